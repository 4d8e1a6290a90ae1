"""The house as it is meant: imports run one way, the ground floor is light, and no code runs that came with data."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sevpeft"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground floor upwards; a room imports from its own floor and from those below.
FLOORS = (
    ("errors", "recipe", "runs", "console", "__init__"),
    ("data",),
    ("severity",),
    ("modeling",),
    ("training",),
    ("evaluation",),
    ("sharing",),
    ("cli", "__main__"),
)
# Imports PEFT and TRL in one function only, which is run after an upgrade to write library_fields.json.
SNAPSHOT = "sevpeft/recipe/library.py"
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "sklearn", "bert_score"}


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, package: str = "sevpeft") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written out in full here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def running_back(tree: ast.Module, room: str) -> list[str]:
    found = []
    for line, imported in imports(tree):
        parts = imported.split(".")
        if (
            parts[0] == "sevpeft"
            and len(parts) > 1
            and (PACKAGE / parts[1]).with_suffix(".py").exists() | (PACKAGE / parts[1]).is_dir()
            and floor_of(parts[1]) > floor_of(room)
        ):
            found.append(f"line {line}: {imported}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    assert running_back(tree_of(path), room_of(path)) == []


def test_an_import_that_runs_back_would_be_seen() -> None:
    inside = "def f():\n    from sevpeft.training.run import train\n"
    for room, text in (
        ("data", "from sevpeft.severity import weighting"),
        ("errors", "import sevpeft.recipe\nimport sevpeft.data.sources"),
        ("modeling", inside),
        ("sharing", "from sevpeft import cli"),
    ):
        assert len(running_back(ast.parse(text), room)) == 1, text
    assert (
        running_back(ast.parse("from sevpeft.data import cleaning\nfrom sevpeft import __version__"), "training") == []
    )


def test_every_room_has_its_floor() -> None:
    known = {room for rooms in FLOORS for room in rooms}
    assert {room_of(path) for path in MODULES} <= known


@pytest.mark.parametrize("path", [path for path in MODULES if floor_of(room_of(path)) == 0], ids=name)
def test_the_ground_floor_imports_no_heavy_library(path: Path) -> None:
    heavy = [imported for _, imported in imports(tree_of(path)) if imported.split(".")[0] in HEAVY]
    assert heavy == ([] if name(path) != SNAPSHOT else ["peft.LoraConfig", "trl.SFTConfig"])


def loaded_after(program: str) -> set[str]:
    """Heavy libraries that a new interpreter has loaded after the program."""
    run = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint('\\nLOADED', *{sorted(HEAVY)!r} & sys.modules.keys())"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "200"},
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("LOADED")[2].split())


def test_a_recipe_is_read_and_refused_without_loading_a_heavy_library() -> None:
    program = (
        "from sevpeft.recipe import recipe_from_values, recipe_schema\nfrom sevpeft.errors import RecipeError\n"
        "import sevpeft.runs\nrecipe_schema()\ntry:\n    recipe_from_values({'training': {'learning_rat': 1}})\n"
        "except RecipeError: print('refused')"
    )
    assert loaded_after(program) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "--help"]])
def test_help_answers_without_loading_a_heavy_library(arguments: list[str]) -> None:
    program = (
        f"import sys\nfrom sevpeft.cli import main\nsys.argv = ['sevpeft', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code, leave.code"
    )
    assert loaded_after(program) == set()


def test_a_heavy_library_would_be_seen() -> None:
    assert loaded_after("import torch") >= {"torch"}


# What a module is


def test_no_module_is_a_drawer() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "base", "core", "tools"}
    assert [name(path) for path in MODULES if path.stem in drawers or path.parent.name in drawers] == []


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_says_what_it_is_and_is_one_idea(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(text)), "opens without a docstring"
    assert len(text.splitlines()) <= 500
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


# What no module does


def silenced(tree: ast.Module) -> list[int]:
    """Lines where an error disappears: a bare except, one that does nothing, or everything suppressed."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            nothing = all(isinstance(do, ast.Pass) or _is_ellipsis(do) for do in node.body)
            if node.type is None or nothing:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and _called(node) == "suppress":
            kinds = {kind.id for kind in node.args if isinstance(kind, ast.Name)}
            if kinds & {"Exception", "BaseException"}:
                lines.append(node.lineno)
    return lines


