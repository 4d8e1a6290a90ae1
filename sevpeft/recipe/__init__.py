"""A YAML recipe with KEY=VALUE overrides, read into a checked `Recipe`. Nothing here imports torch."""
# ruff: noqa: F401

from sevpeft.recipe.library import AUTO, BEST_IS_LEAST, GLOBAL_BATCH_SIZE
from sevpeft.recipe.load import Recipe, load_recipe, recipe_from_values, recipe_schema, settings_from
from sevpeft.recipe.schema import (
    JUDGE_KEY,
    SEVERITY_PRESETS,
    AsPublishedSection,
    CurriculumSection,
    DataSection,
    EvaluationSection,
    JudgeSection,
    QuantizationSection,
    Section,
    SeverityWeights,
    StoppingSection,
    TrainingDataSection,
)
