"""Base models: loading, adapters, prompts, and what their attention can do."""

import logging
import sys
from contextlib import suppress

import torch

# bitsandbytes (0.50.2) has four functions compiled as it is imported, which loads TorchInductor: 3 of 10 seconds. They
# are compiled when they are called. On a CPU with AVX512-BF16 the import also fetches machine code from the Hub and
# runs it, where the package `kernels` is installed; here it finds none. No issue was found for either.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it warns as it is imported
compiled, kernels = torch.compile, sys.modules.pop("kernels", None)
torch.compile = lambda function, **options: lambda *values: compiled(function, **options)(*values)
sys.modules["kernels"] = None  # type: ignore[assignment]
with suppress(Exception):  # PEFT will say what
    import bitsandbytes  # noqa: F401
torch.compile = compiled
del sys.modules["kernels"]
sys.modules.update({"kernels": kernels} if kernels else {})
