"""The weighted loss: stock TRL where all weights are one, the formula everywhere, however the batch is cut."""

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
from sevpeft.training.compat import CPU_VOCABULARY_TILE
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.conftest import ARCHITECTURES, VOCABULARY, build_model

EXAMPLES = 16


def make_rows(count: int = EXAMPLES, *, seed: int = 0, ones: bool = False, reduction: str = "tokens") -> Dataset:
    """Rows of random tokens: prompts of 3 to 20 tokens, answers of 2 to 12, weights between .2 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "token_weights": [], "severity": []}
    for index in range(count):
        prompt = [integer(4, VOCABULARY) for _ in range(integer(3, 21))]
        answer = [integer(4, VOCABULARY) for _ in range(integer(2, 13))]
        weight = 1.0 if ones else 0.2 + 1.8 * float(torch.rand(1, generator=generator))
        if reduction == "examples":
            weight /= len(answer)
        rows["input_ids"].append(prompt + answer)
        rows["labels"].append([-100] * len(prompt) + answer)
        rows["token_weights"].append([0.0] * len(prompt) + [weight] * len(answer))
        rows["severity"].append(index % 3)
    return Dataset.from_dict(rows)


def make_config(folder: Path, **changes: Any) -> SFTConfig:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
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
) -> SFTTrainer:
    ours = {} if stock else {"reduction": options.pop("reduction", "tokens"), "loraplus": options.pop("loraplus", None)}
    evaluation = options.pop("eval_dataset", None)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=options.pop("lora_dropout", 0.0),
        target_modules="all-linear",
        exclude_modules=["out_proj", "conv1d"] if architecture == "falcon_h1" else None,  # PEFT refuses them there
    )
    if stock:
        rows = rows.remove_columns(["token_weights", "severity"])
    return (SFTTrainer if stock else SeveritySFTTrainer)(
        model=options.pop("model", None) or build_model(architecture),
        args=make_config(folder, **options),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=_tokenizer(),
        peft_config=lora,
        **ours,
    )


def _tokenizer() -> Any:
    from tests.conftest import build_tokenizer

    return build_tokenizer()


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


def formula(model: Any, rows: Dataset, reduction: str) -> torch.Tensor:
    """The loss as it is written down: one row at a time, full logits, float64 sums."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total = total - row["token_weights"][position] * scores[position - 1, labels[position]]
                count += reduction == "tokens"
        count += reduction == "examples"
    return total / count


