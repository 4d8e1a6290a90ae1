"""The recipe sections `training` (every setting of TRL's SFTConfig) and `lora` (every setting of PEFT's LoraConfig).

Importing these classes takes seconds (torch), so the settings are read from library_fields.json beside this module.
After an upgrade of trl, transformers or peft, write that file again with `python -m tests.recipe.library_fields`.
"""

import json
import operator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_serializer

from sevpeft.recipe.checks import LIBRARY
from sevpeft.recipe.schema import Section

# Section, setting → types (names in _TYPES), other allowed values, default if it is a plain value, and help; in the
# library's order.
FIELDS = Path(__file__).with_name("library_fields.json")
# YAML has no tuples.
_TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "str": str, "dict": dict[str, Any], "null": None, "any": Any,
    "list[any]": list[Any], "list[int]": list[int], "list[list[int]]": list[list[int]], "list[str]": list[str],
}  # fmt: skip

# Replaced for the model and the device before training, see sevpeft/training/resolve.py.
AUTO = "auto"
GLOBAL_BATCH_SIZE = 8  # consultations per optimizer step, as published (arXiv 2604.06346: 1 row × 8 steps)
_BOUNDS: dict[str, dict[str, Any]] = LIBRARY["bounds"]
_TRACKER: Any = Literal.__getitem__(tuple(LIBRARY["trackers"].split()))


class LibrarySection(Section):
    """Settings that are passed to a library under its own names; a setting not set and not in `ours` is None."""

    ours: ClassVar[dict[str, Any]]

    @model_serializer
    def _own_values(self) -> dict[str, Any]:
        """The values that the recipe sets or sevpeft defaults; the library decides all others."""
        names = type(self).model_fields
        return {name: getattr(self, name) for name in names if name in self.ours or name in self.model_fields_set}

    def settings(self) -> dict[str, Any]:
        """Arguments of the library's configuration; for `training` also the settings that sevpeft adds to it."""
        return {name: value for name, value in self.model_dump().items() if not name.startswith("loraplus_")}


def _settings_of(section: str) -> Any:
    """A section class with every setting of the library; Any, because mypy cannot check a class made at runtime."""
    ours = LIBRARY["defaults"][section]
    settings: dict[str, Any] = {"ours": (ClassVar[dict[str, Any]], ours)}
    for name, about in json.loads(FIELDS.read_text(encoding="utf-8"))[section].items():
        # 3 stays an int where the library's type is float: `logging_steps` takes 3 as a count. Each number type has
        # bounds of its own, because JSON Schema drops the bounds of a union.
        limits = Field(**_BOUNDS.get(name, _BOUNDS["widest"]))
        kinds = [part for kind in about["types"] for part in ((int, float) if kind == "float" else (_TYPES[kind],))]
        kinds = [kind for kind in kinds if kind is not str or "dict" not in about["types"]]  # no JSON in text
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


class LoraSection(_settings_of("lora")):  # type: ignore[misc]
    """The adapter: every setting of PEFT's LoraConfig, and LoRA+ (arXiv 2402.12354)."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1e6)
    """LoRA+: learning rate of the B matrices divided by training.learning_rate (16 in the paper); unset, no LoRA+."""
    loraplus_lr_embedding: float | None = Field(default=None, gt=0, le=1000)
    """LoRA+: learning rate of adapters on an embedding; unset, PEFT's default."""


class TrainingSection(_settings_of("training")):  # type: ignore[misc]
    """The training: every setting of TRL's SFTConfig, and three of sevpeft."""

    global_batch_size: int | None = Field(default=None, ge=1, le=2**20)
    """Consultations per optimizer step, over all processes; unset, 8, or the product of the other batch settings."""
    init_adapter: str | None = Field(default=None, min_length=1)
    """Adapter to start from: a run, a folder or a Hub id. Its LoRA settings must be those of this recipe."""
    generate_samples: int = Field(default=0, ge=0, le=1000)
    """Questions answered greedily at each validation, for RUN/samples.jsonl and the report; 0 for none."""
