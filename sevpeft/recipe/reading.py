"""Turns a YAML recipe and KEY=VALUE overrides into a checked `Recipe`, and that into YAML that reads back equal.

Everything unsaid has a default, and everything wrong is said at once: one line for each mistake, with the file,
the key's path, what is wrong and what to write. Nothing here imports torch, so that a typing error costs a blink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from sevpeft.errors import RecipeError
from sevpeft.recipe.combinations import broken_rules
from sevpeft.recipe.evidence import EvaluationSection, GenerationSection
from sevpeft.recipe.library_fields import lora_fields, sft_fields
from sevpeft.recipe.library_sections import LoraSection, TrainingSection
from sevpeft.recipe.mistakes import field_at, sentences
from sevpeft.recipe.sections import (
    SEVERITY_PRESETS,
    AboutSection,
    DataSection,
    ModelSection,
    PromptSection,
    QuantizationSection,
    Section,
    SeveritySection,
    SeverityWeights,
)
from sevpeft.recipe.stopping import StoppingSection
from sevpeft.recipe.yaml_text import KeyPath, Mistake, read_value, read_yaml, write_yaml

_OVERRIDE = "command line"
_Settings = TypeVar("_Settings", bound=Section)
# Bytes of a recipe; those of the house have 2,000.
_LONGEST = 50_000


class Recipe(BaseModel):
    """One training job: base model, adapter, data, prompt, severity weights, training and how it is judged."""

    model_config = Section.model_config

    about: AboutSection = Field(default_factory=AboutSection)
    """What `sevpeft recipes` prints about the recipe."""
    model: ModelSection = Field(default_factory=ModelSection)
    """The base model."""
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    """How the frozen base model is compressed."""
    lora: LoraSection = Field(default_factory=LoraSection)
    """The adapter."""
    data: DataSection = Field(default_factory=DataSection)
    """The consultations."""
    prompt: PromptSection = Field(default_factory=PromptSection)
    """How a question is put to the model."""
    severity: SeveritySection = Field(default_factory=SeveritySection)
    """How much each consultation counts."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The training."""
    stopping: StoppingSection = Field(default_factory=StoppingSection)
    """When a training that goes wrong is given up."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """How the trained adapter is questioned."""
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """How its answers are judged."""

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
    """The recipe of a YAML file, with KEY=VALUE overrides such as `training.learning_rate=1e-4` or
    `severity.weights.critical=2`. Relative paths in it stay as they are: relative to the working directory.

    Raises:
        RecipeError: one line for each mistake in the file and the overrides.
    """
    path = Path(path)
    values, mistakes = read_yaml(_text_of(path), str(path))
    if values is None:
        raise RecipeError(f"{path}: the recipe is empty; write one setting or more, as data: {{path: data.csv}}.")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "one value"
        raise RecipeError(f"{path}: the recipe is {kind}; write sections, as training: {{learning_rate: 2e-4}}.")
    # A section whose keys are all commented out says nothing.
    values = {key: {} if value is None else value for key, value in values.items()}
    lines = _lines(mistakes, str(path))
    overridden: set[KeyPath] = set()
    for override in overrides:
        mistake = _apply(override, values, overridden)
        lines += [f"{_OVERRIDE}: {mistake}"] if mistake else []
    if {("model",), ("model", "name_or_path")} & overridden and not any(key[0] == "about" for key in overridden):
        values.pop("about", None)  # facts about the file's own base model, its size among them
    recipe, found = _checked(values)
    found = [mistake for mistake in found if mistake[0] not in {place for place, _ in mistakes}]
    for place, sentence in found:
        from_override = any(place[: len(key)] == key or key[: len(place)] == place for key in overridden)
        lines += _lines([(place, sentence)], _OVERRIDE if from_override else str(path))
    if lines or recipe is None:
        raise RecipeError("\n".join(lines))
    recipe._name = path.stem
    return recipe


def recipe_from_values(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain values, checked like a file; `source` stands where an error names the file.

    Raises:
        RecipeError: one line for each mistake.
    """
    recipe, mistakes = _checked(values)
    if recipe is None:
        raise RecipeError("\n".join(_lines(mistakes, source)))
    return recipe


