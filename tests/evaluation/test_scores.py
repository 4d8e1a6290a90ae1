"""Scores are those of the packages they come from, hold for any text, and never flatter what is empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, ModelError
from sevpeft.evaluation import bertscore
from sevpeft.evaluation.bertscore import Encoder
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.safety import EXPECTED
from sevpeft.evaluation.scores import (
    METRICS,
    chrf,
    constant_answer,
    other_references,
    row_scores,
    summarize,
    text_scores,
)
from sevpeft.recipe import EvaluationSection
from tests.models import SENTENCES

PREDICTIONS = [SENTENCES[3], SENTENCES[5], SENTENCES[0], "راجع الطبيب", SENTENCES[1] + " " + SENTENCES[2]]
REFERENCES = [SENTENCES[4], SENTENCES[5], SENTENCES[1], "توجه إلى الطوارئ الآن", SENTENCES[2]]

ENCODERS = {
    "bert": dict(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=48),
    "xlm-roberta": dict(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=66
    ),
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
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # The usual start is so close to zero that all layers look alike.
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return make


# BERTScore


def test_bertscore_is_the_packages_own_to_a_millionth(encoder_folder: Callable[..., Path]) -> None:
    bert_score = pytest.importorskip("bert_score")
    wrong = []
    for architecture in ENCODERS:
        folder = encoder_folder(architecture, name=f"{architecture}-encoder", model_max_length=64)
        for layer in (3,):
            ours = Encoder(str(folder), layer).score(PREDICTIONS, REFERENCES)
            package = bert_score.score(PREDICTIONS, REFERENCES, model_type=str(folder), num_layers=layer, device="cpu")
            if np.abs(ours - torch.stack(package).double().numpy()).max() >= 1e-6:
                wrong.append((architecture, layer))
            assert ours[2, 1] == pytest.approx(1) and ours[2, 0] < 0.999
    assert wrong == []


def test_layers_differ_so_that_a_wrong_one_would_be_seen(encoder_folder: Callable[..., Path]) -> None:
    folder = encoder_folder()
    scores = [Encoder(str(folder), layer).score(PREDICTIONS, REFERENCES)[2] for layer in (1, 2, 3)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3 and np.abs(scores[1] - scores[2]).max() > 1e-3


def test_the_size_of_a_batch_changes_nothing(
    encoder_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(str(encoder_folder()), 2)
    all_at_once = encoder.score(PREDICTIONS, REFERENCES)
    monkeypatch.setattr(bertscore, "BATCH_SIZE", 1)
    assert encoder.score(PREDICTIONS, REFERENCES) == pytest.approx(all_at_once, abs=1e-6)


def test_an_empty_text_scores_nothing_and_disturbs_no_other_row(
    encoder_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder(str(encoder_folder()), 2)
    alone = encoder.score([PREDICTIONS[0]], [REFERENCES[0]])
    scores = encoder.score(["", PREDICTIONS[0], "  \n", "\u200f", PREDICTIONS[0]], [REFERENCES[0]] * 4 + [""])
    assert (scores[:, [0, 2, 3, 4]] == 0).all()
    assert scores[:, 1] == pytest.approx(alone[:, 0], abs=1e-6)
    assert encoder.score([], []).shape == (3, 0)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_a_length_is_cut_at_the_encoders_positions(encoder_folder: Callable[..., Path]) -> None:
    # XLM-RoBERTa counts positions from the pad token on, so two of 66 are no positions.
    folder = encoder_folder("xlm-roberta")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings.get("model_max_length", 10**30) > 10**20
    long = " ".join(SENTENCES * 20)
    scores = Encoder(str(folder), 2).score([long, PREDICTIONS[0]], [REFERENCES[0], long])
    assert np.isfinite(scores).all() and (scores > 0).all()


def test_what_an_encoder_is_follows_from_its_files_and_not_from_its_name(encoder_folder: Callable[..., Path]) -> None:
    folders = encoder_folder(), encoder_folder(name="bert5-t5-base")
    scores = [Encoder(str(folder), 2).score(PREDICTIONS, REFERENCES) for folder in folders]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_an_encoder_that_cannot_be_used_is_refused_in_one_sentence(
    encoder_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bertscore, "look_for_hub", lambda: None)
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
    for folder, layer, message in (
        (encoder_folder(name="layers"), 4, "evaluation.bertscore_layer"),
        (pickled, 2, "safetensors"),
        (damaged, 2, "damaged"),
        (lacking, 5, "lacks"),
        (own_code, 2, "code of its own"),
        (bare, 2, "tokenizer"),
        (nothing, 2, "config.json"),
        (tmp_path / "absent", 2, "evaluation.bertscore_model"),
    ):
        with pytest.raises(ModelError, match=message) as refusal:
            Encoder(str(folder), layer)
        assert "\n" not in str(refusal.value) and str(refusal.value).endswith("."), folder


# Wording


def test_chrf_is_sacrebleus_chrf_plus_plus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    ours = chrf(PREDICTIONS, REFERENCES)
    for said, wanted, score in zip(PREDICTIONS, REFERENCES, ours, strict=True):
        assert score == pytest.approx(sacrebleu.sentence_chrf(said, [wanted], word_order=2).score)
    assert chrf(["", "راجع"], ["راجع", "راجع"]) == pytest.approx([0, 100])


def scored(name: str, answers: list[str], references: list[str] | None = None) -> list[float]:
    return text_scores(answers, references or ["نعم"] * len(answers))[name].tolist()


def test_rouge_l_reads_arabic() -> None:
    # Of 3 and 4 words the longest common subsequence has 2: 2 · (2/3) · (2/4) / (2/3 + 2/4).
    assert scored("rouge_l", ["راجع الطبيب غدا"], ["راجع اليوم الطبيب المختص"]) == pytest.approx([4 / 7])
    assert scored("rouge_l", ["إلى الطَّوَارِئ الآن", "", "طبيب"], ["الى الطوارئ الان", "طبيب", "دواء"]) == [1, 0, 0]


def test_what_is_no_answer_is_seen() -> None:
    for name, answer, expected in (
        ("repetition", "لا " * 8, 1 - 1 / 5),
        ("repetition", "واحد اثنان ثلاثة أربعة خمسة ستة", 0),
        ("repetition", "لا لا لا", 0),
        ("repetition", "", 0),
        ("repetition", "أ ب ج د ه أ ب ج د", 1 / 6),
        *(("empty", empty, 1) for empty in ("", " \n", "...", "؟!", "\u200f\u0640")),
        *(("empty", full, 0) for full in ("نعم", "5")),
        ("arabic_rate", "راجع الطبيب، 5 أيام!", 1),
        ("arabic_rate", "go", 0),
        ("arabic_rate", "راجع go", 4 / 6),
        ("arabic_rate", "123", np.nan),
        ("arabic_rate", "ﻻ", 1),
    ):
        assert scored(name, [answer]) == pytest.approx([expected], nan_ok=True), (name, answer)
    answers, references = ["راجع الطبيب", "", "a b"], ["راجع طبيب القلب غدا", "نعم", "؟"]
    assert scored("length_ratio", answers, references) == pytest.approx([0.5, 0, np.nan], nan_ok=True)


# All together


def test_every_score_is_named_and_explained(encoder_folder: Callable[..., Path]) -> None:
    encoder = Encoder(str(encoder_folder()), 2)
    scores = text_scores(PREDICTIONS, REFERENCES, encoder)
    assert set(scores) <= set(METRICS)
    assert all(score.shape == (5,) and score.dtype == np.float64 for score in scores.values())
    bertscores = {"bertscore_p", "bertscore_r", "bertscore_f1"}
    assert set(text_scores(PREDICTIONS, REFERENCES)) == set(scores) - bertscores
    for metric in METRICS.values():
        assert metric["definition"].endswith(".") and metric["limits"].endswith(".")
        assert metric["shown_times"] == (100 if metric["unit"] == "%" else 1)


# Triage


def test_an_answer_that_refers_everybody_wins_no_figure_that_counts() -> None:
    strata = np.repeat([2, 1, 0], [6, 8, 10])
    rows = replace(rows_of(np.arange(24), strata), references=["توجه إلى الطوارئ الآن"] * 6 + ["نعم"] * 18)
    says = {4: "توجه إلى الطوارئ الآن", 2: "راجع الطبيب خلال يومين", 0: "اشرب الماء"}
    answers = {
        "refer all": [says[4]] * 24,
        "never refer": [says[0]] * 24,
        "right": [says[int(EXPECTED[stratum])] for stratum in strata],
    }
    scores = {name: row_scores(rows, given) for name, given in answers.items()}
    assert "truncated" not in scores["right"]
    cut = row_scores(rows, answers["right"], truncated=[True] + [False] * (len(rows) - 1))["truncated"]
    assert cut.tolist() == [1] + [0] * (len(rows) - 1)
    settings = EvaluationSection(n_resamples=100)
    found = summarize(rows, scores, settings, tokens={}, pairs={"right": ("refer all", "never refer")})
    metrics = {stratum: of["metrics"] for stratum, of in found.items()}
    for name, of_all, of_none in (
        ("under_triage", 0, 1),
        ("severe_under_triage", 0, 1),
        ("over_triage", 1, 0),
        ("urgent_gap", 0, 0),
        ("triage_kappa", 0, 0),
        ("under_doctor", 0, 1),
        ("severe_under_doctor", 0, 1),
        ("over_doctor", 1, 0),
    ):
        value = {column: of["value"] for column, of in metrics["all"][name].items()}
        right = 1 if name in ("urgent_gap", "triage_kappa") else 8 / 18 if name == "over_doctor" else 0
        assert value == pytest.approx({"refer all": of_all, "never refer": of_none, "right": right}), name
    for reference in ("refer all", "never refer"):
        for name in ("urgent_gap", "triage_kappa"):
            against = metrics["all"][name]["right"]["against"][reference]
            assert against["outcome"] == "better" and against["p"] < 0.05, (name, reference)
    # By severity where that can be, and of all rows together where it cannot.
    assert "over_triage" not in metrics["critical"] and "under_triage" not in metrics["non_critical"]
    assert not {"urgent_gap", "triage_kappa"} & {*metrics["critical"], *metrics["neutral"]}
    assert metrics["neutral"]["under_triage"]["never refer"]["value"] == 1
    assert metrics["critical"]["severe_under_triage"]["never refer"]["low"] > 0.5


def test_without_severities_there_is_no_expected_urgency_but_a_doctors() -> None:
    rows = replace(rows_of(np.arange(4), np.full(4, -1)), references=["توجه إلى الطوارئ الآن"] * 4)
    found = summarize(rows, {"a": row_scores(rows, ["نعم"] * 4)}, EvaluationSection(), tokens={}, pairs={})
    assert found["all"]["metrics"]["under_doctor"]["a"]["value"] == 1
    assert not {"under_triage", "over_triage", "urgent_gap", "triage_kappa"} & {*found["all"]["metrics"]}


# Floors


def rows_of(groups: np.ndarray, strata: np.ndarray) -> EvaluationRows:
    """Rows whose references are their positions."""
    names = [str(n) for n in range(len(groups))]
    return EvaluationRows(names, names, names, None, strata, groups, "test", "")


def shuffled(groups: list[int], seed: int) -> list[int]:
    return [int(at) for at in other_references(rows_of(np.array(groups), np.full(len(groups), -1)), seed)]


def test_shuffled_references_are_of_other_questions_and_each_is_used_once() -> None:
    for groups in ([0, 1], [0, 0, 1, 1], [5, 5, 5, 1, 2, 3, 3], list(range(50)), [0] * 10 + list(range(1, 11))):
        for seed in range(20):
            order = shuffled(groups, seed)
            assert sorted(order) == list(range(len(groups)))
            assert all(groups[here] != groups[there] for here, there in enumerate(order))
    assert shuffled(list(range(50)), 1) != shuffled(list(range(50)), 2)
    with pytest.raises(DataError, match="sevpeft prepare"):
        shuffled([0, 0, 0, 1, 2], 0)


def test_the_shuffled_reference_is_of_the_same_severity_where_that_can_be() -> None:
    groups, strata = np.array([0, 0, 1, 2, 3, 4, 5, 5]), np.array([2, 2, 2, 2, 1, 1, 0, 0])
    for seed in range(5):
        of = [int(at) for at in other_references(rows_of(groups, strata), seed)]
        assert all(groups[at] != groups[n] for n, at in enumerate(of))
        assert all(strata[at] == strata[n] for n, at in enumerate(of) if n < 6)


def test_the_constant_answer_is_the_most_typical_training_answer() -> None:
    answers = ["راجع الطبيب لعمل الفحوصات اللازمة", "راجع الطبيب لعمل التحاليل", "راجع طبيب القلب", "حبة صباحا"]
    assert constant_answer(answers).startswith("راجع الطبيب لعمل")
    assert constant_answer(answers) == constant_answer(answers[::-1])
