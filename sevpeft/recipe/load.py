"""Reads a recipe file with KEY=VALUE overrides into a checked `Recipe`, and writes a `Recipe` as YAML.

All mistakes are reported at once, one line each: file, key path, problem, remedy. Scalars follow YAML 1.2, because
PyYAML follows 1.1, where `1e-4` is text, `no` is false, `12:30` is 750 and `010` is 8.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from sevpeft.errors import RecipeError
from sevpeft.recipe import schema as sections
from sevpeft.recipe.library import MANAGED, KeyPath, LoraSection, TrainingSection, failed_checks
from sevpeft.recipe.messages import field_at, messages_of
from sevpeft.recipe.schema import SEVERITY_PRESETS, Section, SeverityWeights

_COMMAND_LINE = "command line"
# The recipes that come with sevpeft: inside the package when pip installed it, at the top of a checkout.
_SHIPPED = next(filter(Path.is_dir, (room / "recipes" for room in Path(__file__).parents[1:3])), Path("recipes"))
_Settings = TypeVar("_Settings", bound=Section)
# Maximum size of a recipe in bytes; those in recipes/ have 2,000, and one with examples 50,000.
_MAX_BYTES = 200_000


class Recipe(Section):
    """One training job: base model, adapter, data, prompt, severity weights, training and evaluation."""

    about: sections.AboutSection = Field(default_factory=sections.AboutSection)
    model: sections.ModelSection = Field(default_factory=sections.ModelSection)
    quantization: sections.QuantizationSection = Field(default_factory=sections.QuantizationSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: sections.TrainingDataSection = Field(default_factory=sections.TrainingDataSection)
    prompt: sections.PromptSection = Field(default_factory=sections.PromptSection)
    severity: sections.SeveritySection = Field(default_factory=sections.SeveritySection)
    curriculum: sections.CurriculumSection = Field(default_factory=sections.CurriculumSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    as_published: sections.AsPublishedSection = Field(default_factory=sections.AsPublishedSection)
    stopping: sections.StoppingSection = Field(default_factory=sections.StoppingSection)
    generation: sections.GenerationSection = Field(default_factory=sections.GenerationSection)
    evaluation: sections.EvaluationSection = Field(default_factory=sections.EvaluationSection)

    _name: str = PrivateAttr("recipe")

    @property
    def name(self) -> str:
        """Name of the recipe's file, without the extension."""
        return self._name

    def to_yaml(self) -> str:
        """YAML with all settings of sevpeft, and those of the libraries that the recipe sets or sevpeft defaults."""
        return write_yaml(self.model_dump())

    def __eq__(self, other: object) -> bool:
        """Two recipes are equal if their settings are; the file names do not count."""
        return self.model_dump() == other.model_dump() if isinstance(other, Recipe) else NotImplemented


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML file, or the recipe of a name (`recipe_file`), with overrides like `severity.weights.critical=2`.

    Relative paths in it are relative to the working directory. Raises RecipeError, with one line for each mistake.
    """
    name, path = str(path), recipe_file(str(path))
    values = read_yaml(text_of(path), name)
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: has no sections; write them as training: {{learning_rate: 2e-4}}.")
    # A section whose keys are all commented out is null.
    recipe = _checked(Recipe, {key: {} if value is None else value for key, value in values.items()}, name, overrides)
    recipe._name = path.stem
    return recipe


def recipe_from_values(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Makes a recipe from plain values; raises RecipeError as `load_recipe` does, with `source` as the file name."""
    return _checked(Recipe, dict(values), source)


def settings_from(
    schema: type[_Settings], overrides: Sequence[str], arguments: Mapping[str, Any] | None = None
) -> _Settings:
    """Settings of a command without a recipe, from KEY=VALUE words; raises RecipeError as `load_recipe` does.

    `arguments`: values that have a command-line argument of their own, such as data.path.
    """
    values: dict[str, Any] = {}
    for key, value in (arguments or {}).items():
        _set_value(tuple(key.split(".")), value, values)
        if any(word.partition("=")[0].strip() == key for word in overrides):
            raise RecipeError(f"{_COMMAND_LINE}: {key}: is given already, as an argument; leave it out.")
    return _checked(schema, values, _COMMAND_LINE, overrides)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors that validate and complete YAML."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for (section, key), (allowed, why) in MANAGED.items():  # the libraries' settings that a recipe cannot set
        values: dict[str, Any] = {"enum": [*allowed]} if allowed else {"not": {}}
        schema["$defs"][f"{section.title()}Section"]["properties"][key] = {"description": why, **values}
    return schema


def _checked(
    schema: type[_Settings], values: dict[str, Any], source: str | Path, overrides: Sequence[str] = ()
) -> _Settings:
    """Applies the overrides and validates the values; raises RecipeError with one line for each mistake."""
    overridden: set[KeyPath] = set()
    lines = [line for word in overrides if (line := _override(word, values, overridden, schema))]
    if ("model", "name_or_path") in overridden and not any(key[0] == "about" for key in overridden):
        values.pop("about", None)  # it describes the base model of the file, such as its size
    mistakes: dict[KeyPath, str] = {}
    try:
        model = schema.model_validate(values)
    except ValidationError as error:
        mistakes = messages_of(error, values, schema)
    if schema is Recipe:
        mistakes.update(failed_checks(values))
    for path, message in mistakes.items():
        by_override = any(path[: len(key)] == key or key[: len(path)] == path for key in overridden)
        place = (_COMMAND_LINE if by_override else str(source), *([".".join(path)] if path else []))
        lines.append(": ".join((*place, f"{message}.")))
    if lines:
        raise RecipeError("\n".join(lines))
    return model


