"""A page in Arabic on which an adapter answers: gradio's server with bubbles of our own (templates/web.html.jinja).

Nothing is fetched from elsewhere and nothing sent there: no analytics, fonts, tunnel or history, and a policy that
forbids it to the browser. All texts are escaped. One answer is made at a time, whoever asks.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Template

from sevpeft.data.text import ARABIC
from sevpeft.errors import SevpeftError, UsageError, first_sentence
from sevpeft.runs import keep_private
from sevpeft.severity.probabilities import is_answer
from sevpeft.sharing.chat import Chat

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and at each start

import gradio as gr

# Letters of a question or comment; questions of one address in a minute; questions of all that wait for their turn.
MOST_LETTERS, A_MINUTE, MOST_WAITING = 4_000, 10, 16
_TEMPLATES = Path(__file__).parent / "templates"
_LOOK = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # its own are fetched
    "css_paths": _TEMPLATES / "web.css",
    **{"footer_links": [], "quiet": True, "prevent_thread_lock": True, "max_file_size": 1},
    **dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False),
}
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The page of one adapter; `compare` puts the base model beside it, `comments` (a JSONL file) brings a box."""

    def __init__(self, chat: Chat, *, compare: bool = False, comments: Path | None = None) -> None:
        self.chat, self.comments, self._asked = chat, comments, list[tuple[str, float]]()
        self.arms = {"النموذج المدرَّب": True} | ({"النموذج الأصلي": False} if compare else {})
        self._template = Template((_TEMPLATES / "web.html.jinja").read_text(encoding="utf-8"), autoescape=True)
        with gr.Blocks(title="sevpeft", analytics_enabled=False) as self.blocks:
            gr.HTML(self._html(part="about"))
            turns, bubbles = gr.State([]), gr.HTML(self._html(), elem_id="bubbles")
            text = {"max_length": MOST_LETTERS, "rtl": True}
            question = gr.Textbox(label="سؤالك", lines=3, max_lines=12, elem_id="question", **text)
            with gr.Row():
                send = gr.Button("أرسل", variant="primary", min_width=90, elem_id="send")
                stop, new = (gr.Button(words, min_width=90) for words in ("أوقف الجواب", "محادثة جديدة"))
            gr.Examples(self._html(part="examples").split("\n"), [question], label="أمثلة", elem_id="examples")
            every = [question, bubbles, turns]
            asked = send.click(self.respond, [question, turns], every, concurrency_limit=1, **_PRIVATE)
            stop.click(lambda known: self._html(known, done=True), turns, bubbles, cancels=[asked], **_PRIVATE)
            new.click(lambda: ("", self._html(), []), None, every, cancels=[asked], **_PRIVATE)
            if comments:
                comment = gr.Textbox(label="تعليقك على الجواب", elem_id="comment", **text)
                save, saved = gr.Button("احفظ التعليق", elem_id="save"), gr.HTML(elem_id="saved")
                save.click(self.save, [comment, turns], [comment, saved], **_PRIVATE)

    def launch(self, host: str, port: int | None, login: tuple[str, str] | None) -> str:
        """Serves the page in threads of its own and returns its address; UsageError where it cannot listen there."""
        where = {"server_name": host, "server_port": port, "auth": login, "head": self._html(part="head")}
        try:
            socket.create_server((host, port or 0)).close()  # gradio would try a hundred ports, 5 s each
            return str(self.blocks.queue(max_size=MOST_WAITING).launch(**where, **_LOOK)[1])
        except OSError as error:
            raise UsageError(f"{host}: {first_sentence(error)}; choose another --host or --port.") from error

    def respond(self, question: str, turns: list[Any], request: gr.Request) -> Iterator[tuple[str, str, list[Any]]]:
        """Box, bubbles and turns {question, severity, answers}, as answers grow; what is refused stays in the box."""
        severity, answers = self.chat.severity(question[: 5 * MOST_LETTERS]), dict[str, str]()
        now = [*turns, {"question": question.strip(), "severity": severity, "answers": answers}]
        earlier = [(known["question"], next(iter(known["answers"].values()))) for known in turns]
        host, when = request.client.host if request.client else "", time.monotonic()
        self._asked = [one for one in self._asked if one[1] > when - 60]
        try:
            if len(question) > MOST_LETTERS:
                raise UsageError(f"السؤال طويل: فيه {len(question):,} حرفاً، والحد {MOST_LETTERS:,}. اختصره ثم أرسله.")
            if not is_answer(question):
                raise UsageError("السؤال فارغ: اكتبه أولاً.")
            if sum(known == host for known, _ in self._asked) >= A_MINUTE:
                raise UsageError("أسئلة كثيرة في دقيقة واحدة: انتظر قليلاً ثم أرسل.")
            self._asked.append((host, when))
            for arm, adapter in self.arms.items():
                for answers[arm] in chain([""], self.chat.stream(question.strip(), earlier, adapter=adapter)):
                    yield "", self._html(now), now
            yield "", self._html(now, done=True), now
        except SevpeftError as error:
            problem = str(error) if ARABIC.search(str(error)) else f"تعذّر الجواب؛ جرّب سؤالاً أقصر. ({error})"
            yield question, self._html(turns, done=True, problem=problem, notice=severity.notice), turns

    def save(self, comment: str, turns: list[Any]) -> tuple[str, str]:
        """Adds a comment to the file, with the last question and its answers; returns its box, and what is said."""
        if not self.comments or not turns or not comment.strip() or len(comment) > MOST_LETTERS:
            return comment, "اسأل أولاً، ثم اكتب تعليقاً قصيراً."
        asked = {**turns[-1], "severity": turns[-1]["severity"].probabilities, "comment": comment.strip()}
        with self.comments.open("a", encoding="utf-8") as file:
            keep_private(self.comments)
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asked}, ensure_ascii=False) + "\n")
        return "", "حُفظ التعليق مع السؤال والجواب."

    def _html(self, turns: Sequence[dict[str, Any]] = (), part: str = "bubbles", **more: Any) -> str:
        return self._template.render(part=part, turns=turns, comments=self.comments, **more)
