"""Shows on the screen what merging found, and how to go on from it."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sevpeft.modeling.loading import resolved_name
from sevpeft.modeling.saved_adapters import read_adapter_config
from sevpeft.modeling.tiny import TINY
from sevpeft.recipe import load_recipe
from sevpeft.runs import Run
from sevpeft.sharing.fidelity import Difference
from sevpeft.sharing.merge import Merged
from sevpeft.sharing.serving import adapter_command, asking, conversion_commands
from sevpeft.training.progress import say


def announce_merged(merged: Merged, run: Run, output: Path, console: Console) -> None:
    """Prints the figures, and the commands for llama.cpp, Ollama and vLLM."""
    size = f"{merged.bytes / 1e9:,.1f} GB" if merged.bytes >= 1e8 else f"{merged.bytes / 1e6:,.1f} MB"
    say(
        console,
        "Merged",
        f"{merged.matrices:,} weights of {merged.base} in {merged.dtype} ({merged.parameters:,} parameters, {size})",
    )
    say(
        console, "Checked", f"on {merged.rounding.tokens:,} answer tokens of bundled consultations, read back from disk"
    )
    console.print()
    console.print(_table(merged))
    console.print()
    if merged.bits:
        told = "" if merged.quantised else ", and by how much they differ was not measured"
        say(
            console,
            "Unquantised",
            f"trained on the base in {merged.bits} bit, merged into the unquantised one, which is not quite the model "
            f"that was trained{told}",
            style="yellow",
        )
    recipe = load_recipe(run.folder / "recipe.yaml")
    name = recipe.model.name_or_path
    base = resolved_name(recipe) if name == TINY else name
    command, reason = adapter_command(base, str(run.adapter), read_adapter_config(run.adapter))
    convert, quantise, create = conversion_commands(str(output), merged.dtype)
    say(console, "Model", f"{output}, its card in README.md. Not a medical device.")
    merged_command = f"vllm serve {shlex.quote(str(output))}"
    _commands(console, "With vLLM, merged or as an adapter:", [merged_command, command or f"# {reason}"])
    console.print(f"  {asking(recipe)}", soft_wrap=True)
    _commands(
        console, "With llama.cpp and Ollama; quantising changes the model once more:", [convert, quantise, create]
    )
    if recipe.prompt.strip_marks:
        console.print("  Take vowel marks out of questions first, as the training did.", soft_wrap=True)


def _table(merged: Merged) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("From base + adapter to", style="bold")
    for title in ("KL, nats/token", "largest logit gap", "same next token"):
        table.add_column(title, justify="right")
    table.add_row("the merged model", *_cells(merged.rounding))
    table.add_row("the base alone", *_cells(merged.effect))
    if merged.quantised is not None:
        table.add_row(f"From {merged.bits} bit + adapter to merged", *_cells(merged.quantised))
    return table


def _cells(found: Difference) -> tuple[str, str, str]:
    return f"{found.kl:.2g}", f"{found.largest_logit_difference:.2g}", f"{found.equal_next_tokens:.1%}"


def _commands(console: Console, title: str, commands: list[str]) -> None:
    console.print(f"\n{title}")
    for command in commands:
        # Never broken, so that it can be copied.
        console.print(f"  {command}", soft_wrap=True)
