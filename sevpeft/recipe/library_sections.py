"""The sections `lora` and `training` of a recipe, as pydantic models built from the fields of the installed PEFT and
TRL (`library_fields`), with our defaults; of them a recipe holds what was set and what we default, and leaves the rest
to the library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, model_serializer

from sevpeft.recipe.library_fields import LibraryField, lora_fields, sft_fields
from sevpeft.recipe.sections import Section

# Chosen for the model and the device, before training: sevpeft/training/batch_split.py, sevpeft/modeling/packing.py.
AUTO = "auto"
_AUTOMATIC = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "padding_free",
)
# The published 1 × 8.
GLOBAL_BATCH_SIZE = 8
# Rank, alpha, dropout, bias and all of `training` down to max_grad_norm are the published ones (arXiv 2604.06346).
LORA_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "target_modules": "all-linear",
}
TRAINING_DEFAULTS: dict[str, Any] = {
    "max_length": 512,
    "global_batch_size": None,
    "per_device_train_batch_size": AUTO,
    "per_device_eval_batch_size": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_checkpointing": AUTO,
    "padding_free": AUTO,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
# Values that the libraries' types allow and that would fail, or train nothing, an hour later.
_BOUNDS: dict[str, dict[str, Any]] = {
    "r": {"ge": 1},
    "lora_alpha": {"ge": 1},
    "lora_dropout": {"ge": 0, "lt": 1},
    "max_length": {"ge": 2},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "gradient_accumulation_steps": {"ge": 1},
    "learning_rate": {"ge": 0},
    "weight_decay": {"ge": 0},
    "warmup_steps": {"ge": 0},
    "num_train_epochs": {"gt": 0},
    "max_grad_norm": {"ge": 0},
    "seed": {"ge": 0, "le": 2**32 - 1},
    "data_seed": {"ge": 0, "le": 2**32 - 1},
    "logging_steps": {"gt": 0},
    "eval_steps": {"gt": 0},
    "save_steps": {"gt": 0},
    "save_total_limit": {"ge": 1},
    "dataloader_num_workers": {"ge": 0},
    "eval_accumulation_steps": {"ge": 1},
    "neftune_noise_alpha": {"ge": 0},
}


class LibrarySection(Section):
    """Settings that go to a library by their own names; one that is neither set nor defaulted by us is None."""

    @model_serializer
    def _written(self) -> dict[str, Any]:
        """What the recipe sets and what we default, in the library's order."""
        ours = TRAINING_DEFAULTS if isinstance(self, TrainingSection) else LORA_DEFAULTS
        set_here = self.model_fields_set
        return {name: getattr(self, name) for name in type(self).model_fields if name in ours or name in set_here}

    def settings(self) -> dict[str, Any]:
        """What to hand to the library's configuration."""
        written: dict[str, Any] = self._written()
        return {name: value for name, value in written.items() if name not in _LoraPlus.model_fields}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class _Batch(LibrarySection):
    """The batch of an optimizer step, which is no field of SFTConfig."""

    global_batch_size: int | None = Field(default=None, ge=1)
    """Consultations that one optimizer step sees, over all processes; unset, 8, or what the other numbers make."""


class _LoraPlus(LibrarySection):
    """LoRA+ (arXiv 2402.12354): parameters of PEFT's `create_loraplus_optimizer`, which are no fields of LoraConfig."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: how many times training.learning_rate the matrices B are trained with (16 is the paper's); unset, once."""
    loraplus_lr_embedding: float | None = Field(default=None, gt=0)
    """LoRA+: learning rate of adapters on an embedding; unset, PEFT's."""


def _library_section(
    name: str,
    fields: Mapping[str, LibraryField],
    ours: Mapping[str, Any],
    about: str,
    parent: type[LibrarySection] = LibrarySection,
) -> Any:
    settings: dict[str, Any] = {}
    for field in fields.values():
        annotation: Any = Annotated[(field.annotation, Field(**_BOUNDS.get(field.name, {})))]
        if field.name in _AUTOMATIC:
            annotation = annotation | Literal["auto"]
        settings[field.name] = (annotation, Field(ours.get(field.name), description=field.help or None))
    return create_model(name, __base__=parent, __doc__=about, __module__=__name__, **settings)


if TYPE_CHECKING:

    class LoraSection(_LoraPlus): ...

    class TrainingSection(_Batch): ...

else:
    LoraSection = _library_section(
        "LoraSection",
        lora_fields(),
        LORA_DEFAULTS,
        "The adapter: every setting of PEFT's LoraConfig, and LoRA+.",
        _LoraPlus,
    )
    TrainingSection = _library_section(
        "TrainingSection",
        sft_fields(),
        TRAINING_DEFAULTS,
        "The training: every setting of TRL's SFTConfig, and the batch of a step.",
        _Batch,
    )


def known_initialisation(value: Any) -> bool:
    """Whether `init_lora_weights` is one that PEFT knows; its type is open because of pissa_niter_4 and the like."""
    # "lora_ga" is missing in PEFT's own list (0.21) although the documentation names it.
    listed = lora_fields()["init_lora_weights"].choices
    return not isinstance(value, str) or value in {*listed, "lora_ga"} or bool(re.fullmatch(r"pissa_niter_\d+", value))
