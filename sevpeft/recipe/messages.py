"""One plain sentence for each key that pydantic rejects: what is wrong; what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sevpeft.recipe.checks import LIBRARY, MANAGED, KeyPath, settable

_RENAMED: dict[str, str] = LIBRARY["renamed"]
# pydantic's kind of finding → what is wanted, where its own words are not those of YAML.
_WANTED = {
    "bool_type": "be true or false",
    "none_required": "be null",
    "string_type": "be text",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "be a mapping (key: value)"),
}


def messages_of(error: ValidationError, values: Mapping[str, Any], schema: type[BaseModel]) -> dict[KeyPath, str]:
    """One sentence for each key that pydantic rejects in `values`, which were validated against `schema`."""
    findings: dict[KeyPath, list[Any]] = {}
    for finding in error.errors(include_url=False):
        findings.setdefault(_key_path(finding, values), []).append(finding)
    # Where a key deeper in a mapping is wrong, the mapping itself was of the right kind.
    deepest = [path for path in findings if not any(o != path and o[: len(path)] == path for o in findings)]
    return {path: _message(path, findings[path], schema) for path in deepest}


def _key_path(finding: Any, values: Any) -> KeyPath:
    """Where a key may have several types, pydantic's location also names the type; only values tell it from a key."""
    path: list[str] = []
    for part in finding["loc"]:
        if part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int):
            values = values[part]
        elif finding["type"] not in ("missing", "value_error") or part != finding["loc"][-1]:
            continue
        path.append(str(part))
    return tuple(path)


def _message(path: KeyPath, findings: list[Any], schema: type[BaseModel]) -> str:
    kinds = {finding["type"]: finding for finding in findings}
    if kinds.keys() & {"extra_forbidden", "invalid_key"}:
        return unknown_key(path, schema)
    if "missing" in kinds:
        return "is missing; add it"
    if "value_error" in kinds:
        return str(kinds["value_error"]["ctx"]["error"])
    given = findings[0]["input"]
    wanted = [
        _WANTED.get(kind) or re.sub(r"^\w+ should ", "", finding["msg"])
        for kind, finding in kinds.items()
        if not (kind == "int_type" and "float_type" in kinds)
    ]
    choices = re.findall(r"'([^']+)'", kinds["literal_error"]["msg"]) if "literal_error" in kinds else []
    remedy = "correct it, or leave it out for the default"
    if near := get_close_matches(str(given), choices, n=1):
        remedy = f"write {near[0]}"
    elif "string_type" in kinds and not isinstance(given, str):
        remedy = "put text in quotes"
    shown = json.dumps(given, ensure_ascii=False, default=str)[:60]
    return f"must {' or '.join(wanted).replace(' or be ', ' or ')}, not {shown}; {remedy}"


def field_at(path: KeyPath, schema: type[BaseModel]) -> FieldInfo | None:
    """The setting of that path; None when there is none, or when it lies within a free mapping."""
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
    """What is nearest to a key that does not exist, in its own section before the others."""
    *above, key = path
    sections = {name: model for name in schema.model_fields if (model := _model_at((name,), schema))}
    everywhere = [(name, known) for name, model in sections.items() for known in model.model_fields]
    homes = [".".join(home) for home in everywhere if home[1] == key and settable(*home)]
    section, here = ".".join(above), _model_at(path[:-1], schema)
    siblings = [known for known in here.model_fields if settable(section, known)] if here else []
    longer = [known for known in siblings if f"_{key}_" in f"_{known}_"]
    if key in _RENAMED and (not section or len(longer) != 1 or _RENAMED[key].startswith(f"{section}.")):
        return f"is unknown; write {_RENAMED[key]}"
    if len(longer) == 1:
        return f"is unknown; write {'.'.join((*above, *longer))}"
    if homes:
        return f"is unknown here; write {' or '.join(homes)}"
    if reasons := [MANAGED[name, key][1] for name in sections if (name, key) in MANAGED]:
        return f"is no setting of a recipe: {reasons[0]}"
    own = {known: ".".join((*above, known)) for known in siblings}
    others = {known: f"{name}.{known}" for name, known in everywhere if settable(name, known)}
    for names, cutoff in ((own, 0.6), (others, 0.7)):
        if near := get_close_matches(key.lower(), names, n=1, cutoff=cutoff):
            return f"is unknown; write {names[near[0]]}"
    return "is unknown, and no setting has a name like it; take it out"
