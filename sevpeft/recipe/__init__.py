"""From a YAML file and KEY=VALUE overrides to a checked recipe. Ground floor: nothing here imports torch."""

from sevpeft.recipe.reading import Recipe, load_recipe, recipe_from_values, recipe_schema
from sevpeft.recipe.sections import SEVERITY_PRESETS, SeverityWeights

__all__ = ["SEVERITY_PRESETS", "Recipe", "SeverityWeights", "load_recipe", "recipe_from_values", "recipe_schema"]
