"""Turns a folder of recipes into the list that `sevpeft recipes` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sevpeft.errors import UsageError
from sevpeft.recipe.reading import load_recipe


def list_recipes(folder: Path, vram: float | None = None) -> list[dict[str, Any]]:
    """Every recipe of a folder, or those that fit a card of `vram` GB; smallest base model first.

    Returns:
        Dictionaries with recipe, model, parameters, adapter (LoRA or QLoRA), licence, gated and vram_gib.
    """
    paths = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not paths:
        raise UsageError(
            f"There are no recipes in {folder}; run this in the checkout, or name the folder that holds them."
        )
    loaded = [(path, load_recipe(path)) for path in paths]
    if vram is not None:
        loaded = [(path, recipe) for path, recipe in loaded if (recipe.about.vram_gib or 0) <= vram]
    loaded.sort(key=lambda pair: (pair[1].about.parameter_count() or 0, pair[0].name))
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
    ]


def recipes_table(recipes: list[dict[str, Any]]) -> Table:
    """The list as a table that fits 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("recipe", "size", "card", "licence"):
        table.add_column(name, overflow="fold")
    for row in recipes:
        table.add_row(
            Path(row["recipe"]).name,
            row["parameters"] or "",
            f"{row['vram_gib']:g} GB" if row["vram_gib"] else "CPU",
            f"{row['licence'] or 'not stated'}{' (gated)' if row['gated'] else ''}",
        )
    return table
