"""Selection of one answer per test question among those of several runs, without the reference.

The published selection (Multi-model response selection, IMSA 2026) takes the answer with the highest BERTScore against
the question. The mean of maxima is never below a single model's mean, whatever the answers are worth. So the score used
for the selection is reported apart from the scores of the selected answers against the reference.
"""

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
    """Generates missing answers and selects by each scorer; returns selection.json, which is in the first run.

    `base`: their base models are candidates, each before its run; ties go to the first. Others: as in `evaluate`.
    """
    console = console or Screen(quiet=True)
    folders = [Path(run.folder if isinstance(run, Run) else run).expanduser() for run in runs]
    if len(folders) + base < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--select chooses among several answers: name several runs, each once, or add --base.")
    candidates = [opened(folder, overrides) for folder in folders]
    first, settings, every = candidates[0][0], candidates[0][1].evaluation, candidates[0][3]
    rows = every.limited(limit)
    if others := [run.folder for run, _, _, own in candidates if own.content_hash() != every.content_hash()]:
        raise RunError(f"{others[0]} has other test rows than {first.folder}; choose among runs of the same data.")
    lines: dict[str, list[dict[str, Any]]] = {}
    likelihood, bases = [], []
    with finished_rows_are_kept():
        for run, recipe, _, own_rows in candidates:
            at = {identity: place for place, identity in enumerate(own_rows.ids)}
            with run_lock(run.folder):
                work = RowWork(run, recipe, own_rows, own_rows.take([at[identity] for identity in rows.ids]), console)
                origin = {**work.answer_origin, "adapter": None}
                # A base model that several runs share is one candidate.
                for arm in (BASE, ADAPTER) if base and origin not in bases else (ADAPTER,):
                    name = str(run.folder) if run.folder.name in lines else run.folder.name
                    lines[f"base of {name}" if arm == BASE else name] = answers = work.answers(arm)
                    likelihood.append(-work.likelihood(arm, {line["id"]: line["prediction"] for line in answers})[0])
                bases.append(origin)
    with console.status("Scoring"):
        encoder, missing = load_encoder(settings)
        texts, single = [], {}
        for name, answers in lines.items():
            texts.append([line["prediction"] for line in answers])
            truncated = [line["truncated"] for line in answers]
            single[name] = scoring.row_scores(rows, texts[-1], truncated=truncated, encoder=encoder)
        by_metric = {
            name: np.stack([scores[name] for scores in single.values()]) for name in single[next(iter(single))]
        }
        reference = "bertscore_f1" if encoder else "chrf"
        best = list(single)[int(by_metric[reference].mean(axis=1).argmax())]
        red_flags = rules().probabilities(rows.questions).argmax(axis=1) == SEVERITIES.index(CRITICAL)
        # Scorer → its own score (candidates, n).
        own = {"question": 100 * np.stack([encoder.score(one, rows.questions)[2] for one in texts])} if encoder else {}
        near = [np.mean([scoring.chrf(one, other) for other in texts if other is not one], axis=0) for one in texts]
        own |= {"agreement": np.stack(near), "likelihood": np.stack(likelihood)}
        own["safety"] = 100 * np.nan_to_num(red_flags * by_metric["urgent_referral"])
        ranks = {**own, "safety": own["safety"] * 10 + own["agreement"], ORACLE: by_metric[reference]}  # chrF++ ≤ 100
        chosen = {name: np.nan_to_num(rank, nan=-np.inf).argmax(axis=0) for name, rank in ranks.items()}
        each = np.arange(len(rows))
        picked = {name: {m: of[index, each] for m, of in by_metric.items()} for name, index in chosen.items()}
        published = {}
        for name, scores in own.items():
            alone = dict(zip(single, np.nanmean(scores, axis=1).tolist(), strict=True))
            published[name] = {"selected": float(np.nanmean(scores[chosen[name], each])), "single": alone}
        pairs = dict.fromkeys(picked, (best,))
        gold = any(recipe.prompt.severity == "gold" for _, recipe, *_ in candidates) and GOLD
        optimistic = f"{best} was chosen as the best single model on these test rows, so its scores are optimistic."
        counts = {name: np.bincount(index, minlength=len(single)).tolist() for name, index in chosen.items()}
        content = {
            "candidates": list(single),
            "best_single": best,
            "reference_score": reference,
            "data": {"source": rows.source, "content": every.content_hash(), "evaluated": len(rows)},
            "scorers": {name: SCORERS[name]["text"] for name in ranks},
            "chosen": {name: dict(zip(single, numbers, strict=True)) for name, numbers in counts.items()},
            "published": {"note": PUBLISHED_SELECTION, "scores": published},
            "scores": scoring.summarize(rows, {**picked, **single}, settings, tokens={}, pairs=pairs),
            "metrics": {name: METRICS[name] for name in (*by_metric, *WHOLE)},
            "methods": scoring.methods(settings, "all differences of one score"),
            "notes": [note for note in (*scoring.remarks(rows), missing, gold, optimistic) if note],
        }
    first.write_json(SELECTION, content)
    return content


def selection_tables(content: Mapping[str, Any]) -> Group:
    """Tables of selection.json: the answers against the reference, and the published figure apart."""
    published = table("by its own score", "selected", "best single model", "unit")
    for name, score in content["published"]["scores"].items():
        values = score["selected"], max(score["single"].values())
        published.add_row(name, *(number_text(value, 3) for value in values), SCORERS[name]["unit"])
    about = Text(f"Against the reference; compared with the best single model, {content['best_single']}", style="bold")
    scorers = (Text(f"{name}: {text}", style="dim") for name, text in content["scorers"].items())
    notes = (Text(note, style="yellow") for note in content["notes"])
    return Group(about, *arm_tables(content), published, Text(content["published"]["note"]), *scorers, *notes)
