"""The sections `training` and `lora` of a recipe: every setting of TRL's SFTConfig and of PEFT's LoraConfig.

Importing these classes takes seconds (torch), so their settings are read from library_fields.json beside this module.
After an upgrade of trl, transformers or peft, write that file again with `python -m tests.recipe.library_fields`.
"""

from __future__ import annotations

import json
import operator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_serializer

from sevpeft.recipe.checks import LIBRARY
from sevpeft.recipe.schema import Section

# Section, setting → types (names of _TYPES, or a list of one), further values that are allowed, default where it is a
# plain value, and help; in the order of the library.
FIELDS = Path(__file__).with_name("library_fields.json")
# YAML has no tuples.
_TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "str": str, "dict": dict[str, Any], "null": None, "any": Any,
}  # fmt: skip

# Chosen for the model and the device before training, see sevpeft/training/resolve.py.
AUTO = "auto"
GLOBAL_BATCH_SIZE = 8  # consultations of an optimizer step, as published (arXiv 2604.06346: 1 row × 8 steps)
_BOUNDS: dict[str, dict[str, Any]] = LIBRARY["bounds"]
_TRACKER: Any = Literal.__getitem__(tuple(LIBRARY["trackers"].split()))


class LibrarySection(Section):
    """Settings that go to a library by their own names; one that is neither set nor in `ours` is None."""

    ours: ClassVar[dict[str, Any]]

    @model_serializer
    def _written(self) -> dict[str, Any]:
        """What the recipe sets and what sevpeft defaults; everything else is left to the library."""
        names = type(self).model_fields
        return {name: getattr(self, name) for name in names if name in self.ours or name in self.model_fields_set}

    def settings(self) -> dict[str, Any]:
        """What to hand to the library's configuration; for `training` also global_batch_size and init_adapter."""
        return {name: value for name, value in self.model_dump().items() if not name.startswith("loraplus_")}


def _settings_of(section: str) -> Any:
    """A section with every setting of the library; typed as Any, because mypy cannot know a class made here."""
    ours = LIBRARY["defaults"][section]
    settings: dict[str, Any] = {"ours": (ClassVar[dict[str, Any]], ours)}
    for name, about in json.loads(FIELDS.read_text(encoding="utf-8"))[section].items():
        # A recipe's `3` stays 3 where the library says float: `logging_steps` takes 3 as a count. Each kind of number
        # has the bounds, because those of both together are none in JSON Schema.
        limits = Field(**_BOUNDS.get(name, _BOUNDS["widest"]))
        kinds = [part for kind in about["types"] for part in ((int, float) if kind == "float" else (_type(kind),))]
        kinds = [kind for kind in kinds if kind is not str or "dict" not in about["types"]]  # JSON in a text
        kinds = [Annotated[kind, limits] if kind in (int, float) else kind for kind in kinds]
        if about["choices"]:
            kinds.append(Literal.__getitem__(tuple(about["choices"])))
        annotation: Any = list[_TRACKER] | _TRACKER | None if name == "report_to" else reduce(operator.or_, kinds)
        if ours.get(name) == AUTO:
            annotation = annotation | Literal["auto"]
        default = ours.get(name)
        shown = {"default": about["default"] if default is None else default}
        settings[name] = (annotation, Field(default, description=about["help"] or None, json_schema_extra=shown))
    return create_model(f"_{section}", __base__=LibrarySection, __module__=__name__, **settings)


def _type(name: str) -> Any:
    return list[_type(name[5:-1])] if name.startswith("list[") else _TYPES[name]  # type: ignore[misc]


class LoraSection(_settings_of("lora")):  # type: ignore[misc]
    """The adapter: every setting of PEFT's LoraConfig, and LoRA+ (arXiv 2402.12354)."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1e6)
    """LoRA+: the matrices B learn so many times faster than training.learning_rate (16 in the paper); unset, once."""
    loraplus_lr_embedding: float | None = Field(default=None, gt=0, le=1000)
    """LoRA+: learning rate of adapters on an embedding; unset, PEFT's."""


class TrainingSection(_settings_of("training")):  # type: ignore[misc]
    """The training: every setting of TRL's SFTConfig, and the batch of a step."""

    global_batch_size: int | None = Field(default=None, ge=1, le=2**20)
    """Consultations that one optimizer step sees, over all processes; unset, 8, or what the other numbers make."""
    init_adapter: str | None = Field(default=None, min_length=1)
    """Adapter that the training starts from: a run, a folder or a Hub id, with the LoRA settings of this recipe."""
    generate_samples: int = Field(default=0, ge=0, le=1000)
    """Validation questions answered at each validation, greedily, into RUN/samples.jsonl and the report; 0, none."""
