"""Measures what a training step costs here, beside stock TRL and beside the published loop, and prints one table.

    python -m tests.benchmarks.training [--quick] [--repetitions N] [--rows NAME ...]
                                        [--layers N] [--threads N] [--clock wall|cpu]

Every row of the table is one pair of processes: a reference and this project's trainer, with the same model, rows,
seed and settings. The reference is (a) stock TRL's SFTTrainer, or (b) the published loop of arXiv 2604.06346: every
row padded to 512, full logits, log-softmax, prompt and pads in the loss, batch 1 x accumulation 8 (in float32 here,
in float16 on a 4-bit model there); against it ours takes the same eight rows a step, in batches as the row says. Both
processes are alive together and take turns, one optimiser step each, so that whatever else the machine does weighs on
both; a repetition is one such pair of steps on the same rows, and who goes first alternates. The first pair warms up
and is not timed.

What the figures mean, always "reference → ours" and below it "× ours / reference":
- s/step: median seconds of one optimiser step, data loading and logging included; the ratio is the median of the
  pairs' ratios, with the lowest and the highest. Other work on the same cores makes it swing by a third: the clock
  "cpu", with one thread, counts processor time instead and swings less.
- peak MB: highest resident memory over all steps, the warm-up too, less what the process held once the model, its
  adapter and the data were loaded. Activations, logits, gradients and optimiser state are in it; the code that a
  first step imports is not, since a toy model trains before. The kernel's own high-water mark is read where it can be
  reset (Linux); elsewhere a thread samples.
- answer tok/s: answer tokens learnt per second. Prompt and pads are no progress, whatever the loss made of them.
- loss: the largest relative difference between the losses of (a) and of ours, all weights being one; "same" is 1e-6.
  Ours scores a vocabulary of this size in narrower tiles than TRL on a CPU, so a last bit may differ.

Rows have the lengths of real consultations: words of question and answer are lognormal with medians 24 and 12 and
95th percentiles 75 and 50, 1.6 tokens a word. Token ids are random and so are the weights of the model: a llama of
vocabulary 64,000 and hidden size 512 in float32, LoRA r 16 on all linear layers. Its LM head weighs as much as ten of
its layers; the more layers (--layers), the less is gained by scoring fewer positions. A time is never asserted: the
exit code is 0 and the table tells.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

# torch and what builds on it are imported in the children only: the parent has to stay out of their way.

VOCABULARY, HIDDEN, EOS, PAD = 64_000, 512, 0, 1
MAX_LENGTH = 512
TOKENS_PER_WORD = 1.6
PROMPT_TOKENS = 6  # the template around a question
LOSS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Setting:
    """One row of the table: what both processes of its pair run."""

    says: str
    reference: str = "trl"
    labels: str = "answer"
    batch: int = 8
    accumulation: int = 1
    layout: str = "padded"
    gradient_checkpointing: bool = False

    # Targets: highest ratio of ours to the reference, and lowest ratio of answer tokens per second.
    @property
    def most_time(self) -> float | None:
        return {"published": None, "trl": 0.6 if self.labels == "answer" else 1.03}[self.reference]

    @property
    def most_memory(self) -> float | None:
        return {"published": 0.25, "trl": 0.5 if self.labels == "answer" else None}[self.reference]

    @property
    def least_throughput(self) -> float | None:
        return 8.0 if self.reference == "published" else None


SETTINGS = {
    "answer": Setting("answer loss, 8 x 1"),
    "answer-1x8": Setting("answer loss, 1 x 8", batch=1, accumulation=8),
    "answer-checkpointing": Setting("answer loss, 8 x 1, gradient checkpointing", gradient_checkpointing=True),
    "answer-padding-free": Setting("answer loss, 8 x 1, padding-free", layout="padding-free"),
    "answer-packed": Setting("answer loss, 2 x 1, bfd packed to 512", layout="packed", batch=2),
    "sequence": Setting("full-sequence loss, 8 x 1", labels="sequence"),
    "sequence-1x8": Setting("full-sequence loss, 1 x 8", labels="sequence", batch=1, accumulation=8),
    "sequence-packed": Setting("full-sequence loss, 2 x 1, bfd packed to 512", "trl", "sequence", 2, 1, "packed"),
    "published": Setting("answer loss, 1 x 8, against the published loop", "published", batch=1, accumulation=8),
    "published-padding-free": Setting(
        "answer loss, 2 x 4, padding-free, against the published loop at 1 x 8",
        "published",
        "answer",
        2,
        4,
        "padding-free",
    ),
}
QUICK = ("answer", "sequence-packed", "published-padding-free")


@dataclass(frozen=True)
class Step:
    """What a child reports after one optimiser step; `peak` is in bytes, above the loaded model."""

    seconds: float
    peak: int
    loss: float
    answer_tokens: int


# ---- What is trained on


def make_rows(count: int, labels: str, vocabulary: int, seed: int = 0) -> dict[str, list[Any]]:
    """`input_ids`, `labels` and `token_weights` (all one) of `count` rows, none longer than 512 tokens."""
    generator = random.Random(seed)

    def tokens(median: float, upper: float) -> list[int]:
        sigma = math.log(upper / median) / statistics.NormalDist().inv_cdf(0.95)
        length = round(TOKENS_PER_WORD * generator.lognormvariate(math.log(median), sigma))
        return [generator.randrange(PAD + 1, vocabulary) for _ in range(max(1, length))]

    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "token_weights": []}
    for _ in range(count):
        prompt = [PAD + 1] * PROMPT_TOKENS + tokens(24, 75)
        answer = [*tokens(12, 50)[: MAX_LENGTH // 2], EOS]
        prompt = prompt[: MAX_LENGTH - len(answer)]
        first = len(prompt) if labels == "answer" else 1
        ids = prompt + answer
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * first + ids[first:])
        rows["token_weights"].append([1.0] * len(ids))
    return rows


def make_model(vocabulary: int, hidden: int, layers: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return AutoModelForCausalLM.from_config(config)


def make_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


# ---- The two sides of a pair


class Meter:
    """Time and peak memory of this process, told to the parent step by step; the parent says when a step begins.

    Without a channel it does nothing: a toy model is training.
    """

    def __init__(self, channel: Connection | None = None, clock: str = "wall") -> None:
        self.channel = channel
        self.clock = time.process_time if clock == "cpu" else time.perf_counter
        self.sampled = 0

    def begin(self, answer_tokens: list[int]) -> None:
        """The model is loaded: memory is counted from here. `answer_tokens` has one number for every step."""
        if self.channel is None:
            return
        self.answer_tokens = iter(answer_tokens)
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what glibc kept from loading would be filled first, and not be seen
        self.loaded = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        except OSError:
            self.sampled = self.loaded
            threading.Thread(target=self._sample, daemon=True).start()
        self.channel.send("loaded")
        self._wait()

    def end_step(self, loss: float) -> None:
        if self.channel is None:
            return
        seconds = self.clock() - self.started
        self.channel.send(Step(seconds, self._peak() - self.loaded, loss, next(self.answer_tokens)))
        self._wait()

    def _wait(self) -> None:
        assert self.channel is not None
        with contextlib.suppress(EOFError):  # the parent hangs up after the last step
            self.channel.recv()
        self.started = self.clock()

    def _peak(self) -> int:
        if self.sampled:
            return self.sampled
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.sampled = max(self.sampled, process.memory_info().rss)
            time.sleep(0.002)


def run_trainer(
    variant: str, setting: Setting, rows: dict[str, list[Any]], steps: int, model: Any, meter: Meter
) -> None:
    """Trains with stock TRL ("trl") or with this project's trainer ("ours"), everything else being the same."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    from sevpeft.training.trainer import SeveritySFTTrainer

    stock = variant == "trl"
    data = Dataset.from_dict(rows)
    if stock:
        data = data.remove_columns("token_weights")
    if setting.layout == "packed":
        data = pack_dataset(data, seq_length=MAX_LENGTH, strategy="bfd")

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin(labels_by_step(data["labels"], setting))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                meter.end_step(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.accumulation,
            gradient_checkpointing=setting.gradient_checkpointing,
            packing=setting.layout == "packed",
            padding_free=setting.layout == "padding-free",
            max_length=MAX_LENGTH if setting.layout == "packed" else None,
            learning_rate=2e-4,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        tokenizer = Tokenizer(models.WordLevel({"<eos>": EOS, "<pad>": PAD}, unk_token="<eos>"))
        trainer = (SFTTrainer if stock else SeveritySFTTrainer)(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"),
            peft_config=make_lora(),
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run_published_loop(setting: Setting, rows: dict[str, list[Any]], steps: int, model: Any, meter: Meter) -> None:
    """The published loop as it is described, on the same rows: what it pays for is 512 positions for every row.

    Its weight is (B, 1, 1) against a loss of (B, T), and its micro-batches are summed, not averaged; neither costs
    time, both are kept so that this is that loop.
    """
    import torch
    from peft import get_peft_model

    model = get_peft_model(model, make_lora())
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    data = iter(rows["input_ids"])
    meter.begin(labels_by_step(rows["labels"], setting))
    for _ in range(steps):
        total = 0.0
        for _ in range(setting.batch * setting.accumulation):
            ids = next(data)
            padding = MAX_LENGTH - len(ids)
            input_ids = torch.tensor([ids + [PAD] * padding])
            attention_mask = torch.tensor([[1] * len(ids) + [0] * padding])
            severity_weight = torch.ones(1)
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
            token_loss = -log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
            loss = (severity_weight.view(-1, 1, 1) * token_loss).mean()
            loss.backward()
            total += loss.item()
            del logits, log_probs, token_loss, loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.end_step(total)


def labels_by_step(labels: Any, setting: Setting) -> list[int]:
    """Number of labelled tokens in each optimiser step, rows being taken in order."""
    size = setting.batch * setting.accumulation
    counts = [sum(label != -100 for label in row) for row in labels]
    return [sum(counts[start : start + size]) for start in range(0, len(counts), size)]


def child(variant: str, setting: Setting, steps: int, options: argparse.Namespace, channel: Connection) -> None:
    """One process of a pair."""
    import datasets
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)

    def run(rows: dict[str, list[Any]], steps: int, model: Any, meter: Meter) -> None:
        if variant == "published":
            run_published_loop(setting, rows, steps, model, meter)
        else:
            run_trainer(variant, setting, rows, steps, model, meter)

    # A packed row of 512 holds six or seven consultations, so sixteen for each are enough for every step.
    count = setting.batch * setting.accumulation * (16 if setting.layout == "packed" else 1)
    run(make_rows(2 * count, setting.labels, 64), 2, make_model(64, 64, 1), Meter())
    rows = make_rows(steps * count, setting.labels, VOCABULARY)
    run(rows, steps, make_model(VOCABULARY, HIDDEN, options.layers), Meter(channel, options.clock))


# ---- The parent


def measure(setting: Setting, repetitions: int, options: argparse.Namespace) -> list[tuple[Step, Step]]:
    """Pairs of steps (reference, ours) of one row, the warm-up first."""
    context = multiprocessing.get_context("spawn")
    channels: list[Connection] = []
    children = []
    for variant in (setting.reference, "ours"):
        here, there = context.Pipe()
        arguments = (variant, setting, repetitions + 1, options, there)
        children.append(context.Process(target=child, args=arguments, daemon=True))
        children[-1].start()
        there.close()
        channels.append(here)
    try:
        for channel in channels:
            channel.recv()
        pairs = []
        for number in range(repetitions + 1):
            steps = {}
            for side in (0, 1) if number % 2 else (1, 0):
                channels[side].send("go")
                steps[side] = channels[side].recv()
            pairs.append((steps[0], steps[1]))
        return pairs
    finally:
        for channel, process in zip(channels, children, strict=True):
            channel.close()
            process.join(timeout=30)
            process.kill()


def add_row(table: Table, setting: Setting, pairs: list[tuple[Step, Step]]) -> None:
    timed = pairs[1:]
    seconds = [statistics.median(pair[side].seconds for pair in timed) for side in (0, 1)]
    ratios = [ours.seconds / theirs.seconds for theirs, ours in timed]
    peaks = [max(pair[side].peak for pair in pairs) for side in (0, 1)]
    speed = [statistics.median(pair[side].answer_tokens / pair[side].seconds for pair in timed) for side in (0, 1)]
    ratio = statistics.median(ratios)

    def verdict(wanted: str, met: bool) -> str:
        return f"\n{wanted}: " + ("[green]met[/]" if met else "[red]not met[/]")

    says = setting.says
    if setting.reference == "trl":
        worst = max(abs(theirs.loss / ours.loss - 1) for theirs, ours in pairs)
        says += f"\nloss {'same' if worst <= LOSS_TOLERANCE else '[red]DIFFERS[/]'} ({worst:.0e})"
    times = f"{seconds[0]:.3f} → {seconds[1]:.3f}\n× {ratio:.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
    if setting.most_time:
        times += verdict(f"≤ {setting.most_time:g}", ratio <= setting.most_time)
    memory = f"{peaks[0] / 1e6:.0f} → {peaks[1] / 1e6:.0f}\n× {peaks[1] / peaks[0]:.2f}"
    if setting.most_memory:
        memory += verdict(f"≤ {setting.most_memory:g}", peaks[1] <= setting.most_memory * peaks[0])
    throughput = f"{speed[0]:.0f} → {speed[1]:.0f}" if setting.labels == "answer" else "–"
    if setting.least_throughput:
        throughput += f"\n× {1 / ratio:.1f}" + verdict(
            f"≥ {setting.least_throughput:g}", 1 / ratio >= setting.least_throughput
        )
    table.add_row(says, times, memory, throughput)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, help="pairs of steps in a row (default 7; 3 with --quick)")
    parser.add_argument("--rows", nargs="+", choices=SETTINGS, metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, and fewer pairs")
    parser.add_argument("--layers", type=int, default=4, help="depth of the model (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what a step's seconds are")
    options = parser.parse_args()
    repetitions = options.repetitions or (3 if options.quick else 7)
    names = options.rows or (QUICK if options.quick else tuple(SETTINGS))

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A waiting thread that spins takes the core from whatever else runs, and steps then last eight times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    progress = Console(stderr=True)
    table = Table(
        title="Training step: reference → this trainer",
        caption=f"{repetitions} pairs of steps a row, {options.layers} layers, {options.threads} threads, "
        f"{options.clock} clock, load {os.getloadavg()[0]:.1f} at the start",
        show_lines=True,
    )
    for heading in ("setting", "s/step", "peak MB", "answer tok/s"):
        table.add_column(heading)
    for name in names:
        progress.print(f"{name} …")
        try:
            add_row(table, SETTINGS[name], measure(SETTINGS[name], repetitions, options))
        except (EOFError, OSError):
            table.add_row(SETTINGS[name].says, "[red]failed[/]: see above")
    Console().print(table)


if __name__ == "__main__":
    main()
