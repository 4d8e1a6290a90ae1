"""The words and patterns of words.yaml, by which texts are cleaned, masked and rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
WORDS = {name: frozenset(words.split()) for name, words in _FILE.items() if isinstance(words, str)}


def pattern(name: str) -> str:
    """A regular expression that matches any of the list `name`, with its fragments filled in."""
    joined = "|".join(_FILE[name])
    for fragment, meaning in _FILE["fragments"].items():
        joined = joined.replace(f"<{fragment}>", meaning)
    return joined
