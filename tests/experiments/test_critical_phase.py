"""The experiment on a critical phase: its batches, the way between two adapters, its rule of choice and its claim."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sevpeft.severity.probabilities import SEVERITIES
from tests.experiments import critical_phase
from tests.experiments.critical_phase import CE, Arm, Point, Results, arms_of, main, most_critical
from tests.models import SENTENCES

SETTINGS = yaml.safe_load(Path(critical_phase.__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PHASE = Arm("phase", "gold", 0.25, 0.12)


@pytest.fixture
def part(tmp_path: Path, model_folder: Callable[..., Path]) -> Any:
    """Fold 0 of 36 short consultations of a tiny model, with ends and middle of the way measured."""
    from tests.experiments.critical_phase_training import Part

    words = ["نزيف شديد", "سعال منذ", "سؤال عن"]
    rows = [
        {
            "row": number,
            "label_block": "D_all",
            "severity": SEVERITIES[2 - number % 3],
            "question": f"{words[number % 3]} {SENTENCES[number % 8]} {number}",
            "answer": SENTENCES[(number + 3) % 8],
        }
        for number in range(36)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        **copy.deepcopy(SETTINGS),
        "interpolation": [0.0, 0.999999, 1.0],
        "final": {"blocks": ["D"], "folds": 2},
    }
    settings["recipe"]["training"] |= {"num_train_epochs": 2, "max_length": 128, "learning_rate": 0.05}
    settings["length"], settings["top_layers"] = [0.4], 1
    options = argparse.Namespace(
        part="final",
        seed=0,
        fold=0,
        rows=None,
        dtype=None,
        output=tmp_path,
        model=str(model_folder()),
        data=tmp_path / "rows.jsonl",
    )
    return Part(settings, options)


def test_a_phase_takes_half_of_its_batches_from_critical_rows(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Any] = {}
    monkeypatch.setattr(part, "run", lambda arm, start, order, **how: ran.update({arm.kind: (start, order, how)}))
    ce = part.__dict__["ce"] = {"of": "ce"}
    for kind in ("phase", "replay", "late", "ce_extra"):
        part.train_arm(Arm(kind, "none" if kind == "ce_extra" else "gold", 0.25, 0.4))
    gold = part.labels[part.train] == 2
    steps = round(0.4 * part.steps)
    for kind in ("phase", "replay", "late"):
        assert (gold[ran[kind][1][-steps:]].sum(1) == 4).all(), kind
    assert np.array_equal(part.order[:-steps], ran["late"][1][:-steps]) and len(ran["late"][1]) == part.steps
    assert ran["phase"][0] is ran["ce_extra"][0] is ce and ran["late"][0] is part.initial
    assert ran["phase"][2]["rate"] == 0.25 and ran["late"][2] == {}
    assert np.array_equal(ran["replay"][2]["weights"], gold) and np.array_equal(ran["replay"][2]["replayed"], ~gold)
    permuted = part.critical("permuted")
    assert permuted.sum() == gold.sum() and (permuted != gold).any()
    assert not {*part.groups[part.train]} & {*part.groups[part.test]}


def test_arms_are_measured_from_ce_to_the_phase(part: Any) -> None:
    for arm in (Arm("base"), Arm("ce"), Arm("replay", "gold", 0.25, 0.4), Arm("balanced", "gold")):
        part.train_arm(arm)
    records = [json.loads(line) for line in part.result.read_text().splitlines()]
    rows = next(one for one in records if one["arm"] is None)
    nll = {(one["arm"][0], one["interpolation"]): np.array(one["nll"]) for one in records if one["arm"]}
    np.testing.assert_allclose(nll["replay", 0.0], nll["ce", 1.0], rtol=1e-6)
    np.testing.assert_allclose(nll["replay", 0.999999], nll["replay", 1.0], rtol=1e-6)
    changed = [np.abs(nll[kind, 1.0] / nll["ce", 1.0] - 1).max() for kind in ("base", "replay", "balanced")]
    assert min(changed) > 5e-3, changed
    # Another trainer, whose model no trainer has wrapped before, measures the same.
    part.write_rows()
    before = nll["base", 1.0]
    part.train_arm(Arm("base"))
    again = json.loads(part.result.read_text().splitlines()[-1])
    np.testing.assert_allclose(again["nll"], before, rtol=1e-5)
    assert len(rows["row"]) == len(before) == len(part.test) and np.isfinite(before).all()
    assert "question" not in part.result.read_text() and SENTENCES[0] not in part.result.read_text()


def made_up(path: Path, gain: float, cost: float) -> Path:
    """Results of two seeds and folds: a phase gains on critical rows and costs others; the router knows severity."""
    generator, lines = np.random.default_rng(0), []
    severity = np.arange(300) % 3
    for seed, fold in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = np.arange(fold, 300, 2)
        of, base = severity[rows], generator.normal(40, 4, len(rows))
        about = {"row": rows.tolist(), "tokens": [20] * len(rows), "group": rows.tolist(), "severity": of.tolist()}
        about |= {
            "steps": 9,
            "auc": {"gold": 1.0},
            "critical_share": None,
            "router": {"gold": (of == 2).astype(float).tolist()},
        }
        moved = base + 20 * np.where(of == 2, -gain, cost) + generator.normal(0, 0.02, len(rows))
        for record in (
            {"arm": None, **about},
            {"arm": list(CE.arm), "interpolation": 1.0, "nll": base.tolist()},
            {"arm": ["ce_extra", "none", *PHASE[2:]], "interpolation": 1.0, "nll": (base + 0.1).tolist()},
            {"arm": list(PHASE), "interpolation": 1.0, "nll": moved.tolist()},
        ):
            lines.append(json.dumps({"seed": seed, "fold": fold, **record}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_claim_needs_a_gain_and_no_cost(tmp_path: Path) -> None:
    table = [(0.02, 0.0, True), (0.02, 0.05, False), (-0.02, 0.0, False), (0.0, 0.0, False)]
    found = [Results.load(SETTINGS, made_up(tmp_path / "r", *row[:2])).claim(Point(PHASE)) for row in table]
    assert found == [row[2] for row in table]


def test_the_rule_takes_the_gain_that_costs_no_more_than_the_margin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["choose", str(made_up(tmp_path / "r", 0.02, 0.05))])
    primary = yaml.safe_load(capsys.readouterr().out)["primary"]
    # Unrouted it costs .05; the router of these results sends critical questions first.
    assert primary["share"] == 0.2 and primary["kind"] == "phase" and primary["critical"] < 0 and primary["cost"] < 0.01
    (tmp_path / "chosen").write_text(yaml.safe_dump({"primary": primary, "secondary": []}), encoding="utf-8")
    main(["analyze", str(tmp_path / "r"), "--chosen", str(tmp_path / "chosen")])
    page = capsys.readouterr().out
    assert "PRIMARY − ce" in page and "CLAIM HOLDS" in page and "oracle" in page
    arms = arms_of(SETTINGS, "final", {"primary": primary, "secondary": []})
    assert {Arm("ce"), PHASE, PHASE._replace(labels="permuted"), Arm("1-1-2", "predicted")} <= {*arms}


def test_the_router_takes_a_share_of_questions_as_training_had_them() -> None:
    scores, critical = np.array([9.0, 8, 7, 6, 5, 4, 3, 2]), np.array([True] * 4 + [False] * 4)
    assert most_critical(scores, critical, 0.25, None).tolist() == [True] * 2 + [False] * 6
    assert most_critical(scores, critical, 0.4, 0.2).sum() == 5  # four critical rows count as one of five
    assert most_critical(scores, critical, 1.0, None).all()


def test_the_upper_layers_alone_score_known_rows_as_the_whole_model() -> None:
    from tests.experiments.upper_layers import keep_upper_layers
    from tests.models import build_model

    rows = [[5, 6, 7, 8, 9, 2], [10, 11, 12, 2]]
    batch = torch.tensor([rows[0], [*rows[1], 1, 1]])
    for architecture in ("llama", "gemma3_text"):
        model = build_model(architecture).eval()
        with torch.no_grad():
            whole = model(input_ids=batch, use_cache=False).logits
            keep_upper_layers(model, rows, 1, pad=1)
            upper = model(input_ids=batch, use_cache=False).logits
        torch.testing.assert_close(upper[0], whole[0], msg=architecture)
        torch.testing.assert_close(upper[1, :4], whole[1, :4], msg=architecture)
