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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from sevpeft.errors import DataError, ModelError
from sevpeft.severity.classifier import transformer
from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.store import load_classifier, write_classifier
from sevpeft.severity.classifier.transformer import FOLDER, TransformerClassifier, fit_transformer, weighted_loss
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


def fit(encoder: Path, examples: Examples | None = None, seed: int = 5, **changes: Any) -> TransformerClassifier:
    settings: dict[str, Any] = dict(num_train_epochs=1, learning_rate=3e-3, per_device_train_batch_size=4)
    section = EncoderSection(name_or_path=str(encoder), **{**settings, **changes})
    return fit_transformer(examples or rows(), section, seed=seed, progress=PROGRESS.append)


PROGRESS: list[str] = []


@pytest.fixture(scope="module")
def fitted(encoder: Path) -> TransformerClassifier:
    return fit(encoder, num_train_epochs=12)


def test_thirty_rows_are_learned_by_heart_and_the_steps_are_counted(fitted: TransformerClassifier) -> None:
    probabilities = fitted.probabilities(rows().questions)
    assert probabilities.shape == (30, 3) and probabilities.dtype == np.float64
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-12
    assert (probabilities.argmax(axis=1) == rows().labels).mean() >= 0.9
    assert {"step 1 of 96", "step 96 of 96"} <= set(PROGRESS)


def test_a_question_and_its_answer_are_read_together_in_the_fit_and_after_it(encoder: Path) -> None:
    asked, answered = rows(seed=1), rows()
    both = replace(asked, answers=answered.questions, reads="both")
    assert fit(encoder, both).version != fit(encoder, replace(both, reads="question")).version
    found = fit(encoder, both, num_train_epochs=12)
    assert (found.probabilities(both.passages).argmax(axis=1) == both.labels).mean() >= 0.9
    swapped = [(question, answered.questions[(n + 1) % 30]) for n, question in enumerate(asked.questions)]
    assert np.abs(found.probabilities(swapped) - found.probabilities(both.passages)).max() > 0.2


def test_the_same_call_gives_the_same_weights_bit_for_bit_and_another_seed_others(encoder: Path) -> None:
    one, again, other = (fit(encoder, seed=seed) for seed in (3, 3, 4))
    assert one.version == again.version != other.version
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_saved_and_loaded_it_gives_the_same_probabilities(fitted: TransformerClassifier, tmp_path: Path) -> None:
    write_classifier(Calibrated([fitted], Calibration()), tmp_path, {})
    (loaded,) = load_classifier(tmp_path).sources
    questions = rows(60, seed=5).questions
    assert loaded.version == fitted.version
    assert np.array_equal(loaded.probabilities(questions), fitted.probabilities(questions))
    # Nor does having read something change what it is.
    loaded.tokenizer(questions, truncation=False)
    assert TransformerClassifier(loaded.model, loaded.tokenizer).version == fitted.version
    names = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    # Without its head it would be random.
    _without("classifier.")(tmp_path / FOLDER)
    with pytest.raises(DataError, match="fit it again"):
        load_classifier(tmp_path)


def test_batches_their_order_dropout_and_words_over_the_limit_do_not_change_what_a_question_gets(
    fitted: TransformerClassifier,
) -> None:
    questions = rows(60, seed=6).questions
    alone = np.concatenate([fitted.probabilities([question]) for question in questions])
    assert np.abs(alone - fitted.probabilities(questions)).max() < 1e-6
    assert np.abs(alone - fitted.probabilities(questions[::-1])[::-1]).max() < 1e-6
    assert len(np.unique(alone.round(6), axis=0)) > 20, "rows that all are alike would prove nothing about order"
    assert fitted.probabilities([]).shape == (0, 3)
    assert fitted.model.config.hidden_dropout_prob == 0.1
    again = TransformerClassifier(fitted.model.train(), fitted.tokenizer)
    assert np.array_equal(again.probabilities(questions), fitted.probabilities(questions))
    exact = " ".join(["عندي"] * (fitted.tokenizer.model_max_length - 2))
    one, other = fitted.probabilities([f"{exact} نزيف", exact])
    assert np.abs(one - other).max() < 1e-6


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


def test_the_trainer_computes_the_weighted_loss_over_all_rows(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    # The rare severity weighs more.
    uneven = rows(60).take(np.flatnonzero((rows(60).labels != 2) | (np.arange(60) < 18)))
    weights = torch.as_tensor(len(uneven) / (3 * np.bincount(uneven.labels)))

    def watched(train_labels: np.ndarray) -> Callable[..., torch.Tensor]:
        compute = weighted_loss(train_labels)

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            found = compute(outputs, labels, num_items_in_batch)
            log_p = torch.log_softmax(outputs.logits.detach(), -1)[torch.arange(len(labels)), labels]
            seen.append((len(labels), abs(float(found.detach() - (weights[labels] * -log_p).mean()))))
            return found

        return loss

    monkeypatch.setattr(transformer, "weighted_loss", watched)
    fit(encoder, uneven)
    assert sum(count for count, _ in seen) == len(uneven) and max(difference for _, difference in seen) < 1e-6
    assert weights[2] > 2 * weights[0]


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
            fit(folder)
            accepted.append(name)
        except ModelError as error:
            assert str(folder) in str(error) and "\n" not in str(error), name
    assert accepted == []


def test_a_head_of_other_labels_is_replaced_and_no_position_is_read_that_the_encoder_lacks(tmp_path: Path) -> None:
    BertForSequenceClassification(config(num_labels=5)).save_pretrained(tmp_path)
    build_bert_tokenizer().save_pretrained(tmp_path)
    fitted = fit(tmp_path)
    assert fitted.probabilities(["صداع " * 99]).shape == (1, 3)
    assert (fitted.tokenizer.model_max_length, fitted.model.config.id2label[2]) == (62, "critical")


def test_a_training_that_diverges_is_refused(encoder: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder\.learning_rate"):
        fit(encoder, learning_rate=float("1e30"))
