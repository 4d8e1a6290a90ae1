"""Turns a question with its answer into the text that a judge is asked, and the judge's reply into ratings.

A rubric is a file of items, each a number from 1 to 5 or a yes or no. The judge is not told which arm wrote the answer;
whether the answer or the doctor's comes first is drawn by the row's id, the same for all arms, so that a preference
for the first or the last text falls on no arm. The texts are handed over as JSON, out of which no text can break, and
the reply has to be JSON too: what is not one sound verdict is no verdict, because a guessed rating would be a figure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sevpeft.errors import DataError

REASON = "reason"
# Characters: of a judge that goes on and on the end is read, and of its reason the beginning is kept.
_LONGEST_REPLY, _LONGEST_REASON = 10_000, 300
_YES_NO = {"yes": 1.0, "no": 0.0, "نعم": 1.0, "لا": 0.0, "true": 1.0, "false": 0.0}


class Item(BaseModel):
    """One thing that is rated."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    label: str = Field(min_length=1, max_length=24)
    scale: Literal["1-5", "yes-no"]
    better: Literal["higher", "lower"]
    asks: str = Field(min_length=1)
    definition: str = Field(min_length=1)

    def rating(self, given: Any) -> float | None:
        """What was given as a number: 1 to 5, or 0 and 1 for no and yes; None for anything else."""
        if self.scale == "yes-no":
            return _YES_NO.get(str(given).strip().lower()) if isinstance(given, str | bool) else None
        if isinstance(given, str) and re.fullmatch(r"\s*[1-5]\s*", given):
            given = int(given)
        numeric = isinstance(given, int | float) and not isinstance(given, bool)
        return float(given) if numeric and given in (1, 2, 3, 4, 5) else None


@dataclass(frozen=True)
class Verdict:
    """Item → rating, and the judge's reason in a sentence."""

    ratings: dict[str, float]
    reason: str


class Rubric(BaseModel):
    """The items by which an answer is rated, and what the judge is told about them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=40)
    instructions: str = Field(min_length=1)
    items: dict[str, Item] = Field(min_length=1, max_length=20)

    @field_validator("items")
    @classmethod
    def _plain_names(cls, items: dict[str, Item]) -> dict[str, Item]:
        for name in items:
            if not re.fullmatch(r"[a-z][a-z_]*", name) or name == REASON:
                raise ValueError(f"{name!r} cannot be the name of an item; write small letters a to z and _")
        return items

    @classmethod
    def load(cls, path: Path | None = None) -> Rubric:
        """The rubric of a file, or the one that comes with sevpeft.

        Raises:
            DataError: the file cannot be read, or is no rubric.
        """
        where = str(path or "the rubric of sevpeft")
        try:
            source = path or files("sevpeft.evaluation").joinpath("rubrics", "answers.yaml")
            return cls.model_validate(yaml.safe_load(source.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            raise DataError(f"{where} cannot be read as YAML; name a rubric in evaluation.judge.rubric.") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{where} is no rubric: {place}: {first['msg'].removeprefix('Value error, ')}; see "
                "sevpeft/evaluation/rubrics/answers.yaml for the form."
            ) from None

    @property
    def version(self) -> str:
        """Name and content hash of all that a judge is told: ratings by another text are other ratings."""
        return f"{self.name} {hashlib.sha256(self._told().encode()).hexdigest()[:12]}"

    def prompt(self, identity: str, question: str, reference: str, answer: str) -> str:
        """What the judge is asked about one answer."""
        texts = [("answer", answer), ("doctor_answer", reference)]
        if hashlib.sha256(identity.encode()).digest()[0] % 2:
            texts.reverse()
        return f"{self._told()}\n\n{json.dumps(dict([('question', question), *texts]), ensure_ascii=False, indent=1)}"

    def read(self, reply: str) -> Verdict | None:
        """The verdict of a reply; None where it holds none, or two that differ."""
        found: list[Verdict] = []
        # What a model thinks before it answers may try several ratings, and may be cut off before it decides.
        text = reply.rpartition("</think>")[2]
        if "<think>" in text:
            return None
        text = text[-_LONGEST_REPLY:]
        at = text.find("{")
        while at >= 0:
            try:
                value, end = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError):
                value, end = None, at + 1
            if isinstance(value, Mapping) and (verdict := self._verdict(value)) is not None:
                found.append(verdict)
            at = text.find("{", end)
        return found[0] if found and all(one.ratings == found[0].ratings for one in found) else None

    def written(self, verdict: Verdict) -> dict[str, int | str]:
        """The ratings as the judge gives them and as they are kept: a number, or yes and no."""
        return {
            name: ("yes" if rating else "no") if self.items[name].scale == "yes-no" else int(rating)
            for name, rating in verdict.ratings.items()
        }

    def _verdict(self, value: Mapping[str, Any]) -> Verdict | None:
        ratings = {name: item.rating(value.get(name)) for name, item in self.items.items()}
        sound = {name: rating for name, rating in ratings.items() if rating is not None}
        reason = value.get(REASON)
        told = " ".join(reason.split())[:_LONGEST_REASON] if isinstance(reason, str) else ""
        return Verdict(sound, told) if len(sound) == len(ratings) else None

    def _told(self) -> str:
        asked = [f'- "{name}" ({_SCALES[item.scale]}): {item.asks.strip()}' for name, item in self.items.items()]
        form = {name: _FORMS[item.scale] for name, item in self.items.items()}
        return "\n".join(
            (
                self.instructions.strip(),
                "",
                "Rate:",
                *asked,
                "",
                f"Reply with one JSON object and nothing else, with exactly these keys; {REASON} is one short sentence "
                "in English that quotes nothing:",
                json.dumps({**form, REASON: "..."}),
            )
        )


_SCALES = {"1-5": "a whole number from 1 to 5", "yes-no": '"yes" or "no"'}
# No example of a rating: a model that copies the form must not have given a verdict.
_FORMS = {"1-5": "1|2|3|4|5", "yes-no": "yes|no"}