def _override(word: str, values: dict[str, Any], overridden: set[KeyPath], schema: type[Section]) -> str | None:
    """Applies KEY=VALUE to the values and adds the key to `overridden`; returns an error line, or None."""
    key, equals, text = word.partition("=")
    path = tuple(key.strip().split("."))
    field = field_at(path, schema)
    example = "training.learning_rate=1e-4" if schema is Recipe else "data.max_rows=100"
    example = f"data.path={word}" if re.search(r"\.(csv|tsv|xlsx|jsonl?|parquet)$", word) else example
    if not equals or not all(path):
        return f"{_COMMAND_LINE}: {word}: is not KEY=VALUE; write it as {example}."
    if len(path) == 1 and field is not None and isinstance(field.annotation, type(Section)):
        return f"{_COMMAND_LINE}: {key}: is a section; set one of its keys, as in {example}."
    if parent := _set_value(path, _value_of(text, field), values):
        return f"{_COMMAND_LINE}: {key}: {parent} has a single value and no keys; set {parent} itself."
    overridden.add(path)
    return None


def _set_value(path: KeyPath, value: Any, values: dict[str, Any]) -> str | None:
    """Sets the value at a path; returns the parent key that is not a mapping, or None."""
    for depth, part in enumerate(path[:-1], start=1):
        child = values.get(part)
        if path[:depth] == ("severity", "weights") and str(child or "balanced") in SEVERITY_PRESETS:
            preset = SEVERITY_PRESETS[str(child or "balanced")]
            child = dict(zip(SeverityWeights.model_fields, preset, strict=True))
        if child is not None and not isinstance(child, dict):
            return ".".join(path[:depth])
        values[part] = dict(child or {})
        values = values[part]
    values[path[-1]] = value
    return None


def _value_of(text: str, field: Any) -> Any:
    """Parses an override: `{…}`, `[…]`, quotes, numbers, true, false and null are YAML, everything else is text.

    So a path may have colons, `#` and leading dashes. For a setting that takes only text, digits are text (commit ids).
    """
    try:
        value = read_yaml(text, "")
    except RecipeError:
        return text
    if isinstance(value, bool | int | float):
        kinds = () if field is None else get_args(field.annotation) or (field.annotation,)
        return text if kinds and {*kinds} <= {str, type(None)} else value
    return value if value is None or text.lstrip()[:1] in ("{", "[", '"', "'") else text


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with sevpeft; names are like qwen3-4b or as-published/al-atlas."""
    return {path.relative_to(_SHIPPED).as_posix()[:-5]: path for path in sorted(_SHIPPED.glob("**/*.yaml"))}


def recipe_file(name: str) -> Path:
    """The recipe file of a name: a local file, with or without its .yaml, or else a recipe of sevpeft."""
    local = Path(name), Path(f"{name}.yaml")
    return next(filter(Path.exists, local), shipped_recipes().get(name.removesuffix(".yaml"), local[0]))


def text_of(path: Path) -> str:
    try:
        # A pipe or a device may never end, and a file this large is not a recipe.
        if path.exists() and not path.is_dir() and not (path.is_file() and path.stat().st_size <= _MAX_BYTES):
            raise RecipeError(f"{path}: is not a regular file of at most {_MAX_BYTES:,} bytes; name a recipe.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        folder = path if path.is_dir() else path.parent
        recipes = sorted(file.name for file in folder.glob("*.y*ml"))
        near = get_close_matches(path.name, recipes, n=3) or recipes[:12]
        hint = f"{folder} holds {', '.join(near)}" if near else "`sevpeft recipes` lists the recipes of sevpeft"
        if names := get_close_matches(str(path).removeprefix("recipes/").removesuffix(".yaml"), shipped_recipes()):
            hint = f"sevpeft has {' and '.join(names)}"
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {hint}.") from error


class _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A reader with the scalars of YAML 1.2; PyYAML's C parser, where installed, takes a fifth of the time."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, key in enumerate(keys):
            key.tag = "tag:yaml.org,2002:str"  # keys are always text, also `1:` and `null:`
            if key.value in (earlier.value for earlier in keys[:position]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """A writer with the rules of YAML 1.1 and 1.2, so that it quotes the text "no" for readers of either version."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    # A number with a leading zero is text: ids such as 007.
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan", [*"-+.0123456789"]),
):
    for _side in (_Reader, _Writer):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In single quotes a line break is written as an empty line, and other line breaks of YAML are lost.
    style = '"' if re.search(r"[\n\r\t\x85\u2028\u2029]", text) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _write_text)


def write_yaml(values: Any, *, flow: bool = False) -> str:
    """YAML text of plain values in their order, with readable Arabic; one line a value, or all in one with `flow`."""
    return yaml.dump(values, Dumper=_Writer, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=10**9)


def read_yaml(text: str, source: str) -> Any:
    """The values of one YAML document; raises RecipeError, with line and column, for bad YAML or a repeated key."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Reader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 50:  # the C parser would overflow its stack
                raise RecursionError
            if isinstance(event, yaml.AliasEvent):  # nested aliases expand a few lines to billions of values
                raise yaml.composer.ComposerError(None, None, "aliases are not allowed", cast(Any, event.start_mark))
        return _Reader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not isinstance(error, yaml.YAMLError) or "nesting depth" in str(error):
            raise RecipeError(f"{source}: a value is nested too deep or too long; shorten it.") from error
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = " (put text that has ': ' or begins with {, [, *, & or ! in quotes)"
        hint = "" if "is given twice" in problem else hint
        raise RecipeError(f"{source}: {where}{problem}; correct it{hint}.") from error
