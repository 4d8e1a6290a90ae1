"""Speed of the real command on a real model: this checkout, an earlier one and stock TRL, in turn, on the same rows.

    python -m tests.benchmarks.real_model --model FOLDER --data FILE.jsonl --baseline CHECKOUT

Each variant is a process of its own that runs `sevpeft train RECIPE …` (TRL: the recipe's settings in SFTConfig) and
writes the time of each step. The variants take turns; of each step the fastest round counts. Steps have the same rows
in every variant, so the ratio of their sums is that of the speed. `--dtypes` compares number formats of this checkout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]


def command(options: argparse.Namespace, output: Path, *extra: str) -> list[str]:
    return [
        *(sys.executable, "-m", "sevpeft", "train", options.recipe),
        *(f"model.name_or_path={options.model}", f"data.path={options.data}", "quantization.load_in_4bit=false"),
        *(f"training.max_steps={options.steps}", f"data.max_rows={options.rows}", "training.logging_steps=1"),
        *(*extra, "--output", str(output)),
    ]


def run(variant: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Seconds of each step after the first, of the validation, and the losses."""
    checkout = Path(options.baseline) if variant == "before" else ROOT
    if variant == "trl":
        arguments = [sys.executable, "-m", "tests.benchmarks.real_model", *sys.argv[1:], "--stock-trl", str(output)]
    else:
        arguments = command(
            options, output, *([f"model.dtype={variant}"] if variant in ("float32", "bfloat16") else [])
        )
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    subprocess.run(arguments, cwd=checkout, env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "seconds": [after["time"] - before["time"] for before, after in itertools.pairwise(steps)],
        "validation": min(line["eval_runtime"] for line in lines if "eval_runtime" in line),
        "losses": [line["loss"] for line in steps],
        "eval_loss": next(line["eval_loss"] for line in lines if "eval_loss" in line),
        "tokens": steps[-1]["num_tokens"] - steps[0]["num_tokens"],
    }


def train_with_stock_trl(options: argparse.Namespace, output: Path) -> None:
    """The recipe's model, rows, adapter and settings under TRL's own trainer: 1 × 8, as the recipes had it written."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from sevpeft.modeling.adapters import lora_config
    from sevpeft.modeling.loading import choose_precision, resolve_model
    from sevpeft.recipe import load_recipe
    from sevpeft.training.data import prepare
    from sevpeft.training.resolve import resolve_split

    overrides = command(options, output)[5:-2]
    recipe = resolve_split(load_recipe(options.recipe, overrides), None, 0)
    resolved = resolve_model(recipe)
    precision = choose_precision(recipe)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=precision.dtype)
    settings = recipe.training.settings()
    for name in ("global_batch_size", "auto_find_batch_size", "padding_free", "eval_strategy", "save_strategy"):
        settings.pop(name, None)
    settings |= {"per_device_eval_batch_size": 8, "dataset_kwargs": {"skip_prepare_dataset": True}}
    settings |= {"bf16": precision.bf16, "fp16": precision.fp16, "use_cpu": not torch.cuda.is_available()}
    output.mkdir()

    class Log(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps({"time": time.time(), **logs}) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(recipe, resolved.prompt, Path(scratch))
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings, output_dir=str(output), eval_strategy="no", save_strategy="no"),
            train_dataset=prepared.train.remove_columns("token_weights"),
            eval_dataset=prepared.validation.remove_columns("severity"),
            processing_class=resolved.tokenizer,
            peft_config=lora_config(recipe, model),
            callbacks=[Log()],
        )
        trainer.evaluate()
        trainer.train()


def table_of(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> Table:
    """Fastest of the rounds, step by step; ratios against the last variant, which is this checkout."""
    fastest = {
        variant: (
            sum(min(seconds) for seconds in zip(*(one["seconds"] for one in rounds), strict=True)),
            min(one["validation"] for one in rounds),
        )
        for variant, rounds in found.items()
    }
    here = fastest[list(found)[-1]]
    title = f"{options.steps - 1} steps, {options.rows} rows, {len(next(iter(found.values())))} rounds"
    table = Table(title=title, caption=f"load {os.getloadavg()[0]:.1f} at the end; of each step the fastest round")
    for heading in (
        "variant",
        "s/step",
        "tokens/s",
        "× here",
        "validation s",
        "× here",
        "last loss",
        "first eval loss",
    ):
        table.add_column(heading)
    for variant, (steps, validation) in fastest.items():
        last = found[variant][0]
        table.add_row(
            variant,
            f"{steps / (options.steps - 1):.2f}",
            f"{last['tokens'] / steps:.0f}",
            f"{steps / here[0]:.2f}",
            f"{validation:.2f}",
            f"{validation / here[1]:.2f}",
            f"{last['losses'][-1]:.4f}",
            f"{last['eval_loss']:.4f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real_model", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a pretrained base model")
    parser.add_argument("--data", required=True, help="file with questions, answers and severities")
    parser.add_argument("--recipe", default="recipes/qwen2.5-0.5b.yaml")
    parser.add_argument("--baseline", help="checkout to compare with")
    parser.add_argument("--trl", action="store_true", help="compare with stock TRL too")
    parser.add_argument("--dtypes", action="store_true", help="float32 against bfloat16 instead")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--stock-trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stock_trl:
        train_with_stock_trl(options, Path(options.stock_trl))
        return
    options.model, options.data = (str(Path(path).resolve()) for path in (options.model, options.data))
    variants = [*(["before"] if options.baseline else []), *(["trl"] if options.trl else []), "here"]
    if options.dtypes:
        variants = ["bfloat16", "float32"]
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    progress = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for variant in variants if number % 2 == 0 else reversed(variants):
                progress.print(f"round {number + 1}: {variant}")
                found[variant].append(run(variant, options, Path(folder) / f"{variant}-{number}"))
    Console(width=120).print(table_of(found, options))


if __name__ == "__main__":
    main()
