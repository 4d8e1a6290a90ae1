"""A recipe file with KEY=VALUE overrides, read into a checked `Recipe`, and a `Recipe` written as YAML.

All mistakes are reported at once, one line each: file, key's path, what is wrong, what to write. YAML is read as
version 1.2 reads it: PyYAML follows 1.1, where `1e-4` is text, `no` is false, `12:30` is 750 and `010` is 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from sevpeft.errors import RecipeError
from sevpeft.recipe import schema as sections
from sevpeft.recipe.checks import MANAGED, KeyPath, failed_checks
from sevpeft.recipe.library import LoraSection, TrainingSection
from sevpeft.recipe.messages import field_at, messages_of
from sevpeft.recipe.schema import SEVERITY_PRESETS, Section, SeverityWeights

_COMMAND_LINE = "command line"
# The recipes that come with sevpeft: pip installs them beside its rooms, in the checkout they stand at the top.
_SHIPPED = next(filter(Path.is_dir, (room / "recipes" for room in Path(__file__).parents[1:3])), Path("recipes"))
_Settings = TypeVar("_Settings", bound=Section)
# Bytes of a recipe; those in recipes/ have 2,000, and one with examples 50,000. A larger file is no recipe.
_LONGEST = 200_000


class Recipe(Section):
    """One training job: base model, adapter, data, prompt, severity weights, training and how it is judged."""

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
        """Stem of the file that the recipe was read from."""
        return self._name

    def to_yaml(self) -> str:
        """The resolved recipe: our settings with their defaults, and of the libraries' those that are set or ours."""
        return write_yaml(self.model_dump())

    def __eq__(self, other: object) -> bool:
        """Equal when they say the same, whatever their files are called."""
        return self.model_dump() == other.model_dump() if isinstance(other, Recipe) else NotImplemented


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or a name (`recipe_file`), with overrides such as `severity.weights.critical=2`.

    Relative paths in it stay relative to the working directory.

    Raises RecipeError: one line for each mistake in the file and the overrides.
    """
    given, path = str(path), recipe_file(str(path))
    values = read_yaml(text_of(path), given)
    if not isinstance(values, dict):
        raise RecipeError(f"{given}: holds no sections; write them as training: {{learning_rate: 2e-4}}.")
    # A section whose keys are all commented out says nothing.
    recipe = _checked(Recipe, {key: {} if value is None else value for key, value in values.items()}, given, overrides)
    recipe._name = path.stem
    return recipe


def recipe_from_values(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain values, checked like a file; `source` stands where an error names the file.

    Raises RecipeError: one line for each mistake.
    """
    return _checked(Recipe, dict(values), source)


def settings_from(
    schema: type[_Settings], overrides: Sequence[str], given: Mapping[str, Any] | None = None
) -> _Settings:
    """Settings of a verb that takes no recipe, from KEY=VALUE words, checked like those of a recipe.

    `schema`: with sections below it, or not. `given`: values that have arguments of their own, such as data.path.

    Raises RecipeError: one line for each mistake.
    """
    values: dict[str, Any] = {}
    for key, value in (given or {}).items():
        _place(tuple(key.split(".")), value, values)
        if any(word.partition("=")[0].strip() == key for word in overrides):
            raise RecipeError(f"{_COMMAND_LINE}: {key}: is given already, as an argument.")
    return _checked(schema, values, _COMMAND_LINE, overrides)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors that check and complete YAML."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    managed = {"training": schema["$defs"]["TrainingSection"], "lora": schema["$defs"]["LoraSection"]}
    for (section, key), (allowed, why) in MANAGED.items():  # what the libraries have and a recipe may not set
        values: dict[str, Any] = {"enum": [*allowed]} if allowed else {"not": {}}
        managed[section]["properties"][key] = {"description": why, **values}
    return schema


def _checked(
    schema: type[_Settings], values: dict[str, Any], source: str | Path, overrides: Sequence[str] = ()
) -> _Settings:
    """The model of the values with the overrides; raises RecipeError with one line for each mistake."""
    overridden: set[KeyPath] = set()
    lines = [line for word in overrides if (line := _override(word, values, overridden, schema))]
    if {("model",), ("model", "name_or_path")} & overridden and not any(key[0] == "about" for key in overridden):
        values.pop("about", None)  # facts about the file's own base model, its size among them
    mistakes: dict[KeyPath, str] = {}
    try:
        model = schema.model_validate(values)
    except ValidationError as error:
        mistakes = messages_of(error, values, schema)
    if schema is Recipe:
        mistakes.update(failed_checks(values))
    for place, message in mistakes.items():
        by_override = any(place[: len(key)] == key or key[: len(place)] == place for key in overridden)
        lines.append(f"{_COMMAND_LINE if by_override else source}: {'.'.join(place)}: {message}.")
    if lines:
        raise RecipeError("\n".join(lines))
    return model


