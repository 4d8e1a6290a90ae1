"""Error messages for each key that pydantic rejects: the problem and the remedy in one sentence."""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sevpeft.recipe.library import LIBRARY, MANAGED, KeyPath, settable

_RENAMED: dict[str, str] = LIBRARY["renamed"]
# pydantic's error type → text for "must …", where its own message does not use the words of YAML.
_EXPECTED = {
    "bool_type": "be true or false",
    "none_required": "be null",
    "string_type": "be text",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "be a mapping (key: value)"),
}


def messages_of(error: ValidationError, values: Mapping[str, Any], schema: type[BaseModel]) -> dict[KeyPath, str]:
    """Key path → message for each key that pydantic rejects in `values`, which were validated against `schema`."""
    details: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        details.setdefault(_key_path(detail, values), []).append(detail)
    # If a key inside a mapping is wrong, the type of the mapping itself was right.
    deepest = [path for path in details if not any(o != path and o[: len(path)] == path for o in details)]
    return {path: _message(path, details[path], schema) for path in deepest}


def _key_path(detail: Any, values: Any) -> KeyPath:
    """The key path of an error; pydantic's location also names the member of a union, which is not in the values."""
    path: list[str] = []
    for part in detail["loc"]:
        if part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int):
            values = values[part]
        elif detail["type"] not in ("missing", "value_error") or part != detail["loc"][-1]:
            continue
        path.append(str(part))
    return tuple(path)


def _message(path: KeyPath, details: list[Any], schema: type[BaseModel]) -> str:
    kinds = {detail["type"]: detail for detail in details}
    if kinds.keys() & {"extra_forbidden", "invalid_key"}:
        return unknown_key(path, schema)
    if "missing" in kinds:
        return "is missing; add it"
    if "value_error" in kinds:
        return str(kinds["value_error"]["ctx"]["error"])
    value = details[0]["input"]
    expected = [
        _EXPECTED.get(kind) or re.sub(r"^\w+ should ", "", detail["msg"])
        for kind, detail in kinds.items()
        if not (kind == "int_type" and "float_type" in kinds)
    ]
    choices = re.findall(r"'([^']+)'", kinds["literal_error"]["msg"]) if "literal_error" in kinds else []
    remedy = "correct it, or leave it out for the default"
    if near := get_close_matches(str(value), choices, n=1):
        remedy = f"write {near[0]}"
    elif "string_type" in kinds and not isinstance(value, str):
        remedy = "put text in quotes"
    shown = json.dumps(value, ensure_ascii=False, default=str)[:60]
    return f"must {' or '.join(expected).replace(' or be ', ' or ')}, not {shown}; {remedy}"


def field_at(path: KeyPath, schema: type[BaseModel]) -> FieldInfo | None:
    """The setting at a path; None if there is none, or if the path is inside a free mapping."""
    parent = _model_at(path[:-1], schema)
    return parent.model_fields.get(path[-1]) if parent and path else None


def _model_at(path: KeyPath, schema: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = schema
    for part in path:
        field = model.model_fields.get(part) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model


def unknown_key(path: KeyPath, schema: type[BaseModel]) -> str:
    """Message for a key that does not exist, with the nearest key: in its own section first, then in the others."""
    *above, key = path
    sections = {name: below for name in schema.model_fields if (below := _model_at((name,), schema))}
    everywhere = [(name, known) for name, below in sections.items() for known in below.model_fields]
    same_name = [".".join(pair) for pair in everywhere if pair[1] == key and settable(*pair)]
    section, model = ".".join(above), _model_at(path[:-1], schema)
    siblings = [known for known in model.model_fields if settable(section, known)] if model else []
    longer = [known for known in siblings if f"_{key}_" in f"_{known}_"]
    if key in _RENAMED and (not section or len(longer) != 1 or _RENAMED[key].startswith(f"{section}.")):
        return f"is unknown; write {_RENAMED[key]}"
    if len(longer) == 1:
        return f"is unknown; write {'.'.join((*above, *longer))}"
    if same_name:
        return f"is unknown here; write {' or '.join(same_name)}"
    if reasons := [MANAGED[name, key][1] for name in sections if (name, key) in MANAGED]:
        return f"cannot be set in a recipe: {reasons[0]}"
    own = {known: ".".join((*above, known)) for known in siblings}
    others = {known: f"{name}.{known}" for name, known in everywhere if settable(name, known)}
    for names, cutoff in ((own, 0.6), (others, 0.7)):
        if near := get_close_matches(key.lower(), names, n=1, cutoff=cutoff):
            return f"is unknown; write {names[near[0]]}"
    return "is unknown, and no setting has a similar name; remove it"
