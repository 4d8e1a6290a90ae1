"""The section of a recipe that says when a training which goes wrong is given up."""

from __future__ import annotations

from pydantic import Field

from sevpeft.recipe.sections import Section


class StoppingSection(Section):
    """When a training that goes wrong is stopped; the adapter is kept as it was before."""

    nonfinite_patience: int = Field(default=3, ge=1)
    """Steps in a row whose loss or gradient is NaN or infinite before the training stops; each changes nothing."""
    divergence_ratio: float = Field(default=1.5, gt=1)
    """The training diverges while the mean loss of ten steps is so many times that of its first ten."""
    divergence_patience: int | None = Field(default=50, ge=1)
    """Steps of divergence in a row before the training stops; null never stops it."""
