"""The house as it is meant: small rooms, imports that run one way, a light ground floor, no code that came with data.

What a linter knows (pickle, eval, unsafe YAML, errors that disappear, print) is a rule of ruff in pyproject.toml.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "sevpeft").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
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
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "sklearn", "bert_score"}
# Of a module, of a room, and altogether, with every room that was planned on 2026-11-28: nothing more may come without
# something that goes.
MOST_LINES, MOST_IN_A_ROOM, MOST_MODULES, MOST_ALTOGETHER = 500, 12, 79, 18_000


def room_of(name: str) -> str:
    return name.split("/")[1].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all imports, those inside functions included; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported, without functions and TYPE_CHECKING."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module([node for node in kept if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])


def test_imports_run_one_way() -> None:
    back = [
        (name, other)
        for name, tree in TREES.items()
        if name != "sevpeft/__init__.py"  # its functions of the Python interface are imported on first use
        for other in imported(tree)
        if re.match(r"sevpeft\.(?!__version__)\w+", other) and floor_of(other.split(".")[1]) > floor_of(room_of(name))
    ]
    assert back == []


def test_no_imports_run_in_a_circle() -> None:
    graph = {
        name: {
            path
            for other in imported(at_import(tree))
            for path in (f"{other.replace('.', '/')}.py", f"{other.rpartition('.')[0].replace('.', '/')}.py")
            if path in MODULES
        }
        for name, tree in TREES.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def test_rooms_are_small() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    own = [name for name in MODULES if not name.endswith("__init__.py")]
    rooms = Counter(name.rpartition("/")[0] for name in own if name.count("/") > 1)
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert {room: count for room, count in rooms.items() if count > MOST_IN_A_ROOM} == {}
    assert len(own) <= MOST_MODULES and sum(lines.values()) <= MOST_ALTOGETHER


def test_a_module_says_what_it_is_and_none_is_a_drawer() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "base", "core", "tools"}
    wrong = [
        name
        for name, tree in TREES.items()
        if (not ast.get_docstring(tree) and not name.endswith("__main__.py"))
        or drawers & set(name.removesuffix(".py").split("/"))
        or re.search(r"\b(TODO|FIXME|XXX)\b", MODULES[name].read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_names_are_the_fields_own_words() -> None:
    own = {"told", "tell", "said", "say", "asked", "ask", "foretold", "leaving", "claimed", "dealing", "strangers"}
    own |= {"unfinished", "rehearsal", "under_way"}
    kinds = (ast.Name, ast.arg, ast.FunctionDef, ast.ClassDef)
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]
    names = {
        (where, next(filter(None, (getattr(node, of, "") for of in ("id", "arg", "name"))))) for where, node in nodes
    }
    assert {(where, name) for where, name in names if name in own or name.startswith("refuse_")} == set()


def test_private_names_of_libraries_stand_in_compat_and_nowhere_else() -> None:
    trees = {name: tree for name, tree in TREES.items() if not name.endswith("compat.py")}
    own = {"_replace", "_asdict"}  # of named tuples, and public in spite of it
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    touches = [
        (name, node.attr)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
        if node.attr not in own and not node.attr.endswith("__")
    ]
    assert touches == [("sevpeft/data/read.py", "_fingerprint"), ("sevpeft/runs.py", "_exit")]


def test_no_code_of_others_is_trusted() -> None:
    trusting = [
        name
        for name, path in MODULES.items()
        if re.search(r"""trust_remote_code["'\]]*(: bool)?\s*[=:]\s*True""", path.read_text(encoding="utf-8"))
    ]
    assert trusting == []


def test_the_ground_floor_imports_no_heavy_library() -> None:
    ground = [name for name in MODULES if floor_of(room_of(name)) == 0 and not name.endswith("/library.py")]
    heavy = {name: HEAVY & {other.split(".")[0] for other in imported(TREES[name])} for name in ground}
    assert {name: found for name, found in heavy.items() if found} == {}


def loaded_after(program: str) -> set[str]:
    """Heavy libraries that a new interpreter has loaded after the program."""
    run = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint('\\nLOADED', *{sorted(HEAVY)!r} & sys.modules.keys())"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("LOADED")[2].split())


def test_a_recipe_is_read_and_refused_without_loading_a_heavy_library() -> None:
    program = (
        "from sevpeft.recipe import recipe_from_values, recipe_schema\nfrom sevpeft.errors import RecipeError\n"
        "import sevpeft, sevpeft.runs\nrecipe_schema()\ntry:\n    recipe_from_values({'training': {'learning_rat': 1}})"
        "\nexcept RecipeError: print('refused')"
    )
    assert loaded_after(program) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["prepare", "--help"]])
def test_help_answers_without_loading_a_heavy_library(arguments: list[str]) -> None:
    program = (
        f"import sys\nfrom sevpeft.cli import main\nsys.argv = ['sevpeft', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code, leave.code"
    )
    assert loaded_after(program) == set()
