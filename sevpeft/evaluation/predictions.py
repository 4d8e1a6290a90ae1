"""Keeps what was computed row by row in a file that only grows, so that a kill costs one batch and nothing is redone.

Beside `predictions.jsonl` stands `predictions.about.json`, which says from which adapter, rows, prompt and settings
the lines come; lines of another origin are refused, with what differs. Lines are found by arm and id, whatever their
order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sevpeft.errors import RunError
from sevpeft.runs import keep_private, plain_disk_errors, write_atomically

PREDICTIONS, LIKELIHOOD = "predictions.jsonl", "likelihood.jsonl"


class RowFile:
    """Lines {"arm": …, "id": …, …} of one origin.

    Args:
        path: of the .jsonl file, which need not exist.
        origin: what the lines depend on, as nested plain values; a list or text is compared as a whole.
        fields: that every line has beside arm and id.

    Raises:
        RunError: the lines that are there have another origin or none, or one of them is damaged.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any], fields: Collection[str] = ()) -> None:
        self.path = path
        self.fields = fields
        self.about = path.with_suffix(".about.json")
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        # Read back as it was written, or 1 and 1.0, tuples and lists would differ.
        self._origin: dict[str, Any] = json.loads(json.dumps(origin, ensure_ascii=False))
        if path.exists() and path.stat().st_size:
            self._refuse_other_origin()
            self._read()

    def rows(self, arm: str) -> dict[str, dict[str, Any]]:
        """Id → line of an arm."""
        return {identity: row for (of, identity), row in self._rows.items() if of == arm}

    def missing(self, arm: str, ids: Iterable[str]) -> list[int]:
        """Positions of the ids that the arm has no line for."""
        return [at for at, identity in enumerate(ids) if (arm, identity) not in self._rows]

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds lines and hands them to the operating system in one piece."""
        with plain_disk_errors(self.path, when_full="free some, then run this again (finished answers are kept)"):
            if not self.about.exists() or not self.path.exists():
                write_atomically(self.about, json.dumps(self._origin, ensure_ascii=False, indent=2) + "\n")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                keep_private(self.path)  # an earlier version or a copy may have left it open to others
                file.write(text.encode())
        for row in rows:
            self._rows.setdefault((row["arm"], row["id"]), row)

    def _refuse_other_origin(self) -> None:
        try:
            stored = json.loads(self.about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RunError(
                f"{self.path} does not say what it was made from, because {self.about.name} is missing or damaged; "
                f"move {self.path.name} away to start anew."
            ) from None
        changed = sorted(differences(stored, self._origin))
        if changed:
            raise RunError(
                f"{self.path} was made from something else: {'; '.join(changed)}. Evaluate with the same, or move "
                f"{self.path.name} away to start anew."
            )

    def _read(self) -> None:
        content = self.path.read_bytes()
        sound = 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key = (str(row["arm"]), str(row["id"]))
                if not line.endswith(b"\n") or any(name not in row for name in self.fields):
                    raise ValueError("cut off")
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break  # a kill cut it off; it is computed again
                raise RunError(
                    f"Line {number} of {self.path} cannot be read; take that line out and run this again, which "
                    "computes that row anew."
                ) from None
            self._rows.setdefault(key, row)
            sound += len(line)
        if sound < len(content):
            with plain_disk_errors(self.path):
                os.truncate(self.path, sound)


def differences(stored: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two nested mappings, as `key: this there, that now`; long values by name alone."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        for key in {**stored, **now}:
            yield from differences(stored.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif stored != now:
        shown = [json.dumps(value, ensure_ascii=False) for value in (stored, now)]
        short = all(len(text) <= 40 for text in shown)
        yield f"{path} is {shown[1]} and was {shown[0]}" if short else f"{path} is another"


@contextmanager
def only_one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps a second evaluation out of the run while one is at work; a kill releases it."""
    path = folder / ".evaluating"
    lock = FileLock(path, timeout=0)
    try:
        with plain_disk_errors(folder, remedy="evaluate a run that you may write to"):
            lock.acquire()
    except Timeout:
        raise RunError(f"{folder} is being evaluated by another process; wait for it.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
