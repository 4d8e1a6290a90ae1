"""The notebook runs from its first cell to its last, in a Jupyter kernel, on the toy instead of a T4.

The kernel is forked from the tests' process, which has the libraries: to load them takes longer than the notebook.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient

from tests.training.children import CONTEXT, forget_processes

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


class Kernel(CONTEXT.Process):  # type: ignore[name-defined, misc]
    """With what Jupyter asks of a subprocess.Popen."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode  # type: ignore[no-any-return]

    def wait(self) -> int | None:
        self.join()
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def fork_kernel(command: list[str], *, env: dict[str, str], cwd: str, **_: Any) -> Kernel:
    kernel = Kernel(target=run_kernel, args=(command[command.index("-f") :], env, cwd))
    kernel.start()
    os.setpgid(kernel.pid, kernel.pid)  # Jupyter sends signals to the group
    return kernel


def run_kernel(arguments: list[str], variables: dict[str, str], folder: str) -> None:
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    forget_processes()
    os.environ.update(variables)
    os.chdir(folder)
    asyncio._set_running_loop(None)  # that of the client, which the fork has taken along
    asyncio.set_event_loop(asyncio.new_event_loop())
    sys.modules.pop("matplotlib.pyplot", None)  # another test may have drawn with another backend
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # read as it is imported
    IPKernelApp.launch_instance(argv=arguments)


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def test_the_notebook_trains_an_adapter_on_a_csv_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_provisioner, "launch_kernel", fork_kernel)
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
