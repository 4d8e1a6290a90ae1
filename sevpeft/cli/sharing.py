"""The verbs chat, merge and push: a trained adapter in use. Heavy imports stand inside."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sevpeft.cli.application import AsJson, RunFolder, Words, app, command_with_keys, quiet_libraries
from sevpeft.console import output_error
from sevpeft.errors import UsageError

if TYPE_CHECKING:
    from sevpeft.sharing.merge import Merged


@app.command()
def chat(
    run: RunFolder,
    question: Annotated[
        str | None, typer.Option(help="Ask this and leave; else questions are read line by line.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Chat with a trained adapter. Its answers are no medical advice.

    Example: sevpeft chat runs/quickstart-20260101-120000 --question "عندي صداع من امبارح"
    """
    from sevpeft.console import Screen, print_text
    from sevpeft.runs import Run, check_one_process, check_run

    check_one_process("chat")
    check_run(run)
    with Screen(stderr=True).status(f"Loading the adapter of {run}"):
        quiet_libraries()
        from sevpeft.sharing.chat import Chat

        adapter = Chat(Run(run))
    if question is not None:
        print_text(adapter.answer(question, max_new_tokens))
        return
    if sys.stdin.isatty():
        print_text("Every question stands alone; an empty line leaves. Not medical advice.", stderr=True)
    while output_error() is None and (line := _read_line()):
        print_text(adapter.answer(line, max_new_tokens), end="\n\n")


def _read_line() -> str:
    """A line from the keyboard or a pipe; empty at its end."""
    try:
        return input("? " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@app.command()
def merge(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="Folder for the merged model, a new one", show_default=False)],
    base: Annotated[
        Literal["auto", "unquantized", "dequantized"],
        typer.Option("--base", help="Weights to merge a 4- or 8-bit run into; auto: the nearer ones."),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option("--dtype", help="Precision of the weights; auto: as the base model is stored."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, as 5GB.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Merge a run's adapter into its base model, for programs that read no adapters.

    A run in 4 or 8 bit is merged into the unquantized base and into the dequantized
    one that it was trained on; both are measured, and the nearer one is written.
    A model that is farther from what was trained than the base alone is not kept.

    Example: sevpeft merge runs/quickstart-20260101-120000 merged
    """
    from sevpeft.console import Screen, print_json
    from sevpeft.runs import Run, check_run

    check_run(run)
    shard_size = max_shard_size.upper()
    if not re.fullmatch("0*[1-9][0-9]*[GMK]B", shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size} is no size; write 5GB, or 500MB.")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.merge import merge as merge_run

    merged = merge_run(Run(run), output, base=base, dtype=dtype, max_shard_size=shard_size, console=messages)
    if as_json:
        print_json({"output": str(output), **merged.as_dict()})
    else:
        _show(merged, output)


@app.command(cls=command_with_keys("sevpeft.sharing:PushSettings"))
def push(
    run: RunFolder,
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as NAME/REPOSITORY", show_default=False)],
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; nothing is sent.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a run's adapter to the Hub, pull it again, and compare both in bytes and logits.

    Example: sevpeft push runs/mine NAME/severity-qwen2.5-0.5b private=true --dry-run
    """
    from sevpeft.console import Screen, print_json, print_labeled, print_text
    from sevpeft.recipe import settings_from
    from sevpeft.runs import Run, check_one_process, check_run
    from sevpeft.sharing import PushSettings

    check_one_process("push")
    check_run(run)
    settings, messages, console = settings_from(PushSettings, words or []), Screen(stderr=True), Screen()
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.push import push as send

    about = send(Run(run), repo_id, settings, dry_run=dry_run, console=messages)
    if as_json:
        print_json(about)
        return
    sizes, why = about["files"], about["not_searched_for_data"]
    lines = [("Files", f"{len(sizes)}, {sum(sizes.values()):,} bytes")]
    lines += [("", f"{name} ({size:,})") for name, size in sizes.items()]
    lines += [("Warning", f"The files were not searched for sentences of the data ({why}).")] if why else []
    if dry_run:
        print_text(about["card"], end="\n\n")
        lines += [("Dry run", f"Nothing was sent to {repo_id}; without --dry-run, these files are.")]
    else:
        lines += [
            ("Commit", f"{about['commit'][:12]} ({'sent' if about['sent'] else 'there already'}), tag {about['tag']}")
        ]
        lines += [("Checked", f"pulled again: equal bytes, equal logits on {about['answer_tokens']:,} tokens")]
        lines += [("Page", about["url"])]
    for label, text in lines:
        print_labeled(console, label, text)


def _show(merged: Merged, output: Path) -> None:
    """Prints the figures; the card holds the commands for vLLM, llama.cpp and Ollama."""
    from sevpeft.console import Screen, print_labeled
    from sevpeft.sharing.card import distance

    console = Screen()
    size = f"{merged.bytes / 1e9:,.1f} GB" if merged.bytes >= 1e8 else f"{merged.bytes / 1e6:,.1f} MB"
    what = f"{merged.matrices:,} weights of {merged.base} in {merged.dtype} ({merged.parameters:,} parameters, {size})"
    print_labeled(console, "Merged", what)
    print_labeled(console, "Checked", f"read back, on {merged.effect.tokens:,} answer tokens of {merged.rows}\n")
    console.print(_table(merged), "")
    gap = merged.as_dict()["gaps"].get("unquantized") if merged.bits else None
    if gap:
        away = f"{distance(gap)} from {merged.bits} bit + adapter; the adapter is worth {merged.effect.kl:.2g}"
        print_labeled(console, "Unquantized", f"as vLLM serves the adapter, it is {away}", style="yellow")
    print_labeled(console, "Model", f"{output}, its card in README.md. Not a medical device.")
    print_labeled(console, "Serve", f"`vllm serve {shlex.quote(str(output))}`; for llama.cpp and Ollama see the card")


def _table(merged: Merged) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    base = f"{merged.bits} bit" if merged.bits else "base"
    table.add_column(f"From {base} + adapter to", style="bold")
    for title in ("KL, nats/token", "largest logit gap", "same next token"):
        table.add_column(title, justify="right")
    rows = [(f"{name} ({'' if name == merged.weights else 'not '}merged)", gap) for name, gap in merged.gaps.items()]
    rows = rows if merged.bits else [("the merged model", gap) for _, gap in rows]
    for name, of in [*rows, ("its base alone", merged.effect)]:
        table.add_row(name, f"{of.kl:.2g}", f"{of.largest_logit_difference:.2g}", f"{of.equal_next_tokens:.1%}")
    return table
