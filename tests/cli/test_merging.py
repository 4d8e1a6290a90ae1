"""`sevpeft merge` as it is typed: figures on the screen or as JSON, and one sentence for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sevpeft.runs import Run
from tests.conftest import Cli
from tests.sharing.conftest import _made, made_run  # noqa: F401 (fixtures)


def test_the_figures_and_the_commands_are_shown(
    sevpeft_: Cli,
    made_run: Callable[..., Run],  # noqa: F811
) -> None:
    made_run("llama", quantization={"load_in_4bit": True})
    code, out, _ = sevpeft_("merge", "run", "merged")
    assert code == 0
    for words in (
        "14 weights of",
        "dequantized (merged)",
        "unquantized (not merged)",
        "From 4 bit + adapter",
        "its base alone",
        "Not a medical device",
    ):
        assert words in out, words
    assert "Unquantized" in out and "`vllm serve merged`" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    card = Path("merged/README.md").read_text(encoding="utf-8")
    assert "--enable-lora --lora-modules severity=RUN/adapter --max-lora-rank 8" in card
    assert "\npython convert_hf_to_gguf.py OUTPUT --outfile OUTPUT/model.gguf --outtype f32\n" in card


def test_json_holds_the_figures_alone(
    sevpeft_: Cli,
    made_run: Callable[..., Run],  # noqa: F811
) -> None:
    made_run("llama")
    code, out, err = sevpeft_("merge", "run", "merged", "--dtype", "bfloat16", "--json")
    found = json.loads(out)
    assert code == 0 and "Base model" in err
    assert (found["output"], found["dtype"], found["matrices"]) == ("merged", "bfloat16", 14)
    assert 0 <= found["gaps"]["unquantized"]["kl"] < found["effect"]["kl"]
    assert found["weights"] == "unquantized" and found["bits"] is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere", "merged"], 1, "There is no run in nowhere"),
        (["run"], 2, "Missing argument 'output'"),
        (["run", "merged", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["run", "merged", "--max-shard-size", "big"], 2, "--max-shard-size big"),
        (["run", "merged", "--max-shard-size", "0GB"], 2, "write 5GB"),
        (["run", "merged", "--max-shard-size", "²GB"], 2, "write 5GB"),
        (["run", "merged", "--max-shard-size", "5KBMB"], 2, "write 5GB"),
        (["run", "run"], 1, "run exists already"),
        (["run", "/proc/merged"], 1, "/proc/merged cannot be written"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    sevpeft_: Cli,
    made_run: Callable[..., Run],  # noqa: F811
    tmp_path: Path,
    words: list[str],
    code: int,
    said: str,
) -> None:
    made_run("llama")
    got, _, err = sevpeft_("merge", *words)
    assert (got, err.count("\n")) == (code, 1) and said in err
    assert not (tmp_path / "merged").exists()


def test_an_unfinished_run_says_how_to_finish_it(
    sevpeft_: Cli,
    made_run: Callable[..., Run],  # noqa: F811
) -> None:
    run = made_run("llama")
    (run.adapter / "adapter_model.safetensors").unlink()
    code, _, err = sevpeft_("merge", "run", "merged")
    assert code == 1 and err.startswith("There is no adapter in run yet; finish the run") and err.count("\n") == 1
