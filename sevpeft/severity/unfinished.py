"""The folder beside an OUTPUT in which finished parts of a long work survive a kill, until OUTPUT is in its place.

`.OUTPUT.annotating/` holds state.json (what the parts were made of), part-000000.arrow and so on, each moved into place
whole, and in the end OUTPUT itself while it is written. It is for its owner alone, because it may hold patient text.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from sevpeft.errors import RunError
from sevpeft.runs import check_absent, keep_private, plain_disk_errors, write_atomically

_STATE, _LOCK, _WHOLE = "state.json", ".lock", "whole"


class Unfinished:
    """Parts of the work on one OUTPUT."""

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.abspath(output))
        self.folder = self.output.parent / f".{self.output.name}.annotating"

    @contextlib.contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """The folder made, or found again with parts of the same settings; for one command at a time.

        Raises:
            RunError: the parts are of other settings, or another command works on them.
        """
        with self.plainly():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            lock = FileLock(self.folder / _LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"Another command is writing {self.output} now; wait for it, or choose another OUTPUT."
                ) from None
        try:
            with self.plainly():
                state = self._state()
                if state and (other := [name for name in settings if state.get(name) != settings[name]]):
                    raise RunError(
                        f"{self.folder} holds what an unfinished command has judged with another "
                        f"{' and another '.join(other)}; give that command again to finish it, choose another OUTPUT, "
                        "or remove that folder to start anew."
                    )
                if not state:
                    self._write_state(settings)
            yield
        finally:
            lock.release()

    def read(self, number: int) -> pa.Table:
        """A part that `has` says is there."""
        with pa.OSFile(str(self._file(number))) as source:
            return pa.ipc.open_file(source).read_all()

    def has(self, number: int, rows: int) -> bool:
        """Whether a part is there whole; a disk that lost its power may have kept the name without the content."""
        try:
            return len(self.read(number)) == rows
        except (OSError, pa.ArrowException):
            return False

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part, whole or not at all."""
        file = self._file(number)
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            with partial.open("wb") as sink:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
                sink.flush()
                os.fsync(sink.fileno())
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def count(self) -> int:
        """How many parts are there, of all processes."""
        return sum(1 for _ in self.folder.glob("part-*.arrow"))

    @contextlib.contextmanager
    def whole(self) -> Iterator[Path]:
        """A path for OUTPUT to be written to, a file or a folder; what a failure leaves of it goes, the parts stay."""
        path = self.folder / _WHOLE
        _clear(path)
        try:
            yield path
        except BaseException:
            _clear(path)
            raise

    def finish(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Move the whole into the place of OUTPUT, and take the parts away.

        Raises:
            RunError: OUTPUT has come to exist meanwhile.
        """
        path = self.folder / _WHOLE
        # Said before it is done: a kill right after the move would else leave parts that nobody takes away.
        self._write_state({**settings, "done": {"inode": path.stat().st_ino, "result": result}})
        check_absent(self.output)
        keep_private(path)
        path.rename(self.output)
        self.remove()

    def finished(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of an earlier try that was killed after OUTPUT was in its place and before all else was gone."""
        state = self._state()
        done = state.get("done")
        if done is None or any(state.get(name) != value for name, value in settings.items()):
            return None
        if not self.output.exists() or self.output.stat().st_ino != done["inode"]:
            return None
        result: dict[str, Any] = done["result"]
        return result

    def remove(self) -> None:
        """Take everything away, and last what says that it was finished."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _STATE):
            _clear(path)
        self.folder.rmdir()

    def remove_empty(self) -> None:
        """Take away the empty folder of a try that was killed at its very last step."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def plainly(self) -> contextlib.AbstractContextManager[None]:
        """Errors of the disk as one sentence."""
        full = "free some, then give the same command again (what is judged is kept)"
        return plain_disk_errors(self.output, when_full=full, remedy="choose another OUTPUT")

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.arrow"

    def _state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / _STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _write_state(self, content: Mapping[str, Any]) -> None:
        write_atomically(self.folder / _STATE, json.dumps(content, indent=2) + "\n")


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
