"""The page in a real Chromium: Arabic from right to left, answers that stream, and nothing that leaves this machine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from sevpeft.evaluation.safety import rules
from sevpeft.sharing.chat import Chat
from tests.evaluation.test_report_browser import CHROMIUM, DRIVER, browser  # noqa: F401

pytest.importorskip("gradio", reason='gradio is not installed (pip install "sevpeft[web]")')

ATTACK = '<img src=x onerror="document.title=1">${document.title=2}{{value}}<script>document.title=3</script>'
RED_FLAG = "بابا عنده ألم شديد في الصدر وضيق تنفس"


class Scripted(Chat):
    """Says the next word when the test lets it; its model is none."""

    def __init__(self) -> None:
        self.source = rules()
        self.words, self.asked = threading.Semaphore(0), list[tuple[str, list[Any], bool]]()
        self.began, self.closed, self.ended = threading.Event(), threading.Event(), threading.Event()

    def stream(self, question: str, earlier: Any = (), *, adapter: bool = True) -> Iterator[str]:
        self.asked.append((question, [*earlier], adapter))
        self.began.set()
        text = "راجع" if adapter else "base"
        try:
            for word in ("", " الطبيب", " اليوم"):
                while not self.words.acquire(timeout=0.05):  # a real one also has something to say, now and then
                    yield text
                text += word
                yield text
        finally:
            self.closed.set()


@pytest.fixture(scope="module")
def contacted() -> Iterator[list[str]]:
    """Addresses and names that this process tries to reach, with all libraries switched to online."""
    from huggingface_hub import constants

    found: list[str] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, to: found.append(str(to[0])) or connect(self, to))
        patch.setattr(
            socket, "getaddrinfo", lambda host, *of, **how: found.append(str(host)) or resolve(host, *of, **how)
        )
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setattr(constants, name, False)
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, contacted: list[str]) -> Iterator[Any]:
    """One server for all tests: the page that compares and takes comments."""
    from sevpeft.sharing.web import Page

    chat, comments = Scripted(), tmp_path_factory.mktemp("web") / "comments.jsonl"
    page = Page(chat, compare=True, comments=comments)
    yield SimpleNamespace(page=page, chat=chat, comments=comments, url=page.launch("127.0.0.1", None, None))
    page.blocks.close(verbose=False)


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def texts(browser: Any, selector: str) -> list[str]:  # noqa: F811
    script = "return Array.from(document.querySelectorAll(arguments[0]), (one) => one.textContent.trim())"
    return list(browser.execute_script(script, selector))


def ask(browser: Any, url: str, question: str) -> None:  # noqa: F811
    if url:
        browser.get(url)
    (box,) = until(lambda: browser.find_elements("css selector", "#question textarea"))
    box.send_keys(question)
    browser.find_element("id", "send").click()


needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium or chromedriver is missing")


@needs_browser
def test_a_question_in_arabic_brings_a_notice_and_two_answers_that_stream(
    browser: Any,  # noqa: F811
    pages: Any,
    contacted: list[str],
) -> None:
    browser.get_log("browser")
    size = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    ask(browser, pages.url, f"{RED_FLAG} {ATTACK}")
    assert until(lambda: texts(browser, ".emergency")), "the notice stands there before a word of the answer"
    answers = "#bubbles .answer .bubble"
    assert until(lambda: texts(browser, answers) == ["راجع"]) and "وضيق تنفس" in texts(browser, "mark.critical")
    assert texts(browser, ".severity strong") == ["حرجة"] and len(texts(browser, ".severity .bar span")) == 3
    for released, expected in ((2, ["راجع الطبيب"]), (1, ["راجع الطبيب اليوم", "base"])):
        pages.chat.words.release(released)
        assert until(lambda expected=expected: texts(browser, answers) == expected), (expected, texts(browser, answers))
    pages.chat.words.release(3)
    assert until(lambda: texts(browser, answers)[-1:] == ["base الطبيب اليوم"])
    assert [adapter for *_, adapter in pages.chat.asked] == [True, False]
    directions = browser.execute_script(
        "return Array.from(document.querySelectorAll('.bubble, .emergency'), (one) =>"
        " [one.getAttribute('dir'), getComputedStyle(one).direction])"
    )
    assert directions == [["auto", "rtl"]] * 3 + [["auto", "ltr"]]
    root = browser.execute_script(
        "const {lang, dir, scrollWidth} = document.documentElement; return [lang, dir, scrollWidth]"
    )
    assert root == ["ar", "rtl", 375]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "width": 1280, "mobile": False})
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280
    # Nothing of the texts runs, and nothing comes from or goes to elsewhere.
    assert texts(browser, ".bubble.question") == [f"{RED_FLAG} {ATTACK}"] and browser.title == "sevpeft"
    assert browser.get_log("browser") == []
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((one) => new URL(one.name).hostname)"
    )
    assert {*fetched} == {"127.0.0.1"} and {*contacted} <= {"127.0.0.1", "localhost", "None"}
    # The next question has this exchange before it; a comment is kept with it.
    pages.chat.words.release(6)
    ask(browser, "", "ومتى؟")
    assert until(lambda: len(pages.chat.asked) == 4)
    assert pages.chat.asked[-1][1] == [(f"{RED_FLAG} {ATTACK}", "راجع الطبيب اليوم")]
    assert until(lambda: texts(browser, answers)[-1:] == ["base الطبيب اليوم"] and len(texts(browser, answers)) == 4)
    browser.find_element("css selector", "#comment textarea, #comment input").send_keys("حسن")
    browser.find_element("id", "save").click()
    (line,) = until(lambda: pages.comments.exists() and pages.comments.read_text(encoding="utf-8").splitlines())
    saved = json.loads(line)
    assert (saved["question"], saved["comment"]) == ("ومتى؟", "حسن") and len(saved["answers"]) == 2
    assert pages.comments.stat().st_mode & 0o777 == 0o600


@needs_browser
def test_a_second_tab_waits_and_a_closed_one_ends_its_answer(browser: Any, pages: Any) -> None:  # noqa: F811
    pages.page._recent.clear()
    pages.chat.began.clear()
    ask(browser, "" if browser.current_url.startswith(pages.url) else pages.url, "سؤال أول")
    assert pages.chat.began.wait(10)
    pages.chat.closed.clear()
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    ask(browser, pages.url, "سؤال ثان")
    colors = "return Array.from(document.querySelectorAll(arguments[0]), (of) => getComputedStyle(of).color)"
    shown = {*browser.execute_script(colors, ".not-a-doctor, .not-a-doctor *")}
    assert shown == {"rgb(31, 41, 55)"}, "dark on yellow, also in a dark page"
    time.sleep(0.3)
    assert pages.chat.asked[-1][0] == "سؤال أول", "one answer at a time"
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.close()
    browser.switch_to.window(second)
    assert pages.chat.closed.wait(10), "nobody reads it any more"
    assert until(lambda: pages.chat.asked[-1][0] == "سؤال ثان")
    pages.chat.closed.clear()
    browser.find_element("xpath", "//button[contains(., 'أوقف')]").click()
    assert pages.chat.closed.wait(10)
    assert until(lambda: texts(browser, ".answer .bubble")) == ["راجع"]


def test_what_cannot_be_asked_stays_in_the_box_with_a_plain_sentence(
    pages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sevpeft.errors import UsageError
    from sevpeft.sharing.web import A_MINUTE, MOST_LETTERS

    def respond(question: str, host: str = "10.0.0.1") -> tuple[str, str]:
        pages.chat.words.release(6)
        *_, (box, html, _) = pages.page.respond(question, [], SimpleNamespace(client=SimpleNamespace(host=host)))
        return box, html

    long = f"{RED_FLAG} " * MOST_LETTERS
    for question, word in (("  ", "فارغ"), ("؟!", "فارغ"), (long, "طويل")):
        box, html = respond(question)
        assert box == question and word in html and ("emergency" in html) == (question == long), word
    with monkeypatch.context() as context:  # what the model itself refuses, in English
        context.setattr(pages.chat, "stream", Mock(side_effect=UsageError("900 words are too long.")))
        box, html = respond("عندي زكام", "10.0.0.3")
        assert box == "عندي زكام" and "أقصر" in html and "900 words" in html
    assert all(respond("عندي زكام")[0] == "" for _ in range(A_MINUTE))
    assert "انتظر" in respond("عندي زكام")[1] and respond("عندي زكام", "10.0.0.2")[0] == ""
    assert pages.page.save("تعليق", [])[0] == "تعليق" and pages.page.save(" ", [{}])[0] == " "


def test_a_page_for_others_asks_for_a_password(
    pages: Any, sevpeft_: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    password = "SEVPEFT_WEB_PASSWORD"
    for words in (["--host", "0.0.0.0"], ["--host", "::"], ["--host", ""], ["--auth", "a"], ["--auth", "a:b"]):
        code, _, err = sevpeft_("web", tmp_path, *words)
        assert code == 2 and password in err, words
    monkeypatch.setenv(password, "secret")
    assert sevpeft_("web", tmp_path, "--auth", "a:b")[0] == 2
    for words in ([], ["--host", "localhost"], ["--host", "127.0.0.2"], ["--host", "0.0.0.0", "--auth", "a"]):
        code, _, err = sevpeft_("web", tmp_path, *words)
        assert code == 1 and "runs/NAME-DATE" in err and "secret" not in err, words
    from sevpeft.errors import UsageError
    from sevpeft.sharing.web import Page

    (tmp_path / "recipe.yaml").write_text("mine: true\n")
    for place in (tmp_path, tmp_path / "recipe.yaml"):  # comments are appended, and a file of another kind is no place
        code, _, err = sevpeft_("web", tmp_path, "--comments", place)
        assert code == 2 and ".jsonl" in err
    assert (tmp_path / "recipe.yaml").read_text() == "mine: true\n"
    served: list[Any] = []
    chat = Scripted()
    chat.ended.set()  # as if Ctrl-C came at once
    with monkeypatch.context() as patch:
        patch.setattr("sevpeft.cli.sharing._loaded", lambda *of: served.append(of) or chat)
        patch.setattr(Page, "launch", lambda self, *of: served.append((len(self.arms), *of)) or "http://here")
        words = (
            "web",
            "run",
            "generation.seed=1",
            "--compare",
            "--comments",
            "c.jsonl",
            "--host",
            "0.0.0.0",
            "--auth",
            "a",
        )
        code, out, _ = sevpeft_(*words)
    assert code == 0 and out.startswith("http://here") and "secret" not in out
    assert served == [("run", ["generation.seed=1"], "web"), (2, "0.0.0.0", None, ("a", "secret"))]
    assert Path("c.jsonl").stat().st_mode & 0o777 == 0o600
    taken = int(pages.url.rstrip("/").rpartition(":")[2])
    for host, port in (("127.0.0.1", taken), ("192.0.2.1", None), ("::1", None)):
        with pytest.raises(UsageError, match="--port"):
            Page(pages.chat).launch(host, port, None)
