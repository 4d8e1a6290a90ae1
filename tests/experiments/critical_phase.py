"""Experiment: does a critical phase after plain cross-entropy help critical cases at nobody else's cost?

    python -m tests.experiments.critical_phase train explore OUT --model FOLDER --data FILE --seed 0 --fold 0
    python -m tests.experiments.critical_phase choose OUT/explore.jsonl > CHOSEN
    python -m tests.experiments.critical_phase train final OUT --chosen CHOSEN --model … --data … --seed 0 --fold 0
    python -m tests.experiments.critical_phase analyze OUT/final.jsonl --chosen CHOSEN

A process trains the arms of one seed and fold (critical_phase_training.py) and appends the NLL of each test row to one
file, which all processes share. Settings, claim and rule of choice stand in critical_phase.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import yaml
from sklearn.metrics import roc_auc_score

from sevpeft.evaluation import statistics
from sevpeft.evaluation.statistics import Estimate, paired_difference
from sevpeft.recipe import EvaluationSection
from sevpeft.severity.probabilities import SEVERITIES

BRANCHES = ("phase", "replay", "late", "ce_extra")  # arms for which a way from CE is measured
CRITICAL, OTHERS = SEVERITIES[-1], SEVERITIES[:-1]
ORACLE = "gold"  # in the place of a routed share
SETTINGS = Path(__file__).with_suffix(".yaml")
WEIGHTINGS = ("token", "row")


class Arm(NamedTuple):
    """What is trained: its kind, whose severities it knows, and the rate and length of a phase."""

    kind: str
    labels: str = "none"
    rate: float = 0.0
    length: float = 0.0


class Point(NamedTuple):
    """An arm, how far from CE towards it, and the share of questions that it answers, CE the others."""

    arm: Arm
    interpolation: float = 1.0
    share: Any = 1.0

    def text(self) -> str:
        arm, text = self.arm, self.arm.kind
        text += f" {arm.rate:g}×{arm.length:g}" if arm.length else ""
        text += f" λ={self.interpolation:g}" if arm.kind in BRANCHES else ""
        text += f" routed={self.share}" if self.share != 1 else ""
        return f"{text} {arm.labels}" if arm.labels not in ("none", "gold") else text


def arms_of(settings: dict[str, Any], part: str, chosen: dict[str, Any] | None) -> list[Arm]:
    """The arms of one seed and fold: the exploration has the grid, the final what was chosen, and all controls.

    Where the settings name no kind of phase, fixed weights and their shuffled twins are all there is.
    """
    points = {*itertools.product(settings["kinds"], settings["rate"], settings["length"])}
    if chosen:
        points = {(one["kind"], one["rate"], one["length"]) for one in (chosen["primary"], *chosen["secondary"])}
    after = sorted(point for point in points if point[0] != "late")
    late = [Arm("late", "gold", 0.0, length) for length in sorted({point[2] for point in points if point[0] == "late"})]
    final, names = part == "final", list(settings["weights"])
    gold = [Arm(kind, "gold", *point) for kind, *point in after]
    extra = sorted({Arm("ce_extra", "none", *point) for _, *point in after})
    permuted = [arm._replace(labels="permuted") for arm in gold if final or arm.kind == "phase"]
    arms = [Arm("base"), Arm("ce"), *gold, *extra, *permuted]
    if final or not settings["kinds"]:
        arms += [Arm(name, labels) for name in names for labels in ("gold", "permuted")]
    if final:
        arms += [arm._replace(labels="predicted") for arm in gold]
        arms += [Arm(name, labels) for name in names for labels in ("predicted", "permuted-predicted")]
    # As long as a whole training each, so they come last.
    return [*arms, *late, *(arm._replace(labels="permuted") for arm in late if final)]


def train(settings: dict[str, Any], options: argparse.Namespace) -> None:
    from tests.experiments.critical_phase_training import Part

    chosen = yaml.safe_load(Path(options.chosen).read_text(encoding="utf-8")) if options.chosen else None
    if options.part == "final" and not chosen:
        raise SystemExit("The final needs --chosen, a file that `choose` wrote.")
    part = Part(settings, options)
    finished = part.finished()
    for arm in arms_of(settings, options.part, chosen):
        if arm in finished or (options.half and (arm.kind in settings["weights"]) != (options.half == "weights")):
            continue
        try:
            part.train_arm(arm)
        except Exception:  # the other arms go on
            print(f"{part.name} {arm} failed:\n{traceback.format_exc()}", flush=True)


# What was found.


@dataclass
class Results:
    """NLL per answer token of all rows, each measured by a model that never saw it; arrays are (seeds, rows)."""

    settings: dict[str, Any]
    seeds: list[int]
    severity: np.ndarray  # (rows,) names
    groups: np.ndarray  # (rows,) of the question
    tokens: np.ndarray  # (rows,) of the answer
    nll: dict[tuple[Arm, float], np.ndarray]  # by arm and interpolation; NaN where it failed
    routed: dict[tuple[str, Any], np.ndarray]  # by the router's labels and the share; bool
    about: list[dict[str, Any]]  # of each seed and fold

    @classmethod
    def load(cls, settings: dict[str, Any], path: Path | str) -> Results:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut by a kill
        about = {(one["seed"], one["fold"]): one for one in records if one["arm"] is None}
        seeds = sorted({seed for seed, _ in about})
        rows: dict[int, Any] = {}
        for one in about.values():
            rows |= zip(one["row"], zip(one["severity"], one["group"], one["tokens"], strict=True), strict=True)
        place = {row: number for number, row in enumerate(sorted(rows))}
        severity, groups, tokens = map(np.array, zip(*(rows[row] for row in place), strict=True))
        nll, routed = dict[Any, Any](), dict[Any, Any]()
        for one in records:
            told = about[one["seed"], one["fold"]]
            where = seeds.index(one["seed"]), [place[row] for row in told["row"]]
            if one["arm"] is not None:
                key = Arm(*one["arm"]), one["interpolation"]
                nll.setdefault(key, np.full((len(seeds), len(rows)), np.nan))[where] = one["nll"]
                continue
            is_critical, thinned = np.array(told["severity"]) == 2, told["critical_share"]
            for labels, share in itertools.product(told["router"], settings["share"]):
                part = routed.setdefault((labels, share), np.zeros((len(seeds), len(rows)), dtype=bool))
                part[where] = most_critical(np.array(told["router"][labels]), is_critical, share, thinned)
                routed[labels, ORACLE] = np.broadcast_to(severity == 2, part.shape)
        nll = {key: found / tokens for key, found in nll.items()}
        return cls(settings, seeds, np.array(SEVERITIES)[severity], groups, tokens, nll, routed, list(about.values()))

    def values(self, point: Point) -> np.ndarray:
        """(seeds, rows) of a point: of its arm where the router sends a question there, else of CE."""
        found = self.nll[point.arm, point.interpolation]
        labels = "gold" if point.arm.labels == "none" else point.arm.labels
        if point.share == 1:
            return found
        absent = np.isnan(found).all(axis=1, keepdims=True)  # seeds that were not trained are not CE
        return np.where(self.routed[labels, point.share] | absent, found, self.nll[CE.arm, 1.0])

    def difference(self, point: Point, other: Point, severity: str, weighting: str, level: float = 0.95) -> Estimate:
        """point − other on the rows of a severity; groups are questions, seeds a random factor."""
        rows = self.severity == severity
        pair = [self.values(one)[:, rows] for one in (point, other)]
        there = ~np.any([np.isnan(values).all(axis=1) for values in pair], axis=0)  # seeds of which both arms have rows
        settings = EvaluationSection(confidence_level=level, n_resamples=self.settings["resamples"])
        mass = self.tokens[rows] if weighting == "token" else None
        return paired_difference(*(values[there] for values in pair), self.groups[rows], settings, weights=mass)

    def claim(self, point: Point) -> bool:
        """One-sided tests, which must all pass: superior on critical rows, not inferior on each other severity."""
        level = 1 - 2 * self.settings["alpha"]

        def passes(other: Point, name: str, weighting: str) -> bool:
            found = self.difference(point, other, name, weighting, level)
            high = found.value if np.isnan(found.high) else found.high  # where CE answers all there is no spread
            return high < (0 if name == CRITICAL else self.settings["margin"])

        tests = [(other, CRITICAL) for other in self.baselines(point)] + [(CE, name) for name in OTHERS]
        return all(passes(*test, weighting) for test in tests for weighting in WEIGHTINGS)

    def baselines(self, point: Point) -> list[Point]:
        """CE and, of what comes after CE, CE with as many more steps, both as far and for the same questions."""
        extra = point._replace(arm=Arm("ce_extra", "none", point.arm.rate, point.arm.length))
        return [CE, extra] if (extra.arm, extra.interpolation) in self.nll else [CE]

    def points(self, labels: str = "gold") -> Iterator[Point]:
        for arm, interpolation in self.nll:
            if arm.kind in self.settings["kinds"] and arm.labels == labels:
                yield from (Point(arm, interpolation, share) for share in self.settings["share"])


CE = Point(Arm("ce"))


def most_critical(scores: np.ndarray, critical: np.ndarray, share: float, thinned: float | None) -> np.ndarray:
    """(n,) bool: the questions with the highest scores, a share of all.

    thinned: the share of critical rows in training, where it is another one; test rows are weighed to have it.
    """
    mass = np.ones(len(scores))
    if thinned:
        mass[critical] = thinned / (1 - thinned) * (~critical).sum() / max(critical.sum(), 1)
    order = np.argsort(-scores, kind="stable")
    chosen = np.empty(len(scores), dtype=bool)
    chosen[order] = np.cumsum(mass[order]) <= share * mass.sum() + 1e-9
    return chosen


def choose(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the points that the rule takes."""
    results = Results.load({**settings, "resamples": 100}, options.results)  # no interval is asked for

    def cost_and_gain(point: Point) -> tuple[float, float]:
        paid = [results.difference(point, CE, name, way) for name in OTHERS for way in WEIGHTINGS]
        gained = [results.difference(point, other, CRITICAL, "token").value for other in results.baselines(point)]
        return max(one.value + np.nan_to_num(one.standard_error) for one in paid), max(gained)

    measured = {point: cost_and_gain(point) for point in results.points()}

    def best(points: list[Point]) -> dict[str, Any]:
        within = [point for point in points if measured[point][0] <= settings["margin"]]
        cheapest = min(points, key=lambda point: measured[point][0])
        point = min(within, key=lambda point: measured[point][1]) if within else cheapest
        cost, gain = (round(float(value), 4) for value in measured[point])
        about = {"kind": point.arm.kind, "rate": point.arm.rate, "length": point.arm.length}
        return {**about, "interpolation": point.interpolation, "share": point.share, "critical": gain, "cost": cost}

    parts: dict[Any, list[Point]] = {}
    for point in measured:
        parts.setdefault((point.arm.kind, point.share == 1), []).append(point)
    found = {"primary": best(list(measured)), "secondary": [best(part) for _, part in sorted(parts.items())]}
    print(yaml.safe_dump(found, sort_keys=False), end="")


