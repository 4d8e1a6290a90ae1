"""The weighted loss: TRL's if all weights are 1, the formula otherwise, for every batch split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer import utils as trl_utils

from sevpeft.errors import WeightError
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.training.compat import CPU_VOCABULARY_TILE
from sevpeft.training.data import check_weights
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.models import ARCHITECTURES, VOCABULARY, build_model, build_tokenizer

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 64},
}


def make_rows(count: int = 16, *, seed: int = 0, ones: bool = False, reduction: str = "tokens") -> Dataset:
    """Rows of random tokens: prompts of 3 to 20 tokens, answers of 2 to 12, weights between .2 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "token_weights", "token_severity")}
    rows["severity"] = []
    for index in range(count):
        prompt = [integer(4, VOCABULARY) for _ in range(integer(3, 21))]
        answer = [integer(4, VOCABULARY) for _ in range(integer(2, 13))]
        weight = 1.0 if ones else 0.2 + 1.8 * float(torch.rand(1, generator=generator))
        if reduction == "examples":
            weight /= len(answer)
        rows["input_ids"].append(prompt + answer)
        rows["labels"].append([-100] * len(prompt) + answer)
        rows["token_weights"].append([0.0] * len(prompt) + [weight] * len(answer))
        rows["token_severity"].append([index % 3] * len(rows["labels"][-1]))
        rows["severity"].append(index % 3)
    return Dataset.from_dict(rows)


def laid_out(rows: Dataset, layout: str) -> Dataset:
    if layout != "packed":
        return rows
    packed = pack_dataset(rows.remove_columns("severity"), seq_length=64, strategy="bfd")
    assert len(packed) < len(rows)
    return packed


def make_config(folder: Path, **changes: Any) -> SFTConfig:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        gradient_checkpointing=False,
    )
    return SFTConfig(**{**settings, **changes})


def make_trainer(
    folder: Path, rows: Dataset, architecture: str = "llama", *, stock: bool = False, **options: Any
) -> Any:
    names = ("reduction", "loraplus", "split_on_oom", "on_message", "callbacks", "curriculum")
    ours = {name: options.pop(name) for name in names if name in options}
    evaluation = options.pop("eval_dataset", None)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=options.pop("lora_dropout", 0.0),
        target_modules="all-linear",
        exclude_modules=["out_proj", "conv1d"] if architecture == "falcon_h1" else None,  # PEFT refuses them there
    )
    if stock:
        rows = rows.select_columns([name for name in ("input_ids", "labels", "seq_lengths") if name in rows.features])
    return (SFTTrainer if stock else SeveritySFTTrainer)(
        model=options.pop("model", None) or build_model(architecture),
        args=options.pop("args", None) or make_config(folder, **options),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=build_tokenizer(),
        peft_config=lora,
        **ours,
    )


def adapter_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert float((one[name] - other[name]).abs().max()) <= tolerance, name


def formula(model: Any, rows: Dataset, reduction: str) -> float:
    """The loss as it is written down: one row at a time, full logits, float64 sums."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total = total - row["token_weights"][position] * scores[position - 1, labels[position]]
                count += reduction == "tokens"
        count += reduction == "examples"
    return float(total / count)


def severity_losses(trainer: Any) -> list[dict[str, float]]:
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: line[f"loss_{name}"] for name in SEVERITIES if f"loss_{name}" in line} for line in lines]


def test_the_log_has_the_unweighted_loss_of_each_severity_however_a_batch_is_cut(tmp_path: Path) -> None:
    rows, wrong = make_rows(), list[Any]()
    ones = rows.map(lambda row: {"token_weights": [float(weight > 0) for weight in row["token_weights"]]})
    expected = {
        name: formula(build_model("llama"), ones.filter(lambda row, at=at: row["severity"] == at), "tokens")
        for at, name in enumerate(SEVERITIES)
    }
    for layout, size, accumulation, reduction in (
        *(("padded", 16, 1, "tokens"), ("padded", 4, 4, "examples")),
        *(("padding-free", 4, 4, "tokens"), ("packed", 2, 50, "examples")),
    ):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options = {**LAYOUTS[layout], **settings, "max_steps": 1, "reduction": reduction}
        trainer = make_trainer(tmp_path, laid_out(rows, layout), **options)
        trainer.train()
        if severity_losses(trainer) != [pytest.approx(expected, rel=1e-4)]:
            wrong.append((layout, size, reduction, severity_losses(trainer)))
    assert wrong == []


def test_a_line_of_the_log_has_the_severities_of_its_own_steps_and_none_that_is_unknown(tmp_path: Path) -> None:
    rows = make_rows(8)
    known = rows.map(lambda row: {"token_severity": [2 if row["severity"] == 2 else -1] * len(row["labels"])})
    trainer = make_trainer(tmp_path, known, max_steps=4, learning_rate=0.0, logging_steps=2)
    trainer.train()
    first, second = severity_losses(trainer)
    assert set(first) == set(second) == {"critical"} and first == pytest.approx(second, rel=1e-5)
    single = make_trainer(tmp_path, make_rows(3), max_steps=3, per_device_train_batch_size=1)
    single.train()
    assert sorted(name for line in severity_losses(single) for name in line) == sorted(SEVERITIES)
    plain = make_trainer(tmp_path, rows.remove_columns("token_severity"), max_steps=1)
    plain.train()
    assert severity_losses(plain) == [{}]


def batch_loss(trainer: SFTTrainer, rows: Dataset) -> torch.Tensor:
    """Loss of all rows as one batch, through the trainer's own collator and normalizer."""
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "severity"} for row in rows])
    trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)