def _is_ellipsis(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and statement.value.value is ...
    )


def _called(call: ast.Call) -> str:
    """Last name of what is called: `load` for torch.load(...)."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def trusting(tree: ast.Module) -> list[int]:
    """Lines where trust_remote_code is written as True: as an argument, a key, a default or an assignment."""
    lines = []
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.AST | None]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [(str(getattr(key, "value", "")), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.Assign):
            pairs = [(ast.unparse(target), node.value) for target in node.targets]
        elif isinstance(node, ast.FunctionDef):
            every = [*node.args.args, *node.args.kwonlyargs]
            values = [*node.args.defaults, *node.args.kw_defaults]
            pairs = [(a.arg, v) for a, v in zip(every[len(every) - len(values) :], values, strict=True)]
        for key, value in pairs:
            if (
                key.strip("'\"]").endswith("trust_remote_code")
                and isinstance(value, ast.Constant)
                and value.value is True
            ):
                lines.append(value.lineno)
    return lines


def evaluating(tree: ast.Module) -> list[int]:
    """Lines that turn text into code."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call.lineno for call in calls if _called(call) in ("eval", "exec", "__import__")]


def unpickling(tree: ast.Module) -> list[int]:
    """Lines that could run what a file says: pickle and its kin, torch.load, allow_pickle, unsafe YAML, a shell."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    lines = [line for line, imported in imports(tree) if imported.split(".")[0] in modules]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        loads = ast.unparse(node.func) in ("torch.load", "load_pickle") and keywords.get("weights_only") is not True
        allows = keywords.get("allow_pickle") is True
        if loads or allows or ast.unparse(node.func) in ("yaml.load", "yaml.unsafe_load", "os.system"):
            lines.append(node.lineno)
    return lines


def printing(tree: ast.Module) -> list[int]:
    """Lines that print past sevpeft/console.py, which shows control characters of data instead of sending them."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) in ("print", "Console", "typer.echo")]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_error_disappears_and_nothing_that_was_downloaded_runs(path: Path) -> None:
    tree = tree_of(path)
    assert (silenced(tree), trusting(tree), unpickling(tree)) == ([], [], [])
    assert evaluating(tree) == []
    assert printing(tree) == [] or path.name == "console.py"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (silenced, "try:\n    f()\nexcept OSError:\n    pass"),
        (silenced, "try:\n    f()\nexcept OSError: ..."),
        (silenced, "try:\n    f()\nexcept:\n    g()"),
        (silenced, "with contextlib.suppress(Exception):\n    f()"),
        (trusting, "f(trust_remote_code=True)"),
        (trusting, "f(**{'trust_remote_code': True})"),
        (trusting, "trust_remote_code: bool = True"),
        (trusting, "settings['trust_remote_code'] = True"),
        (trusting, "def f(a, *, trust_remote_code=True): ..."),
        (unpickling, "import pickle"),
        (unpickling, "def f():\n    from joblib import load"),
        (unpickling, "torch.load(path)"),
        (unpickling, "torch.load(path, weights_only=False)"),
        (unpickling, "numpy.load(path, allow_pickle=True)"),
        (evaluating, "eval(text)"),
        (printing, "print(text)"),
        (printing, "Console(quiet=True)"),
        (evaluating, "exec(open(path).read())"),
        (unpickling, "yaml.load(text)"),
    ],
)
def test_each_check_would_see_it(check: object, text: str) -> None:
    assert callable(check) and len(check(ast.parse(text))) == 1


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (silenced, "try:\n    f()\nexcept OSError:\n    return None"),
        (silenced, "with contextlib.suppress(FileNotFoundError):\n    f()"),
        (trusting, "f(trust_remote_code=recipe.trust_remote_code)\ntrust_remote_code: bool = False"),
        (unpickling, "torch.load(path, weights_only=True)\nyaml.safe_load(text)"),
        (evaluating, "model.eval()\nre.compile(text)"),
    ],
)
def test_each_check_lets_the_right_way_pass(check: object, text: str) -> None:
    assert callable(check) and check(ast.parse(text)) == []