def analyze(settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints every arm against CE, and each chosen point against its controls too."""
    results = Results.load(settings, options.results)
    counts = {name: int((results.severity == name).sum()) for name in reversed(SEVERITIES)}
    print(f"{counts}, {len(np.unique(results.groups))} questions, seeds {results.seeds}")
    print(f"steps of CE: {[one['steps'] for one in results.about]}")
    for labels, known in results.about[0]["auc"].items():
        routers = [roc_auc_score(np.array(one["severity"]) == 2, one["router"][labels]) for one in results.about]
        known = np.mean([one["auc"][labels] for one in results.about])
        print(f"{labels} severities: AUC of critical {known:.3f}; of a router fitted on them {np.mean(routers):.3f}")
    print("Differences of NLL in nats per answer token with 95 % intervals; negative is better.\n")
    chosen = yaml.safe_load(Path(options.chosen).read_text(encoding="utf-8")) if options.chosen else {}
    points = list[tuple[str, Point, Point]]()
    named = [("PRIMARY", chosen["primary"]), *(("secondary", one) for one in chosen["secondary"])] if chosen else []
    for name, one in named:
        arm = Arm(one["kind"], "gold", one["rate"], one["length"])
        gold = Point(arm, one["interpolation"], one["share"])
        extra = Point(Arm("ce_extra", "none", arm.rate, arm.length), gold.interpolation, gold.share)
        permuted, predicted = (gold._replace(arm=arm._replace(labels=labels)) for labels in ("permuted", "predicted"))
        points += [(f"{name} − ce", gold, CE), ("  − ce_extra", gold, extra), ("  − permuted", gold, permuted)]
        points += [("  oracle − ce", gold._replace(share=ORACLE), CE), ("  permuted − ce", permuted, CE)]
        points += [("  predicted − ce", predicted, CE), ("  ce_extra − ce", extra, CE)]
    points += [("− ce", Point(Arm("base")), CE)]
    weighted = [arm for arm, _ in results.nll if arm.kind in settings["weights"]]
    points += [("− ce", Point(arm, 1.0, share), CE) for share in settings["share"] for arm in weighted]
    if options.all:
        labels = ("gold", "permuted", "predicted")
        points += [("− ce", point, CE) for name in labels for point in results.points(name)]
        points += [("− ce", Point(arm, way), CE) for arm, way in results.nll if arm.kind == "ce_extra"]
    for title, point, other in dict.fromkeys(points):
        if any((one.arm, one.interpolation) not in results.nll for one in (point, other)):
            continue
        verdict = "" if other != CE else ": CLAIM HOLDS" if results.claim(point) else ": claim fails"
        print(f"{title}: {point.text()}{verdict}")
        for weighting, name in itertools.product(WEIGHTINGS, counts):
            if (found := results.difference(point, other, name, weighting)).rows:
                seeds = " ".join(f"{value:+.3f}" for value in found.per_seed)
                figures = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
                print(f"    {weighting:5} {name:13} {figures}  seeds {seeds}")


def settings_of(path: Path) -> dict[str, Any]:
    """critical_phase.yaml, with what the file says otherwise."""

    def merged(whole: Any, other: Any) -> Any:
        if not (isinstance(whole, dict) and isinstance(other, dict)):
            return other
        return whole | {name: merged(whole.get(name), value) for name, value in other.items()}

    whole, other = (yaml.safe_load(one.read_text(encoding="utf-8")) for one in (SETTINGS, path))
    found = dict(merged(whole, other))
    return {**found, "weights": {name: ratio for name, ratio in found["weights"].items() if ratio}}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.experiments.critical_phase")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("part", choices=["explore", "final"])
    one.add_argument("output")
    for name, kind in (("--model", str), ("--data", str), ("--seed", int), ("--fold", int)):
        one.add_argument(name, type=kind, required=True)
    one.add_argument("--half", choices=["phases", "weights"], help="these arms only, so that two processes share them")
    one.add_argument("--rows", type=int, help="no more than so many, drawn at random, to try it")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], help="on a GPU bfloat16, on a CPU float32 by default")
    for verb in ("choose", "analyze"):
        verbs.add_parser(verb).add_argument("results")
    verbs.choices["analyze"].add_argument("--all", action="store_true", help="every point of the grid")
    for one in verbs.choices.values():
        one.add_argument("--settings", default=SETTINGS, help="what differs from critical_phase.yaml")
        one.add_argument("--chosen")
    options = parser.parse_args(words)
    settings = settings_of(Path(options.settings))
    with patch.object(statistics, "PERMUTATIONS", 99):  # no p is asked for
        {"train": train, "choose": choose, "analyze": analyze}[options.verb](settings, options)


if __name__ == "__main__":
    main()
