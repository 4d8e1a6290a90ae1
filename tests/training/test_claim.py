"""One run folder is written by one training at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevpeft.errors import RunError
from sevpeft.recipe import load_recipe
from sevpeft.training.checkpoints import run_lock
from sevpeft.training.train import train
from tests.training.test_plan import QUICKSTART


def test_a_folder_is_held_by_one_and_free_again_after_it(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        with (
            pytest.raises(RunError, match="run is being written by another training; wait"),
            run_lock(tmp_path / "run"),
        ):
            pass
        with run_lock(tmp_path / "other"):
            pass
    with pytest.raises(ValueError), run_lock(tmp_path / "run"):
        raise ValueError
    with run_lock(tmp_path / "x" / ".." / "run"):
        pass
    assert not list(tmp_path.iterdir()), "a run that is refused leaves no trace"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_of_the_same_run_is_refused_before_it_touches_anything(tmp_path: Path, resume: bool) -> None:
    with run_lock(tmp_path / "run"), pytest.raises(RunError, match="written by another training"):
        train(load_recipe(QUICKSTART, []), tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()
