"""Parameter-efficient fine-tuning of Arabic medical text generators with a severity-weighted loss.

    from sevpeft import compare, evaluate, load_recipe, plan, report, train

These are what the verbs of the command line call. Each is imported on first use, so that `import sevpeft` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sevpeft.evaluation.compare import compare
    from sevpeft.evaluation.evaluate import evaluate
    from sevpeft.evaluation.report.page import write_report as report
    from sevpeft.recipe import load_recipe
    from sevpeft.training.plan import plan
    from sevpeft.training.train import train

__version__ = "0.1.0"
__all__ = ["compare", "evaluate", "load_recipe", "plan", "report", "train"]

_HOMES = {
    "compare": "sevpeft.evaluation.compare:compare",
    "evaluate": "sevpeft.evaluation.evaluate:evaluate",
    "load_recipe": "sevpeft.recipe:load_recipe",
    "plan": "sevpeft.training.plan:plan",
    "report": "sevpeft.evaluation.report.page:write_report",
    "train": "sevpeft.training.train:train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sevpeft' has no attribute {name!r}")
    module, _, function = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), function)
