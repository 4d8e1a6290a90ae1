"""Turns the installed source of trl, transformers and peft into the names, types and help of their settings.

`training:` takes every field of TRL's SFTConfig and `lora:` every field of PEFT's LoraConfig, in the versions that
are installed. Importing those classes costs seconds (torch), and a recipe has to be checked in a blink; so the
dataclasses are read as text with `ast`, and nothing of the libraries is run but their type annotations.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import operator
import types
import typing
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from sevpeft.errors import SevpeftError

# Base classes first, as dataclasses order their fields: package, file in it, class.
_SFT_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_LORA_CLASSES = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)


@dataclass(frozen=True)
class LibraryField:
    """One setting of a library.

    `annotation` is a type that pydantic can check; what cannot be known without running the library is `Any`.
    `default` is the library's where it is written as a literal, else None. `choices` are the values that the
    library lists, including patterns such as "pissa_niter_[number of iters]".
    """

    name: str
    annotation: Any
    default: Any
    choices: tuple[Any, ...]
    help: str


@cache
def sft_fields() -> dict[str, LibraryField]:
    """Every setting that the installed `trl.SFTConfig` takes, by name, in its order."""
    return _fields_of(_SFT_CLASSES)


@cache
def lora_fields() -> dict[str, LibraryField]:
    """Every setting that the installed `peft.LoraConfig` takes, by name, in its order."""
    return _fields_of(_LORA_CLASSES)


def _fields_of(classes: tuple[tuple[str, str, str], ...]) -> dict[str, LibraryField]:
    found: dict[str, LibraryField] = {}
    for package, file, class_name in classes:
        path = _package_folder(package) / file
        tree = _tree(path) if path.is_file() else None
        classes_there = [node for node in tree.body if isinstance(node, ast.ClassDef)] if tree else []
        found_class = next((node for node in classes_there if node.name == class_name), None)
        if found_class is None:
            raise SevpeftError(
                f"The installed {package} has no {class_name} in {file}, so its settings cannot be read; "
                f"install the version of {package} that sevpeft asks for."
            )
        for statement in found_class.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            field = _field(statement.target.id, statement, path)
            if field is None:
                found.pop(statement.target.id, None)
            else:
                found[field.name] = field
    return found


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SevpeftError(f"The package {package} is not installed; install sevpeft again with its dependencies.")
    return Path(spec.origin).parent


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _field(name: str, statement: ast.AnnAssign, path: Path) -> LibraryField | None:
    """None for what `__init__` does not take."""
    if "ClassVar" in ast.unparse(statement.annotation):
        return None
    default, metadata = statement.value, {}
    if isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in statement.value.keywords}
        if _literal(given.get("init"), True) is False:
            return None
        default = given.get("default")
        factory = given.get("default_factory")
        if isinstance(factory, ast.Name) and factory.id in ("dict", "list"):
            default = ast.parse("{}" if factory.id == "dict" else "[]", mode="eval").body
        entries = given.get("metadata")
        if isinstance(entries, ast.Dict):
            pairs = zip(entries.keys, entries.values, strict=True)
            metadata = {_literal(key, None): _literal(value, None) for key, value in pairs}
    annotation = _annotation(statement.annotation, path)
    choices = metadata.get("choices")
    if choices:
        optional = type(None) in get_args(annotation)
        annotation = _one_of(choices) | None if optional else _one_of(choices)
    if metadata.get("const") is not None:
        # argparse's value for the bare flag; the library takes it in Python too (`fsdp=True`).
        annotation = annotation | _one_of([metadata["const"]])
    literals = [member for member in _members(annotation) if get_origin(member) is Literal]
    return LibraryField(
        name=name,
        annotation=_closed(annotation),
        default=_literal(default, None),
        choices=tuple(value for literal in literals for value in get_args(literal)),
        # argparse needs the percent sign doubled, a reader does not.
        help=" ".join(str(metadata.get("help") or "").replace("%%", "%").split()),
    )


def _literal(node: ast.expr | None, otherwise: Any) -> Any:
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        return otherwise


def _one_of(values: typing.Iterable[Any]) -> Any:
    return Literal.__getitem__(tuple(values))


class _Names(dict[str, Any]):
    """The names that an annotation may use; one that only the library knows is looked up in its source."""

    def __init__(self, path: Path) -> None:
        super().__init__({**vars(builtins), **vars(typing), "typing": typing})
        # A recipe's `3` stays 3 where the library says float: `logging_steps` tells counts from shares by that.
        # YAML has no tuples: a pair is a list.
        self.update(float=int | float, tuple=list)
        self.path = path

    def __missing__(self, name: str) -> Any:
        return _library_type(name, self.path)


def _annotation(node: ast.expr, path: Path) -> Any:
    try:
        return eval(compile(ast.Expression(node), str(path), "eval"), {"__builtins__": {}}, _Names(path))
    except Exception:  # an annotation that only the library can evaluate; it is checked there
        return Any


def _library_type(name: str, path: Path) -> Any:
    """An enumeration becomes the Literal of its values, a dataclass a mapping, anything else Any."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                return dict[str, Any]
            values = [_literal(member.value, None) for member in node.body if isinstance(member, ast.Assign)]
            if values and any(ast.unparse(base).endswith("Enum") for base in node.bases):
                return _one_of(values)
        if isinstance(node, ast.ImportFrom) and node.level and name in {alias.name for alias in node.names}:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if module.with_suffix(".py").is_file():
                return _library_type(name, module.with_suffix(".py"))
    return Any


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _closed(annotation: Any) -> Any:
    """`SchedulerType | str` means the name of one of the schedulers, so the bare text is left out; a Literal that
    holds a pattern ("pissa_niter_[number of iters]") is an open list, so it becomes text."""
    members = []
    for member in _members(annotation):
        values = get_args(member) if get_origin(member) is Literal else ()
        members.append(str if any("[" in str(value) for value in values) else member)
    if any(get_origin(member) is Literal and isinstance(get_args(member)[0], str) for member in members):
        members = [member for member in members if member is not str]
    return reduce(operator.or_, members)
