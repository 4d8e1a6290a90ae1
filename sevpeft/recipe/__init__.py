"""A YAML recipe with KEY=VALUE overrides, read into a checked `Recipe`. Nothing here imports torch."""
# ruff: noqa: F401

from sevpeft.recipe.combinations import BEST_IS_LEAST, CHANGING_THE_BASE
from sevpeft.recipe.evidence import EvaluationSection, JudgeSection
from sevpeft.recipe.library_sections import AUTO, GLOBAL_BATCH_SIZE
from sevpeft.recipe.reading import Recipe, load_recipe, recipe_from_values, recipe_schema, settings_from
from sevpeft.recipe.rules import JUDGE_KEY
from sevpeft.recipe.sections import (
    SEVERITY_PRESETS,
    DataSection,
    ModelSection,
    QuantizationSection,
    Section,
    SeverityWeights,
)
from sevpeft.recipe.stopping import StoppingSection