def batch_loss(trainer: SFTTrainer, rows: Dataset) -> torch.Tensor:
    """Loss of all rows as one batch, through the trainer's own collator and normaliser."""
    batch = trainer.data_collator([dict(row) for row in rows.remove_columns("severity")])
    trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_weights_of_one_are_stock_trl_to_the_bit(tmp_path: Path, architecture: str) -> None:
    rows = make_rows(ones=True)
    runs = []
    for stock in (True, False):
        trainer = make_trainer(
            tmp_path, rows, architecture, stock=stock, gradient_accumulation_steps=2, per_device_train_batch_size=2
        )
        trainer.train()
        runs.append((losses_of(trainer), adapter_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_with_a_vocabulary_of_several_tiles_weights_of_one_are_stock_trl_but_for_rounding(tmp_path: Path) -> None:
    """Scored in narrower tiles than TRL's on a CPU: sums are taken in another order, and nothing else changes."""
    rows = make_rows(ones=True)
    losses = []
    for stock in (True, False):
        model = build_model("llama", vocab_size=3 * CPU_VOCABULARY_TILE + 100)
        trainer = make_trainer(tmp_path, rows, stock=stock, model=model, learning_rate=1e-3)
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


def test_weights_of_one_are_stock_trl_to_the_bit_when_packed(tmp_path: Path) -> None:
    rows = make_rows(ones=True)
    runs = []
    for stock in (True, False):
        columns = ["input_ids", "labels"] if stock else ["input_ids", "labels", "token_weights"]
        packed = pack_dataset(rows.select_columns(columns), seq_length=64, strategy="bfd")
        trainer = make_trainer(
            tmp_path,
            packed
            if not stock
            else packed.add_column("token_weights", packed["input_ids"]).add_column("severity", [0] * len(packed)),
            stock=stock,
            packing=True,
            max_length=64,
            per_device_train_batch_size=2,
        )
        trainer.train()
        runs.append((losses_of(trainer), adapter_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_a_loss_over_the_whole_sequence_is_stock_trl_to_the_bit(tmp_path: Path) -> None:
    """Nearly every position has a label then, and the road without skipping is taken."""
    rows = make_rows(ones=True)
    ids = rows["input_ids"][:]
    rows = rows.remove_columns(["labels", "token_weights"]).add_column("labels", ids)
    rows = rows.add_column("token_weights", [[1.0] * len(row) for row in ids])
    runs = []
    for stock in (True, False):
        trainer = make_trainer(tmp_path, rows, stock=stock, per_device_train_batch_size=1)
        trainer.train()
        runs.append((losses_of(trainer), adapter_of(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
def test_loss_is_the_formula(tmp_path: Path, reduction: str, layout: str) -> None:
    rows = make_rows(6, reduction=reduction)
    options: dict[str, Any] = {}
    batch = rows
    if layout == "padding-free":
        options = {"padding_free": True}
    if layout == "packed":
        options = {"packing": True, "max_length": 64}
        batch = pack_dataset(rows.remove_columns("severity"), seq_length=64, strategy="bfd")
        assert len(batch) < len(rows)
        batch = batch.add_column("severity", [0] * len(batch))
    trainer = make_trainer(tmp_path, batch, reduction=reduction, **options)
    with torch.no_grad():
        loss = batch_loss(trainer, batch)
        trainer.model.eval()
        expected = formula(trainer.model, rows, reduction)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
@pytest.mark.parametrize("cut", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_the_cut_of_a_batch_changes_nothing(tmp_path: Path, reduction: str, cut: tuple[int, int]) -> None:
    size, accumulation = cut
    rows = make_rows(reduction=reduction)
    results = []
    for settings in ((8, 1), (size, accumulation)):
        trainer = make_trainer(
            tmp_path,
            rows,
            reduction=reduction,
            per_device_train_batch_size=settings[0],
            gradient_accumulation_steps=settings[1],
            learning_rate=1e-3,
        )
        trainer.train()
        results.append((losses_of(trainer), adapter_of(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_close(results[0][1], results[1][1], 1e-5)


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_packing_and_padding_train_the_same_adapter(tmp_path: Path, reduction: str) -> None:
    rows = make_rows(12, reduction=reduction)
    packed = pack_dataset(rows.remove_columns("severity"), seq_length=1024, strategy="bfd")
    assert len(packed) == 1
    packed = packed.add_column("severity", [0])
    adapters = []
    for data, options in ((rows, {"per_device_train_batch_size": 12}), (packed, {"packing": True, "max_length": 1024})):
        trainer = make_trainer(tmp_path, data, reduction=reduction, learning_rate=1e-3, **options)
        trainer.train()
        adapters.append(adapter_of(trainer))
    assert_close(*adapters, 1e-5)


@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
@pytest.mark.parametrize("heavy", range(4))
def test_a_token_never_gets_the_weight_of_another_example(tmp_path: Path, layout: str, heavy: int) -> None:
    rows = make_rows(4)
    weights = [
        [1e4 * (index == heavy and label != -100) for label in labels] for index, labels in enumerate(rows["labels"])
    ]
    rows = rows.remove_columns("token_weights").add_column("token_weights", weights)
    options: dict[str, Any] = {}
    batch = rows
    if layout == "padding-free":
        options = {"padding_free": True}
    if layout == "packed":
        options = {"packing": True, "max_length": 256}
        batch = pack_dataset(rows.remove_columns("severity"), seq_length=256, strategy="bfd").add_column(
            "severity", [0]
        )
    trainer = make_trainer(tmp_path, batch, **options)
    with torch.no_grad():
        loss = batch_loss(trainer, batch)
        trainer.model.eval()
        expected = formula(trainer.model, rows, "tokens")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_run_repeats_to_the_bit(tmp_path: Path) -> None:
    adapters = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, make_rows(), lora_dropout=0.1)
        trainer.train()
        adapters.append(adapter_of(trainer))
    assert_equal(*adapters)


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"padding_free": True}])
def test_validation_loss_is_a_sum_over_tokens_whatever_the_batch(tmp_path: Path, size: int, options: dict) -> None:
    rows, validation = make_rows(), make_rows(13, seed=5, ones=True)
    trainer = make_trainer(tmp_path, rows, eval_dataset=validation, per_device_eval_batch_size=size, **options)
    metrics = trainer.evaluate()
    trainer.model.eval()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(float(formula(trainer.model, validation, "tokens")), rel=1e-6)
        for index, name in enumerate(("non_critical", "neutral", "critical")):
            part = validation.filter(lambda severity, index=index: severity == index, input_columns="severity")
            expected = float(formula(trainer.model, part, "tokens"))
            assert metrics[f"eval_loss_{name}"] == pytest.approx(expected, rel=1e-6)


def test_validation_ignores_the_weights(tmp_path: Path) -> None:
    weighted, plain = make_rows(5, seed=3), make_rows(5, seed=3).remove_columns("token_weights")
    trainer = make_trainer(tmp_path, make_rows())
    assert trainer.evaluate(weighted)["eval_loss"] == trainer.evaluate(plain)["eval_loss"]


def replace_weights(rows: Dataset, weights: list[list[float | None]]) -> Dataset:
    return rows.remove_columns("token_weights").add_column("token_weights", weights)


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (-0.5, "negative"), (None, "missing")],
)
def test_one_bad_weight_stops_the_run_before_its_first_step(tmp_path: Path, value: float | None, said: str) -> None:
    rows = make_rows()
    weights = rows["token_weights"][:]
    weights[11][-1] = value
    with pytest.raises(WeightError, match=said):
        make_trainer(tmp_path, replace_weights(rows, weights))


def test_all_weights_zero_are_refused(tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(WeightError, match="zero"):
        make_trainer(tmp_path, replace_weights(rows, [[0.0] * len(row) for row in rows["token_weights"]]))


def test_absent_weights_are_never_taken_as_one(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="token_weights"):
        make_trainer(tmp_path, make_rows().remove_columns("token_weights"))


def test_a_collator_that_drops_the_weights_is_noticed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows())
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "token_weights"}
    with pytest.raises(WeightError, match="without token_weights"):
        trainer.train()


@pytest.mark.parametrize(
    "setting", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}]
)
def test_settings_that_bypass_the_weights_are_refused(tmp_path: Path, setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_trainer(tmp_path, make_rows(), **setting)


@pytest.fixture
def quantised_model(tmp_path: Path) -> Any:
    folder = tmp_path / "base"
    build_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
    )


def test_gradients_of_a_4bit_model_after_an_evaluation_equal_those_before(tmp_path: Path, quantised_model: Any) -> None:
    for module in quantised_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as on a CPU that has it, where this one may not
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, rows, model=quantised_model, eval_dataset=make_rows(4, seed=1))
    gradients = []
    for _ in range(2):
        trainer.model.zero_grad()
        batch_loss(trainer, rows).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        trainer.evaluate()
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert_equal(*gradients)


def test_a_4bit_model_trains_its_adapter_in_float32(tmp_path: Path, quantised_model: Any) -> None:
    trainer = make_trainer(tmp_path, make_rows(), model=quantised_model)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
