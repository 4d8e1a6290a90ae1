"""An encoder learns severities, repeats itself, comes back from the disk as it was, and is refused if it is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from sevpeft.errors import DataError, ModelError
from sevpeft.severity.classifier import transformer
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.examples import Examples, hold_out
from sevpeft.severity.classifier.store import load_classifier, write_classifier
from sevpeft.severity.classifier.transformer import (
    FOLDER,
    VALIDATION_SHARE,
    TransformerClassifier,
    fit_transformer,
    longest_input,
    weighted_loss,
)
from sevpeft.severity.settings import EncoderSection

WORDS = {
    0: ["حكة", "بشرة", "شعر", "تطعيم", "فيتامين"],
    1: ["حرارة", "صداع", "إسهال", "سعال", "دوخة"],
    2: ["نزيف", "اختناق", "إغماء", "جلطة", "تشنج"],
}
FILLERS = ["عندي", "منذ", "يومين", "السلام", "عليكم", "يا", "دكتور", "ما", "الحل", "شكرا"]


def rows(count: int = 30, seed: int = 0) -> Examples:
    """Questions whose severity one word decides, in random company; a group each."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    questions = []
    for position, label in enumerate(labels):
        company = random.choice(FILLERS, random.integers(2, 12)).tolist()
        company.insert(int(random.integers(len(company))), WORDS[int(label)][position // 3 % 2])
        questions.append(" ".join(company))
    return Examples(questions, labels, np.arange(count), np.arange(count))


def build_bert_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({*FILLERS, *(word for group in WORDS.values() for word in group)})
    letters = sorted({letter for word in words for letter in word})
    # Not trained: of pairs that are as frequent, each training takes another one first.
    pieces = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def config(**changes: Any) -> BertConfig:
    # Weights of the usual size would leave so small a model without a signal to begin with.
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.1
    )
    return BertConfig(vocab_size=200, max_position_embeddings=64, pad_token_id=0, **sizes, **changes)


def encoder_folder(folder: Path, kind: type = BertForMaskedLM) -> Path:
    torch.manual_seed(7)
    kind(config()).save_pretrained(folder)
    build_bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder") / "tiny-bert")


def fit(
    encoder: Path,
    examples: Examples | None = None,
    seed: int = 5,
    progress: Callable[[str], None] = lambda message: None,
    **changes: Any,
) -> TransformerClassifier:
    settings: dict[str, Any] = dict(num_train_epochs=12, learning_rate=3e-3, per_device_train_batch_size=4)
    section = EncoderSection(name_or_path=str(encoder), **{**settings, **changes})
    return fit_transformer(rows() if examples is None else examples, section, seed=seed, progress=progress)


@pytest.fixture(scope="module")
def fitted(encoder: Path) -> TransformerClassifier:
    return fit(encoder, early_stopping_patience=12)


def test_thirty_rows_are_learned_by_heart(fitted: TransformerClassifier) -> None:
    probabilities = fitted.probabilities(rows().questions)
    assert probabilities.shape == (30, 3) and probabilities.dtype == np.float64
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-12
    # A part of the rows only validated.
    assert (probabilities.argmax(axis=1) == rows().labels).mean() >= 0.9


def test_the_same_call_gives_the_same_weights_bit_for_bit_and_another_seed_others(encoder: Path) -> None:
    one, again, other = (fit(encoder, seed=seed, num_train_epochs=2) for seed in (3, 3, 4))
    assert one.version == again.version != other.version
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_saved_and_loaded_it_gives_the_same_probabilities(fitted: TransformerClassifier, tmp_path: Path) -> None:
    write_classifier(Calibrated([fitted], Calibration()), tmp_path, {})
    (loaded,) = load_classifier(tmp_path).sources
    assert isinstance(loaded, TransformerClassifier)
    questions = rows(60, seed=5).questions
    assert (loaded.version, loaded.max_length) == (fitted.version, fitted.max_length)
    assert np.array_equal(loaded.probabilities(questions), fitted.probabilities(questions))
    # Nor does having read something change what it is.
    loaded.tokenizer(questions, truncation=False)
    assert TransformerClassifier(loaded.model, loaded.tokenizer, loaded.max_length).version == fitted.version
    names = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    shorter = TransformerClassifier(loaded.model, loaded.tokenizer, 8)
    (tmp_path / "shorter").mkdir()
    write_classifier(Calibrated([shorter], Calibration()), tmp_path / "shorter", {})
    (again,) = load_classifier(tmp_path / "shorter").sources
    assert isinstance(again, TransformerClassifier) and again.max_length == 8


def test_batches_and_their_order_do_not_change_what_a_question_gets(fitted: TransformerClassifier) -> None:
    questions = rows(60, seed=6).questions
    alone = np.concatenate([fitted.probabilities([question]) for question in questions])
    together = fitted.probabilities(questions)
    backwards = fitted.probabilities(questions[::-1])[::-1]
    assert np.abs(alone - together).max() < 1e-6
    assert np.abs(alone - backwards).max() < 1e-6
    assert len(np.unique(alone.round(6), axis=0)) > 20, "rows that all are alike would prove nothing about order"
    assert fitted.probabilities([]).shape == (0, 3)


def test_dropout_is_off_although_the_encoder_has_it(fitted: TransformerClassifier) -> None:
    assert fitted.model.config.hidden_dropout_prob == 0.1
    again = TransformerClassifier(fitted.model.train(), fitted.tokenizer, fitted.max_length)
    assert np.array_equal(again.probabilities(rows().questions), again.probabilities(rows().questions))


def test_a_question_that_is_too_long_is_cut(fitted: TransformerClassifier) -> None:
    exact = " ".join(["عندي"] * (fitted.max_length - 2))
    found = fitted.probabilities([f"{exact} نزيف", exact, "صداع"])
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_the_weighted_loss_is_the_one_computed_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    labels = torch.tensor([0, 1])
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    by_hand = (10 / 18 * -log_p[0, 0] + 10 / 9 * -log_p[1, 1]) / 2
    loss = weighted_loss(np.array([0] * 6 + [1] * 3 + [2]))
    assert float(loss(SimpleNamespace(logits=logits), labels)) == pytest.approx(float(by_hand), rel=1e-6)
    # Over two steps of accumulation the number of rows of both divides.
    halves = [loss(SimpleNamespace(logits=logits[i : i + 1]), labels[i : i + 1], 2) for i in range(2)]
    assert float(sum(halves)) == pytest.approx(float(by_hand), rel=1e-6)


def test_the_trainer_computes_the_weighted_loss(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, float]] = []

    def watched(train_labels: np.ndarray) -> Callable[..., torch.Tensor]:
        compute = weighted_loss(train_labels)
        weights = len(train_labels) / (3 * np.bincount(train_labels))

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            found = compute(outputs, labels, num_items_in_batch)
            log_p = torch.log_softmax(outputs.logits.detach(), -1)[torch.arange(len(labels)), labels]
            by_hand = (torch.as_tensor(weights)[labels] * -log_p).mean()
            seen.append((weights, abs(float(found.detach() - by_hand))))
            return found

        return loss

    monkeypatch.setattr(transformer, "weighted_loss", watched)
    labels = rows(90).labels
    uneven = rows(90).take(np.flatnonzero((labels != 2) | (np.arange(90) < 27)))
    fit(encoder, uneven, num_train_epochs=1)
    assert seen and max(difference for _, difference in seen) < 1e-6
    assert seen[0][0][2] > 2 * seen[0][0][0], "the rare severity weighs more"


