"""The report: one file that needs nothing else, shows what was measured, and lets no text become markup."""

from __future__ import annotations

import json
import re
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sevpeft.errors import RunError, SevpeftError
from sevpeft.evaluation.report.page import cases, direction, marked, write_report
from sevpeft.evaluation.scores import METRICS

ATTACK = '</p><script>alert("x")</script><img src=http://a.example/x onerror=alert(1)> "\'&'
CHEST = "عندي الم شديد في الصدر وضيق تنفس، ولا يوجد نزيف"
NLL = {
    "label": "NLL",
    "definition": "Per token.",
    "unit": "nats a token",
    "better": dict.fromkeys(("critical", "neutral", "non_critical", "all"), "lower"),
    "limits": "One reference.",
    "shown_times": 1,
    "of": "all rows",
}
REFERRAL = {**METRICS["urgent_referral"], "limits": ""}
METHODS = {"Interval": "90% of questions", "Test": "9 permutations", "Correction": "Holm"}


def estimate(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "rows": 4, "against": {}, **more}


def compared(value: float, **more: Any) -> dict[str, Any]:
    """A difference as `compare_family` writes it."""
    about = {"p": 0.2, "p_at_most": False, "comparisons": 4, "detectable": 0.02, "better": "lower", "outcome": "better"}
    return {**estimate(value), "per_seed": [value], **about, **more}


