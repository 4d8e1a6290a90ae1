"""An encoder learns severities, repeats itself, comes back from the disk as it was, and is refused if it is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from sevpeft.errors import DataError, ModelError
from sevpeft.severity.classifier.crossvalidation import hold_out
from sevpeft.severity.classifier.encoder import longest_input
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.transformer import (
    VALIDATION_SHARE,
    TransformerClassifier,
    WeightedLoss,
    class_weights,
    fit_transformer,
    read_transformer,
    write_transformer,
)

WORDS = {
    0: ["حكة", "بشرة", "شعر", "تطعيم", "فيتامين"],
    1: ["حرارة", "صداع", "إسهال", "سعال", "دوخة"],
    2: ["نزيف", "اختناق", "إغماء", "جلطة", "تشنج"],
}
FILLERS = ["عندي", "منذ", "يومين", "السلام", "عليكم", "يا", "دكتور", "ما", "الحل", "شكرا"]


def rows(count: int = 30, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Questions whose severity one word decides, in random company; a group each."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    questions = []
    for position, label in enumerate(labels):
        company = random.choice(FILLERS, random.integers(2, 12)).tolist()
        company.insert(int(random.integers(len(company))), WORDS[int(label)][position // 3 % 2])
        questions.append(" ".join(company))
    return questions, labels, np.arange(count)


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


def fit(encoder: Path, **changes: Any) -> TransformerClassifier:
    settings: dict[str, Any] = dict(
        seed=5, encoder=str(encoder), num_train_epochs=12, learning_rate=3e-3, per_device_train_batch_size=4
    )
    return fit_transformer(*rows(), **{**settings, **changes})


@pytest.fixture(scope="module")
def fitted(encoder: Path) -> TransformerClassifier:
    return fit(encoder, early_stopping_patience=12)


def test_thirty_rows_are_learnt_by_heart(fitted: TransformerClassifier) -> None:
    questions, labels, _ = rows()
    probabilities = fitted.probabilities(questions)
    assert probabilities.shape == (30, 3) and probabilities.dtype == np.float64
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-12
    # A part of the rows only validated.
    assert (probabilities.argmax(axis=1) == labels).mean() >= 0.9


def test_the_same_call_gives_the_same_weights_bit_for_bit_and_another_seed_others(encoder: Path) -> None:
    one, again, other = (fit(encoder, seed=seed, num_train_epochs=2) for seed in (3, 3, 4))
    assert one.version == again.version != other.version
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_saved_and_loaded_it_says_the_same(fitted: TransformerClassifier, tmp_path: Path) -> None:
    write_transformer(fitted, tmp_path / "classifier")
    loaded = read_transformer(tmp_path / "classifier")
    questions = rows(60, seed=5)[0]
    assert (loaded.kind, loaded.version, loaded.max_length) == ("transformer", fitted.version, fitted.max_length)
    assert np.array_equal(loaded.probabilities(questions), fitted.probabilities(questions))
    # Nor does having read something change what it is.
    loaded.tokenizer(questions, truncation=False)
    assert TransformerClassifier(loaded.model, loaded.tokenizer, loaded.max_length).version == fitted.version
    names = {path.name for path in (tmp_path / "classifier").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_batches_and_their_order_do_not_change_what_a_question_gets(fitted: TransformerClassifier) -> None:
    questions = rows(60, seed=6)[0]
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
    assert np.array_equal(again.probabilities(rows()[0]), again.probabilities(rows()[0]))


def test_a_question_that_is_too_long_is_cut_and_counted(fitted: TransformerClassifier) -> None:
    before = fitted.shortened
    exact = " ".join(["عندي"] * (fitted.max_length - 2))
    found = fitted.probabilities([f"{exact} نزيف", exact, "صداع"])
    assert fitted.shortened - before == 1
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_class_weights_give_every_severity_the_same_part_and_are_those_of_the_formula() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(labels)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert class_weights(np.array([0, 0, 1])).tolist() == pytest.approx([0.5, 1, 0])


def test_the_weighted_loss_is_the_one_computed_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    labels = torch.tensor([0, 1])
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    by_hand = (0.5 * -log_p[0, 0] + 4.0 * -log_p[1, 1]) / 2
    loss = WeightedLoss(torch.tensor([0.5, 4.0, 9.0]))
    assert float(loss(SimpleNamespace(logits=logits), labels)) == pytest.approx(float(by_hand), rel=1e-6)
    # Over two steps of accumulation the number of rows of both divides.
    halves = [loss(SimpleNamespace(logits=logits[i : i + 1]), labels[i : i + 1], 2) for i in range(2)]
    assert float(sum(halves)) == pytest.approx(float(by_hand), rel=1e-6)


def _uneven() -> tuple[list[str], np.ndarray, np.ndarray]:
    questions, labels, groups = rows(90)
    keep = np.flatnonzero((labels != 2) | (np.arange(90) < 27))
    return [questions[i] for i in keep], labels[keep], groups[keep]


def test_the_trainer_computes_the_weighted_loss(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], float]] = []
    call = WeightedLoss.__call__

    def spy(self: WeightedLoss, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = call(self, outputs, labels, num_items_in_batch)
        by_hand = (
            self.weights[labels] * -torch.log_softmax(outputs.logits.detach(), -1)[torch.arange(len(labels)), labels]
        ).mean()
        seen.append((self.weights.tolist(), abs(float(loss.detach() - by_hand))))
        return loss

    monkeypatch.setattr(WeightedLoss, "__call__", spy)
    questions, labels, groups = _uneven()
    fit_transformer(questions, labels, groups, encoder=str(encoder), num_train_epochs=1)
    assert seen and max(difference for _, difference in seen) < 1e-6
    assert seen[0][0][2] > 2 * seen[0][0][0], "the rare severity weighs more"
    seen.clear()
    fit_transformer(questions, labels, groups, encoder=str(encoder), num_train_epochs=1, balance="none")
    assert seen[0][0] == [1, 1, 1]


def test_resampling_repeats_the_rows_of_rarer_severities(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    made = transformers.Trainer.__init__

    def spy(self: Any, *positional: Any, **named: Any) -> None:
        given.append([row["labels"] for row in named["train_dataset"]])
        made(self, *positional, **named)

    monkeypatch.setattr(transformers.Trainer, "__init__", spy)
    questions, labels, groups = _uneven()
    for balance in ("resampling", "weights"):
        fit_transformer(
            questions,
            labels,
            groups,
            encoder=str(encoder),
            num_train_epochs=1,
            balance=balance,  # type: ignore[arg-type]
        )
    resampled, plain = (np.bincount(labels) for labels in given)
    assert len(set(resampled.tolist())) == 1 and resampled[0] == plain.max()
    assert plain[2] < plain[0]


def test_no_question_is_trained_on_and_validated_on(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = []
    made = transformers.Trainer.__init__

    def spy(self: Any, *positional: Any, **named: Any) -> None:
        parts.extend([named["train_dataset"], named["eval_dataset"]])
        made(self, *positional, **named)

    monkeypatch.setattr(transformers.Trainer, "__init__", spy)
    questions, labels, groups = rows(45)
    fit_transformer(questions * 2, np.tile(labels, 2), np.tile(groups, 2), encoder=str(encoder), num_train_epochs=1)
    train, validation = ({tuple(row["input_ids"]) for row in part} for part in parts)
    assert train and validation and not train & validation


def test_the_best_epoch_is_kept_and_the_training_stops_early(encoder: Path) -> None:
    questions, labels, groups = rows(60)
    wrong = np.random.default_rng(0).permutation(labels)
    said: list[str] = []
    kept = fit_transformer(
        questions,
        wrong,
        groups,
        encoder=str(encoder),
        num_train_epochs=30,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        early_stopping_patience=4,
        progress=said.append,
    )
    losses = [float(line.rpartition(" ")[2]) for line in said if "validation loss" in line]
    assert 2 <= len(losses) < 30, "labels that mean nothing are soon not learnt any better"
    assert losses[-1] > min(losses) + 0.01, "else the last epoch would be the best one"
    held = hold_out(Examples(questions, wrong, groups, groups), VALIDATION_SHARE, seed=0).test
    probabilities = kept.probabilities([questions[i] for i in held])
    weights = class_weights(wrong[held]).numpy()[wrong[held]]
    loss = float((weights * -np.log(probabilities[np.arange(len(held)), wrong[held]])).mean())
    assert loss == pytest.approx(min(losses), abs=1e-3)
    assert any(line.startswith("step 1 of at most ") for line in said)


def test_lora_trains_adapters_and_stores_a_whole_model(encoder: Path, tmp_path: Path) -> None:
    adapted = fit(encoder, lora_r=4, learning_rate=1e-2, num_train_epochs=10, early_stopping_patience=10)
    questions, labels, _ = rows()
    assert (adapted.probabilities(questions).argmax(axis=1) == labels).mean() >= 0.6, "a third is chance"
    original = BertModel.from_pretrained(encoder)
    query = "encoder.layer.0.attention.self.query.weight"
    change = adapted.model.bert.state_dict()[query] - original.state_dict()[query]
    assert torch.linalg.matrix_rank(change, atol=1e-5) <= 4 and change.abs().max() > 1e-4
    embeddings = "embeddings.word_embeddings.weight"
    assert torch.equal(adapted.model.bert.state_dict()[embeddings], original.state_dict()[embeddings])
    write_transformer(adapted, tmp_path / "classifier")
    loaded = read_transformer(tmp_path / "classifier")
    assert isinstance(loaded.model, BertForSequenceClassification) and loaded.version == adapted.version
    assert np.array_equal(loaded.probabilities(questions), adapted.probabilities(questions))


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


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "without config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
    "pickle only": (_only_pickle, "pickle files only"),
    "no tokenizer": (_no_tokenizer, "no tokenizer that can be read"),
    "a layer is missing": (_without("layer.1."), r"lacks \d+ of the weights .* such as bert\.encoder\.layer\.1"),
    "cut weights": (_cut, "damaged weights"),
    "larger than its weights": (_edit_config(intermediate_size=96), "lacks 6 of the weights"),
    "tokenizer of another model": (_edit_config(vocab_size=20), "lacks 1 of the weights|tokenizer of"),
    "cut config": (lambda folder: (folder / "config.json").write_text('{"model_type": "be'), "could not be loaded"),
    "own code": (
        _edit_config(
            model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}
        ),
        "own, which is never done here",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_encoder_that_would_be_random_or_dangerous_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    change, said = BROKEN[name]
    folder = encoder_folder(tmp_path / "encoder")
    change(folder)
    with pytest.raises(ModelError, match=said) as refused:
        fit(folder)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_an_encoder_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder here and could not be fetched"):
        fit(Path("nobody/no-such-encoder"))


def test_a_head_of_other_labels_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "sentiment"
    BertForSequenceClassification(config(num_labels=5)).save_pretrained(folder)
    build_bert_tokenizer().save_pretrained(folder)
    assert fit(folder, num_train_epochs=1).probabilities(["صداع"]).shape == (1, 3)


def test_a_classifier_without_a_fitted_head_or_with_other_labels_is_refused(
    fitted: TransformerClassifier, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"holds no severity classifier.*severity\.json is absent"):
        read_transformer(encoder)
    folder = tmp_path / "classifier"
    write_transformer(fitted, folder)
    _without("classifier.")(folder)
    with pytest.raises(ModelError, match="without a fitted classification head"):
        read_transformer(folder)
    other = tmp_path / "other"
    write_transformer(fitted, other)
    _edit_config(id2label={"0": "critical", "1": "neutral", "2": "non_critical"})(other)
    with pytest.raises(ModelError, match="has the labels critical, neutral, non_critical, not"):
        read_transformer(other)


def test_too_few_questions_of_a_severity_are_refused(encoder: Path) -> None:
    with pytest.raises(DataError, match="non_critical stands on 4 distinct questions"):
        fit_transformer(["صداع"] * 9, np.array([0, 1, 0, 1, 0, 1, 0, 2, 2]), np.arange(9), encoder=str(encoder))


def test_a_training_that_diverges_is_refused(encoder: Path) -> None:
    with pytest.raises(ModelError, match="lower the learning rate"):
        fit(encoder, learning_rate=float("1e30"), num_train_epochs=1)


def test_inputs_are_no_longer_than_the_encoder_has_positions() -> None:
    tokenizer = SimpleNamespace(model_max_length=10**30)
    bert = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=128, model_type="bert", pad_token_id=0))
    roberta = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=130, model_type="xlm-roberta", pad_token_id=1)
    )
    assert [longest_input(model, tokenizer, 256) for model in (bert, roberta)] == [128, 128]  # type: ignore[arg-type]
    assert longest_input(bert, tokenizer, 100) == 100  # type: ignore[arg-type]
