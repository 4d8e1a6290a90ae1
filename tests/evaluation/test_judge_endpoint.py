"""A judge that is slow, strict, lost or broken costs one plain sentence; its key and the texts stand in none."""

from __future__ import annotations

import email.utils
import json
import re
import time
from typing import Any

import pytest

from sevpeft.errors import RunError, SevpeftError, UsageError
from sevpeft.evaluation import judge_endpoint
from sevpeft.evaluation.judge_endpoint import Endpoint
from sevpeft.evaluation.rubric import Rubric
from sevpeft.recipe import JUDGE_KEY, JudgeSection
from tests.evaluation.judge_server import GOOD, KEY, Play, Request, good, serving, slow

RUBRIC = Rubric.load()
ASKED = {
    f"d{n}": RUBRIC.prompt(f"row {n}", "عندي ألم في الصدر", "راجع الطوارئ", "لا تقلق " * (n + 1)) for n in range(6)
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_endpoint, "_PAUSE", 0.01)
    monkeypatch.delenv(JUDGE_KEY, raising=False)


def ask(url: str, **settings: Any) -> dict[str, str | None]:
    replies: dict[str, str | None] = {}
    endpoint = Endpoint(JudgeSection(model="judge", url=url, **settings), lambda reply: RUBRIC.read(reply) is not None)
    endpoint.ask(ASKED, replies.__setitem__)
    return replies


def refusal(play: Play, **settings: Any) -> str:
    with serving(play) as server, pytest.raises(SevpeftError) as caught:
        ask(server.url, **settings)
    said = str(caught.value)
    assert "\n" not in said and KEY not in said and "الصدر" not in said
    return said


def test_every_prompt_is_asked_for_once_with_the_key_and_without_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JUDGE_KEY, f" {KEY}\n")
    with serving(good) as server:
        replies = ask(server.url)
    assert replies == dict.fromkeys(ASKED, json.dumps(GOOD))
    assert sorted(request.prompt for request in server.requests) == sorted(ASKED.values())
    for request in server.requests:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert {key: request.body[key] for key in ("model", "temperature", "max_tokens")} == {
            "model": "judge",
            "temperature": 0,
            "max_tokens": 512,
        }


def test_no_other_variable_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(other, KEY)
    with serving(good) as server:
        ask(server.url)
    assert all("Authorization" not in request.headers for request in server.requests)


def test_several_are_under_way_at_once_and_no_more_than_asked_for() -> None:
    under_way: list[int] = []
    now = 0

    def counting(request: Request) -> tuple[int, Any]:
        nonlocal now
        now += 1
        under_way.append(now)
        time.sleep(0.05)
        now -= 1
        return good(request)

    with serving(counting) as server:
        ask(server.url, concurrency=3)
    assert max(under_way) == 3 and len(under_way) == 6


def test_an_unreadable_reply_is_asked_for_once_more_and_then_given_back_as_it_is() -> None:
    with serving(lambda request: (200, "I cannot judge.")) as server:
        assert ask(server.url) == dict.fromkeys(ASKED, "I cannot judge.")
    assert len(server.requests) == 2 * len(ASKED)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 9_000]
)
def test_what_is_no_chat_completion_is_an_empty_reply(body: bytes) -> None:
    with serving(lambda request: (200, body)) as server:
        assert set(ask(server.url).values()) == {""}


def test_an_endless_reply_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_endpoint, "_LARGEST_BODY", 1000)
    with serving(lambda request: (200, json.dumps(GOOD) + "x" * 300_000)) as server:
        assert set(ask(server.url).values()) == {""}


def test_a_setting_that_the_server_does_not_know_is_left_out() -> None:
    def strict(request: Request) -> tuple[int, Any]:
        for name in ("temperature", "max_tokens"):
            if name in request.body:
                return 400, f"Unsupported parameter: '{name}'".encode()
        return (400, b"bad request") if "response_format" in request.body else good(request)

    with serving(strict) as server:
        assert set(ask(server.url).values()) == {json.dumps(GOOD)}
    assert server.requests[-1].body["max_completion_tokens"] == 512
    assert len(server.requests) == len(ASKED) + 3


def test_a_prompt_that_is_too_long_for_the_judge_costs_that_row_only() -> None:
    longest = max(map(len, ASKED.values()))
    with serving(lambda request: (400, b"too long") if len(request.prompt) == longest else good(request)) as server:
        replies = ask(server.url)
    assert [key for key, reply in replies.items() if reply is None] == ["d5"] and len(replies) == 6


