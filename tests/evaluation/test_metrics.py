"""Scores are those of the packages they come from, hold for any text, and never flatter what is empty."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, ModelError
from sevpeft.evaluation.bertscore import Encoder
from sevpeft.evaluation.metrics import METRICS, constant_answer, shuffled_references, text_scores
from sevpeft.evaluation.overlap import chrf, rouge_l
from sevpeft.evaluation.wellformedness import arabic_rate, empty, length_ratio, repetition
from tests.conftest import SENTENCES

PREDICTIONS = [SENTENCES[3], SENTENCES[5], SENTENCES[0], "راجع الطبيب", SENTENCES[1] + " " + SENTENCES[2]]
REFERENCES = [SENTENCES[4], SENTENCES[5], SENTENCES[1], "توجه إلى الطوارئ الآن", SENTENCES[2]]

ENCODERS = {
    "bert": dict(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=48),
    "xlm-roberta": dict(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=66
    ),
    "t5": dict(num_layers=3, d_model=32, d_kv=8, d_ff=48, num_heads=4),
    "distilbert": dict(n_layers=3, dim=32, n_heads=4, hidden_dim=48),
    "albert": dict(num_hidden_layers=3, hidden_size=32, embedding_size=16, num_attention_heads=4, intermediate_size=48),
}


def tokenizer_of_words(**settings: int) -> PreTrainedTokenizerFast:
    """[CLS] words [SEP], as a BERT has it; without a length of its own unless one is given."""
    words = sorted({word for text in (*SENTENCES, *REFERENCES) for word in fold_for_matching(text).split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        **settings,
    )


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a small random encoder of an architecture."""

    def make(architecture: str = "bert", name: str = "encoder", **settings: int) -> Path:
        folder = tmp_path / name
        tokenizer = tokenizer_of_words(**settings)
        tokenizer.save_pretrained(folder)
        config = transformers.AutoConfig.for_model(
            architecture, vocab_size=len(tokenizer), pad_token_id=0, **ENCODERS[architecture]
        )
        torch.manual_seed(0)
        kind = transformers.T5EncoderModel if architecture == "t5" else AutoModel
        model = kind(config) if architecture == "t5" else AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # The usual start is so close to zero that all layers look alike.
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return make


# BERTScore


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("architecture", ENCODERS)
def test_bertscore_is_the_packages_own_to_a_millionth(
    encoder_folder: Callable[..., Path], architecture: str, layer: int
) -> None:
    bert_score = pytest.importorskip("bert_score")
    folder = encoder_folder(architecture, name=f"{architecture}-encoder", model_max_length=64)
    ours = Encoder.load(str(folder), layer, device="cpu").score(PREDICTIONS, REFERENCES)
    package = bert_score.score(PREDICTIONS, REFERENCES, model_type=str(folder), num_layers=layer, device="cpu")
    for mine, theirs in zip((ours.precision, ours.recall, ours.f1), package, strict=True):
        assert np.abs(mine - theirs.double().numpy()).max() < 1e-6
    assert ours.f1[1] == pytest.approx(1) and ours.f1[0] < 0.999


