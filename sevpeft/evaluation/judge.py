"""A language model that rates answers by a rubric, at an OpenAI-compatible URL; off unless the recipe names one.

The judge does not see which arm wrote an answer. The order of the answer and the doctor's answer is drawn by the row's
id, the same for all arms. The texts are sent as JSON, so that no text can end its own quotation.

Consultations are sent to the host in the recipe only: redirects are not followed, and for this machine's own address
the environment's proxies are not used. No message contains the key. Messages repeat the status of a reply and not its
text, because error pages quote requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from sevpeft.console import row_progress
from sevpeft.errors import DataError, RecipeError, RunError, UsageError
from sevpeft.evaluation.generate import EvaluationRows
from sevpeft.evaluation.scores import Scores, judge_metrics
from sevpeft.recipe import JUDGE_KEY, JudgeSection
from sevpeft.recipe.load import read_yaml

JUDGEMENTS = "judgements.jsonl"
PACKAGE_RUBRIC = Path(__file__).parent / "rubrics" / "answers.yaml"
# Characters read at the end of a reply, and stored of its reason and of an unreadable reply.
_LONGEST_REPLY, _LONGEST_REASON, _LONGEST_SHOWN = 10_000, 300, 500
# If more than half of this many replies are unreadable, the judge is stopped.
_ENOUGH = 20
# Attempts per reply, seconds before the second one (doubled for each later one), and the longest accepted retry-after.
_TRIES, _PAUSE, _LONGEST_WAIT = 4, 1.0, 120.0
# Scale → the judge's word in lower case → rating.
_RATINGS: dict[str, dict[str, int | str]] = {
    "1-5": {text: number for number in range(1, 6) for text in (f"{number}", f"{number}.0")},
    "yes-no": {"yes": "yes", "true": "yes", "نعم": "yes", "no": "no", "false": "no", "لا": "no"},
}
# Scale → its description in the prompt, and its value in the example form, which is no rating if the judge copies it.
_SCALES = {"1-5": ("a whole number from 1 to 5", "1|2|3|4|5"), "yes-no": ('"yes" or "no"', "yes|no")}
_REMEDIES = {
    **dict.fromkeys(range(300, 400), "it redirects; set evaluation.judge.url to the final address"),
    **dict.fromkeys((401, 403), f"put a valid key into the environment variable {JUDGE_KEY}"),
    404: "check evaluation.judge.model, and evaluation.judge.url, which often ends in /v1",
    429: "run this again later, or lower evaluation.judge.concurrency",
}
Words = Annotated[str, Field(min_length=1)]


class Item(BaseModel):
    """One item of a rubric; rubrics/answers.yaml explains the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    label: Annotated[Words, Field(max_length=24)]
    scale: Literal["1-5", "yes-no"]
    better: Literal["higher", "lower"]
    asks: Words
    definition: Words


