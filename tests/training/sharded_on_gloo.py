"""FSDP2 and DeepSpeed on CPUs, where accelerate offers neither: real engines, gloo in NCCL's place.

accelerate 1.15 takes every CPU for DDP's, before it looks at what was asked for. Here it is told that the backend is
gloo and the device a CPU, as it would find NCCL and a GPU; all else, and all of sevpeft, is as it is.
"""

from __future__ import annotations

import importlib

from accelerate.state import DistributedType, PartialState
from accelerate.utils import is_deepspeed_available

ENGINES_DEVICE = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
_initialise = PartialState.__init__


def _initialise_as_on_a_gpu(self: PartialState, cpu: bool = False, **options: object) -> None:
    _initialise(self, False, **{name: value for name, value in options.items() if name != "backend"})


def pose_as_gpus() -> None:
    PartialState.__init__ = _initialise_as_on_a_gpu
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if is_deepspeed_available():
        # Its own way through shared memory is compiled at first use; gloo does the same. `deepspeed.comm.torch` is
        # PyTorch itself, for who asks the package.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
