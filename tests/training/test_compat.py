"""Private names of the libraries that training uses: each test fails when a release changes one."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sevpeft.training import compat
from tests.models import build_model
from tests.training.test_trainer import make_rows, make_trainer

# Overridden by SeveritySFTTrainer, with the parameters that it relies on.
METHODS = {
    "_get_train_sampler": ("train_dataset",),
    "_init_training_state": (),
    "_maybe_log_save_evaluate": (),
    "_evaluate": (),
    "_save_checkpoint": ("model", "trial"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_grad_norm": (),
    "get_eval_dataloader": ("eval_dataset",),
    "get_batch_samples": ("epoch_iterator", "num_batches"),
    "prediction_step": ("model", "inputs"),
    "_send_telemetry": (),
    "create_model_card": (),
    "training_step": (),
    "evaluation_loop": ("metric_key_prefix",),
}
STATE = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def test_the_trainer_still_has_the_methods_that_are_overridden() -> None:
    moved = []
    for name, parameters in METHODS.items():
        method = getattr(SFTTrainer, name, None)
        found = inspect.signature(method).parameters if method else {}
        if method is None or not set(parameters) <= set(found):
            moved.append((name, list(found)))
    assert moved == []


def test_the_trainer_still_counts_in_the_attributes_that_a_resume_sets(tmp_path: Path) -> None:
    source = inspect.getsource(Trainer) + inspect.getsource(SFTTrainer)
    assert [name for name in STATE if f"self.{name}" not in source] == []
    trainer = make_trainer(tmp_path, make_rows(), stock=True)
    assert set(trainer._metrics) == {"train", "eval"}


def test_trl_scores_tiles_of_the_vocabulary_and_returns_log_probabilities() -> None:
    fields = {field.name for field in dataclasses.fields(trl_utils.FusedCausalLMOutput)}
    assert fields >= {"log_probs", "entropy", "is_top1", "label_mask"}
    assert {"padding_free", "pad_to_multiple_of"} <= {
        f.name for f in dataclasses.fields(DataCollatorForLanguageModeling)
    }


def test_only_labeled_positions_reach_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, make_rows())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    seen, tiles = list[int](), list[int]()

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output.last_hidden_state.shape[:2].numel())
        tiles.append(trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)

    stock = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trainer.model.get_base_model().base_model.register_forward_hook(keep)
    narrow = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
    monkeypatch.setattr(compat, "_WORTH_SKIPPING_BELOW", 0)
    whole = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
    assert seen == [int((batch["labels"][:, 1:] != -100).sum()), batch["labels"].numel()]
    assert tiles == [compat.CPU_VOCABULARY_TILE, stock] and stock > tiles[0]
    torch.testing.assert_close(narrow, whole, rtol=1e-5, atol=1e-5)


def test_the_mixed_precision_of_the_launcher_is_hidden_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("bf16", None):
        if before:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", before)
        else:
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        with compat.mixed_precision_of_recipe(bf16=False, fp16=False):
            assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
        assert os.environ.get("ACCELERATE_MIXED_PRECISION") == before
    assert "ACCELERATE_MIXED_PRECISION" in inspect.getsource(accelerate.utils.launch)


def test_a_backbone_still_returns_last_hidden_state() -> None:
    output = build_model("llama").base_model(input_ids=torch.arange(4, 10)[None])
    assert output.last_hidden_state.shape[:2] == (1, 6)
