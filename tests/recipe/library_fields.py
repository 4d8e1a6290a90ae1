"""Writes sevpeft/recipe/library_fields.json from the installed trl, transformers and peft, after an upgrade of one.

python -m tests.recipe.library_fields
"""

from __future__ import annotations

import dataclasses
import json
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sevpeft.recipe.library import FIELDS


def installed_fields() -> dict[str, dict[str, Any]]:
    """The content of library_fields.json for the installed trl, transformers and peft. Imports them."""
    from peft import LoraConfig
    from trl import SFTConfig

    found: dict[str, dict[str, Any]] = {}
    for section, config in (("training", SFTConfig), ("lora", LoraConfig)):
        hints = get_type_hints(config)
        fields = [field for field in dataclasses.fields(config) if field.init]
        found[section] = {field.name: _described(field, hints[field.name]) for field in fields}
    return found


def _described(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    choices = list(field.metadata.get("choices") or ())
    kinds = []
    for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(kind) is Literal:
            choices += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [member.value for member in kind]
        else:
            kinds.append(_name(kind))
    if any("[" in str(choice) for choice in choices):
        kinds, choices = [*kinds, "str"], []  # an open list: "pissa_niter_[number of iters]"
    elif any(isinstance(choice, str) for choice in choices):
        kinds = [kind for kind in kinds if kind != "str"]  # `SchedulerType | str` means the name of a scheduler
    default = field.default_factory() if callable(field.default_factory) else field.default
    default = default.value if isinstance(default, Enum) else default
    return {
        "types": sorted(set(kinds)),  # `typing` may give `str | list[str]` as `list[str] | str`, made earlier
        "choices": choices,
        "default": default if isinstance(default, bool | int | float | str) or default in ([], {}) else None,
        # argparse needs the percent sign twice.
        "help": " ".join(str(field.metadata.get("help") or "").replace("%%", "%").split()),
    }


def _name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in (list, tuple, set):
        inner = {_name(part) for part in get_args(kind)}
        return f"list[{inner.pop() if len(inner) == 1 else 'any'}]"
    if origin is dict or dataclasses.is_dataclass(origin):
        return "dict"
    return "null" if kind is type(None) else kind.__name__ if kind in (bool, int, float, str) else "any"


if __name__ == "__main__":
    FIELDS.write_text(json.dumps(installed_fields(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
