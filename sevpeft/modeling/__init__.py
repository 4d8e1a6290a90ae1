"""Base models: loading, adapters, prompts, packing and the memory plan."""

import logging
import sys
from contextlib import suppress

import torch

# At import, bitsandbytes (0.50.2) compiles four functions, which loads TorchInductor: 3 of 10 seconds. Here they are
# compiled at their first call. On a CPU with AVX512-BF16 the import also downloads machine code from the Hub and runs
# it, if the package `kernels` is installed; so that package is hidden. No issue was found for either.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it logs warnings at import
compiled, kernels = torch.compile, sys.modules.pop("kernels", None)
torch.compile = lambda function, **options: lambda *values: compiled(function, **options)(*values)
sys.modules["kernels"] = None  # type: ignore[assignment]
with suppress(Exception):  # PEFT reports a broken installation
    import bitsandbytes  # noqa: F401
torch.compile = compiled
del sys.modules["kernels"]
sys.modules.update({"kernels": kernels} if kernels else {})
