"""Turns pydantic's findings about a recipe into one plain sentence per key: what is wrong; what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sevpeft.recipe.library_fields import lora_fields, sft_fields
from sevpeft.recipe.rules import GONE, RENAMED, managed, settable
from sevpeft.recipe.yaml_text import KeyPath

# More values than these are not listed in a sentence; the nearest ones are.
_MANY = 12
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "model": "a mapping (key: value)",
    "none": "null",
}
# YAML 1.1's words for true and false.
_YES_NO = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_BOUNDS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def sentences(error: ValidationError, values: Mapping[str, Any], recipe: type[BaseModel]) -> dict[KeyPath, str]:
    """One sentence for each key that pydantic refuses.

    Args:
        values: what was validated; where a key may have several types, pydantic names each that failed, and only the
            values tell such a name from a key.
        recipe: the model that was validated against.
    """
    findings: dict[KeyPath, list[Any]] = {}
    for finding in error.errors(include_url=False):
        path = _key_path(finding["loc"], finding["type"], values)
        findings.setdefault(path, []).append(finding)
    # Where a key deeper in a mapping is wrong, the mapping itself was of the right kind.
    deepest = [path for path in findings if not any(o != path and o[: len(path)] == path for o in findings)]
    return {path: _sentence(path, findings[path], recipe) for path in deepest}


def _key_path(location: tuple[int | str, ...], kind: str, values: Any) -> KeyPath:
    path: list[str] = []
    for position, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif not (kind == "missing" and position == len(location) - 1):
            continue
        path.append(str(part))
    return tuple(path)


def _sentence(path: KeyPath, findings: list[Any], recipe: type[BaseModel]) -> str:
    first = findings[0]
    kinds = {finding["type"] for finding in findings}
    if kinds & {"extra_forbidden", "invalid_key"}:
        return unknown_key(path, recipe)
    if "missing" in kinds:
        return "is missing; add it"
    own = next((finding for finding in findings if finding["type"] == "value_error"), None)
    if own:
        return str(own["ctx"]["error"])
    found = _shown(first["input"])
    bound = next((finding for finding in findings if finding["type"] in _BOUNDS), None)
    if bound:
        limit = next(iter(bound["ctx"].values()))
        return f"must be {_BOUNDS[bound['type']]} {limit:g}, not {found}; {_instead(path, recipe)}"
    if first["type"] == "string_pattern_mismatch":
        return f"must look like 0.49B or 135M, not {found}; write the number and K, M, B or T"
    if first["type"] == "string_too_short":
        return f"is empty; {_instead(path, recipe)}"
    return _wrong_kind(path, findings, found, recipe)


def _wrong_kind(path: KeyPath, findings: list[Any], found: str, recipe: type[BaseModel]) -> str:
    given = findings[0]["input"]
    literals = [finding for finding in findings if finding["type"] == "literal_error"]
    listed = [name for finding in literals for name in _listed(finding["ctx"]["expected"])]
    kinds = [_KINDS.get(finding["type"].split("_")[0]) for finding in findings if finding not in literals]
    if "a number" in kinds or "a finite number" in kinds:
        kinds = [kind for kind in kinds if kind != "a whole number"]
    near = get_close_matches(str(given), [str(choice) for choice in listed], n=3, cutoff=0.5)
    if listed and len(listed) <= _MANY:
        kinds.insert(0, "one of " + ", ".join(listed) if len(listed) > 1 else listed[0])
    elif listed:
        kinds.insert(0, f"one of {len(listed)} names, such as {', '.join(near or listed[:3])}")
    # `typing` hands out whichever of `str | list[str]` and `list[str] | str` was made first in the process.
    wanted = " or ".join(sorted({kind for kind in kinds if kind}, key=_order)) or "something else"
    if kinds == ["text"] and isinstance(given, Mapping | list):
        remedy = "put text that begins with { or [ in quotes"
    elif "text" in kinds and not isinstance(given, str | list | dict | None):
        remedy = f'put it in quotes: "{found}"'
    elif "true or false" in kinds and given in _YES_NO:
        remedy = f"write {_YES_NO[given]}"
    elif "a mapping (key: value)" in kinds and len(path) == 1:
        remedy = "write its settings below it, indented"
    elif near and isinstance(given, str):
        remedy = f"write {near[0]}" if len(listed) <= _MANY else "write one of them"
    else:
        remedy = _instead(path, recipe)
    return f"must be {wanted}, not {found}; {remedy}"


def _order(kind: str) -> tuple[int, str]:
    """Names to choose from first, then text, then the rest."""
    known = list(_KINDS.values())
    return (0 if kind not in known else 1 if kind == "text" else 2, kind)


def _listed(expected: str) -> list[str]:
    return [name.strip("'") for name in re.split(r", | or ", expected)]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "…")
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def _instead(path: KeyPath, recipe: type[BaseModel]) -> str:
    field = field_at(path, recipe)
    default = None if field is None else field.default
    if field is None or field.is_required():
        return "write such a number"
    if default is None and path[0] in ("training", "lora"):
        library = (sft_fields() if path[0] == "training" else lora_fields()).get(path[1])
        default = library.default if library else None
    if default in (None, "", {}, []) or "\n" in str(default):
        return "leave it out"
    return f"leave it out for the default, {default if isinstance(default, str) else _shown(default)}"


def field_at(path: KeyPath, recipe: type[BaseModel]) -> FieldInfo | None:
    """The setting of that path; None when there is none, or when it lies within a free mapping."""
    parent = _model_at(path[:-1], recipe)
    return None if parent is None or not path else parent.model_fields.get(path[-1])


def _model_at(path: KeyPath, recipe: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = recipe
    for part in path:
        field = model.model_fields.get(part) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model


def unknown_key(path: KeyPath, recipe: type[BaseModel]) -> str:
    """Why a key does not exist, and the nearest that does, in its own section before the others."""
    key, section = path[-1], ".".join(path[:-1])
    models = {name: model for name in recipe.model_fields if (model := _model_at((name,), recipe))}
    sections = {name: [k for k in model.model_fields if settable(name, k)] for name, model in models.items()}
    homes = [f"{name}.{key}" for name, keys in sections.items() if key in keys]
    refused = [rule[1] for name in sections if not homes and (rule := managed(name, key))]
    gone = GONE.get(key) or next(iter(refused), None)
    if gone:
        return f"is not a setting of a recipe: {gone}"
    if key in RENAMED:
        return f"is unknown; write {RENAMED[key]}"
    if key in sections:
        return f"is a section of its own; write {key}: at the start of a line"
    if homes:
        return f"is unknown here; write {' or '.join(homes)}"
    here = _model_at(path[:-1], recipe)
    siblings = [name for name in here.model_fields if settable(section, name)] if here else []
    near = get_close_matches(key.lower(), siblings, n=1, cutoff=0.6)
    if near:
        return f"is unknown; write {'.'.join((*path[:-1], near[0]))}"
    elsewhere = {**RENAMED, **dict(_every_key(sections))}
    near = get_close_matches(key.lower(), elsewhere, n=1, cutoff=0.7)
    if near:
        return f"is unknown; write {elsewhere[near[0]]}"
    if siblings and len(siblings) <= _MANY:
        return f"is unknown; {section or 'a recipe'} takes {', '.join(siblings)}"
    return "is unknown, and no setting has a name like it; take it out"


def _every_key(sections: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    for section, keys in sections.items():
        for key in keys:
            yield key, f"{section}.{key}"