def whole_sequences(rows: Dataset) -> Dataset:
    """Nearly every position has a label then, and the head scores all positions."""
    ids = rows["input_ids"][:]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "token_weights": [[1.0] * len(row) for row in ids]})


def assert_stock(folder: Path, rows: Dataset, architecture: str = "llama", **options: Any) -> None:
    found = []
    for stock in (True, False):
        trainer = make_trainer(folder, rows, architecture, stock=stock, **options)
        trainer.train()
        found.append((losses_of(trainer), adapter_of(trainer)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_weights_of_one_are_stock_trl_to_the_bit(tmp_path: Path, architecture: str) -> None:
    rows = make_rows(ones=True)
    assert_stock(
        tmp_path, rows, architecture, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )


def test_weights_of_one_are_stock_trl_to_the_bit_packed_and_over_whole_sequences(tmp_path: Path) -> None:
    rows = make_rows(ones=True)
    assert_stock(tmp_path, laid_out(rows, "packed"), per_device_train_batch_size=2, max_steps=2, **LAYOUTS["packed"])
    assert_stock(tmp_path, whole_sequences(rows), per_device_train_batch_size=1, max_steps=2)


def test_with_a_vocabulary_of_several_tiles_weights_of_one_are_stock_trl_but_for_rounding(tmp_path: Path) -> None:
    """Scored in narrower tiles than TRL's on a CPU: sums are taken in another order, and nothing else changes."""
    rows = make_rows(ones=True)
    losses = []
    for stock in (True, False):
        model = build_model("llama", vocab_size=3 * CPU_VOCABULARY_TILE + 100)
        trainer = make_trainer(tmp_path, rows, stock=stock, model=model, learning_rate=1e-3, max_steps=3)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_narrower_tiles_are_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock TRL in the same process keeps its own width, and a tile that is narrower already stays so."""
    seen = []
    scored = trl_utils._ChunkedLogProbFunction.apply

    def apply(*arguments: Any) -> Any:
        seen.append(arguments[5])
        return scored(*arguments)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", apply)
    stock_width = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    for stock, width in ((False, CPU_VOCABULARY_TILE), (True, stock_width)):
        make_trainer(tmp_path, make_rows(), stock=stock, max_steps=1).train()
        assert set(seen) == {width}
        seen.clear()
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    make_trainer(tmp_path, make_rows(), max_steps=1).train()
    assert set(seen) == {100}


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_is_the_formula_and_no_token_has_the_weight_of_another_example(
    tmp_path: Path, reduction: str, layout: str
) -> None:
    rows = make_rows(6, reduction=reduction)
    trainer = make_trainer(tmp_path, laid_out(rows, layout), reduction=reduction, **LAYOUTS[layout])
    for heavy in (None, *range(4)):
        weights = [
            [1e4 * (index == heavy and label != -100) for label in labels]
            for index, labels in enumerate(rows["labels"])
        ]
        weighted = rows if heavy is None else replace_weights(rows, weights)
        with torch.no_grad():
            loss = batch_loss(trainer, laid_out(weighted, layout))
        assert float(loss) == pytest.approx(formula(trainer.model, weighted, reduction), rel=1e-6), heavy


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_neither_the_cut_of_a_batch_nor_packing_changes_anything(tmp_path: Path, reduction: str) -> None:
    rows = make_rows(8, reduction=reduction)
    packed = pack_dataset(rows.remove_columns("severity"), seq_length=1024, strategy="bfd")
    assert len(packed) == 1
    ways: list[tuple[Dataset, dict[str, Any]]] = [
        (rows, {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}) for size in (8, 2, 1)
    ]
    ways.append((packed, {"packing": True, "max_length": 1024}))
    found = []
    for data, options in ways:
        trainer = make_trainer(tmp_path, data, reduction=reduction, learning_rate=1e-3, max_steps=3, **options)
        trainer.train()
        found.append((losses_of(trainer), adapter_of(trainer)))
    for losses, adapter in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert_close(adapter, found[0][1], 1e-5)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 16}])
def test_validation_loss_is_a_sum_over_tokens_whatever_the_batch(tmp_path: Path, options: dict) -> None:
    validation = make_rows(13, seed=5, ones=True)
    trainer = make_trainer(tmp_path, make_rows(), eval_dataset=validation, **options)
    expected = {"eval_loss": formula(trainer.model, validation, "tokens")}
    for index, name in enumerate(("non_critical", "neutral", "critical")):
        part = validation.select([row for row in range(13) if validation["severity"][row] == index])
        expected[f"eval_loss_{name}"] = formula(trainer.model, part, "tokens")
    for size in (1, 3, 16):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6), size


def test_validation_ignores_the_weights_and_takes_all_rows(tmp_path: Path) -> None:
    weighted, plain = make_rows(6, seed=3), make_rows(6, seed=3).remove_columns("token_weights")
    trainer = make_trainer(tmp_path, make_rows(), dataloader_drop_last=True, per_device_eval_batch_size=4)
    assert trainer.evaluate(weighted)["eval_loss"] == trainer.evaluate(plain)["eval_loss"]
    assert len(trainer.get_eval_dataloader(plain)) == 2 and trainer.args.dataloader_drop_last


def replace_weights(rows: Dataset, weights: list[list[float | None]]) -> Dataset:
    return rows.remove_columns("token_weights").add_column("token_weights", weights)


def test_bad_weights_stop_the_run_before_its_first_step(tmp_path: Path) -> None:
    rows, expected, found = make_rows(), {}, {}
    changes: dict[str, Any] = {
        "not finite": lambda weights: [*weights[:-1], float("nan")],
        "finite": lambda weights: [*weights[:-1], float("inf")],
        "missing": lambda weights: [*weights[:-1], None],
        "negative": lambda weights: [*weights[:-1], -0.5],
        "more or fewer": lambda weights: weights[:-1],
    }
    for word, change in changes.items():
        weights = rows["token_weights"][:]
        weights[11] = change(weights[11])
        with pytest.raises(WeightError) as caught:
            check_weights(replace_weights(rows, weights))
        expected[word], found[word] = True, word in str(caught.value)
    assert found == expected
    with pytest.raises(WeightError, match="zero"):
        make_trainer(tmp_path, replace_weights(rows, [[0.0] * len(row) for row in rows["token_weights"]]))
    with pytest.raises(WeightError, match="token_weights"):
        make_trainer(tmp_path, rows.remove_columns("token_weights"))


def test_a_collator_that_drops_the_weights_is_noticed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows())
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "token_weights"}
    with pytest.raises(WeightError, match=r"token_weights.*collator"):
        trainer.train()


def test_settings_that_bypass_the_weights_are_refused(tmp_path: Path) -> None:
    for name, value in {
        "loss_type": "dft",
        "label_smoothing_factor": 0.1,
        "average_tokens_across_devices": False,
    }.items():
        with pytest.raises(ValueError, match=name):
            make_trainer(tmp_path, make_rows(4), **{name: value})


def test_no_telemetry_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **about: sent.append(about))
    make_trainer(tmp_path, make_rows(4), stock=True)
    assert len(sent) == 1, "TRL itself sends, by this name"
    make_trainer(tmp_path, make_rows(4))
    assert len(sent) == 1


def test_a_4bit_model_has_the_same_gradients_after_an_evaluation_and_a_float32_adapter(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as on a CPU that has it, where this one may not
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, rows, model=model, eval_dataset=make_rows(4, seed=1))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    gradients = []
    for _ in range(2):
        trainer.model.zero_grad()
        batch_loss(trainer, rows).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        trainer.evaluate()
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert_equal(*gradients)