def settings_from(
    schema: type[_Settings], overrides: Sequence[str], given: Mapping[str, Any] | None = None
) -> _Settings:
    """Settings of a verb that takes no recipe, from KEY=VALUE words, checked like those of a recipe.

    Args:
        schema: with sections below it, or not. given: values that have arguments of their own, such as data.path.

    Raises:
        RecipeError: one line for each mistake.
    """
    values: dict[str, Any] = {}
    lines, set_before = [], set()
    for key, value in (given or {}).items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
        set_before.add(tuple(key.split(".")))
    for override in overrides:
        path = tuple(override.partition("=")[0].strip().split("."))
        mistake = f"{'.'.join(path)}: is given already, as an argument." if path in set_before else None
        mistake = mistake or _apply(override, values, set(), schema)
        lines += [f"{_OVERRIDE}: {mistake}"] if mistake else []
    try:
        settings = schema.model_validate(values)
    except ValidationError as error:
        lines += _lines(list(sentences(error, values, schema).items()), _OVERRIDE)
    if lines:
        raise RecipeError("\n".join(lines))
    return settings


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for the editors that check and complete YAML with one."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for section, fields in (("LoraSection", lora_fields()), ("TrainingSection", sft_fields())):
        for name, setting in schema["$defs"][section]["properties"].items():
            if setting.get("default") is None:
                setting.pop("default", None)
                if name in fields and fields[name].default is not None:
                    setting["default"] = fields[name].default
    return schema


def _checked(values: Mapping[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    """The recipe, or None and its mistakes in the order of the keys; one mistake a key."""
    mistakes: dict[KeyPath, str] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = sentences(error, values, Recipe)
    for path, sentence in broken_rules(values):
        mistakes[path] = sentence
    order = {path: position for position, path in enumerate(_paths(values))}

    def position(mistake: Mistake) -> int:
        path = mistake[0]
        return next((order[path[:n]] for n in range(len(path), 0, -1) if path[:n] in order), len(order))

    return (None if mistakes else recipe), sorted(mistakes.items(), key=position)


def _paths(values: Any, above: KeyPath = ()) -> list[KeyPath]:
    if not isinstance(values, Mapping):
        return []
    return [path for key, value in values.items() for path in ((*above, str(key)), *_paths(value, (*above, str(key))))]


def _lines(mistakes: Sequence[Mistake], source: str) -> list[str]:
    return [f"{source}: {'.'.join(path)}: {sentence.rstrip('.')}." for path, sentence in mistakes]


def _apply(
    override: str, values: dict[str, Any], overridden: set[KeyPath], schema: type[BaseModel] | None = None
) -> str | None:
    """Puts one override into the values; returns what is wrong with it."""
    schema = schema or Recipe
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    example = "training.learning_rate=1e-4" if schema is Recipe else "data.max_rows=100"
    if not equals:
        return f"{override}: has no =; write it as {example}."
    if not all(path):
        return f"{override}: names no key before the =; write it as {example}."
    if len(path) == 1 and _is_section(path[0], schema):
        return f"{key}: is a whole section; override one of its settings, as {example}."
    place = values
    for depth, part in enumerate(path[:-1], start=1):
        below = place.get(part)
        if path[:depth] == ("severity", "weights"):
            below = _as_weights("balanced" if below is None else below)
        if below is not None and not isinstance(below, dict):
            return f"{key}: {'.'.join(path[:depth])} holds one value and no keys; override it as a whole."
        place[part] = place = {} if below is None else dict(below)
    value = read_value(text)
    place[path[-1]] = text if _takes_only_text(path, schema) and isinstance(value, bool | int | float) else value
    overridden.add(path)
    return None


def _as_weights(weights: Any) -> Any:
    if weights not in tuple(SEVERITY_PRESETS):
        return weights
    return dict(zip(SeverityWeights.model_fields, SEVERITY_PRESETS[weights], strict=True))


def _is_section(key: str, schema: type[BaseModel]) -> bool:
    kind = schema.model_fields[key].annotation if key in schema.model_fields else None
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _takes_only_text(path: KeyPath, schema: type[BaseModel]) -> bool:
    """On a command line a commit id or a file called 2024 needs no quotes."""
    field = field_at(path, schema)
    return field is not None and set(get_args(field.annotation) or (field.annotation,)) <= {str, type(None)}


def _text_of(path: Path) -> str:
    try:
        # A pipe or a device may never end; a file that long was named by mistake.
        if path.exists() and not path.is_dir() and not (path.is_file() and path.stat().st_size <= _LONGEST):
            raise RecipeError(f"{path}: is no regular file of at most {_LONGEST:,} bytes; name a recipe.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}: line {line} is not UTF-8; save the file as UTF-8.") from error
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such recipe; {_others(path)}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: is a folder; {_others(path / 'recipe')}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its name and its rights.") from error


def _others(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; check the path."
    recipes = sorted(found.name for found in path.parent.iterdir() if found.suffix in (".yaml", ".yml"))
    stems = {name.rsplit(".", 1)[0].lower(): name for name in recipes}
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    near = get_close_matches(stem.lower(), stems, n=3)
    if near:
        return "did you mean " + " or ".join(str(path.parent / stems[stem]) for stem in near) + "?"
    if recipes:
        return f"{path.parent} holds {', '.join(recipes[:12])}{' and more' if recipes[12:] else ''}."
    return f"{path.parent} holds no recipes; check the path."
