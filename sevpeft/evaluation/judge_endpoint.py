"""Asks a judge at an OpenAI-compatible URL (POST /chat/completions), several answers at once.

Consultations go to the host that the recipe names and to no other: a redirect is not followed, and for this machine's
own address no proxy of the environment is used. The key is read from the environment and stands in no message; of what
a server says only the status is repeated, because error pages quote requests.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from sevpeft.errors import RunError, UsageError
from sevpeft.recipe import JUDGE_KEY, JudgeSection

# Tries for one reply, and the seconds before the second; each later wait is twice as long.
_TRIES, _PAUSE = 4, 1.0
# A server that asks for more patience than this is come back to with the same command.
_LONGEST_WAIT = 120.0
_LARGEST_BODY = 1 << 20
# Settings that some servers refuse, with what is sent instead.
_REFUSABLE = ("response_format", "max_tokens", "temperature")
_KEPT = "Finished verdicts are kept, and the same command goes on from them."
_TOO_MUCH = (400, 413, 422)

Sound = Callable[[str], bool]
OnReply = Callable[[str, str | None], None]


class Endpoint:
    """An OpenAI-compatible endpoint.

    Args:
        settings: with model and url.
        sound: whether a reply is a verdict; one that is not is asked for once more.

    Raises:
        UsageError: the key would be readable on its way, or can be no key.
    """

    def __init__(self, settings: JudgeSection, sound: Sound) -> None:
        assert settings.url is not None
        self.settings, self.sound = settings, sound
        parts = urlsplit(settings.url)
        self.host = parts.netloc
        self.on_this_machine = _on_this_machine(parts.hostname or "")
        self.headers = self._key_header(parts.scheme)
        self.body: dict[str, Any] = {
            "model": settings.model,
            "temperature": 0,
            "max_tokens": settings.max_tokens,
            "response_format": {"type": "json_object"},
        }
        self.left_out: list[str] = []

    def ask(self, asked: Mapping[str, str], on_reply: OnReply) -> None:
        """Asks for every prompt.

        Args:
            asked: key → prompt.
            on_reply: told the key and the reply as soon as it is there; None where this prompt was refused.

        Raises:
            RunError: in one sentence, when the judge cannot be asked any further.
        """
        asyncio.run(self._ask_all(asked, on_reply))

    async def _ask_all(self, asked: Mapping[str, str], on_reply: OnReply) -> None:
        # The shortest goes alone: what is refused then is the settings and not the length.
        waiting = iter(sorted(asked.items(), key=lambda one: len(one[1])))
        async with self._client() as client:
            for key, prompt in waiting:
                on_reply(key, await self._sound_reply(client, prompt, first=True))
                break
            work = [
                asyncio.create_task(self._work_off(client, waiting, on_reply)) for _ in range(self.settings.concurrency)
            ]
            try:
                await asyncio.gather(*work)
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    def _client(self) -> httpx.AsyncClient:
        try:
            return httpx.AsyncClient(
                headers=self.headers,
                timeout=self.settings.timeout,
                follow_redirects=False,
                trust_env=not self.on_this_machine,
            )
        except (ValueError, ImportError, OSError, httpx.InvalidURL):
            raise UsageError(
                "The proxy or certificates that this machine's environment names cannot be used for the judge; correct "
                "HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE."
            ) from None

    async def _work_off(self, client: httpx.AsyncClient, waiting: Iterator[tuple[str, str]], on_reply: OnReply) -> None:
        for key, prompt in waiting:
            on_reply(key, await self._sound_reply(client, prompt))

    async def _sound_reply(self, client: httpx.AsyncClient, prompt: str, first: bool = False) -> str | None:
        reply = await self._reply(client, prompt, first)
        return reply if reply is None or self.sound(reply) else await self._reply(client, prompt, first)

    async def _reply(self, client: httpx.AsyncClient, prompt: str, first: bool) -> str | None:
        """What the judge says; empty for what is no chat completion."""
        pause, tries = _PAUSE, 0
        while True:
            problem, wait = "", pause
            try:
                status, headers, content = await asyncio.wait_for(self._post(client, prompt), self.settings.timeout)
            except (asyncio.TimeoutError, httpx.TimeoutException):
                problem = (
                    f"did not answer within {self.settings.timeout:g} seconds; raise evaluation.judge.timeout or lower "
                    "evaluation.judge.concurrency"
                )
            except httpx.RequestError as error:
                problem = f"cannot be reached ({type(error).__name__}); see whether it runs and evaluation.judge.url"
            else:
                if status == 200:
                    return _content(content)
                if status in _TOO_MUCH:
                    if first and self._settle_for_less(content):
                        continue
                    if not first:
                        return None
                problem = self._refusal(status, headers)
                if status != 429 and status < 500:
                    raise RunError(self._said(problem))
                wait = max(wait, _seconds(headers.get("retry-after", "")))
            tries += 1
            if tries >= _TRIES or wait > _LONGEST_WAIT:
                raise RunError(self._said(problem))
            await asyncio.sleep(wait)
            pause *= 2

    async def _post(self, client: httpx.AsyncClient, prompt: str) -> tuple[int, httpx.Headers, bytes]:
        body = {**self.body, "messages": [{"role": "user", "content": prompt}]}
        async with client.stream("POST", f"{self.settings.url}/chat/completions", json=body) as response:
            content = b""
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _LARGEST_BODY:
                    break
            return response.status_code, response.headers, content

    def _settle_for_less(self, content: bytes) -> bool:
        """Leaves out, or names anew, a setting that the server does not know; False when there is none left."""
        words = content.decode(errors="replace")
        named = [name for name in _REFUSABLE if name in self.body and name in words]
        # Some servers refuse without a name; the JSON format is what they lack most often.
        if not named and "response_format" in self.body:
            named = ["response_format"]
        if not named:
            return False
        if named[0] == "max_tokens":
            self.body["max_completion_tokens"] = self.body["max_tokens"]
        del self.body[named[0]]
        self.left_out.append(named[0])
        return True

    def _refusal(self, status: int, headers: httpx.Headers) -> str:
        if status in (401, 403):
            sent = "refuses the key in" if self.headers else "wants a key, and none is in"
            return f"{sent} the environment variable {JUDGE_KEY} ({status}); put a valid one there"
        if status == 404:
            return (
                f"knows no model {self.settings.model} or no such address (404); check evaluation.judge.model, and "
                "evaluation.judge.url, which often ends in /v1"
            )
        if 300 <= status < 400:
            target = urlsplit(headers.get("location", "")).hostname or "another address"
            return f"redirects to {target} ({status}), where nothing was sent; if that is right, name it in the url"
        if status == 429:
            seconds = _seconds(headers.get("retry-after", ""))
            later = f"in {seconds:,.0f} seconds" if seconds else "later"
            return f"has had too many requests (429); run this again {later}, or lower evaluation.judge.concurrency"
        if status >= 500:
            return f"fails ({status}); see its own log, and run this again when it is well"
        return f"refuses the request ({status}); check evaluation.judge.model and evaluation.judge.max_tokens"

    def _said(self, problem: str) -> str:
        return f"The judge at {self.host} {problem}. {_KEPT}"

    def _key_header(self, scheme: str) -> dict[str, str]:
        key = os.environ.get(JUDGE_KEY, "").strip()
        if not key:
            return {}
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"The environment variable {JUDGE_KEY} holds no key: it has blanks or special letters.")
        if scheme == "http" and not self.on_this_machine:
            raise UsageError(
                f"The key in {JUDGE_KEY} would be readable on its way to {self.host}; write https in "
                "evaluation.judge.url, or unset that variable to send none."
            )
        return {"Authorization": f"Bearer {key}"}


def _on_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _content(content: bytes) -> str:
    try:
        said = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return said if isinstance(said, str) else ""


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header (RFC 9110, 10.2.3): a number of seconds or a date; 0 where there is none."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        found = email.utils.parsedate_tz(retry_after) if retry_after else None
        return max(0.0, email.utils.mktime_tz(found) - time.time()) if found else 0.0
