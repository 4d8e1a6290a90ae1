"""Web page in Arabic for chat with an adapter: gradio's server with its own HTML (templates/web.html.jinja).

The page sends and fetches nothing elsewhere: no analytics, fonts, tunnel or history, and a content security policy
for the browser. All texts are escaped. All users share one queue: one answer at a time.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Template

from sevpeft.errors import SevpeftError, UsageError, first_sentence
from sevpeft.runs import keep_private
from sevpeft.severity.probabilities import is_answer
from sevpeft.sharing.chat import Chat

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and at each start

import gradio as gr

# Letters of a question or comment; questions of one address per minute; length of the queue.
MOST_LETTERS, A_MINUTE, MOST_WAITING = 4_000, 10, 16
_TEMPLATES = Path(__file__).parent / "templates"
_LOOK = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # gradio downloads its own
    "css_paths": _TEMPLATES / "web.css",
    **{"footer_links": [], "quiet": True, "prevent_thread_lock": True, "max_file_size": 1},
    **dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False),
}
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The page of one adapter. `compare`: shows the base model's answers too; `comments`: JSONL file for comments."""

    def __init__(self, chat: Chat, *, compare: bool = False, comments: Path | None = None) -> None:
        self.chat, self.comments, self._recent = chat, comments, list[tuple[str, float]]()
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
            answer = send.click(self.respond, [question, turns], every, concurrency_limit=1, **_PRIVATE)
            stop.click(lambda known: self._html(known, done=True), turns, bubbles, cancels=[answer], **_PRIVATE)
            new.click(lambda: ("", self._html(), []), None, every, cancels=[answer], **_PRIVATE)
            if comments:
                comment = gr.Textbox(label="تعليقك على الجواب", elem_id="comment", **text)
                save, saved = gr.Button("احفظ التعليق", elem_id="save"), gr.HTML(elem_id="saved")
                save.click(self.save, [comment, turns], [comment, saved], **_PRIVATE)

    def launch(self, host: str, port: int | None, login: tuple[str, str] | None) -> str:
        """Serves the page in background threads and returns its URL. UsageError if the address is not available."""
        options = {"server_name": host, "server_port": port, "auth": login, "head": self._html(part="head")}
        try:
            socket.create_server((host, port or 0)).close()  # gradio would try a hundred ports, 5 s each
            return str(self.blocks.queue(max_size=MOST_WAITING).launch(**options, **_LOOK)[1])
        except OSError as error:
            raise UsageError(f"{host}: {first_sentence(error)}; choose another --host or --port.") from error

    def respond(self, question: str, turns: list[Any], request: gr.Request) -> Iterator[tuple[str, str, list[Any]]]:
        """Yields text box, HTML and turns {question, severity, answers}. A refused question stays in the text box."""
        severity, answers = self.chat.severity(question[: 5 * MOST_LETTERS]), dict[str, str]()
        now = [*turns, {"question": question.strip(), "severity": severity, "answers": answers}]
        earlier = [(known["question"], next(iter(known["answers"].values()))) for known in turns]
        problem = self._problem(question, request.client.host if request.client else "")
        try:
            for arm, adapter in ({} if problem else self.arms).items():
                for answers[arm] in chain([""], self.chat.stream(question.strip(), earlier, adapter=adapter)):
                    yield "", self._html(now), now
        except SevpeftError as error:
            problem = f"تعذّر الجواب؛ جرّب سؤالاً أقصر. ({error})"
        if problem:
            yield question, self._html(turns, done=True, problem=problem, notice=severity.notice), turns
        else:
            yield "", self._html(now, done=True), now

    def _problem(self, question: str, host: str) -> str:
        """Why a question of this address is refused, in Arabic; "" if it is accepted."""
        if len(question) > MOST_LETTERS:
            return f"السؤال طويل: فيه {len(question):,} حرفاً، والحد {MOST_LETTERS:,}. اختصره ثم أرسله."
        if not is_answer(question):
            return "السؤال فارغ: اكتبه أولاً."
        now = time.monotonic()
        self._recent = [(other, when) for other, when in self._recent if when > now - 60]
        if sum(other == host for other, _ in self._recent) >= A_MINUTE:
            return "أسئلة كثيرة في دقيقة واحدة: انتظر قليلاً ثم أرسل."
        self._recent.append((host, now))
        return ""

    def save(self, comment: str, turns: list[Any]) -> tuple[str, str]:
        """Appends a comment with the last question and its answers to the file; returns text box and message."""
        if not self.comments or not turns or not comment.strip() or len(comment) > MOST_LETTERS:
            return comment, "اسأل أولاً، ثم اكتب تعليقاً قصيراً."
        entry = {**turns[-1], "severity": turns[-1]["severity"].probabilities, "comment": comment.strip()}
        with self.comments.open("a", encoding="utf-8") as file:
            keep_private(self.comments)
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry}, ensure_ascii=False) + "\n")
        return "", "حُفظ التعليق مع السؤال والجواب."

    def _html(self, turns: Sequence[dict[str, Any]] = (), part: str = "bubbles", **more: Any) -> str:
        return self._template.render(part=part, turns=turns, comments=self.comments, **more)