def test_no_question_is_trained_on_and_validated_on(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = []
    made = transformers.Trainer.__init__

    def spy(self: Any, *positional: Any, **named: Any) -> None:
        parts.extend([named["train_dataset"], named["eval_dataset"]])
        made(self, *positional, **named)

    monkeypatch.setattr(transformers.Trainer, "__init__", spy)
    fit(encoder, rows(45).take(np.tile(np.arange(45), 2)), num_train_epochs=1)
    train, validation = ({tuple(row["input_ids"]) for row in part} for part in parts)
    assert train and validation and not train & validation


def test_the_best_epoch_is_kept_and_the_training_stops_early(encoder: Path) -> None:
    random = np.random.default_rng(0)
    wrong = replace(rows(60), labels=random.permutation(rows(60).labels))
    shown: list[str] = []
    kept = fit(encoder, wrong, 0, shown.append, num_train_epochs=30, early_stopping_patience=4)
    losses = [float(line.rpartition(" ")[2]) for line in shown if "validation loss" in line]
    assert 2 <= len(losses) < 30, "labels that mean nothing are soon not learned any better"
    assert losses[-1] > min(losses) + 0.01, "else the last epoch would be the best one"
    fold = hold_out(wrong, VALIDATION_SHARE, seed=0)
    held = wrong.take(fold.test)
    counts = np.bincount(wrong.labels[fold.train])
    weights = (counts.sum() / (3 * counts))[held.labels]
    right = kept.probabilities(held.questions)[np.arange(len(held)), held.labels]
    assert float((weights * -np.log(right)).mean()) == pytest.approx(min(losses), abs=1e-3)
    assert any(line.startswith("step 1 of at most ") for line in shown)


# What is refused


def _without(*names: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        left = {name: tensor for name, tensor in weights.items() if not any(part in name for part in names)}
        assert len(left) < len(weights)
        save_file(left, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _edit_config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")

    return change


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


BROKEN: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickle only": _only_pickle,
    "no tokenizer": _no_tokenizer,
    "a layer is missing": _without("layer.1."),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:5000]
    ),
    "larger than its weights": _edit_config(intermediate_size=96),
    "tokenizer of another model": _edit_config(vocab_size=20),
    "cut config": lambda folder: (folder / "config.json").write_text('{"model_type": "be'),
    "own code": _edit_config(
        model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}
    ),
    "no folder": shutil.rmtree,
}