class Rubric(BaseModel):
    """The items by which an answer is rated, and the judge's instructions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, regex_engine="python-re")

    name: Words
    instructions: Words
    # "reason" is reserved for the judge's explanation.
    items: dict[Annotated[str, Field(pattern=r"^(?!reason$)[a-z][a-z_]*$")], Item] = Field(min_length=1)

    @classmethod
    def load(cls, path: Path = PACKAGE_RUBRIC) -> Rubric:
        """Raises DataError: the file cannot be read, or is not a rubric."""
        try:
            return cls.model_validate(read_yaml(path.read_text(encoding="utf-8"), str(path)))
        except (OSError, ValueError, RecipeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not valid YAML"}
            problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
            how = f"write evaluation.judge.rubric in the form of {PACKAGE_RUBRIC}"
            raise DataError(f"{path} is not a rubric ({problem}); {how}.") from None

    def full_instructions(self) -> str:
        """The part of the prompt that all answers share. Its hash is the version of the rubric."""
        items = [f'- "{name}" ({_SCALES[item.scale][0]}): {item.asks.strip()}\n' for name, item in self.items.items()]
        form = {**{name: _SCALES[item.scale][1] for name, item in self.items.items()}, "reason": "..."}
        return (
            f"{self.instructions.strip()}\n\nRate:\n{''.join(items)}\nReply with one JSON object and nothing else, "
            f"with exactly these keys; reason is one short sentence in English that quotes nothing:\n{json.dumps(form)}"
        )

    def prompt(self, identity: str, question: str, reference: str, answer: str) -> str:
        """The prompt for one answer."""
        texts = [("answer", answer), ("doctor_answer", reference)]
        if hashlib.sha256(identity.encode()).digest()[0] % 2:
            texts.reverse()
        shown = json.dumps(dict([("question", question), *texts]), ensure_ascii=False, indent=1)
        return f"{self.full_instructions()}\n\n{shown}"

    def read(self, reply: str) -> tuple[dict[str, int | str], str] | None:
        """Item → rating, and the reason; None if a reply has no verdict, or two different ones."""
        # The thinking of a model may contain several ratings, and may be cut off before the final one.
        text = reply.rpartition("</think>")[2]
        verdicts = []
        for braces in re.findall(r"\{[^{}]*\}", text[-_LONGEST_REPLY:]) if "<think>" not in text else ():
            try:
                verdict = json.loads(braces)
            except ValueError:
                continue
            ratings = {
                name: _RATINGS[item.scale][word]
                for name, item in self.items.items()
                if (word := str(verdict.get(name)).strip().lower()) in _RATINGS[item.scale]
            }
            if len(ratings) == len(self.items):
                verdicts.append((ratings, " ".join(str(verdict.get("reason") or "").split())[:_LONGEST_REASON]))
        return verdicts[0] if verdicts and all(ratings == verdicts[0][0] for ratings, _ in verdicts) else None


class Judge:
    """The judge of a recipe; its settings are checked before any slow work and before any text is sent."""

    def __init__(self, settings: JudgeSection) -> None:
        if not settings.url:
            raise UsageError("Read a sheet with `sevpeft report FOLDER evaluation.judge.file=FILE`, or set judge.url.")
        self.rubric = Rubric.load(Path(settings.rubric) if settings.rubric else PACKAGE_RUBRIC)
        self.metrics = judge_metrics({name: item.model_dump() for name, item in self.rubric.items.items()})
        version = hashlib.sha256(self.rubric.full_instructions().encode()).hexdigest()[:12]
        self.about = {**settings.model_dump(include={"model", "max_tokens"}), "rubric": f"{self.rubric.name} {version}"}
        self.settings, parts = settings, urlsplit(settings.url)
        self.host, key = parts.netloc, os.environ.get(JUDGE_KEY, "").strip()
        self.on_this_machine = _on_this_machine(parts.hostname or "")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"The key in {JUDGE_KEY} has blanks or special characters; set the variable again.")
        if key and parts.scheme == "http" and not self.on_this_machine:
            remedy = "use https in evaluation.judge.url, or unset the variable"
            raise UsageError(f"The key in {JUDGE_KEY} would be sent to {self.host} without encryption; {remedy}.")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._body: dict[str, Any] = settings.model_dump(include={"model", "max_tokens"})
        self._body |= {"temperature": 0, "response_format": {"type": "json_object"}}

    def rate(
        self,
        rows: EvaluationRows,
        answers: Mapping[str, Sequence[str]],
        kept: Mapping[tuple[str, str], Mapping[str, Any]],
        keep: Callable[[list[dict[str, Any]]], None],
        console: Console,
    ) -> tuple[dict[str, Scores], list[str]]:
        """Rates the answers (column → (n,)) that have no verdict yet; returns column → judge_ITEM → (n,), and notes.

        `kept`: (column, id) → line of an earlier verdict, with the digest of its prompt; `keep` adds lines to it. A
        RunError if the judge is unreachable, or most replies are unreadable. NaN is an unreadable verdict.
        """
        missing: dict[tuple[str, ...], str] = {}
        for column, texts in answers.items():
            for identity, *three in zip(rows.ids, rows.questions, rows.references, texts, strict=True):
                prompt = self.rubric.prompt(identity, *three)
                digest = hashlib.sha256(prompt.encode()).hexdigest()[:24]
                if (column, identity) not in kept:
                    missing[column, identity, digest] = prompt
                elif kept[column, identity]["digest"] != digest:
                    raise RunError(f"{JUDGEMENTS} has verdicts on other answers; move it away.")

        def on_reply(place: tuple[str, ...], reply: str | None) -> None:
            ratings, reason = self.rubric.read(reply or "") or (None, "")
            line = dict(zip(("arm", "id", "digest"), place, strict=True)) | {"ratings": ratings, "reason": reason}
            keep([line | ({} if ratings else {"reply": reply and reply[:_LONGEST_SHOWN]})])
            done(1)
            unreadable = sum(line["ratings"] is None for line in kept.values())
            if len(kept) >= _ENOUGH and 2 * unreadable > len(kept):
                remedy = f"move {JUDGEMENTS} away, and use another judge or raise evaluation.judge.max_tokens"
                raise RunError(f"{unreadable} of {len(kept)} replies have no verdict; {remedy}.")

        if missing:
            console.print(
                f"Judge: {len(missing):,} answers, each with its question and reference answer, go to {self.host} "
                f"({'this' if self.on_this_machine else 'another'} machine) with "
                f"{f'the key in {JUDGE_KEY}' if self._headers else 'no key'}, model {self.about['model']}.",
                soft_wrap=True,
            )
            with row_progress(console, "Judge", len(missing)) as done:
                asyncio.run(self.ask(missing, on_reply))
        scores, notes = dict[str, Scores](), []
        for column in answers:
            verdicts = [kept[column, identity]["ratings"] for identity in rows.ids]
            unreadable = verdicts.count(None)
            for item in self.rubric.items if unreadable < len(rows) else ():
                ratings = [np.nan if one is None else {"yes": 1, "no": 0}.get(one[item], one[item]) for one in verdicts]
                scores.setdefault(column, {})[f"judge_{item}"] = np.array(ratings, dtype=np.float64)
            if unreadable:
                notes.append(f"Judge: {unreadable:,} of {len(rows):,} answers ({column}) got no readable verdict.")
        if "temperature" not in self._body:
            notes.append("Judge: it accepts no temperature, so another run may rate the same answer differently.")
        return scores, notes

    async def ask(self, prompts: Mapping[Any, str], on_reply: Callable[[Any, str | None], None]) -> None:
        """Sends all prompts, several at once; `on_reply` gets a prompt's key and its reply, None if it was refused."""
        # The shortest prompt is sent first and alone: a refusal is then due to the settings, not to the length.
        (first, *others) = sorted(prompts.items(), key=lambda one: len(one[1]))
        gate = asyncio.Semaphore(self.settings.concurrency)
        async with httpx.AsyncClient(
            headers=self._headers, follow_redirects=False, trust_env=not self.on_this_machine, timeout=None
        ) as client:

            async def work(key: Any, prompt: str) -> None:
                async with gate:
                    on_reply(key, await self._reply(client, prompt))

            reply = await self._reply(client, first[1])
            if reply is None:  # some servers lack response_format, others use another name for max_tokens
                self._body = {"model": self.settings.model}
                reply = await self._reply(client, first[1])
                if reply is None:
                    raise RunError(f"The judge at {self.host} rejects the request; check evaluation.judge.model.")
            on_reply(first[0], reply)
            await asyncio.gather(*(work(*one) for one in others))

    async def _reply(self, client: httpx.AsyncClient, prompt: str) -> str | None:
        """Text of the reply; "" if it is not a chat completion, None if the server rejects this prompt."""
        body = {**self._body, "messages": [{"role": "user", "content": prompt}]}
        problem = ""
        for attempt in range(_TRIES):
            wait = _PAUSE * 2**attempt
            try:
                # A limit for the whole reply: httpx limits single reads, which a slow stream never exceeds.
                sent = client.post(f"{self.settings.url}/chat/completions", json=body)
                response = await asyncio.wait_for(sent, self.settings.timeout)
            except asyncio.TimeoutError:
                problem = f"did not answer within {self.settings.timeout:g} seconds; raise evaluation.judge.timeout"
            except httpx.RequestError as error:
                problem = f"cannot be reached ({type(error).__name__}); check that it runs, and evaluation.judge.url"
            else:
                status = response.status_code
                if status == 200:
                    try:
                        text = json.loads(response.content)["choices"][0]["message"]["content"]
                    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                        text = ""
                    return text if isinstance(text, str) else ""
                if status in (400, 413, 422):
                    return None
                problem = f"answers with status {status}; {_REMEDIES.get(status, 'see its log, and run this again')}"
                if status != 429 and status < 500:
                    break
                requested = response.headers.get("retry-after", "")
                wait = max(wait, float(requested) if re.fullmatch(r"\d+(\.\d+)?", requested) else 0.0)
            if attempt == _TRIES - 1 or wait > _LONGEST_WAIT:
                break
            await asyncio.sleep(wait)
        raise RunError(f"The judge at {self.host} {problem}. The same command continues from the finished verdicts.")


def _on_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
