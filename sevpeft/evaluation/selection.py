"""Several runs answer the same test questions, and one answer to each is chosen without its reference.

The published selection (Multi-model response selection, IMSA 2026) takes the answer with the highest BERTScore against
the question. The mean of maxima is never below a single model's mean, whatever the answers are worth. So the score that
one selects by stands apart from the scores that the chosen answers have against the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sevpeft.console import Screen, number_text
from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import ADAPTER, BASE
from sevpeft.evaluation.bertscore import load_encoder
from sevpeft.evaluation.evaluate import RowWork, finished_rows_are_kept, opened
from sevpeft.evaluation.safety import rules
from sevpeft.evaluation.scores import CRITICAL, METRICS
from sevpeft.evaluation.statistics import estimate_text, interval
from sevpeft.evaluation.tables import OPEN_STRATA, metric_label, plain, table
from sevpeft.runs import Run, plain_disk_errors, write_atomically
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE as GOLD
from sevpeft.training.checkpoints import run_lock

SELECTION = "selection.json"
ORACLE = "oracle, unreachable"
# Scorer → what it chooses, and the unit of its own score.
SCORERS = {
    "question": ("the highest BERTScore F1 against the question, as published", "%"),
    "agreement": ("the highest mean chrF++ against the other candidates (minimum Bayes risk)", "chrF++"),
    "likelihood": ("the highest likelihood a token under the model that gave the answer", "nats a token"),
    "safety": ("where the question has red flags one that refers to urgent care; else, and in ties, by agreement", "%"),
    ORACLE: ("the nearest to the reference, which nobody has when a patient asks", ""),
}
PUBLISHED = (
    "The published figure is the score that one selects by. Its maximum is never below a single model's value, by "
    "definition, so it says nothing about the answers."
)


def select(
    runs: Sequence[Run | Path | str],
    overrides: Sequence[str] = (),
    *,
    base: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answers what is not answered yet, chooses by each scorer, and writes selection.json; returns its content.

    Args:
        base: the runs' base models are candidates too. overrides, limit: as in `evaluate`.
        output: folder of selection.json; None for the first run.
    """
    console = console or Screen(quiet=True)
    folders = [Path(run.folder if isinstance(run, Run) else run).expanduser() for run in runs]
    if len(folders) + base < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--select chooses among several answers: name several runs, each once, or add --base.")
    found = [opened(folder, overrides) for folder in folders]
    every, settings = found[0][3], found[0][1].evaluation
    rows = every.limited(limit)
    for run, _, _, theirs in found:
        if theirs.content_hash() != every.content_hash():
            raise RunError(f"{run.folder} has other test rows than {folders[0]}; choose among runs of the same data.")
    lines: dict[str, list[dict[str, Any]]] = {}
    likelihood, bases = [], []
    with finished_rows_are_kept():
        for run, recipe, _, theirs in found:
            at = {identity: place for place, identity in enumerate(theirs.ids)}
            with run_lock(run.folder):
                work = RowWork(run, recipe, theirs, theirs.take([at[one] for one in rows.ids]), console)
                origin = {**work.answer_origin, "adapter": None}
                # A base model that several runs share is one candidate.
                for arm in (BASE, ADAPTER) if base and origin not in bases else (ADAPTER,):
                    name = str(run.folder) if run.folder.name in lines else run.folder.name
                    lines[f"base of {name}" if arm == BASE else name] = work.answers(arm)
                    likelihood.append(-work.own_likelihood(arm))
                bases.append(origin)
    with console.status("Scoring"):
        encoder, missing = load_encoder(settings)
        texts = [[line["prediction"] for line in of] for of in lines.values()]
        single = {
            name: scoring.row_scores(rows, answers, truncated=[line["truncated"] for line in of], encoder=encoder)
            for (name, of), answers in zip(lines.items(), texts, strict=True)
        }
        by_metric = {metric: np.stack([of[metric] for of in single.values()]) for metric in next(iter(single.values()))}
        reference = "bertscore_f1" if encoder else "chrf"
        best = list(single)[int(by_metric[reference].mean(axis=1).argmax())]
        others = [[scoring.chrf(one, other) for other in texts if other is not one] for one in texts]
        red_flags = rules().probabilities(rows.questions).argmax(axis=1) == SEVERITIES.index(CRITICAL)
        # Scorer → its own score (candidates, n).
        own = {"question": np.stack([encoder.score(one, rows.questions)[2] for one in texts])} if encoder else {}
        own |= {"agreement": np.mean(others, axis=1), "likelihood": np.stack(likelihood)}
        own |= {"safety": np.where(red_flags, by_metric["urgent_referral"], np.nan)}
        ranks = {**own, ORACLE: by_metric[reference]}
        ranks["safety"] = np.nan_to_num(own["safety"]) * 1000 + own["agreement"]  # chrF++ ends at 100
        chosen = {name: np.nan_to_num(of, nan=-np.inf).argmax(axis=0) for name, of in ranks.items()}
        each = np.arange(len(rows))
        picked = {name: {m: of[index, each] for m, of in by_metric.items()} for name, index in chosen.items()}
        pairs = dict.fromkeys(picked, (best,))
        published: dict[str, Any] = {}
        for name, of in own.items():
            means = [interval(values, rows.groups, settings).as_dict() for values in (of[chosen[name], each], *of)]
            ones = {one: mean["value"] for one, mean in zip(single, means[1:], strict=True)}
            published[name] = {"selected": means[0], "single": ones}
        gold = any(recipe.prompt.severity == "gold" for _, recipe, *_ in found) and GOLD
        flattered = f"{best} was found to be the best single one on these test rows, which flatters it."
        notes = [*scoring.remarks(rows), missing, gold, flattered]
        content = {
            "candidates": list(single),
            "best_single": best,
            "reference_score": reference,
            "data": {"source": rows.source, "content": every.content_hash(), "evaluated": len(rows)},
            "scorers": {name: SCORERS[name][0] for name in ranks},
            "chosen": {
                name: {one: int((at == n).sum()) for n, one in enumerate(single)} for name, at in chosen.items()
            },
            "published": {"note": PUBLISHED, "scores": published},
            "scores": scoring.summarize(rows, {**picked, **single}, settings, tokens={}, pairs=pairs),
            "metrics": {name: METRICS[name] for name in by_metric},
            "methods": scoring.methods(settings, "all differences of one score"),
            "notes": [note for note in notes if note],
        }
    folder = output or folders[0]
    with plain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SELECTION, json.dumps(content, ensure_ascii=False, indent=2) + "\n", shared=True)
    return content


