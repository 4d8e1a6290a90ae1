"""Measures how long `sevpeft prepare` takes and how much memory all its processes hold, and how both grow.

    python -m tests.benchmarks.preparation [--rows 27000 108000 430000] [--num-proc N] [--keep FOLDER]

Rows are made from the bundled sample: a question is two pieces of questions with some of their words replaced by words
of others, its answer likewise, about 60 words in all. One row in twelve repeats an earlier question with a word
replaced, one in fifty repeats an earlier row, and one in five has what cleaning, masking and rejection look for: marks,
tags, e-mail addresses, phone numbers, greetings, long runs of letters, an answer of one word. All is drawn by a seed.

What the figures mean:
- seconds: wall clock of the whole verb in a process of its own, start of Python and reading of the JSONL included;
  cpu s: processor time of all its processes, which other work on the same cores hardly changes.
- peak MB: highest sum over the verb's process and its children, sampled five times a second: of the proportional set
  sizes, in which a page that several processes share counts once (Linux), elsewhere of the resident ones. Pages of
  memory-mapped files are in it, although the kernel takes them back when it needs them.
- exponent: of time and of memory as a power of the rows, between one size and the next; linear is 1.

The target is 430,000 rows in 600 seconds and 4,000 MB on 2 cores. A time is never asserted: the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from sevpeft.data.read import load_consultations

SIZES = (27_000, 108_000, 430_000)
SECONDS, MEGABYTES = 600, 4_000
EARLIER = 1_000  # rows back from which a repetition is drawn
GREETING, THANKS = "السلام عليكم ورحمة الله وبركاته دكتور، ", " وشكرا جزيلا لكم"


def varied_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield consultations of about 60 words, the same for the same seed."""
    draw = random.Random(seed)
    sample = load_consultations("builtin:consultations").rows
    questions = [question.split() for question in sample["question"][:]]
    answers = [answer.split() for answer in sample["answer"][:]]
    severities = sample["severity"][:]
    words = [word for text in questions for word in text]
    earlier: list[tuple[list[str], list[str], str]] = []
    for number in range(count):
        chance = draw.random()
        if earlier and chance < 0.02 + 1 / 12:
            question, answer, severity = draw.choice(earlier)
            question = list(question)
            if chance >= 0.02:
                question[draw.randrange(len(question))] = draw.choice(words)
        else:
            question = _pieces(questions, words, draw, 38)
            answer, severity = _pieces(answers, words, draw, 22), draw.choice(severities)
        if len(earlier) < EARLIER:
            earlier.append((question, answer, severity))
        else:
            earlier[number % EARLIER] = (question, answer, severity)
        asked, answered = " ".join(question), " ".join(answer)
        if draw.random() < 0.2:
            asked, answered = _soiled(asked, answered, draw)
        yield {"question": asked, "answer": answered, "severity": severity, "year": str(2010 + number % 14)}


def _pieces(texts: list[list[str]], words: list[str], draw: random.Random, length: int) -> list[str]:
    made: list[str] = []
    wanted = length + draw.randint(-8, 8)
    while len(made) < wanted:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - 12))
        made += text[start : start + 16]
    return [draw.choice(words) if draw.random() < 0.15 else word for word in made[:wanted]]


def _soiled(question: str, answer: str, draw: random.Random) -> tuple[str, str]:
    dirt = draw.randrange(8)
    if dirt == 0:
        return GREETING + question + THANKS, answer
    if dirt == 1:
        return f"<p>{question}<br/>&nbsp;</p>", answer
    if dirt == 2:
        return question, f"{answer} 010{draw.randrange(10**7, 10**8)} أو a{draw.randrange(99)}@example.com"
    if dirt == 3:
        return question.replace("ا", "اا", 3) + "ااااا؟؟؟؟؟", answer.replace(" ", " \u200f", 2)
    if dirt == 4:
        return question, f"{answer} د. محمد علي https://example.com/{draw.randrange(999)}"
    if dirt == 5:
        return question, draw.choice(["نعم", "راجع الطبيب", "..."])
    if dirt == 6:
        return f"{question} والتحليل في الصورة المرفقة", answer
    return question.replace(" ", " ـ", 1) + " 😷🙏", answer


def measured(rows: int, num_proc: int | None, folder: Path) -> dict[str, float]:
    """Make the rows, prepare them in a process of its own, and return what that cost."""
    file = folder / f"{rows}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        lengths = 0
        for row in varied_rows(rows):
            lengths += len(row["question"].split()) + len(row["answer"].split())
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "sevpeft", "prepare", str(file), str(folder / f"prepared-{rows}"), "--json"]
    command += [f"num_proc={num_proc}"] if num_proc else []
    environment = {**os.environ, "SEVPEFT_CACHE": str(folder / "cache")}
    begun, peak, used = time.perf_counter(), 0.0, os.times()
    with (folder / "said.json").open("w+", encoding="utf-8") as said:
        verb = subprocess.Popen(command, stdout=said, env=environment)
        while verb.poll() is None:
            peak = max(peak, held(verb.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - begun
        ended = os.times()
        if verb.returncode:
            raise SystemExit(verb.returncode)
        said.seek(0)
        about = json.load(said)
    file.unlink()
    return {
        "rows": rows,
        "words": lengths / rows,
        "seconds": seconds,
        "cpu": ended.children_user + ended.children_system - used.children_user - used.children_system,
        "megabytes": peak / 1e6,
        "kept": about["rows"]["kept"],
        "groups": about["duplicates"]["groups"],
        "largest": about["duplicates"]["largest_group"],
    }


def held(pid: int) -> float:
    """Bytes that a process and its children hold."""
    total = 0.0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            try:
                memory = process.memory_full_info() if sys.platform == "linux" else process.memory_info()
                total += getattr(memory, "pss", 0) or memory.rss
            except psutil.Error:
                continue  # it has ended since it was listed
    except psutil.Error:
        return total
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--num-proc", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="folder to work in and to leave the results in")
    arguments = parser.parse_args()
    table = Table(title="sevpeft prepare")
    for head in (
        "rows",
        "words",
        "seconds",
        "cpu s",
        "rows/s",
        "peak MB",
        "kept",
        "groups",
        "largest",
        "time^",
        "memory^",
    ):
        table.add_column(head, justify="right")
    before: dict[str, float] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in arguments.rows:
            cost = measured(rows, arguments.num_proc, folder)
            growth = ["", ""]
            if before:
                times = math.log(rows / before["rows"])
                growth = [f"{math.log(cost[of] / before[of]) / times:.2f}" for of in ("seconds", "megabytes")]
            figures = (rows, cost["words"], cost["seconds"], cost["cpu"], rows / cost["seconds"], cost["megabytes"])
            counts = (cost["kept"], cost["groups"], cost["largest"])
            table.add_row(*(f"{figure:,.0f}" for figure in (*figures, *counts)), *growth)
            before = cost
            print(f"{rows:,} rows: {cost['seconds']:.0f} s, {cost['megabytes']:.0f} MB", file=sys.stderr, flush=True)
    console = Console(width=100)
    console.print(table)
    console.print(f"target: 430,000 rows in {SECONDS} s and {MEGABYTES:,} MB on 2 cores; cores here: {os.cpu_count()}")


if __name__ == "__main__":
    main()
