"""Base models: loading, adapters, prompts, and what their attention can do."""

import logging
from contextlib import suppress

import torch

# bitsandbytes (0.50.2) has four functions compiled as it is imported, which loads TorchInductor: 3 of 10 seconds. They
# are compiled when they are called. No issue was found.
compiled = torch.compile
torch.compile = lambda function, **options: lambda *values: compiled(function, **options)(*values)
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it warns as it is imported
with suppress(Exception):  # PEFT will say what
    import bitsandbytes  # noqa: F401
torch.compile = compiled
