"""The verbs chat, web, merge and push. Slow imports are inside the functions."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from sevpeft.cli.application import AsJson, RunFolder, Words, app, command_with_keys, quiet_libraries
from sevpeft.console import Screen, output_error, print_json, print_labeled, print_text
from sevpeft.errors import SevpeftError, UsageError
from sevpeft.runs import Run, check_absent, check_one_process, check_run, keep_private

if TYPE_CHECKING:
    from sevpeft.sharing.chat import Chat, Exchanges
    from sevpeft.sharing.merge import Merged

PASSWORD = "SEVPEFT_WEB_PASSWORD"  # not an option: all users of a machine can read its command lines
_HELP = """\
This is not a doctor: in an emergency call an ambulance. Ctrl-C stops an answer.
The model reads earlier exchanges, but most were trained on single questions.
/base [QUESTION]      answer of the base model, without the adapter
/severity [QUESTION]  severity of the question, and the words that decide it
/reset                forget the earlier exchanges"""

RunOrRepo = Annotated[str, typer.Argument(metavar="RUN_OR_REPO", help="A run, an adapter's folder or its Hub id")]


@app.command()
def chat(
    source: RunOrRepo,
    overrides: Words = None,
    question: Annotated[str | None, typer.Option(help="Answer this and exit; else each line is one.")] = None,
) -> None:
    """Chat with a trained adapter. Its answers are not medical advice.

    Example: sevpeft chat runs/quickstart-20260101-120000 --question "عندي صداع من امبارح"
    """
    adapter = _loaded(source, overrides, "chat")
    _converse(adapter, sys.stdin.isatty()) if question is None else _answer(adapter, question)


@app.command()
def web(
    source: RunOrRepo,
    overrides: Words = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answers too.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; one open to others needs --auth.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="unset: the first free one from 7860")] = None,
    auth: Annotated[str | None, typer.Option(metavar="USER", help=f"Require login as USER with ${PASSWORD}.")] = None,
    comments: Annotated[Path | None, typer.Option(help="JSONL file for comments; unset: no comment box.")] = None,
) -> None:
    """Serve a web page in Arabic for chat with a trained adapter. Its answers are no medical advice.

    The page loads nothing from other servers. A question is stored only with a comment, in --comments.

    Example: sevpeft web runs/quickstart-20260101-120000 --compare
    """
    login = _login(host, auth)
    if find_spec("gradio") is None:
        raise SevpeftError('The page needs gradio: run pip install -e ".[web]".')
    if comments and comments.suffix != ".jsonl":
        raise UsageError(f"--comments {comments}: name a file that ends in .jsonl; comments are added to it.")
    if comments:
        with comments.open("a"):  # raises before slow work if it is not writable
            keep_private(comments)
    adapter = _loaded(source, overrides, "web")
    from sevpeft.sharing.web import Page

    page = Page(adapter, compare=compare, comments=comments)
    print_text(f"{page.launch(host, port, login)} (stop with Ctrl-C)")
    try:
        adapter.ended.wait()
    finally:
        adapter.ended.set()


def _login(host: str, user: str | None) -> tuple[str, str] | None:
    """User and password; UsageError if others could reach the page without a login."""
    if user is None and re.fullmatch(r"localhost|127(\.\d+){3}", host):
        return None
    if not user or ":" in user or not (password := os.environ.get(PASSWORD)):
        raise UsageError(f"{host} needs --auth USER (a name without a colon) and a password in ${PASSWORD}.")
    return user, password


def _loaded(source: str, overrides: list[str] | None, verb: str) -> Chat:
    check_one_process(verb)
    if wrong := [one for one in overrides or [] if not re.match("(generation|model|quantization)\\.", one)]:
        raise UsageError(f"{wrong[0]} has no effect here; write keys of generation, model and quantization only.")
    if not Path(source).expanduser().is_dir() and not re.fullmatch("[^./~][^/]*/[^/]+", source):  # nor a Hub id
        check_run(Path(source))  # raises before the slow imports
    with Screen(stderr=True).status(f"Loading the adapter of {source}"):
        quiet_libraries()
        from sevpeft.sharing.chat import Chat

        return Chat(source, overrides or [])


def _converse(chat: Chat, interactive: bool) -> None:
    """Answers line by line until the input ends. A refused or stopped question is not added to the conversation."""
    if interactive:
        print_text(_HELP, stderr=True)
        with suppress(ImportError):  # absent on Windows
            importlib.import_module("readline")  # without it a line ends after 4,095 bytes: 2,000 Arabic letters
    earlier, refused = list[tuple[str, str]](), False
    while output_error() is None and (line := _read_line()) is not None:
        command, _, rest = line.partition(" ") if interactive and line.startswith("/") else ("", "", line)
        question = rest.strip() or (earlier[-1][0] if earlier else "")
        try:
            if command == "/severity":
                _show_severity(chat, question)
            elif command == "/base":
                _answer(chat, question, earlier if rest else earlier[:-1], adapter=False)
            elif command:
                earlier = [] if command == "/reset" else earlier
                print_text("The earlier exchanges are forgotten." if command == "/reset" else _HELP, stderr=True)
            else:
                earlier += [(line, _answer(chat, line, earlier))] * interactive
                print_text("")
        except SevpeftError as error:
            print_text(str(error), stderr=True)
            refused |= not interactive and line != ""  # an empty line asks nothing
        except KeyboardInterrupt:
            if not interactive:
                raise
            print_text("\nStopped; the question is not part of the conversation.", stderr=True)
    if refused:  # for scripts: the other lines of the pipe are answered
        raise typer.Exit(1)


def _answer(chat: Chat, question: str, earlier: Exchanges = (), *, adapter: bool = True) -> str:
    """Prints the notice of a red flag and the growing answer; returns the answer."""
    if notice := chat.severity(question).notice:
        print_text(f"This may be an emergency: call an ambulance now.\n{notice}", stderr=True)
    if lost := len(earlier) - len(chat.fitting(question, earlier)):
        print_text(f"(The context is full: the model does not read the first {lost} exchanges.)", stderr=True)
    shown = ""
    for text in chat.stream(question, earlier, adapter=adapter):
        print_text(text[len(shown) :] if text.startswith(shown) else f"\n{text}", end="")
        shown = text
    print_text("")
    if not shown:
        print_text("(The answer is empty.)", stderr=True)
    return shown


def _show_severity(chat: Chat, question: str) -> None:
    result, screen = chat.severity(question), Screen()
    for name, chance in reversed(result.probabilities.items()):
        print_labeled(screen, name, f"{chance:4.0%} {'█' * round(30 * chance)}", "bold" if name == result.name else "")
    words = "; ".join(f"{name}: {', '.join(of)}" for name, of in result.words.items())
    print_labeled(screen, "words", words or "the rules match none")
    print_labeled(screen, "by", f"{chat.source.kind}, from the question alone; not validated by clinicians")


def _read_line() -> str | None:
    """A line of standard input; None at its end."""
    try:
        return input("? " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@app.command()
def merge(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="New folder for the merged model")],
    base: Annotated[
        Literal["auto", "unquantized", "dequantized"],
        typer.Option("--base", help="Base weights of a 4- or 8-bit run; auto: the closer ones."),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option("--dtype", help="Precision of the weights; auto: that of the stored base model."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest weight file, such as 5GB.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Merge a run's adapter into its base model, for programs that load no adapters.

    A run in 4 or 8 bit is merged into the unquantized base and into the dequantized
    one that it was trained on. Both are measured, and the closer one is written.
    A merge that is farther from the trained model than the base alone is an error.

    Example: sevpeft merge runs/quickstart-20260101-120000 merged
    """
    check_run(run)
    check_absent(output)
    shard_size = max_shard_size.upper()
    if not re.fullmatch("0*[1-9][0-9]*[GMK]B", shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size} is not a size; write 5GB or 500MB.")
    messages = Screen(stderr=True)
    with messages.status("Loading the libraries"):
        quiet_libraries()
        from sevpeft.sharing.merge import merge as merge_run

    merged = merge_run(Run(run), output, base=base, dtype=dtype, max_shard_size=shard_size, console=messages)
    if as_json:
        print_json({"output": str(output), **asdict(merged)})
    else:
        _show(merged, output)


