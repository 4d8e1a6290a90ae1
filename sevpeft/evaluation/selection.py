"""Several runs answer the same test questions, and one answer to each is chosen without its reference.

The published selection (Multi-model response selection, IMSA 2026) takes the answer with the highest BERTScore against
the question. The mean of maxima is never below a single model's mean, whatever the answers are worth. So the score that
one selects by stands apart from the scores that the chosen answers have against the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.text import Text

from sevpeft.console import Screen, number_text
from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation import scores as scoring
from sevpeft.evaluation.arms import ADAPTER, BASE
from sevpeft.evaluation.bertscore import load_encoder
from sevpeft.evaluation.evaluate import RowWork, finished_rows_are_kept, opened
from sevpeft.evaluation.safety import WHOLE, rules
from sevpeft.evaluation.scores import CRITICAL, METRICS, PUBLISHED_SELECTION, SCORERS
from sevpeft.evaluation.tables import arm_tables, table
from sevpeft.runs import Run
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.source import ORACLE as GOLD
from sevpeft.training.checkpoints import run_lock

SELECTION, ORACLE = "selection.json", "oracle, unreachable"


def select(
    runs: Sequence[Run | Path | str],
    overrides: Sequence[str] = (),
    *,
    base: bool = False,
    limit: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answers what is not answered yet, and chooses by each scorer; returns selection.json, which is in the first run.

    `base`: the runs' base models are candidates too. overrides, limit: as in `evaluate`.
    """
    console = console or Screen(quiet=True)
    folders = [Path(run.folder if isinstance(run, Run) else run).expanduser() for run in runs]
    if len(folders) + base < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--select chooses among several answers: name several runs, each once, or add --base.")
    found = [opened(folder, overrides) for folder in folders]
    first, settings, every = found[0][0], found[0][1].evaluation, found[0][3]
    rows = every.limited(limit)
    if others := [run.folder for run, _, _, theirs in found if theirs.content_hash() != every.content_hash()]:
        raise RunError(f"{others[0]} has other test rows than {first.folder}; choose among runs of the same data.")
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
                    lines[f"base of {name}" if arm == BASE else name] = given = work.answers(arm)
                    likelihood.append(-work.likelihood(arm, {line["id"]: line["prediction"] for line in given})[0])
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
        red_flags = rules().probabilities(rows.questions).argmax(axis=1) == SEVERITIES.index(CRITICAL)
        # Scorer → its own score (candidates, n).
        own = {"question": 100 * np.stack([encoder.score(one, rows.questions)[2] for one in texts])} if encoder else {}
        near = [np.mean([scoring.chrf(one, other) for other in texts if other is not one], axis=0) for one in texts]
        own |= {"agreement": np.stack(near), "likelihood": np.stack(likelihood)}
        own["safety"] = 100 * np.nan_to_num(red_flags * by_metric["urgent_referral"])
        ranks = {**own, "safety": own["safety"] * 10 + own["agreement"], ORACLE: by_metric[reference]}  # chrF++ ≤ 100
        chosen = {name: np.nan_to_num(of, nan=-np.inf).argmax(axis=0) for name, of in ranks.items()}
        each = np.arange(len(rows))
        picked = {name: {m: of[index, each] for m, of in by_metric.items()} for name, index in chosen.items()}
        published = {}
        for name, of in own.items():
            alone = dict(zip(single, np.nanmean(of, axis=1).tolist(), strict=True))
            published[name] = {"selected": float(np.nanmean(of[chosen[name], each])), "single": alone}
        pairs = dict.fromkeys(picked, (best,))
        gold = any(recipe.prompt.severity == "gold" for _, recipe, *_ in found) and GOLD
        flattered = f"{best} was found to be the best single one on these test rows, which flatters it."
        counts = {name: np.bincount(index, minlength=len(single)).tolist() for name, index in chosen.items()}
        content = {
            "candidates": list(single),
            "best_single": best,
            "reference_score": reference,
            "data": {"source": rows.source, "content": every.content_hash(), "evaluated": len(rows)},
            "scorers": {name: SCORERS[name]["text"] for name in ranks},
            "chosen": {name: dict(zip(single, of, strict=True)) for name, of in counts.items()},
            "published": {"note": PUBLISHED_SELECTION, "scores": published},
            "scores": scoring.summarize(rows, {**picked, **single}, settings, tokens={}, pairs=pairs),
            "metrics": {name: METRICS[name] for name in (*by_metric, *WHOLE)},
            "methods": scoring.methods(settings, "all differences of one score"),
            "notes": [note for note in (*scoring.remarks(rows), missing, gold, flattered) if note],
        }
    first.write_json(SELECTION, content)
    return content


def selection_tables(content: Mapping[str, Any]) -> Group:
    """The contents of selection.json: the answers against the reference, and the published figure apart."""
    shown = table("by its own score", "selected", "best single one", "unit")
    for name, one in content["published"]["scores"].items():
        values = one["selected"], max(one["single"].values())
        shown.add_row(name, *(number_text(value, 3) for value in values), SCORERS[name]["unit"])
    about = Text(f"Against the reference; compared with the best single one, {content['best_single']}", style="bold")
    scorers = (Text(f"{name}: {text}", style="dim") for name, text in content["scorers"].items())
    notes = (Text(note, style="yellow") for note in content["notes"])
    return Group(about, *arm_tables(content), shown, Text(content["published"]["note"]), *scorers, *notes)