def test_a_busy_or_failing_server_is_asked_again() -> None:
    def moody(request: Request) -> tuple[int, Any]:
        return {0: (429, {"Retry-After": "0"}), 1: (503, b""), 2: (0, b"")}.get(request.number) or good(request)

    with serving(moody) as server:
        assert set(ask(server.url).values()) == {json.dumps(GOOD)}


def test_the_wait_that_the_server_asks_for_is_kept() -> None:
    with serving(lambda request: (429, {"Retry-After": "0.3"}) if request.number == 0 else good(request)) as server:
        begun = time.monotonic()
        ask(server.url)
    assert time.monotonic() - begun > 0.3


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (
            lambda request: (401, KEY.encode()),
            rf"wants a key, and none is in .* {JUDGE_KEY}",
        ),
        (lambda request: (404, b""), r"knows no model judge or no such address \(404\).*often ends in /v1"),
        (lambda request: (429, {"Retry-After": "9000"}), r"\(429\); run this again in 9,000 seconds"),
        (lambda request: (429, {}), r"\(429\); run this again later"),
        (lambda request: (500, b""), r"fails \(500\)"),
        (lambda request: (400, b""), r"refuses the request \(400\)"),
        (lambda request: (0, b""), r"cannot be reached \(RemoteProtocolError\)"),
        (lambda request: (302, {"Location": "https://evil.example/?q=1"}), r"redirects to evil.example \(302\)"),
    ],
)
def test_what_a_server_refuses_is_one_sentence_with_the_remedy(play: Play, said: str) -> None:
    message = refusal(play)
    assert re.search(said, message) and message.endswith("and the same command goes on from them.")


def test_a_refused_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JUDGE_KEY, KEY)
    assert f"refuses the key in the environment variable {JUDGE_KEY} (401)" in refusal(lambda _: (401, KEY.encode()))


def test_a_slow_judge_is_given_up_on() -> None:
    assert "did not answer within 0.05 seconds; raise evaluation.judge.timeout" in refusal(slow, timeout=0.05)


def test_a_reply_that_drips_for_ever_is_given_up_on() -> None:
    # Every single read is in time.
    assert "did not answer within 0.1 seconds" in refusal(lambda request: (200, [b" "] * 8), timeout=0.1)


def test_a_judge_that_is_not_there_is_named() -> None:
    with serving(good) as server:
        url = server.url
    with pytest.raises(RunError, match=r"The judge at 127.0.0.1:\d+ cannot be reached \(ConnectError\)"):
        ask(url)


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JUDGE_KEY, KEY)
    with serving(good) as other:
        refusal(lambda request: (307, {"Location": f"{other.url}/chat/completions"}))
    assert other.requests == []


def test_on_this_machine_no_proxy_sees_a_consultation(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(good) as proxy, serving(good) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        ask(server.url)
    assert proxy.requests == [] and len(server.requests) == 6


@pytest.mark.parametrize("key", ["two words", "مفتاح", "sk-\x07"])
def test_what_can_be_no_key_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(JUDGE_KEY, key)
    with pytest.raises(UsageError) as caught:
        ask("http://127.0.0.1:9/v1")
    assert JUDGE_KEY in str(caught.value) and key not in str(caught.value)


def test_a_key_does_not_travel_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JUDGE_KEY, KEY)
    with pytest.raises(UsageError, match=r"would be readable on its way to judge.example; write https") as caught:
        Endpoint(JudgeSection(model="judge", url="http://judge.example/v1"), bool)
    assert KEY not in str(caught.value)
    Endpoint(JudgeSection(model="judge", url="https://judge.example/v1"), bool)


def test_this_machine_is_known_from_others() -> None:
    for url, here in (
        ("http://localhost:1/v1", True),
        ("http://127.0.0.2/v1", True),
        ("http://[::1]:1/v1", True),
        ("http://0.0.0.0/v1", False),
        ("http://localhost.example/v1", False),
        ("http://10.0.0.1/v1", False),
    ):
        assert Endpoint(JudgeSection(model="judge", url=url), bool).on_this_machine == here


def test_a_date_to_come_back_at_is_understood() -> None:
    later = email.utils.formatdate(time.time() + 500, usegmt=True)
    assert 490 < judge_endpoint._seconds(later) <= 500
    assert [judge_endpoint._seconds(said) for said in ("", "soon", "-5", "nan", "7")] == [0, 0, 0, 0, 7]