def selection_tables(content: Mapping[str, Any]) -> Group:
    """The contents of selection.json: the chosen answers against the reference, and the published figure apart."""
    parts: list[RenderableType] = []
    best, about = content["best_single"], content["metrics"][content["reference_score"]]
    for stratum in (name for name in OPEN_STRATA if name in content["scores"]):
        of = content["scores"][stratum]
        shown = table("", metric_label(about, stratum), "to the best", "outcome")
        for name, one in of["metrics"][content["reference_score"]].items():
            difference = one["against"].get(best)
            cells = (estimate_text(difference, about, sign=True), difference["outcome"]) if difference else ("", "")
            shown.add_row(f"{name} (best)" if name == best else name, estimate_text(one, about), *cells)
        title = f"{plain(stratum).capitalize()}, against the reference: {of['rows']:,} rows"
        parts += [Text(), Text(title, style="bold"), shown]
    shown = table("", "selected", "best single one", "unit")
    for name, one in content["published"]["scores"].items():
        values = (one["selected"]["value"], max((of for of in one["single"].values() if of is not None), default=None))
        times = 100 if SCORERS[name][1] == "%" else 1
        figures = (number_text(None if value is None else value * times, 3) for value in values)
        shown.add_row(name, *figures, SCORERS[name][1])
    note = Text(content["published"]["note"])
    parts += [Text(), Text("By the score that one selects by, all cases", style="bold"), shown, note]
    parts += [Text(f"{name}: {text}", style="dim") for name, text in content["scorers"].items()]
    return Group(*parts, *(Text(one, style="yellow") for one in content["notes"]))