def _override(word: str, values: dict[str, Any], overridden: set[KeyPath], schema: type[Section]) -> str | None:
    """Puts KEY=VALUE into the values and the key into `overridden`; returns the line of what is wrong with it."""
    key, equals, text = word.partition("=")
    path = tuple(key.strip().split("."))
    field = field_at(path, schema)
    example = "training.learning_rate=1e-4" if schema is Recipe else "data.max_rows=100"
    example = f"data.path={word}" if re.search(r"\.(csv|tsv|xlsx|jsonl?|parquet)$", word) else example
    if not equals or not all(path):
        return f"{_COMMAND_LINE}: {word}: is no KEY=VALUE; write it as {example}."
    if len(path) == 1 and field is not None and isinstance(field.annotation, type(Section)):
        return f"{_COMMAND_LINE}: {key}: is a whole section; set one of its keys, as {example}."
    if whole := _place(path, _value_of(text, field), values):
        return f"{_COMMAND_LINE}: {key}: {whole} holds one value and no keys; set it as a whole."
    overridden.add(path)
    return None


def _place(path: KeyPath, value: Any, values: dict[str, Any]) -> str | None:
    """Puts a value at its path; returns the key above it that holds no mapping."""
    for depth, part in enumerate(path[:-1], start=1):
        below = values.get(part)
        if path[:depth] == ("severity", "weights") and str(below or "balanced") in SEVERITY_PRESETS:
            preset = SEVERITY_PRESETS[str(below or "balanced")]
            below = dict(zip(SeverityWeights.model_fields, preset, strict=True))
        if below is not None and not isinstance(below, dict):
            return ".".join(path[:depth])
        values[part] = values = dict(below or {})
    values[path[-1]] = value
    return None


def _value_of(text: str, field: Any) -> Any:
    """What is meant on a command line: `{…}`, `[…]`, quotes, numbers, true, false and null are YAML, all else is text.

    So a path may hold colons, `#` and leading dashes. Where a setting takes text only, a commit id of digits is text.
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
    """Name, such as qwen3-4b or as-published/al-atlas, and file of every recipe that comes with sevpeft."""
    return {path.relative_to(_SHIPPED).as_posix()[:-5]: path for path in sorted(_SHIPPED.glob("**/*.yaml"))}


def recipe_file(name: str) -> Path:
    """What a name stands for: what is here, with or without its .yaml, before what comes with sevpeft."""
    here = Path(name), Path(f"{name}.yaml")
    return next(filter(Path.exists, here), shipped_recipes().get(name.removesuffix(".yaml"), here[0]))


def text_of(path: Path) -> str:
    try:
        # A pipe or a device may never end; a file that long was named by mistake.
        if path.exists() and not path.is_dir() and not (path.is_file() and path.stat().st_size <= _LONGEST):
            raise RecipeError(f"{path}: is no regular file of at most {_LONGEST:,} bytes; name a recipe.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        folder = path if path.is_dir() else path.parent
        recipes = sorted(found.name for found in folder.glob("*.y*ml"))
        near = get_close_matches(path.name, recipes, n=3) or recipes[:12]
        hint = f"{folder} holds {', '.join(near)}" if near else "`sevpeft recipes` lists what there is"
        if names := get_close_matches(str(path).removeprefix("recipes/").removesuffix(".yaml"), shipped_recipes()):
            hint = f"sevpeft has {' and '.join(names)}"
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {hint}.") from error


class _Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's plain words; in C, where PyYAML has it, which takes a fifth of the time."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, key in enumerate(keys):
            key.tag = "tag:yaml.org,2002:str"  # keys are names: `1:` and `null:` are no number and no nothing
            if key.value in (earlier.value for earlier in keys[:position]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Keeps the rules of YAML 1.1 beside ours, so that it quotes the text "no" for other readers of the file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    # A leading zero makes text of it: ids such as 007 are no numbers.
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.inf|\.nan", [*"-+.0123456789"]),
):
    for _side in (_Reader, _Writer):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Between single quotes a line break is an empty line, and YAML's other line breaks are folded away.
    style = '"' if re.search(r"[\n\r\t\x85\u2028\u2029]", text) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _write_text)


def write_yaml(values: Any, *, flow: bool = False) -> str:
    """YAML text of plain values, keys in their order, Arabic readable, one line a value, or all on one (`flow`)."""
    return yaml.dump(values, Dumper=_Writer, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=10**9)


def read_yaml(text: str, source: str) -> Any:
    """The values of one YAML document.

    Raises RecipeError: the text is no YAML, or a key stands twice; with line and column.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Reader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 50:  # C would go on until its stack is full
                raise RecursionError
            if isinstance(event, yaml.AliasEvent):  # aliases of aliases make billions of values of a few lines
                raise yaml.composer.ComposerError(None, None, "an alias stands here", cast(Any, event.start_mark))
        return _Reader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not isinstance(error, yaml.YAMLError) or "nesting depth" in str(error):
            raise RecipeError(f"{source}: the values are nested too deep or too long; shorten them.") from error
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = " (text that holds ': ' or begins with {, [, *, & or ! belongs in quotes)"
        hint = "" if "stands twice" in problem else hint
        raise RecipeError(f"{source}: {where}{problem}; correct it{hint}.") from error
