"""Seconds of `sevpeft evaluate` on a finished run: this checkout against another, through the real command.

The two are started in turn on copies of the run, so that a busy machine slows both, and the least time of each part
counts. Likelihoods must agree to rounding; how many answers are equal token for token is printed. A checkout that reads
a prompt once for both has the likelihoods in the time of its answers.

    sevpeft train recipe.yaml --output RUN           # once, with either checkout
    git worktree add ../before 2672e40
    python -m tests.benchmarks.generation RUN --baseline ../before --limit 24 evaluation.bertscore=false
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
_RATE = re.compile(r"^(NLL|Answers), (\w+)\s+([\d,]+) rows, ([\d,.]+) a second", re.MULTILINE)
# Of one process, so that other work on the machine counts less than in seconds on the clock.
TOTAL, CPU = "whole command", "whole command, CPU"


def run_command(checkout: Path, run: Path, scratch: Path, options: list[str]) -> tuple[dict[str, float], Path]:
    """Seconds of every part of one evaluation, and the copy of the run that it wrote into."""
    copy = Path(shutil.copytree(run, Path(tempfile.mkdtemp(dir=scratch)) / "run"))
    for name in ("predictions.jsonl", "likelihood.jsonl", "scores.jsonl", "evaluation.json"):
        (copy / name).unlink(missing_ok=True)
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sevpeft", "evaluate", str(copy), *options],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr.strip() or done.stdout}")
    after = os.times()
    seconds = {TOTAL: time.perf_counter() - started, CPU: after.children_user - before.children_user}
    for part, arm, rows, rate in _RATE.findall(done.stdout + done.stderr):
        seconds[f"{part}, {arm}"] = float(rows.replace(",", "")) / max(float(rate.replace(",", "")), 0.005)
    return seconds, copy


def lines(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["arm"], line["id"]): line for line in read if "arm" in line}


def compare(ours: Path, theirs: Path) -> str:
    pairs = {name: (lines(ours / name), lines(theirs / name)) for name in ("likelihood.jsonl", "predictions.jsonl")}
    nll, others = pairs["likelihood.jsonl"]
    gap = max(abs(line["nll"] - others[key]["nll"]) / line["tokens"] for key, line in nll.items() if line["tokens"])
    said, also = pairs["predictions.jsonl"]
    same = sum(line["prediction"] == also[key]["prediction"] for key, line in said.items())
    return f"Largest difference of an NLL per token: {gap:.1e}. Equal answers: {same} of {len(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.generation", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--baseline", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--limit", type=int, default=64, help="rows")
    asked, settings = parser.parse_known_args()
    options = ["--limit", str(asked.limit), *settings]
    least: dict[Path, dict[str, float]] = {asked.baseline.resolve(): {}, HERE: {}}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(asked.pairs):
            copies = []
            for checkout, best in least.items():
                seconds, copy = run_command(checkout, asked.run, Path(scratch), options)
                copies.append(copy)
                best.update({part: min(took, best.get(part, took)) for part, took in seconds.items()})
            print(compare(*reversed(copies)), flush=True)
    theirs, ours = least.values()
    print(f"{'seconds':22} {'baseline':>9} {'here':>9} {'ratio':>6}   least of {asked.pairs}, {asked.limit} rows")
    for part in ours:
        if part in theirs:
            print(f"{part:22} {theirs[part]:9.1f} {ours[part]:9.1f} {theirs[part] / ours[part]:5.1f}×")


if __name__ == "__main__":
    main()
