"""What a newcomer does wrong at the command line: one plain sentence, exit code 1 or 2, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import peft.peft_model
import pytest
import torch
import transformers.trainer
from safetensors import SafetensorError

import sevpeft.data.read
import sevpeft.modeling.tiny
import sevpeft.runs
from sevpeft.cli import main
from sevpeft.errors import DataError, RecipeError
from sevpeft.runs import Run
from sevpeft.training.trainer import SeveritySFTTrainer

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
QUESTION, ANSWER = "عندي صداع شديد من يوم", "راجع الطبيب اليوم ولا تنتظر"
SHORT = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2", "data.max_rows=60"]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without a GPU, started anywhere, whose folder for temporary files must be empty in the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SEVPEFT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def refusal(sevpeft_: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused in one sentence without a trace on the disk, and returns the sentence."""

    def run(*words: str | Path, code: int = 1, lines: int = 1) -> str:
        runs_before = sorted(tmp_path.rglob("recipe.yaml"))
        got, _, err = sevpeft_(*words)
        assert got == code, err
        assert err.count("\n") == lines and err.rstrip()[-1] in ".?`", err
        assert sorted(tmp_path.rglob("recipe.yaml")) == runs_before
        assert not list((Path(os.environ["SEVPEFT_CACHE"])).rglob("*.partial-*"))
        return err.strip()

    return run


def csv(folder: Path, header: str, rows: list[str], encoding: str = "utf-8") -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return path


def pairs(*cells: str, count: int = 40) -> list[str]:
    return [",".join([f"{QUESTION} {index}", f"{ANSWER} {index}", *cells]) for index in range(count)]