def test_an_encoder_that_would_be_random_or_dangerous_is_refused(tmp_path: Path) -> None:
    accepted = []
    for name, change in BROKEN.items():
        folder = encoder_folder(tmp_path / name)
        change(folder)
        try:
            fit(folder, num_train_epochs=1)
            accepted.append(name)
        except ModelError as error:
            assert str(folder) in str(error) and "\n" not in str(error), name
    assert accepted == []


def test_a_head_of_other_labels_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "sentiment"
    BertForSequenceClassification(config(num_labels=5)).save_pretrained(folder)
    build_bert_tokenizer().save_pretrained(folder)
    assert fit(folder, num_train_epochs=1).probabilities(["صداع"]).shape == (1, 3)


def test_a_stored_classifier_without_its_head_is_refused(fitted: TransformerClassifier, tmp_path: Path) -> None:
    write_classifier(Calibrated([fitted], Calibration()), tmp_path, {})
    _without("classifier.")(tmp_path / FOLDER)
    with pytest.raises(DataError, match="fit it again"):
        load_classifier(tmp_path)


def test_too_few_questions_and_a_training_that_diverges_are_refused(encoder: Path) -> None:
    with pytest.raises(DataError, match="non_critical"):
        fit(encoder, replace(rows(9), labels=np.array([0, 1, 0, 1, 0, 1, 0, 2, 2])))
    with pytest.raises(ModelError, match=r"encoder\.learning_rate"):
        fit(encoder, learning_rate=float("1e30"), num_train_epochs=1)


def test_inputs_are_no_longer_than_the_encoder_has_positions() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=130))
    for length, wanted, longest in ((10**30, 256, 128), (100, 256, 100), (10**30, 64, 64)):
        tokenizer: Any = SimpleNamespace(model_max_length=length)
        assert longest_input(model, tokenizer, wanted) == longest
