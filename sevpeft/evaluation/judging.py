"""Has the answers of an evaluation rated by a judge, keeps every verdict, and turns them into scores beside the others.

Off unless the recipe names a judge. A verdict belongs to the exact text that the judge was asked (its digest), so one
that was given before, here or in a file to replay, is never asked for again, and never taken for another answer. Equal
answers are judged once. A reply that is no verdict is kept as such and counted: it becomes no rating.

Judged are the arms and, beside the base model, the constant answer as a floor. The doctors' own answers are not: the
judge sees them as the reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sevpeft.errors import RunError, UsageError
from sevpeft.evaluation.judge_endpoint import Endpoint
from sevpeft.evaluation.judge_model import LocalJudge
from sevpeft.evaluation.metrics import Metric, Scores, judge_metrics
from sevpeft.evaluation.predictions import RowFile
from sevpeft.evaluation.progress import RowProgress
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.evaluation.rubric import Rubric, Verdict
from sevpeft.recipe import JUDGE_KEY, JudgeSection, Recipe

JUDGEMENTS = "judgements.jsonl"
_FIELDS = ("digest", "ratings", "reason")
# With more than half of so many replies unreadable, the rest is not worth asking for.
_ENOUGH_TO_TELL = 20
# Of an unreadable reply, so that its owner sees what the judge said instead.
_SHOWN = 500
# Digest → verdict, None for a reply that was none.
_Known = dict[str, Verdict | None]


@dataclass(frozen=True)
class Judged:
    """What came out.

    Attributes:
        scores: column → judge_ITEM → (n,), NaN where there is no sound verdict.
        about: for evaluation.json.
        notes: what a reader has to know before believing a figure.
    """

    scores: dict[str, Scores]
    about: dict[str, Any]
    notes: list[str]


class Judging:
    """The judge of a recipe, checked before anything slow happens and before anything is sent.

    Raises:
        SevpeftError: the rubric, the file to replay, the key or the local model cannot be used.
    """

    def __init__(self, recipe: Recipe, settings: JudgeSection, console: Console) -> None:
        self.settings, self.console = settings, console
        self.rubric = Rubric.load(Path(settings.rubric) if settings.rubric else None)
        self.model = settings.model or ""
        self.replayed: _Known = {}
        if settings.file:
            self._replay(Path(settings.file))
        self.engine: Endpoint | LocalJudge | None = None
        if settings.url:
            self.engine = Endpoint(settings, lambda reply: self.rubric.read(reply) is not None)
        elif settings.model:
            self.engine = LocalJudge(recipe, settings, console)

    @property
    def metrics(self) -> dict[str, Metric]:
        """Score → its meaning."""
        return {metric.name: metric for metric in judge_metrics(self.rubric).values()}

    def judge(
        self, rows: EvaluationRows, answers: Mapping[str, Sequence[str]], folder: Path, origin: Mapping[str, Any]
    ) -> Judged:
        """Judges what was not judged yet.

        Args:
            answers: column → the answers (n,) to the rows.
            folder: where judgements.jsonl stands.
            origin: what the answers were made from.

        Raises:
            RunError: the judge cannot be reached, refuses, or talks nonsense; finished verdicts are kept.
        """
        about = {"model": self.model, "rubric": self.rubric.version, "max_tokens": self.settings.max_tokens}
        kept = RowFile(folder / JUDGEMENTS, {**origin, "judge": about}, _FIELDS)
        prompts: dict[str, str] = {}
        digests: dict[tuple[str, str], str] = {}
        for column, texts in answers.items():
            for at, identity in enumerate(rows.ids):
                prompt = self.rubric.prompt(identity, rows.questions[at], rows.references[at], texts[at])
                digest = hashlib.sha256(f"{self.model}\n{prompt}".encode()).hexdigest()[:24]
                digests[column, identity], prompts[digest] = digest, prompt
        known = self._known(kept, digests)
        # Also what a file or another arm's equal answer gave stands in the run, so that it is whole by itself.
        there = {(column, identity) for column in answers for identity in kept.rows(column)}
        copied = [
            self._line(place, digest, known[digest])
            for place, digest in digests.items()
            if digest in known and place not in there
        ]
        if copied:
            kept.append(copied)
        missing = {digest: prompt for digest, prompt in prompts.items() if digest not in known}
        if missing and self.engine is not None:
            self._ask(missing, digests, known, kept)
        return self._judged(rows, digests, known)

    def _known(self, kept: RowFile, digests: Mapping[tuple[str, str], str]) -> _Known:
        """Digest → verdict of what was judged before, the run's own file first."""
        known: _Known = {}
        for column in dict.fromkeys(column for column, _ in digests):
            for identity, line in kept.rows(column).items():
                if (column, identity) not in digests:
                    continue
                if line["digest"] != digests[column, identity]:
                    raise RunError(
                        f"{kept.path} holds verdicts on other answers than these; move it away to have them judged "
                        "anew."
                    )
                known[line["digest"]] = self._verdict(line, kept.path)
        wanted = set(digests.values())
        return {digest: one for digest, one in self.replayed.items() if digest in wanted} | known

    def _ask(
        self, missing: dict[str, str], digests: Mapping[tuple[str, str], str], known: _Known, kept: RowFile
    ) -> None:
        assert self.engine is not None
        places: dict[str, list[tuple[str, str]]] = {}
        for place, digest in digests.items():
            places.setdefault(digest, []).append(place)
        self._announce(len(missing))
        self._refuse_nonsense(known, kept.path)
        with RowProgress(self.console, "Judge", len(missing)) as progress:

            def take(digest: str, reply: str | None) -> None:
                verdict = self.rubric.read(reply) if reply is not None else None
                kept.append([self._line(place, digest, verdict, reply) for place in places[digest]])
                known[digest] = verdict
                progress(1)
                self._refuse_nonsense(known, kept.path)

            self.engine.ask(missing, take)

    def _line(
        self, place: tuple[str, str], digest: str, verdict: Verdict | None, reply: str | None = None
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"arm": place[0], "id": place[1], "digest": digest, "ratings": None, "reason": ""}
        if verdict is not None:
            return line | {"ratings": self.rubric.written(verdict), "reason": verdict.reason}
        return line | {"reply": reply[:_SHOWN] if reply is not None else None}

    def _announce(self, number: int) -> None:
        """Says before the first request where how much goes."""
        many = f"{number:,} answers, each with its question and reference answer,"
        if isinstance(self.engine, Endpoint):
            place = "this machine" if self.engine.on_this_machine else "another machine"
            key = f"the key in {JUDGE_KEY}" if self.engine.headers else "no key"
            self.console.print(
                f"Judge: {many} go to {self.engine.host} ({place}) with {key}, model {self.model}.", soft_wrap=True
            )
        else:
            self.console.print(f"Judge: {many} are rated by {self.model} in this process.", soft_wrap=True)

    def _refuse_nonsense(self, known: _Known, path: Path) -> None:
        unsound = sum(verdict is None for verdict in known.values())
        if len(known) >= _ENOUGH_TO_TELL and 2 * unsound > len(known):
            raise RunError(
                f"{unsound} of the first {len(known)} replies of the judge {self.model} are no verdicts; choose a "
                "model that follows instructions, or raise evaluation.judge.max_tokens for one that thinks before it "
                f"answers, and move {path} away."
            )

    def _judged(self, rows: EvaluationRows, digests: Mapping[tuple[str, str], str], known: _Known) -> Judged:
        scores: dict[str, Scores] = {}
        notes: list[str] = []
        counts: dict[str, dict[str, int]] = {}
        for column in dict.fromkeys(column for column, _ in digests):
            found = [known.get(digests[column, identity]) for identity in rows.ids]
            sound = sum(verdict is not None for verdict in found)
            asked = sum(digests[column, identity] in known for identity in rows.ids)
            counts[column] = {"judged": sound, "unreadable": asked - sound, "never asked": len(rows) - asked}
            if sound:
                scores[column] = {
                    f"judge_{item}": np.array([np.nan if one is None else one.ratings[item] for one in found])
                    for item in self.rubric.items
                }
            lacking = {"got no readable verdict": asked - sound, "have none in the file": len(rows) - asked}
            for told, number in lacking.items():
                if number:
                    notes.append(
                        f"Judge: {number:,} of {len(rows):,} answers ({column}) {told}; its scores leave them out."
                    )
        if isinstance(self.engine, Endpoint) and "temperature" in self.engine.left_out:
            notes.append("Judge: it takes no temperature, so that the same answer may be rated otherwise next time.")
        about = {"model": self.model, "rubric": self.rubric.version, "answers": counts}
        return Judged(scores, about, notes)

    def _verdict(self, line: Mapping[str, Any], path: Path) -> Verdict | None:
        """The verdict of a line that was kept; read with the rubric again, because files are edited."""
        if line["ratings"] is None:
            return None
        verdict = self.rubric.read(json.dumps({**dict(line["ratings"]), "reason": line["reason"]}))
        if verdict is None:
            raise RunError(f"{path} holds ratings that the rubric does not know; move it away, or bring it back whole.")
        return verdict

    def _replay(self, path: Path) -> None:
        about = path.with_suffix(".about.json")
        try:
            judge = json.loads(about.read_text(encoding="utf-8"))["judge"]
            model, rubric = str(judge["model"]), str(judge["rubric"])
            lines = path.read_bytes().splitlines(keepends=True)
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{path} cannot be replayed, because it or {about.name} beside it is missing or damaged; name the "
                f"{JUDGEMENTS} of a run in evaluation.judge.file."
            ) from None
        if self.model not in ("", model):
            raise UsageError(
                f"{path} holds verdicts of {model}, and evaluation.judge.model is {self.model}; leave one of them out."
            )
        if rubric != self.rubric.version:
            raise UsageError(
                f"{path} was judged by the rubric {rubric}, and this one is {self.rubric.version}; name its rubric in "
                "evaluation.judge.rubric."
            )
        self.model = model
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                known = str(line["digest"]), self._verdict(line, path)
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break  # a kill cut it off
                raise RunError(f"Line {number} of {path} cannot be read; take it out.") from None
            self.replayed.setdefault(*known)