@app.command(cls=command_with_keys("sevpeft.sharing:PushSettings"))
def push(
    run: RunFolder,
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as NAME/REPOSITORY")],
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a run's adapter to the Hub, download it again, and compare bytes and logits.

    Example: sevpeft push runs/mine NAME/severity-qwen2.5-0.5b private=true --dry-run
    """
    from sevpeft.recipe import settings_from
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
    lines += [("Warning", f"The files were not searched for sentences of the data: {why}.")] if why else []
    if dry_run:
        print_text(about["card"], end="\n\n")
        lines += [("Dry run", f"Nothing was sent to {repo_id}; leave --dry-run out to send these files.")]
    else:
        how = "sent" if about["sent"] else "already there"
        lines += [("Commit", f"{about['commit'][:12]} ({how}), tag {about['tag']}")]
        lines += [("Checked", f"downloaded: equal bytes, equal logits on {about['answer_tokens']:,} tokens")]
        lines += [("Page", about["url"])]
    for label, text in lines:
        print_labeled(console, label, text)


def _show(merged: Merged, output: Path) -> None:
    """Prints the measurements; the card has the commands for vLLM, llama.cpp and Ollama."""
    from sevpeft.sharing.card import distance

    console = Screen()
    size = f"{merged.bytes / 1e9:,.1f} GB" if merged.bytes >= 1e8 else f"{merged.bytes / 1e6:,.1f} MB"
    model = f"{merged.base} in {merged.dtype} ({merged.parameters:,} parameters, {size})"
    print_labeled(console, "Merged", f"{merged.matrices:,} weights of {model}")
    print_labeled(console, "Checked", f"after reloading, on {merged.effect.tokens:,} answer tokens of {merged.rows}\n")
    console.print(_table(merged), "")
    if merged.bits and (gap := merged.gaps.get("unquantized")):
        gap_text = f"{distance(asdict(gap))} from {merged.bits} bit + adapter (its effect: {merged.effect.kl:.2g})"
        print_labeled(console, "Unquantized", f"with the adapter, as vLLM serves it: {gap_text}", style="yellow")
    print_labeled(console, "Model", f"{output}, its card in README.md. Not a medical device.")
    print_labeled(console, "Serve", f"`vllm serve {shlex.quote(str(output))}`; llama.cpp and Ollama: see the card")


def _table(merged: Merged) -> Table:
    first = Column(f"From {f'{merged.bits} bit' if merged.bits else 'base'} + adapter to", style="bold")
    others = (Column(name, justify="right") for name in ("KL, nats/token", "largest logit gap", "same next token"))
    table = Table(first, *others, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows = [(f"{name} ({'' if name == merged.weights else 'not '}merged)", gap) for name, gap in merged.gaps.items()]
    rows = rows if merged.bits else [("the merged model", gap) for _, gap in rows]
    for name, gap in [*rows, ("its base alone", merged.effect)]:
        table.add_row(name, f"{gap.kl:.2g}", f"{gap.largest_logit_difference:.2g}", f"{gap.equal_next_tokens:.1%}")
    return table