def test_a_recipe_with_a_mistake_is_answered_with_its_key_and_what_to_write(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yml"
    wrong = []
    for text, key, remedy in (
        ("a: [1\nb: {", "line 2", "quotes"),
        ("- a\n- b\n", "", "training:"),
        ("", "", "training:"),
        ("modle: {dtype: auto}", "modle", "write model."),
        ("lora: {lora_r: 8}", "lora.lora_r", "write lora."),
        ("training: {learning_rate: fast}", "training.learning_rate", "number"),
        ("training: {warmup_ratio: 0.1}", "training.warmup_ratio", "training.warmup_steps"),
        ("severity: {weights: hard}", "severity.weights", "'balanced'"),
        ("severity: {weights: {non_critical: -1, neutral: 1, critical: 1}}", "severity.weights.non_critical", "0"),
    ):
        recipe.write_text(text, encoding="utf-8")
        message = refusal("train", recipe, code=2)
        if not message.startswith(f"{recipe}: {key}") or remedy not in message:
            wrong.append((text, message))
    assert wrong == []


def test_five_mistakes_are_five_lines(refusal: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yml"
    recipe.write_text("foo: 1\nlora: 3\ndata: {max_rows: -1}\nmodel: {dtype: fp16}\ntraining: {learning_rate: fast}\n")
    lines = refusal("train", recipe, code=2, lines=5).splitlines()
    keys = {"foo", "lora", "data.max_rows", "model.dtype", "training.learning_rate"}
    assert {line.split(": ")[1] for line in lines} == keys


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nope.yaml"], "nope.yaml: cannot be read"),
        (["train", "nowhere/nope.yaml"], "`sevpeft recipes` lists"),
        (["train"], "Missing argument 'recipe'"),
        (["trian"], "Did you mean 'train'?"),
        (["train", QUICKSTART, "--ouput", "x"], "--output"),
        (["train", QUICKSTART, "--resume"], "--resume needs --output RUN"),
        (["train", QUICKSTART, "training.lerning_rate=1"], "write training.learning_rate"),
        (["train", QUICKSTART, "learning_rate=1"], "write training.learning_rate"),
        (["train", QUICKSTART, "training.learning_rate"], "training.learning_rate=1e-4"),
        (["train", QUICKSTART, "training=1"], "training.learning_rate=1e-4"),
        (["train", QUICKSTART, "severity.weights.critical=-1"], "severity.weights.critical: must be"),
        (["recipes", "nowhere"], "There are no recipes in nowhere"),
        (["recipes", "--copy", "qwen3-4"], "sevpeft has qwen3-4b"),
        (["train", "qwen3_4b"], "sevpeft has qwen3-4b"),
        (["train", "recipes/qwen3-4b"], "sevpeft has qwen3-4b"),
        (["train", "base-model"], "base-model: model.name_or_path: "),
        (["chat", "x", "training.max_steps=1"], "generation, model and quantization"),
        (["web", "x", "--host", "0.0.0.0"], "SEVPEFT_WEB_PASSWORD"),
        (["web", "x", "--auth", "user:password"], "--auth USER"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line_and_exit_code_2(
    refusal: Callable[..., str], words: list[str], said: str
) -> None:
    assert said in refusal(*words, code=2)


def test_without_a_verb_the_help_is_shown(sevpeft_: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = sevpeft_()
    assert code == 2 and "Usage: " in out and err == ""


PROBABILITIES = "question,answer,p_non_critical,p_neutral,p_critical"


@pytest.mark.parametrize(
    ("header", "rows", "said"),
    [
        ("question,answer,severity", [], "holds no rows"),
        ("alpha,beta,gamma", pairs("x"), "one of 'alpha', 'beta', 'gamma'"),
        ("question,answer,severity", [*pairs("حرج"), f'"{QUESTION}" x,{ANSWER},حرج'], "line 42: a quote is stray"),
        ("question,answer,severity", pairs(), "more or fewer cells than the header"),
        ("question,answer", pairs(), "severity.control=uniform"),
        (PROBABILITIES, pairs(".5", ".5", ".5"), "do not sum to 1"),
        (PROBABILITIES, pairs("-.5", ".5", "1"), "negative"),
        (PROBABILITIES, [*pairs(".2", ".5", ".3"), *pairs(".2", ".5", "", count=1)], "Row 42: a severity probability"),
        (PROBABILITIES, pairs(".2", ".5", QUESTION), "see rows.csv, line 2"),
        ("question,answer,p_critical", pairs("1"), "no p_non_critical, p_neutral"),
        ("question,answer,severity", [*pairs("حرج"), *pairs(QUESTION, count=1)], "Row 42"),
        ("question,answer,severity", [*pairs("critical"), *pairs("", count=1)], "Row 42"),
        ("question,answer,severity", pairs("حرج", count=2), "data.validation_size"),
        ("question,answer,severity", [f"{QUESTION},{ANSWER} {i},حرج" for i in range(40)], "data.test_size"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_with_its_place_and_without_its_words(
    refusal: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    header: str,
    rows: list[str],
    said: str,
) -> None:
    path = csv(tmp_path, header, rows)
    output = tmp_path / "run"
    sentence = refusal(
        "train", QUICKSTART, f"model.name_or_path={model_folder()}", f"data.path={path}", "--output", output
    )
    assert said in sentence
    assert "صداع" not in sentence and "راجع" not in sentence
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.csv", None, "there is no such file"),
        ("empty.csv", b"", "empty.csv is empty"),
        (
            "cut.csv.gz",
            # Without the time, because the bytes are part of the test's name on every worker.
            gzip.compress("\n".join(pairs("حرج")).encode(), mtime=0)[:60],
            "download it again",
        ),
        ("windows.csv", "\n".join(["question,answer", *pairs()]).encode("cp1256"), "set data.encoding=cp1256"),
        ("rows.pdf", b"%PDF", ".csv, .tsv, .xlsx"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_remedy(
    refusal: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    name: str,
    content: bytes | None,
    said: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = f"data.path={tmp_path / name}"
    assert said in refusal("train", QUICKSTART, f"model.name_or_path={model_folder()}", path, "--output", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize("names", [("حرج", "متوسط", "غير حرج"), ("critical", "neutral", "non_critical")])
def test_arabic_and_english_severity_names_both_train(
    sevpeft_: Callable[..., tuple[int, str, str]],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    names: tuple[str, ...],
) -> None:
    rows = [f"{row},{names[index % 3]}" for index, row in enumerate(pairs(count=30))]
    path = csv(tmp_path, "question,answer,severity", rows)
    code, out, err = sevpeft_(
        "train",
        QUICKSTART,
        f"model.name_or_path={model_folder()}",
        f"data.path={path}",
        "training.max_steps=1",
        "--output",
        "run",
    )
    assert (code, err) == (0, "")
    assert "critical, 8 neutral, 8 non_critical" in out


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json"),
    "pickle": (_only_pickle, "no *.safetensors weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors weights"),
    "no tokenizer": (_no_tokenizer, "tokenizer.json"),
    "cut weights": (_cut, "could not be loaded"),
    "no weights at all": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "could not be loaded"),
    "cut config": (lambda folder: (folder / "config.json").write_text('{"model_type": "lla'), "could not be loaded"),
    "other architecture": (lambda folder: (folder / "config.json").write_text("{}"), "could not be loaded"),
    "ids without a row": (
        lambda folder: _edit_json(folder / "config.json", lambda config: config.update(vocab_size=300)),
        "has tokens beyond the 300 rows of the embedding",
    ),
    "no EOS": (
        lambda folder: _edit_json(folder / "tokenizer_config.json", lambda config: config.pop("eos_token")),
        "has no end-of-sequence token",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_that_cannot_be_used_is_refused(
    refusal: Callable[..., str], model_folder: Callable[..., Path], name: str
) -> None:
    folder = model_folder()
    damage, said = MODELS[name]
    damage(folder)
    assert said in refusal("train", QUICKSTART, f"model.name_or_path={folder}", "--output", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("settings", "said", "code"),
    [
        (["model.name_or_path=Nobody/nothing"], "could not be fetched from the Hub", 1),
        (["data.path=nobody/nothing"], "data.path=nobody/nothing", 1),
        (["training.fp16=true"], "training.fp16=true needs a CUDA GPU", 1),
        (["lora.target_modules=[nothing]"], "it has down_proj, embed_tokens", 1),
        (["lora.target_modules=nothing.*"], "lora.target_modules: llama has no nothing.*; it has", 1),
        (["training.report_to=wandb"], "wandb", 2),
        (["training.max_length=2"], "training.max_length=2", 1),
    ],
)
def test_what_this_machine_or_model_cannot_do_is_refused_before_a_run_is_there(
    refusal: Callable[..., str], model_folder: Callable[..., Path], settings: list[str], said: str, code: int
) -> None:
    sentence = refusal(
        "train", QUICKSTART, f"model.name_or_path={model_folder()}", *settings, "--output", "run", code=code
    )
    assert said in sentence
    assert not Path("run").exists()


def test_a_4bit_recipe_of_a_large_model_is_refused_without_a_gpu_before_anything_is_fetched(
    refusal: Callable[..., str],
) -> None:
    sentence = refusal("train", ROOT / "recipes" / "mistral-7b-instruct-v0.2.yaml")
    assert "needs a CUDA GPU" in sentence and "model.name_or_path=builtin:tiny" in sentence


def test_packing_is_refused_for_bloom(refusal: Callable[..., str], model_folder: Callable[..., Path]) -> None:
    folder = model_folder("bloom")
    words = ("train", QUICKSTART, f"model.name_or_path={folder}", "training.packing=true", "--output", "run")
    assert "training.packing=true is refused for bloom" in refusal(*words)
    assert not Path("run").exists()


def _a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def _other_files(folder: Path) -> Path:
    (folder / "other").mkdir()
    (folder / "other" / "thesis.docx").write_text("x")
    return folder / "other"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (_a_file, "--output"),
        (_other_files, "is not empty"),
        (lambda folder: _a_file(folder) / "run", "Not a directory"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: Path("/proc/run"), "cannot be written"),
    ],
    ids=["file", "other files", "under a file", "long", "proc"],
)
def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(
    refusal: Callable[..., str], tmp_path: Path, place: Callable[[Path], Path], said: str
) -> None:
    assert said in refusal("train", QUICKSTART, "model.name_or_path=unread", "--output", place(tmp_path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_an_output_that_is_not_writable_is_refused(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(**_: Any) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sevpeft.runs.tempfile, "mkdtemp", refuse)
    sentence = refusal("train", QUICKSTART, "--output", tmp_path / "run")
    assert os.strerror(number) in sentence and "choose another --output" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["tables", "models"])
def test_a_full_cache_is_named_and_left_clean(
    refusal: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))
    if kind == "tables":
        monkeypatch.setattr(sevpeft.data.read, "_write", full)
        model = str(model_folder())
    else:
        monkeypatch.setattr(sevpeft.modeling.tiny, "make_tiny_model", full)
        model = "builtin:tiny"
    sentence = refusal(
        "train", QUICKSTART, f"model.name_or_path={model}", "--output", "run", lines=1 + (kind == "models")
    )
    assert str(tmp_path / "cache" / kind) in sentence and "SEVPEFT_CACHE" in sentence
    assert "o space" in sentence
    assert [path.name for path in (tmp_path / "cache" / kind).iterdir() if path.suffix != ".lock"] == []
    assert not Path("run").exists()


def test_a_full_folder_for_temporary_files_is_named(
    refusal: Callable[..., str], model_folder: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "map", full)
    sentence = refusal("train", QUICKSTART, f"model.name_or_path={model_folder()}", "--output", "run")
    assert str(scratch) in sentence and "set TMPDIR" in sentence
    assert not Path("run").exists()


def _full_after(calls: int, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """The writing function of a library on a disk that is full after so many files; it leaves half a file."""
    count = 0

    def write(content: Any, file: Any, *rest: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count <= calls:
            return real(content, file, *rest, **more)
        Path(file).write_bytes(b"half")
        raise error

    return write


DISK_ERRORS: dict[str, tuple[Any, str, int, Exception]] = {
    "adapter": (
        peft.peft_model,
        "safe_save_file",
        1,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    "optimizer": (
        transformers.trainer.torch,
        "save",
        5,
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 875072 vs 874960"),
    ),
    "python": (transformers.trainer.torch, "save", 5, OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("name", DISK_ERRORS)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_a_run_that_resumes(
    sevpeft_: Callable[..., tuple[int, str, str]],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    run = Run(tmp_path / "run")
    words = ["train", QUICKSTART, f"model.name_or_path={model_folder()}", *SHORT, "--output", str(run.folder)]
    module, function, calls, error = DISK_ERRORS[name]
    with monkeypatch.context() as full:
        full.setattr(module, function, _full_after(calls, getattr(module, function), error))
        code, _, err = sevpeft_(*words)
    assert code == 1
    assert err.startswith(f"No space is left for {run.folder}; free some, then go on with --resume")
    assert [path.name for path in run.checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not run.adapter.exists() and not (run.folder / ".adapter.unfinished").exists()
    code, _, err = sevpeft_(*words, "--resume")
    assert (code, err) == (0, "") and run.finished
    assert run.metrics()["training"]["resumed_from"] == "checkpoint-2"


def test_a_checkpoint_that_a_kill_cut_off_is_not_resumed_from(
    sevpeft_: Callable[..., tuple[int, str, str]], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    words = ["train", QUICKSTART, f"model.name_or_path={model_folder()}", *SHORT, "training.save_total_limit=2"]
    words += ["--output", str(run.folder)]
    assert sevpeft_(*words)[0] == 0
    (run.adapter / "adapter_model.safetensors").unlink()
    (run.checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    code, _, err = sevpeft_(*words, "--resume")
    assert (code, err) == (0, "")
    assert run.metrics()["training"]["resumed_from"] == "checkpoint-2"


def test_ctrl_c_in_training_says_how_to_go_on_and_the_run_resumes(
    sevpeft_: Callable[..., tuple[int, str, str]],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tmp_path / "run")
    words = ["train", QUICKSTART, f"model.name_or_path={model_folder()}", *SHORT, "--output", str(run.folder)]
    step = SeveritySFTTrainer.training_step

    def interrupted(self: SeveritySFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as impatient:
        impatient.setattr(SeveritySFTTrainer, "training_step", interrupted)
        code, _, err = sevpeft_(*words)
    assert code == 130
    told = f"sevpeft train {run.folder}/recipe.yaml --output {run.folder} --resume"
    assert err == f"Interrupted. Resume with: {told}\n"
    assert "There is no adapter" in sevpeft_("chat", run.folder)[2]
    assert sevpeft_(*told.split()[1:])[0] == 0
    assert run.metrics()["training"]["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize("moment", ["data", "model", "trainer"])
def test_ctrl_c_before_training_leaves_nothing(
    refusal: Callable[..., str],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module, name = {
        "data": (sevpeft.data.read, "canonical_row"),
        "model": (sevpeft.modeling.tiny, "make_tiny_model"),
        "trainer": (SeveritySFTTrainer, "__init__"),
    }[moment]
    monkeypatch.setattr(module, name, interrupted)
    monkeypatch.setenv("SEVPEFT_CACHE", str(tmp_path / "cache"))
    model = "builtin:tiny" if moment == "model" else model_folder()
    words = ("train", QUICKSTART, f"model.name_or_path={model}", "--output", "run")
    assert refusal(*words, code=130, lines=1 + (moment == "model")).splitlines()[-1] == "Interrupted."
    assert not Path("run").exists()
    assert not list((tmp_path / "cache").glob("models/*/*"))


def test_resume_is_refused_where_it_would_not_continue_the_same_run(
    refusal: Callable[..., str],
    sevpeft_: Callable[..., tuple[int, str, str]],
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = csv(tmp_path, "question,answer,severity", pairs("حرج"))
    run = tmp_path / "run"
    words = [
        *("train", QUICKSTART, f"model.name_or_path={model_folder()}", f"data.path={path}", "training.max_steps=1"),
        *("--output", str(run)),
    ]
    assert "There is no run in" in refusal(*words, "--resume")
    assert sevpeft_(*words)[0] == 0
    assert "continue it with --resume, or choose another --output" in refusal(*words)
    code, out, err = sevpeft_(*words, "--resume")
    assert (code, err) == (0, "") and "is finished; nothing is left to do" in out
    assert "lora.r is 4 and was 16" in refusal(*words, "lora.r=4", "--resume")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    path.write_text(path.read_text(encoding="utf-8").replace("صداع", "سعال"), encoding="utf-8")
    assert "its content has changed" in refusal(*words, "--resume")


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_chat_with_no_run_names_what_is_wanted(refusal: Callable[..., str], folder: str) -> None:
    assert "runs/NAME-DATE" in refusal("chat", folder)


@pytest.mark.parametrize(
    ("words", "kind"),
    [(["train", QUICKSTART, "lora.rank=1"], RecipeError), (["train", QUICKSTART, "data.path=nope.csv"], DataError)],
)
def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path], words: list[str], kind: type[Exception]
) -> None:
    monkeypatch.setenv("SEVPEFT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["sevpeft", *words, f"model.name_or_path={model_folder()}"])
    with pytest.raises(kind):
        main()


def test_recipes_fit_a_narrow_terminal(
    sevpeft_: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = sevpeft_("recipes", ROOT / "recipes")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 40
    assert "\x1b" not in out


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--schema"]])
def test_a_reader_that_stops_and_a_full_disk_behind_the_pipe_are_taken_calmly(words: list[str]) -> None:
    command = [sys.executable, "-m", "sevpeft", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "No space left on device" in ended.stderr and ended.stderr.count("\n") == 1


# Before the libraries are loaded


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(**_: object) -> None:
        raise AssertionError("torch would be loaded first, which takes ten seconds")

    for module in ("training", "evaluation", "sharing", "data"):
        monkeypatch.setattr(f"sevpeft.cli.{module}.quiet_libraries", loading)


def test_what_needs_no_torch_is_said_before_it_is_loaded(
    refusal: Callable[..., str], without_libraries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    csv(tmp_path, "a,b", pairs()).rename(tmp_path / "names.csv")
    csv(tmp_path, "question,answer", pairs())
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sevpeft.cli.application.find_spec", lambda name: None if "mlflow" in name else True)
    wrong = []
    for words, code, said in (
        (["train", QUICKSTART, "data.path=nothing.csv"], 1, "data.path=nothing.csv: there is no such file"),
        (["train", QUICKSTART, "data.path=names.csv"], 1, "data.question_column"),
        (["train", QUICKSTART, "data.path=rows.csv"], 1, "severity.source=rules"),
        (["train", QUICKSTART, "--output", "full"], 1, "--output"),
        (["train", QUICKSTART, "training.report_to=mlflow"], 2, "pip install mlflow"),
        (["train", QUICKSTART, "training.report_to=wandb"], 2, "wandb login"),
        (["train", QUICKSTART, "model.name_or_path=./nothing"], 1, "model.name_or_path=./nothing"),
        (["train", QUICKSTART, "training.init_adapter=runs/a/b"], 1, "training.init_adapter=runs/a/b"),
        (["train", QUICKSTART, "severity.source=linear", "severity.classifier=no"], 1, "severity.classifier"),
        (["plan", QUICKSTART, "data.path=names.csv"], 1, "data.question_column"),
        (["compare", QUICKSTART, "data.path=nothing.csv"], 1, "data.path=nothing.csv"),
        (["compare", "nothing.yaml"], 2, "nothing.yaml"),
        (["compare", QUICKSTART, "--seeds", "3"], 2, "--seeds 0,1,2"),
        (["compare", QUICKSTART, "--arms", "ce,balanced"], 2, "add that to --arms"),
        (["compare", QUICKSTART, "--vary", "training.seed=1,2"], 2, "vary another key"),
        (["evaluate", "nothing"], 1, "sevpeft train"),
        (["choices", "nothing", "--tasks", "x"], 1, "sevpeft train"),
        (["report", "nothing"], 1, "sevpeft train"),
        (["chat", "nothing"], 1, "sevpeft train"),
        (["merge", "nothing", "out"], 1, "sevpeft train"),
        (["prepare", "nothing.csv", "out"], 1, "data.path=nothing.csv"),
        (["prepare", "rows.csv", "full"], 1, "full exists already"),
        (["annotate", "names.csv", "out.jsonl", "method=rules"], 1, "data.question_column"),
        (["annotate", "rows.csv", "out.jsonl"], 2, "method=rules"),
        (["classifier", "fit", "nothing.csv", "out"], 1, "data.path=nothing.csv"),
        (["classifier", "evaluate", "nothing.csv"], 1, "data.path=nothing.csv"),
        (["translate", "nothing.csv", "out.jsonl", "model=x"], 1, "data.path=nothing.csv"),
    ):
        sentence = refusal(*words, code=code)
        wrong += [] if said in sentence else [(words, sentence)]
    assert wrong == []


def test_an_option_of_another_program_is_answered_with_the_setting(
    refusal: Callable[..., str], without_libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = []
    for words, said in (
        (["--epochs", "3"], "write training.num_train_epochs=3."),
        (["--lr=1e-4"], "write training.learning_rate=1e-4."),
        (["--batch-size", "4"], "write training.global_batch_size=4."),
        (["--max_steps", "5"], "write training.max_steps=5."),
        (["--model", "a/b"], "write model.name_or_path=a/b."),
        (["--fp16"], "write training.fp16=VALUE."),
        (["--output_dir", "x"], "--output"),
        (["--resume_from_checkpoint", "x"], "use --resume"),
        (["--nothing"], "remove it"),
        (["model.name=x"], "model.name: is unknown; write model.name_or_path."),
        (["lora.alpha=3"], "lora.alpha: is unknown; write lora.lora_alpha."),
        (["lora.rank=3"], "lora.rank: is unknown; write lora.r."),
        (["evaluation.model=x"], "evaluation.model: is unknown; write evaluation.bertscore_model."),
    ):
        sentence = refusal("train", QUICKSTART, *words, code=2)
        wrong += [] if said in sentence else [(words, sentence)]
    assert wrong == []


def test_the_version_and_a_short_help_are_there(sevpeft_: Callable[..., tuple[int, str, str]]) -> None:
    assert sevpeft_("--version")[1].startswith("sevpeft ")
    assert "Usage" in sevpeft_("train", "-h")[1] and "--install-completion" in sevpeft_("-h")[1]
