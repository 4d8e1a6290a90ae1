"""Measures how many rows a second are annotated here, beside the published way, and prints two tables.

    python -m tests.benchmarks.annotation [--quick] [--repetitions N] [--threads N] [--rows N]

Transformer: the published loop (arXiv 2604.06346) takes one row at a time, tokenises it with padding to 512 tokens and
truncation, and runs one forward pass for it, without a batch. Against it stands `TransformerClassifier.probabilities`:
questions sorted by length, in batches that are padded to their longest. Both have the same encoder of the size of
BERT-base (12 layers, 768, vocabulary 30,522) with random weights, in float32 on the CPU, and the same tokenizer, and
are run in turn, the published loop on a few rows and ours on a full part, of which those rows are a part; who begins
alternates. A repetition is one such pair; the ratio is the median of the pairs' ratios, with the lowest and the
highest. Target: 8 times as many rows a second on two cores, and probabilities that are equal to 1e-5.

Rules and linear: "one core" (judging alone, as a worker does it), and the whole way of `annotate` on the cores that
there are, "in memory" (rows that are in the cache folder already, judged and written) and "with reading" (from JSON
lines to JSON lines, the table in the cache folder made anew). No row is like another: every run and
every column has questions of its own, though of the same words, as real questions are. Targets: 20,000 rows a second
for rules, 5,000 for linear.

Rows have the lengths of real consultations: the words of a question are lognormal with median 24 and 95th percentile
75; the tokenizer takes 1.6 tokens a word, as the encoders for Arabic do. For the rules and for linear the words are
those of the bundled sample. A time is never asserted: the exit code is 0 and the tables tell. Other work on the same
cores weighs on both ways of a pair, but makes the rates of the second table smaller than they are: therefore it has the
CPU seconds too, of the parent with reading and writing, and of its workers together. Two cores with nothing else to do
take about the parent's and half of the workers'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

MEDIAN, UPPER = 24, 75
PAIRS_PER_WORD = 0.6  # share of the words that are two tokens
LONGEST = 512
TOLERANCE = 1e-5
LEAST = {"transformer": 8.0, "rules": 20_000.0, "linear": 5_000.0}


def word_count(generator: random.Random) -> int:
    sigma = math.log(UPPER / MEDIAN) / statistics.NormalDist().inv_cdf(0.95)
    return max(2, round(generator.lognormvariate(math.log(MEDIAN), sigma)))


# ---- Transformer


def build_classifier() -> Any:
    """BERT-base with random weights, whose tokenizer takes 1.6 tokens a word."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from sevpeft.severity.classifier.transformer import LABELS, TransformerClassifier

    transformers.logging.set_verbosity_error()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    config = BertConfig(num_labels=3, id2label=LABELS)
    pieces = [*special, *(f"w{number}" for number in range(15_000)), *(f"##x{number}" for number in range(15_000))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    # A head of the usual size would give a third to every severity, whatever the question.
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return TransformerClassifier(model, fast)


def token_questions(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)

    def word() -> str:
        piece = f"w{generator.randrange(15_000)}"
        return piece + (f"x{generator.randrange(15_000)}" if generator.random() < PAIRS_PER_WORD else "")

    return [" ".join(word() for _ in range(word_count(generator))) for _ in range(count)]


def published(classifier: Any, questions: list[str]) -> np.ndarray:
    """One row at a time, every row padded to 512 tokens."""
    import torch

    found = []
    with torch.no_grad():
        for question in questions:
            inputs = classifier.tokenizer(
                question, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            found.append(torch.softmax(classifier.model(**inputs).logits, dim=-1)[0].double().numpy())
    return np.array(found)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure_transformer(repetitions: int, rows: int, few: int, console: Console) -> None:
    import torch

    classifier = build_classifier()
    questions = token_questions(rows)
    lengths = [len(ids) for ids in classifier.tokenizer(questions)["input_ids"]]
    console.print(
        f"{rows} rows, {statistics.median(lengths):.0f} tokens in the median, "
        f"{np.quantile(lengths, 0.95):.0f} in the 95th percentile; {torch.get_num_threads()} threads",
        highlight=False,
    )
    published(classifier, questions[:1])
    classifier.probabilities(questions[: classifier.batch_size])
    pairs: list[tuple[float, float]] = []
    difference = 0.0
    for repetition in range(repetitions):
        # Rows spread over the part, so that they are as long as the others.
        chosen = list(range(repetition, rows, max(1, rows // few)))[:few]
        asked = [questions[i] for i in chosen]
        ways = [lambda asked=asked: published(classifier, asked), lambda: classifier.probabilities(questions)]
        order = (0, 1) if repetition % 2 == 0 else (1, 0)
        seconds: dict[int, float] = {}
        results: dict[int, np.ndarray] = {}
        for way in order:
            seconds[way], results[way] = timed(ways[way])
        difference = max(difference, float(np.abs(results[0] - results[1][chosen]).max()))
        spread = float(results[1].std(axis=0).max())
        pairs.append((len(asked) / seconds[0], rows / seconds[1]))
        console.print(f"  pair {repetition + 1}: {pairs[-1][0]:.2f} → {pairs[-1][1]:.2f} rows/s", highlight=False)
    ratios = [ours / theirs for theirs, ours in pairs]
    table = Table("", "published, rows/s", "ours, rows/s", "ratio [lowest, highest]", "target", title="Transformer")
    table.add_row(
        "BERT-base, float32",
        f"{statistics.median(theirs for theirs, _ in pairs):.2f}",
        f"{statistics.median(ours for _, ours in pairs):.2f}",
        f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]",
        f"≥ {LEAST['transformer']:g}",
    )
    console.print(table)
    verdict = "same" if difference <= TOLERANCE else "NOT THE SAME"
    console.print(
        f"Probabilities: largest difference {difference:.1e} ({verdict} to {TOLERANCE:g}); they differ between rows by "
        f"a standard deviation of {spread:.2f}.",
        highlight=False,
    )


# ---- Rules and linear


def sample_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Consultations of words of the bundled sample, whole sentences where they are long enough."""
    from sevpeft.data.read import BUILTIN, load_consultations

    generator = random.Random(seed)
    sample = load_consultations(BUILTIN).rows
    questions, answers = [text.split() for text in sample["question"]], list(sample["answer"])
    rows = []
    for _ in range(count):
        words: list[str] = []
        wanted = word_count(generator)
        while len(words) < wanted:
            words += generator.choice(questions)
        rows.append({"question": " ".join(words[:wanted]), "answer": generator.choice(answers)})
    return rows


def build_linear() -> Any:
    from sevpeft.data.read import BUILTIN, load_consultations
    from sevpeft.severity.classifier.calibrate import Calibrated, Calibration
    from sevpeft.severity.classifier.examples import labeled_examples
    from sevpeft.severity.classifier.linear import fit_linear

    examples = labeled_examples(load_consultations(BUILTIN, keep="all"))
    return Calibrated([fit_linear(examples)], Calibration((1 / 1.3,)))


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of the workers that it has had."""
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, workers.ru_utime + workers.ru_stime


def measure_annotate(repetitions: int, rows: int, console: Console) -> None:
    from sevpeft.data.read import load_consultations
    from sevpeft.recipe import settings_from
    from sevpeft.runs import whole_folder
    from sevpeft.severity.annotate import AnnotateSettings, annotate
    from sevpeft.severity.classifier.store import write_classifier
    from sevpeft.severity.rules import Rules

    title = f"Whole path, rows/s ({rows:,} rows, {os.cpu_count()} cores, best of {repetitions} runs)"
    table = Table("", "one core", "in memory", "with reading", "target", "CPU s per 10,000 rows", title=title)
    for kind, classifier in (("rules", Rules()), ("linear", build_linear())):
        alone, memory, reading, spent = [], [], [], []
        judge = getattr(classifier, "explained", classifier.probabilities)
        for repetition in range(repetitions):
            with tempfile.TemporaryDirectory(prefix="sevpeft-benchmark-") as scratch:
                source, words = Path(scratch, "in.jsonl"), ["method=rules"]
                if kind != "rules":
                    with whole_folder(Path(scratch, "classifier")) as folder:
                        write_classifier(classifier, folder, training={})
                    words = [f"classifier={scratch}/classifier"]
                made = sample_rows(rows, seed=repetition)
                source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
                os.environ["SEVPEFT_CACHE"] = str(Path(scratch, "cache"))
                settings, output = settings_from(AnnotateSettings, words, {"data.path": str(source)}), source.parent
                before = cpu_seconds()
                read, _ = timed(lambda source=source: load_consultations(source, keep="all"))
                wrote, _ = timed(lambda to=output / "out.jsonl", settings=settings: annotate(settings, to))
                spent.append([(now - then) * 10_000 / rows for now, then in zip(cpu_seconds(), before, strict=True)])
            others = [row["question"] for row in sample_rows(rows, seed=repetition + 1_000)]
            alone.append(rows / timed(lambda others=others, judge=judge: judge(others))[0])
            memory.append(rows / wrote)
            reading.append(rows / (read + wrote))
        rates = [f"{max(found):,.0f}" for found in (alone, memory, reading)]
        own, workers = min(spent, key=sum)
        table.add_row(kind, *rates, f"≥ {LEAST[kind]:,.0f}", f"{own:.2f} + {workers:.2f} in workers")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and pairs")
    parser.add_argument("--repetitions", type=int, default=None, help="pairs of the transformer, runs of the others")
    parser.add_argument("--threads", type=int, default=None, help="of torch; by default one a core")
    parser.add_argument("--rows", type=int, default=None, help="of the second table")
    parser.add_argument("--only", choices=("transformer", "others"), default=None)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    console = Console(width=100)
    if arguments.only != "others":
        measure_transformer(
            arguments.repetitions or (3 if arguments.quick else 5), 256 if arguments.quick else 1024, 12, console
        )
    if arguments.only != "transformer":
        cache = os.environ.get("SEVPEFT_CACHE")
        measure_annotate(arguments.repetitions or 3, arguments.rows or (10_000 if arguments.quick else 20_000), console)
        if cache is not None:
            os.environ["SEVPEFT_CACHE"] = cache


if __name__ == "__main__":
    main()
