"""Says how `accelerate launch` spreads the weights of the base model over processes, before anything is loaded.

The launcher tells its processes through environment variables, and accelerate builds its engines from them only inside
the trainer. A model must be loaded in the form that its engine can shard, so they are read here, as accelerate does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import deepspeed as hf_deepspeed


def fsdp_asked() -> bool:
    """Whether the launcher asks for FSDP, of any version."""
    return _flag("ACCELERATE_USE_FSDP")


def deepspeed_asked() -> bool:
    """Whether the launcher asks for DeepSpeed, at any ZeRO stage."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def engine_asked() -> str | None:
    """FSDP or DeepSpeed, where the launcher asks for one of them."""
    return "DeepSpeed" if deepspeed_asked() else "FSDP" if fsdp_asked() else None


def zero3() -> bool:
    """Whether DeepSpeed is at ZeRO-3; known once TRL's settings were made, which read DeepSpeed's."""
    return bool(hf_deepspeed.is_deepspeed_zero3_enabled())


def weights_are_sharded() -> bool:
    """Whether each process holds a part of the base model only."""
    return fsdp_asked() or zero3()


@contextmanager
def on_paper() -> Iterator[None]:
    """Modules made inside have shapes and no numbers (PyTorch's meta device).

    Under ZeRO-3 transformers would give each new model to DeepSpeed, which cannot divide what is not there.
    """
    zero = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
