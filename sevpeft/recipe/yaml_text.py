"""Turns YAML text into plain values, and plain values into YAML text that reads back as the same values.

PyYAML follows YAML 1.1, which surprises in recipes: `1e-4` is text, `no` is false (so `eval_strategy: no` breaks),
`12:30` is 750, `010` is 8, and of two equal keys the last wins in silence. Here a plain word is a number, true, false,
null or text, as in YAML 1.2, and a key that stands twice is a mistake. What is written reads the same under both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from sevpeft.errors import RecipeError

KeyPath = tuple[str, ...]
Mistake = tuple[KeyPath, str]

# A recipe has some 200 values. Aliases of aliases make billions of a few lines, and reading them never ends.
_MOST_VALUES = 10_000

_MERGE = "tag:yaml.org,2002:merge"
_PLAIN_WORDS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # A leading zero makes text of it: ids such as 007 are no numbers.
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    (_MERGE, r"<<", ["<"]),
)


class _Reader(yaml.SafeLoader):
    # None of YAML 1.1's words; `add_implicit_resolver` fills in ours.
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Writer(yaml.SafeDumper):
    """Keeps the rules of YAML 1.1 beside ours, so that it quotes the text "no" for other readers of the file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN_WORDS:
    for _side in (_Reader, _Writer):
        _side.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Between single quotes a line break is an empty line, and YAML's other line breaks are folded away.
    style = '"' if re.search(r"[\n\r\t\x85\u2028\u2029]", text) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _write_text)

# What PyYAML says → what it means in a recipe.
_PLAIN_SENTENCES = (
    (
        "mapping values are not allowed",
        "a second ': ' stands here, or the line is indented too far; put text with ': ' in it in quotes",
    ),
    ("'\\t' that cannot start", "a tab stands here; indent with spaces"),
    ("cannot start any token", "text begins with a character that has a meaning in YAML; put it in quotes"),
    ("could not find expected ':'", "the line has no ': ' between key and value; write key: value"),
    ("expected <block end>", "the indentation does not fit the lines above; indent the keys of a section alike"),
    ("expected ',' or", "a { or [ is not closed or lacks a comma; write {key: value, key: value} or [a, b]"),
    ("while scanning a quoted scalar", "a quotation mark is opened and not closed; close it"),
    ("unexpected end of stream", "a quotation mark or bracket is opened and not closed; close it"),
    ("expected a single document", "--- starts a second document; keep one recipe in a file"),
    ("undefined alias", "a word begins with *, which means an alias in YAML; put it in quotes"),
    ("constructor for the tag", "a word begins with !, which means a tag in YAML; put it in quotes"),
    ("unhashable key", "a mapping or list stands where a key belongs; put text that begins with { or [ in quotes"),
    (
        "values with its aliases",
        f"over {_MOST_VALUES:,} values stand here, each alias counted as all that it names; write fewer",
    ),
    ("stands within itself", "an alias stands within what it names; write the values out"),
)


def write_yaml(values: Any) -> str:
    """YAML text of plain values, keys in their order, Arabic readable."""
    # One line a value: a value broken over lines is hard to edit and to compare.
    return yaml.dump(values, Dumper=_Writer, allow_unicode=True, sort_keys=False, width=10**9)


def read_yaml(text: str, source: str) -> tuple[Any, list[Mistake]]:
    """The values of one YAML document, and a mistake for every key that stands twice.

    Raises:
        RecipeError: the text is no YAML; with line and column.
    """
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        if node is None:
            return None, []
        if _size(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "values with its aliases", node.start_mark)
        twice = list(_keys_twice(node, (), ()))
        return reader.construct_document(node), twice
    except yaml.MarkedYAMLError as error:
        said = f"{error.context or ''} {error.problem or ''}".strip()
        unknown = f"this is no YAML ({said}); mend it"
        meant = next((plain for words, plain in _PLAIN_SENTENCES if words in said), unknown)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise RecipeError(f"{source}: {where}: {meant}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}: line {line}: a control character stands here; remove it.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: the values are nested too deep or too long; shorten them.") from error


def read_value(text: str) -> Any:
    """The value that is meant on a command line: YAML, but never a word that YAML would cut or bend.

    `{…}`, `[…]` and quoted text are YAML; otherwise numbers, true, false and null are themselves, and all else is
    the text as it was typed, with its colons, `#` and leading dashes.
    """
    try:
        value, twice = read_yaml(text, "")
    except RecipeError:
        return text
    structured = text.lstrip()[:1] in ("{", "[", '"', "'") and not twice
    return value if structured or value is None or isinstance(value, bool | int | float) else text


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Number of values under a node, an alias counted as all that it stands for."""
    if node not in sizes:
        sizes[node] = 1  # for what stands within itself, which is refused later
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (part for item in below for part in (item if isinstance(item, tuple) else (item,)))
        sizes[node] += sum(_size(part, sizes) for part in nodes)
    return sizes[node]


def _keys_twice(node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Iterator[Mistake]:
    if node in above:
        raise yaml.constructor.ConstructorError(None, None, "stands within itself", node.start_mark)
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys_twice(item, (*path, str(index)), above)
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue
            # Keys are names: `1:` and `null:` are keys that do not exist, not numbers and nothing.
            key.tag = "tag:yaml.org,2002:str"
            line = key.start_mark.line + 1
            here = (*path, key.value)
            if key.value in first_lines:
                yield here, f"stands twice, on lines {first_lines[key.value]} and {line}; keep one of them."
            first_lines.setdefault(key.value, line)
            yield from _keys_twice(value, here, above)
