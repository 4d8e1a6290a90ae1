"""The list of recipes that `sevpeft recipes` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Column, Table

from sevpeft.errors import UsageError
from sevpeft.recipe.load import load_recipe


def list_recipes(folder: Path, vram: float | None = None) -> list[dict[str, Any]]:
    """Every recipe of a folder, or those that fit a GPU of `vram` GB; smallest base model first.

    Returns:
        Dictionaries with recipe, model, parameters, adapter (LoRA or QLoRA), licence, gated and vram_gib.
    """
    loaded = [(path, load_recipe(path)) for path in sorted(folder.glob("*.yaml"))]
    if not loaded:
        raise UsageError(f"There are no recipes in {folder}; run this in the checkout, or name their folder.")
    loaded.sort(key=lambda pair: pair[1].about.parameter_count() or 0)
    return [
        {
            "recipe": str(path),
            "model": recipe.model.name_or_path,
            "parameters": recipe.about.parameters,
            "adapter": "QLoRA" if recipe.quantization.quantised() else "LoRA",
            "licence": recipe.about.licence,
            "gated": recipe.about.gated,
            "vram_gib": recipe.about.vram_gib,
        }
        for path, recipe in loaded
        if vram is None or (recipe.about.vram_gib or 0) <= vram
    ]


def recipes_table(recipes: list[dict[str, Any]]) -> Table:
    """The list as a table that fits 80 columns."""
    names = ("recipe", "size", "GPU", "license")
    table = Table(*(Column(name, overflow="fold") for name in names), box=None, padding=(0, 2, 0, 0))
    for row in recipes:
        memory = f"{row['vram_gib']:g} GB" if row["vram_gib"] else "CPU"
        terms = f"{row['licence'] or 'not stated'}{' (gated)' if row['gated'] else ''}"
        table.add_row(Path(row["recipe"]).name, row["parameters"] or "", memory, terms)
    return table
