"""The notebook runs from its first cell to its last, in a Jupyter kernel, on the toy instead of a T4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "recipes" / "notebooks" / "first_adapter.ipynb"
SETTINGS = [
    *("data.max_rows=60", "training.max_steps=2", "training.eval_strategy=no", "training.use_cpu=true"),
    *("generation.max_new_tokens=4", "evaluation.n_resamples=100"),
]
ON_THE_TOY = f"""
RECIPE = {str(ROOT / "recipes" / "quickstart.yaml")!r}
SETTINGS = {SETTINGS!r}
ROWS = 2
"""


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def test_the_notebook_trains_an_adapter_on_a_csv_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "install")]
    (settings,) = (cell for cell in notebook.cells if tagged(cell, "parameters"))
    settings.source += ON_THE_TOY
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [set(output.get("data", ())) for cell in notebook.cells for output in cell.get("outputs", ())]
    answer = notebook.cells[-2].outputs[-1]["data"]["text/html"]
    assert sum("image/png" in kinds for kinds in shown) == 2 and answer.count('dir="rtl"') == 2
    assert (tmp_path / "consultations.csv").is_file()
    assert (tmp_path / "first-adapter" / "adapter" / "adapter_model.safetensors").is_file()