def line(arm: str, identity: str, **more: Any) -> dict[str, Any]:
    row = {"question": CHEST, "reference": "اذهب إلى الطوارئ الآن", "prediction": f"لا تقلق، هذا طبيعي ({arm})"}
    return {"arm": arm, "id": identity, **row, "severity": "critical", "group": 0, "truncated": False, **more}


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, *, evaluated: bool = True) -> Path:
    """A run folder as train and evaluate leave it behind, without a model."""
    folder.mkdir(parents=True)
    recipe = "model:\n  name_or_path: builtin:tiny\ndata:\n  path: builtin:consultations\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    losses = {"loss": 5.0, "loss_critical": 5.5, "loss_neutral": 4.5, "loss_non_critical": 4.0}
    weights = {
        "consultations": 30,
        "mean": 1.0,
        "effective_sample_size": 25.7,
    }
    metrics = {
        "model": {"name_or_path": "builtin:tiny"},
        "data": {"source": "file.csv", "rows": {"train": 30}, "columns": {"question": "q", "answer": "answer"}},
        "weights": weights,
        "before": losses,
        "after": {name: value - 0.25 for name, value in losses.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "seed": 42}), encoding="utf-8")
    log = [{"step": step, "eval_loss": 5 - step, "eval_loss_critical": 5.5 - step} for step in (0, 1)]
    write_lines(folder / "log.jsonl", log)
    if lines is None:
        lines = [line(arm, f"q{at}") for arm in ("adapter", "base") for at in range(3)]
    if evaluated:
        against = {"against": {"base": compared(-0.25, p=0.01)}}
        by = {"adapter": {**estimate(5.25), **against}, "base": estimate(5.5), "shuffled": estimate(6.0)}
        scores = {
            "rows": 4,
            "questions": 3,
            "metrics": {
                "nll": by,
                "urgent_referral": {"adapter": estimate(0.5), "base": {**estimate(0), "value": None}},
            },
        }
        content = {
            "scores": {"critical": scores, "neutral": scores, "all": scores},
            "metrics": {"nll": NLL, "urgent_referral": REFERRAL},
            "columns": {"adapter": "the trained adapter", "base": "without", "shuffled": "floor"},
            "notes": ["Only 3 critical questions."],
            "methods": METHODS,
        }
        (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
        write_lines(folder / "predictions.jsonl", lines)
    return folder


def write_comparison(folder: Path) -> Path:
    folder.mkdir()
    arms = {"base": "not trained", "ce": "plain CE", "balanced": "weights", "shuffled": "control"}
    for arm in ("ce", "balanced", "shuffled"):
        write_run(folder / f"{arm}-0", [line(one, "q0", prediction=f"{one} of {arm}") for one in ("adapter", "base")])
    difference = compared(-0.05, p=0.004, comparisons=24)
    nll = {arm: {**estimate(5.0), "against": {}} for arm in arms}
    nll["balanced"]["against"] = {"ce": difference, "shuffled": {**difference, "p": 0.01}}
    nll["shuffled"]["against"] = {"ce": compared(0.02)}
    scores = {"rows": 4, "questions": 3, "metrics": {"nll": nll}}
    part = {
        "stratum": "critical",
        "metric": "nll",
        "margin": 0.0,
        "questions": 3,
        "shown": True,
        **compared(-0.05, p=0.01),
    }
    others = {**part, **compared(0.02, p=0.3), "stratum": "non_critical", "margin": 0.01, "shown": False}
    parts = [
        {"reference": name, **one, "by_rows": estimate(one["value"] - 0.01)}
        for name, one in (("ce", part), ("shuffled", part), ("ce", others))
    ]
    cost = {"balanced": compared(0.02), "shuffled": compared(0.01)}
    content = {
        "claim": {"arm": "balanced", "outcome": "price", "p": 0.3, "alpha": 0.05, "margin": 0.01, "parts": parts},
        "plane": {"critical": {"balanced": compared(-0.05), "shuffled": compared(0.02)}, "others": cost},
        "dialects": {"egyptian": cost, "= the = a_b": cost},
        "folds": 1,
        "model": "builtin:tiny",
        "data": {"source": "file.csv", "rows": 4},
        "chosen": "balanced",
        "runs": {"base": ["ce-0"], **{arm: [f"{arm}-0"] for arm in ("ce", "balanced", "shuffled")}},
        "power": "Smallest true difference: .02.",
        "notes": [],
        "scores": {"critical": scores, "all": scores},
        "seeds": [0],
        "columns": arms,
        "primary": {"metric": "nll", "stratum": "critical"},
        "methods": METHODS,
        "metrics": {"nll": NLL},
        "verdict": "balanced lowers it <b>.",
    }
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside script and style."""

    VOID = frozenset({"meta", "input", "br", "img", "link"})
    INLINE = frozenset({"b", "mark", "bdi"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += "" if tag in self.INLINE else " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(folder: Path, **options: Any) -> Page:
    return Page(write_report(folder, **options).path.read_text(encoding="utf-8"))


# What the page is


def test_the_file_is_its_owners_alone_and_says_so(tmp_path: Path) -> None:
    written = write_report(write_run(tmp_path / "run"))
    assert stat.S_IMODE(written.path.stat().st_mode) == 0o600
    assert "This file contains patients' text" in Page(written.path.read_text(encoding="utf-8")).text
    assert [path.name for path in written.path.parent.iterdir() if path.name.startswith(".")] == []


def test_without_answers_it_holds_no_word_of_a_patient_and_warns_of_none(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run"), answers=0).path.read_text(encoding="utf-8")
    assert not re.search(r"[\u0620-\u064a]{2}", re.sub(r"<script>.*</script>|<style>.*</style>", "", html, flags=re.S))
    assert "Confidential" not in html


def test_it_needs_nothing_from_elsewhere_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    for write in (write_run, write_comparison):
        html = write_report(write(tmp_path / write.__name__)).path.read_text(encoding="utf-8")
        page = Page(html)
        assert not re.search(r"https?:|url\((?!#)|@import", html)
        for tag, attributes in page.tags:
            assert tag not in ("link", "iframe", "object", "embed", "base", "image")
            for name in ("src", "href", "xlink:href", "action"):
                assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert page.unbalanced == [] and page.open == []
        names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(names) == len(set(names))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(names)


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    pages = {}
    for field in ("question", "reference", "prediction", "id", "severity"):
        rows = [{**line(arm, "q0"), field: ATTACK} for arm in ("adapter", "base")]
        pages[field] = report(write_run(tmp_path / field, rows))
        assert field == "severity" or " ".join(ATTACK.split()) in pages[field].text, field
    # Names of data and models are data of others too.
    folder, comparison = write_run(tmp_path / "run"), write_comparison(tmp_path / "cmp")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["data"]["source"] = metrics["model"]["name_or_path"] = ATTACK
    (folder / "metrics.json").write_text(json.dumps(metrics))
    content = json.loads((comparison / "comparison.json").read_text())
    content |= {"model": ATTACK, "notes": [ATTACK]}
    (comparison / "comparison.json").write_text(json.dumps(content))
    pages |= {"names of a run": report(folder), "names of a comparison": report(comparison)}
    for name, page in pages.items():
        assert len(page.named("script")) == 1 and page.named("img") == [] and page.unbalanced == [], name


def test_the_policy_allows_the_pages_own_script_and_no_other(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = write_report(write_run(tmp_path / "run")).path.read_text(encoding="utf-8")
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(meta["content"] for meta in Page(html).named("meta") if "http-equiv" in meta)
    assert f"script-src 'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)


# What it shows


def test_a_run_is_shown_with_its_scores_intervals_differences_and_floors(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run")).text
    for shown in (
        "5.250 [5.150, 5.350]",
        "NLL, nats a token ↓ −0.250 [−0.350, −0.150] .010 of 4 0.020 better",
        "floor: shuffled",
        "50.0 [40.0, 60.0]",
    ):
        assert shown in text, shown
    assert all(f"{name} {method}" in text for name, method in METHODS.items())
    assert "Only 3 critical questions." in text and "Not a medical device" in text
    assert "critical 5.500 5.250 −0.250" in text  # validation loss before and after
    assert text.index("Critical cases") < text.index("All cases")


def test_to_send_harmless_cases_to_the_emergency_room_is_shown_as_worse(tmp_path: Path) -> None:
    """Table, arrow and picture go by the stratum; where no row has a value nothing is claimed."""
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rises = {name: METRICS["urgent_referral"]["better"][name] for name in ("critical", "non_critical", "all")}
    outcomes = {"higher": "better", "lower": "worse", "neither": "higher"}
    for name, better in rises.items():
        difference = compared(0.95, better=better, outcome=outcomes[better], p=0.001)
        by = {"adapter": estimate(1.0, against={"base": difference}), "base": estimate(0.05)}
        content["scores"][name] = {"rows": 40, "questions": 40, "metrics": {"urgent_referral": by}}
    empty = {name: None for name in ("value", "low", "high", "p", "detectable")}
    none = {**compared(0), **empty, "rows": 0, "outcome": "no data"}
    content["scores"]["neutral"]["metrics"] = {"nll": {"adapter": estimate(1.0, against={"base": none})}}
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    html = write_report(folder).path.read_text(encoding="utf-8")
    text = Page(html).text
    heads = {
        name: html.split(f"Adapter − base model, {shown} cases")[-1].split("</table>")[0]
        for name, shown in (("critical", "critical"), ("non_critical", "non-critical"), ("all", "all"))
    }
    label = "Urgent referral, %\u00a0"
    assert [(f"{label}↑" in heads[name], f"{label}↓" in heads[name]) for name in rises] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    assert ['class="better"' in head for head in heads.values()] == [True, False, False]
    assert ['class="worse"' in head for head in heads.values()] == [False, True, False]
    assert [head.split("<circle")[0].split("forest ")[1].split('"')[0] for head in heads.values()] == [
        "better", "worse", "higher",
    ]  # fmt: skip
    assert "no data" in text and "not distinguishable" not in text.split("Limits")[0]


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluated=False)
    page = report(folder)
    assert (
        f"sevpeft evaluate {folder}" in page.text
        and "4.750" in page.text
        and [svg["class"] for svg in page.named("svg")] == ["curves"]
    )
    for name in ("metrics.json", "environment.json", "log.jsonl"):
        (folder / name).unlink()
    assert "--resume" in write_report(folder).missing[0]
    comparison = write_comparison(tmp_path / "cmp")
    for run in comparison.glob("*-0"):
        shutil.rmtree(run)
    written = write_report(comparison)
    assert written.shown == 0 and "--nll-only" in written.missing[0]
    assert "balanced − ce" in Page(written.path.read_text(encoding="utf-8")).text


def test_bars_and_curves_are_drawn_to_scale(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    by = content["scores"]["critical"]["metrics"]["nll"]["adapter"]["against"]
    by["base"] |= {"value": -0.3, "low": -0.6, "high": 0.15}
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    html = write_report(folder).path.read_text(encoding="utf-8")
    assert (
        '<path d="M4.0 6H74.0"/><circle cx="32.0"' in html
    )  # 56 of 60 to the left, and a quarter of that to the right
    assert html.count('<circle cx="') == 3 and '<polyline class="critical" points="0.0,0.0 100.0,' in html


def test_training_losses_are_drawn_too_and_those_of_every_run_of_a_comparison(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 50.0, "loss_critical": 4.0 - step, "loss_neutral": 2.0} for step in (1, 2, 3)]
    run, comparison = write_run(tmp_path / "run"), write_comparison(tmp_path / "cmp")
    for folder in (run, comparison / "ce-0"):
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in log)
    html = write_report(run).path.read_text(encoding="utf-8")
    assert '<polyline class="critical" points="0.0,0.0 50.0,50.0 100.0,100.0"/>' in html, "the weighted loss is no line"
    assert "Training loss by step" in Page(html).text and "from 3.00 to 1.00" in html
    text = Page(write_report(comparison).path.read_text(encoding="utf-8")).text
    assert "Training loss by step, ce-0" in text and "Validation loss by step, balanced-0" in text


def test_answers_during_the_training_are_shown_unless_the_text_of_patients_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluated=False)
    sample = {"number": 0, "severity": "critical", "prompt": CHEST + ATTACK, "reference": "اذهب", "truncated": True}
    write_lines(folder / "samples.jsonl", [{**sample, "step": at, "prediction": f"جواب {at}"} for at in (0, 7)])
    page = report(folder)
    assert "جواب 0" in page.text and "step 7 cut off جواب 7" in page.text and "Confidential" in page.text
    assert not page.named("img") and write_report(folder).shown == 1
    without = write_report(folder, answers=0)
    assert without.shown == 0 and CHEST not in without.path.read_text(encoding="utf-8")


def test_a_comparison_begins_with_its_verdict_and_shows_every_arm(tmp_path: Path) -> None:
    page = report(write_comparison(tmp_path / "cmp"))
    assert page.text.count("balanced lowers it <b>.") == 1
    assert page.text.index("balanced lowers it <b>.") < page.text.index("Scores")
    for shown in ("balanced − ce −0.050 [−0.150, 0.050] .004 of 24 0.020 better", ".010 of 24", ".02."):
        assert shown in page.text, shown
    # The claim part by part, with its limit, the mean over rows, and each seed.
    for shown in (
        "NLL, critical: balanced − shuffled −0.050 [−0.150, 0.050] < 0 .010 −0.060 [−0.160, 0.040] −0.050 yes",
        "NLL, non-critical: balanced − ce 0.020 [−0.080, 0.120] < 0.01 .300".replace(" 0.020", " +0.020"),
    ):
        assert shown in page.text, shown
    # Each arm's answers are those of its first run, the base model's from its own column.
    answers = re.findall(r"(?:adapter|base) of \w+", page.text)
    assert answers == ["base of ce", "adapter of ce", "adapter of balanced", "adapter of shuffled"]


def test_arms_stand_in_the_plane_of_gain_and_cost_with_the_trade_off_through_them(tmp_path: Path) -> None:
    html = write_report(write_comparison(tmp_path / "cmp")).path.read_text(encoding="utf-8")
    figure = html.split('<svg class="plane"')[1].split("</svg>")[0]
    # Costs reach .12 to the right of 176, in 128; gains .15 above 116, in 92.
    at = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3"/><text[^>]*>(\w+)<', figure)
    assert at == [("197.3", "85.3", "balanced"), ("186.7", "128.3", "shuffled"), ("176", "116", "ce")]
    assert 'd="M197.3 24.0V146.7"' in figure and 'd="M90.7 85.3H304.0"' in figure  # intervals
    # The line goes through the origin and the one weighted arm: it rises 2.5 for each 1.
    line = re.search(r'class="line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', figure)
    x0, y0, x1, y1 = map(float, line.groups())  # type: ignore[union-attr]
    slope = (y0 - y1) / 92 * 0.15 / ((x1 - x0) / 128 * 0.12)
    assert slope == pytest.approx(2.5, rel=0.01) and (x0 + x1) / 2 == pytest.approx(176) and 16 <= y1 < y0 <= 216


def test_the_answers_of_folds_are_shown_together(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    content = json.loads((folder / "comparison.json").read_text())
    for arm in ("ce", "balanced", "shuffled"):
        write_run(folder / f"{arm}-0-2", [line(one, "q1", prediction="other") for one in ("adapter", "base")])
    content["runs"] = {arm: [runs[0], f"{runs[0]}-2"] for arm, runs in content["runs"].items()}
    (folder / "comparison.json").write_text(json.dumps(content | {"folds": 2}))
    assert write_report(folder).shown == 2
    (folder / "comparison.json").write_text(json.dumps(content))
    assert write_report(folder).shown == 1


def test_a_comparison_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "cmp")
    content = json.loads((folder / "comparison.json").read_text())
    del content["claim"]
    (folder / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"comparison\.json .*again"):
        write_report(folder)


# Answers side by side


def test_arms_are_joined_by_id_and_never_by_position() -> None:
    answers = {
        "adapter": {name: line("adapter", name, prediction=f"a {name}") for name in ("1", "2", "3", "unanswered")},
        "base": {name: line("base", name, prediction=f"b {name}") for name in ("3", "2", "1")},
    }
    shown, answered = cases(answers, 10)
    assert [case["identity"] for case in shown] == ["1", "2", "3"] and answered == 3
    for case in shown:
        name = case["identity"]
        assert [answer["text"] for answer in case["answers"][:-1]] == [f"a {name}", f"b {name}"]


def test_a_sample_takes_as_many_of_each_severity_and_more_where_one_has_few() -> None:
    severities = ["critical"] * 2 + ["neutral"] * 50 + ["non_critical"] * 50 + [None] * 50
    rows = {str(at): line("adapter", str(at), severity=severity) for at, severity in enumerate(severities)}
    shown = cases({"adapter": rows}, 20)[0]
    drawn = [severities[int(case["identity"])] for case in shown]
    assert [drawn.count(name) for name in ("critical", "neutral", "non_critical", None)] == [2, 6, 6, 6]
    assert drawn == sorted(drawn, key=["critical", "neutral", "non_critical", None].index)
    assert cases({"adapter": rows}, 20)[0] == shown
    assert cases({"adapter": rows}, 0) == ([], 152) and cases({}, 5) == ([], 0)


def test_marks_stand_on_the_words_that_the_rules_matched_and_change_no_letter() -> None:
    texts = (
        "",
        "   ",
        "؟!",
        "معنديش نزيف",
        "x" * 50,
        "a\u2028b\tc\n\n",
        "٤٠ حرارة ٣٩.٥ درجة",
        "(نزيف)، شديد",
        "... نزيف",
    )
    for text in (*texts, f"السلام عليكم،\n{CHEST}؟؟ شكرا"):
        assert "".join(piece for piece, _ in marked(text)) == text
    by_mark: dict[str, str] = {}
    for piece, match in marked(f"السلام عليكم،\n{CHEST}؟؟ شكرا"):
        mark = "" if match is None else "discounted" if match.discounted else match.level
        by_mark[mark] = by_mark.get(mark, "") + " " + piece
    assert "ضيق تنفس" in by_mark["critical"] and "،" not in by_mark["critical"]
    assert "نزيف" in by_mark["discounted"] and "نزيف" not in by_mark["critical"]
    # معنديش is two words to the rules; what follows must not slip by one.
    for text, critical in (("عندي سعال وضيق تنفس", "وضيق تنفس"), ("معنديش سعال. عندي ضيق تنفس", "ضيق تنفس")):
        found = [piece for piece, match in marked(text) if match and not match.discounted and match.level == "critical"]
        assert found == [critical], text


def test_safety_hits_stand_under_the_answer_with_their_words() -> None:
    answers = cases({"adapter": {"1": line("adapter", "1")}}, 1)[0][0]["answers"]
    assert list(answers[0]["hits"]) == ["reassurance"] and "referral" in answers[-1]["hits"]


def test_the_opinion_of_a_judge_stands_under_its_answer_and_is_no_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report(folder)
    assert "Judge (a language model)" not in (folder / "report.html").read_text(encoding="utf-8")
    judged = [
        {"arm": "adapter", "id": "q1", "ratings": {"urgency": 2, "false_reassurance": "yes"}, "reason": ATTACK},
        {"arm": "base", "id": "q1", "ratings": None, "reason": ""},
        {"arm": "adapter", "id": "another row", "ratings": {"urgency": 5}, "reason": ""},
    ]
    write_lines(folder / "judgements.jsonl", judged)
    write_report(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert html.count("Judge (a language model)") == 2 and "no readable verdict" in html and "urgency 5" not in html
    assert f"urgency 2, false reassurance yes: {' '.join(ATTACK.split())}" in page.text
    assert len(page.named("script")) == 1 and page.named("img") == [] and page.unbalanced == []


def test_a_text_runs_as_most_of_its_letters_do() -> None:
    assert direction("COVID-19 هل هو خطير على الأطفال") == "rtl"
    assert direction("You should see a doctor (طبيب)") == "ltr"
    assert direction("") == direction("123") == "rtl"


def test_empty_and_cut_off_answers_are_marked(tmp_path: Path) -> None:
    rows = [line("adapter", "q0", prediction="  "), line("base", "q0", truncated=True)]
    text = report(write_run(tmp_path / "run", rows)).text
    assert "the adapter no answer" in text and "base model cut off" in text


# Bad input


def test_a_folder_without_a_run_and_a_damaged_file_are_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=str(tmp_path)):
        write_report(tmp_path)
    for name in ("evaluation.json", "comparison.json"):
        folder = write_run(tmp_path / name)
        for content in ("{", "[]", '{"scores": {}}', "\x00"):
            (folder / name).write_text(content)
            with pytest.raises(RunError, match=name):
                write_report(folder)
        assert not (folder / "report.html").exists()


def test_a_damaged_line_of_answers_is_refused_by_number_and_never_quoted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:80]]), encoding="utf-8")  # a kill cut the last one off
    assert write_report(folder).shown == 2
    path.write_text("\n".join([lines[0], lines[1][:80], *lines[2:]]) + "\n", encoding="utf-8")
    with pytest.raises(SevpeftError, match="line 2") as refused:
        write_report(folder)
    assert not re.search(r"[\u0620-\u064a]", str(refused.value))


# The verb


def test_the_verb_writes_the_report_and_prints_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sevpeft.cli.application import app

    folder = write_run(tmp_path / "run")
    import sevpeft.cli  # noqa: F401

    app(["report", str(folder)], standalone_mode=False)
    assert f"Report: {folder / 'report.html'} (contains patients' text, 3 questions)" in capsys.readouterr().out
    app(["report", str(folder), "--answers", "0", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["questions"] == 0
