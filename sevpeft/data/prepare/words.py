"""The words and patterns of words.yaml, by which texts are cleaned, masked and rejected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _FILE["words"].items()}


def _compiled(written: str | list[str]) -> re.Pattern[str]:
    """A pattern, or one that matches any of a list, with the fragments filled in."""
    joined = written if isinstance(written, str) else "|".join(written)
    for fragment, meaning in _FILE["fragments"].items():
        joined = joined.replace(f"<{fragment}>", meaning)
    return re.compile(joined)


PATTERNS: dict[str, re.Pattern[str]] = {name: _compiled(written) for name, written in _FILE["patterns"].items()}
