"""Shows on the screen what merging found, and how to go on from it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sevpeft.console import print_labeled
from sevpeft.modeling.loading import resolved_name
from sevpeft.modeling.saved_adapters import read_adapter_config
from sevpeft.modeling.tiny import TINY
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.card import distance
from sevpeft.sharing.fidelity import Difference
from sevpeft.sharing.merge import Merged
from sevpeft.sharing.serving import adapter_command, asking, conversion_commands


def announce_merged(merged: Merged, run: Run, output: Path, console: Console) -> None:
    """Prints the figures, and the commands for llama.cpp, Ollama and vLLM."""
    size = f"{merged.bytes / 1e9:,.1f} GB" if merged.bytes >= 1e8 else f"{merged.bytes / 1e6:,.1f} MB"
    print_labeled(
        console,
        "Merged",
        f"{merged.matrices:,} weights of {merged.base} in {merged.dtype} ({merged.parameters:,} parameters, {size})",
    )
    print_labeled(console, "Checked", f"read back, on {merged.effect.tokens:,} answer tokens of {merged.rows}")
    console.print()
    console.print(_table(merged))
    console.print()
    gap = merged.gaps.get("unquantized") if merged.bits else None
    if gap is not None and merged.weights == "unquantized":
        print_labeled(
            console,
            "Unquantized",
            f"not quite the model that was trained: {_over_unquantized(merged, gap)}",
            style="yellow",
        )
    recipe = load_recipe(run.folder / "recipe.yaml")
    name = recipe.model.name_or_path
    base = resolved_name(recipe) if name == TINY else name
    command, reason = adapter_command(base, str(run.adapter), read_adapter_config(run.adapter))
    convert, quantise, create = conversion_commands(str(output), merged.dtype)
    print_labeled(console, "Model", f"{output}, its card in README.md. Not a medical device.")
    merged_command = f"vllm serve {shlex.quote(str(output))}"
    _commands(console, "With vLLM, merged or as an adapter:", [merged_command, command or f"# {reason}"])
    if command and gap is not None:
        console.print(f"  # As an adapter it is served {_over_unquantized(merged, gap)}.", soft_wrap=True)
    console.print(f"  {asking(recipe)}", soft_wrap=True)
    _commands(
        console, "With llama.cpp and Ollama; quantising changes the model once more:", [convert, quantise, create]
    )
    if recipe.prompt.strip_marks:
        console.print("  Take vowel marks out of questions first, as the training did.", soft_wrap=True)


def _over_unquantized(merged: Merged, gap: Difference) -> str:
    return (
        f"over the unquantized base, {distance(asdict(gap))} with {merged.bits} bit + adapter; the adapter itself is "
        f"worth {merged.effect.kl:.2g}"
    )


def _table(merged: Merged) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    base = f"{merged.bits} bit" if merged.bits else "base"
    table.add_column(f"From {base} + adapter to", style="bold")
    for title in ("KL, nats/token", "largest logit gap", "same next token"):
        table.add_column(title, justify="right")
    for weights, gap in merged.gaps.items():
        chosen = "merged" if weights == merged.weights else "not merged"
        table.add_row(f"{weights} ({chosen})" if merged.bits else "the merged model", *_cells(gap))
    table.add_row("its base alone", *_cells(merged.effect))
    return table


def _cells(found: Difference) -> tuple[str, str, str]:
    return f"{found.kl:.2g}", f"{found.largest_logit_difference:.2g}", f"{found.equal_next_tokens:.1%}"


def _commands(console: Console, title: str, commands: list[str]) -> None:
    console.print(f"\n{title}")
    for command in commands:
        # Never broken, so that it can be copied.
        console.print(f"  {command}", soft_wrap=True)