def test_layers_differ_so_that_a_wrong_one_would_be_seen(encoder_folder: Callable[..., Path]) -> None:
    folder = encoder_folder()
    scores = [Encoder.load(str(folder), layer, device="cpu").score(PREDICTIONS, REFERENCES).f1 for layer in (1, 2, 3)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3 and np.abs(scores[1] - scores[2]).max() > 1e-3


def test_the_size_of_a_batch_changes_nothing(encoder_folder: Callable[..., Path]) -> None:
    encoder = Encoder.load(str(encoder_folder()), 2, device="cpu")
    one, all_at_once = (encoder.score(PREDICTIONS, REFERENCES, batch_size=size).f1 for size in (1, 64))
    assert one == pytest.approx(all_at_once, abs=1e-6)


def test_an_empty_text_scores_nothing_and_disturbs_no_other_row(
    encoder_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder.load(str(encoder_folder()), 2, device="cpu")
    alone = encoder.score([PREDICTIONS[0]], [REFERENCES[0]])
    said = ["", PREDICTIONS[0], "  \n", "\u200f", PREDICTIONS[0]]
    scores = encoder.score(said, [REFERENCES[0]] * 4 + [""])
    for ours, single in ((scores.precision, alone.precision), (scores.recall, alone.recall), (scores.f1, alone.f1)):
        assert ours[[0, 2, 3, 4]].tolist() == [0, 0, 0, 0]
        assert ours[1] == pytest.approx(single[0], abs=1e-6)
    assert encoder.score([], []).f1.shape == (0,)
    assert encoder.score([""], [""]).f1.tolist() == [0]
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_a_length_is_cut_at_the_encoders_positions(encoder_folder: Callable[..., Path]) -> None:
    # XLM-RoBERTa counts positions from the pad token on, so two of 66 are no positions.
    folder = encoder_folder("xlm-roberta")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings.get("model_max_length", 10**30) > 10**20
    long = " ".join(SENTENCES * 20)
    scores = Encoder.load(str(folder), 2, device="cpu").score([long, PREDICTIONS[0]], [REFERENCES[0], long])
    assert np.isfinite(scores.f1).all() and (scores.f1 > 0).all()


def test_a_path_with_t5_in_it_is_no_t5(encoder_folder: Callable[..., Path]) -> None:
    plain, named = encoder_folder("bert"), encoder_folder("bert", name="bert5-t5-base")
    scores = [Encoder.load(str(folder), 2, device="cpu").score(PREDICTIONS, REFERENCES).f1 for folder in (plain, named)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_t5_is_one_without_t5_in_its_path(encoder_folder: Callable[..., Path]) -> None:
    named, plain = encoder_folder("t5", name="some-t5"), encoder_folder("t5")
    scores = [Encoder.load(str(folder), 2, device="cpu").score(PREDICTIONS, REFERENCES).f1 for folder in (named, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


@pytest.mark.parametrize("layer", [0, 4, -1, 9])
def test_a_layer_that_does_not_exist_is_refused(encoder_folder: Callable[..., Path], layer: int) -> None:
    with pytest.raises(ModelError, match=rf"has layers 1 to 3 and no layer {layer};"):
        Encoder.load(str(encoder_folder()), layer)


def test_an_encoder_that_cannot_be_read_is_refused_in_one_sentence(
    encoder_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sevpeft.evaluation.bertscore.look_for_hub", lambda: None)
    pickled = encoder_folder(name="pickled")
    torch.save(AutoModel.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    damaged = encoder_folder(name="damaged")
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    lacking = encoder_folder(name="lacking")
    config = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    own_code = encoder_folder(name="own_code")
    (own_code / "config.json").write_text(
        json.dumps({**config, "model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (own_code / "code.py").write_text("raise SystemExit('ran')")
    bare = encoder_folder(name="bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for folder, layer, said in (
        (pickled, 2, "pickled"),
        (damaged, 2, "damaged"),
        (lacking, 5, "would be random"),
        (own_code, 2, "code of its own"),
        (bare, 2, "tokenizer"),
        (nothing, 2, "config.json"),
        (tmp_path / "absent", 2, "no folder here"),
    ):
        with pytest.raises(ModelError, match=said) as refusal:
            Encoder.load(str(folder), layer, device="cpu")
        assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
        shutil.rmtree(folder, ignore_errors=True)


# Wording


def test_chrf_is_sacrebleus_chrf_plus_plus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    ours = chrf(PREDICTIONS, REFERENCES)
    for said, wanted, score in zip(PREDICTIONS, REFERENCES, ours, strict=True):
        assert score == pytest.approx(sacrebleu.sentence_chrf(said, [wanted], word_order=2).score)
    assert chrf(["", "راجع"], ["راجع", "راجع"]) == pytest.approx([0, 100])


def test_rouge_l_reads_arabic() -> None:
    # Of 3 and 4 words the longest common subsequence has 2: 2 · (2/3) · (2/4) / (2/3 + 2/4).
    assert rouge_l(["راجع الطبيب غدا"], ["راجع اليوم الطبيب المختص"])[0] == pytest.approx(4 / 7)
    assert rouge_l(["إلى الطَّوَارِئ الآن"], ["الى الطوارئ الان"])[0] == 1
    assert rouge_l(["", "طبيب"], ["طبيب", "دواء"]).tolist() == [0, 0]


# Well-formedness


def test_repetition_counts_4_grams_that_stood_before() -> None:
    assert repetition(["لا " * 8])[0] == pytest.approx(1 - 1 / 5)
    assert repetition(["واحد اثنان ثلاثة أربعة خمسة ستة", "لا لا لا", ""]).tolist() == [0, 0, 0]
    assert repetition(["أ ب ج د ه أ ب ج د"])[0] == pytest.approx(1 / 6)


def test_length_is_in_words_of_the_reference() -> None:
    assert length_ratio(["راجع الطبيب", "", "a b"], ["راجع طبيب القلب غدا", "نعم", "؟"]) == pytest.approx(
        [0.5, 0, np.nan], nan_ok=True
    )
    assert length_ratio([], []).shape == (0,)


def test_empty_is_without_a_letter_or_digit() -> None:
    assert empty(["", " \n", "...", "؟!", "\u200f\u0640", "نعم", "5"]).tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_the_arabic_rate_is_of_letters() -> None:
    assert arabic_rate(["راجع الطبيب، 5 أيام!", "go", "راجع go", "123", "ﻻ"]) == pytest.approx(
        [1, 0, 4 / 6, np.nan, 1], nan_ok=True
    )


# All together


def test_every_score_is_named_and_explained(encoder_folder: Callable[..., Path]) -> None:
    encoder = Encoder.load(str(encoder_folder()), 2, device="cpu")
    scores = text_scores(PREDICTIONS, REFERENCES, truncated=[True] + [False] * 4, encoder=encoder)
    assert set(scores) <= set(METRICS)
    assert all(score.shape == (5,) and score.dtype == np.float64 for score in scores.values())
    assert scores["truncated"].tolist() == [1, 0, 0, 0, 0]
    assert set(text_scores(PREDICTIONS, REFERENCES)) == set(scores) - {
        "truncated",
        "bertscore_p",
        "bertscore_r",
        "bertscore_f1",
    }
    for name, metric in METRICS.items():
        assert name == metric.name and metric.definition.endswith(".") and metric.limits.endswith(".")


def test_rows_without_a_reference_are_refused_by_number() -> None:
    with pytest.raises(DataError, match="Row 2 has no reference"):
        text_scores(["نعم", "لا"], ["نعم", " "])
    with pytest.raises(DataError, match="2 answers and 1 references"):
        text_scores(["نعم", "لا"], ["نعم"])


# Floors


def test_shuffled_references_are_strangers_and_each_is_used_once() -> None:
    for groups in ([0, 1], [0, 0, 1, 1], [5, 5, 5, 1, 2, 3, 3], list(range(50)), [0] * 10 + list(range(1, 11))):
        for seed in range(20):
            order = shuffled_references(groups, seed)
            assert sorted(order) == list(range(len(groups)))
            assert all(groups[here] != groups[there] for here, there in enumerate(order))
    assert not np.array_equal(shuffled_references(range(50), 1), shuffled_references(range(50), 2))
    assert shuffled_references([]).shape == (0,)
    with pytest.raises(DataError, match="More than half"):
        shuffled_references([0, 0, 0, 1, 2])


def test_the_constant_answer_is_the_most_typical_training_answer() -> None:
    answers = ["راجع الطبيب لعمل الفحوصات اللازمة", "راجع الطبيب لعمل التحاليل", "راجع طبيب القلب", "حبة صباحا", ""]
    assert constant_answer(answers).startswith("راجع الطبيب لعمل")
    assert constant_answer(answers) == constant_answer(answers[::-1])
    with pytest.raises(DataError, match="no training answer"):
        constant_answer(["", " "])
