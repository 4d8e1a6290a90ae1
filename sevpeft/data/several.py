"""From a folder of files, or a pattern such as data/*.csv, to the one table that they are parts of.

Corpora such as MAQA come as several files. They are read in sorted order, one after the other, and their rows are
numbered on; messages name the file and its own line. Each row carries the `file` it stands in, so that a file can be
held out. Files that do not belong together are refused: a set that is read by half trains on half of it.
"""

import bisect
import glob
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sevpeft.data.columns import listed
from sevpeft.data.files import Row, Table, file_format, open_table
from sevpeft.errors import DataError

FILE_COLUMN = "file"


def files_of(given: str) -> list[Path] | None:
    """Return the files that a folder or a pattern names, sorted by path, None where `given` is neither.

    Of a folder these are the files directly in it with a suffix that is read; of a pattern, all that match.

    Raises:
        DataError: there are none, they are of several formats, or the folder cannot be read.
    """
    path = Path(given).expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file_format(file) and _is_visible_file(file))
            none = f"data.path={given} is a folder without a file that is read here: name a file, or another folder."
        elif not path.exists() and glob.has_magic(given):
            files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
            none = f"data.path={given}: no file matches this pattern."
        else:
            return None
    except ValueError:  # a zero byte; what is wrong with the path is said where it is read as a file
        return None
    except OSError as error:
        raise DataError(f"data.path={given} cannot be read ({error.strerror or type(error).__name__}).") from None
    if not files:
        raise DataError(none)
    formats = list(dict.fromkeys(file_format(file) or file.suffix for file in files))
    if len(formats) > 1:
        pattern = f"{path if path.is_dir() else path.parent}/*{formats[0]}"
        raise DataError(
            f"data.path={given} names files of several formats ({', '.join(formats)}): name one file, or those of one "
            f"format, as in {pattern}."
        )
    return files


def _is_visible_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith((".", "~$"))


def joined(files: Sequence[Path], encoding: str | None, chosen: Mapping[str, str | None]) -> Table:
    """Return the rows of several files as one table that can be read once; files are opened one at a time.

    Raises:
        DataError: a file cannot be read, or its columns differ from those of the first.
    """
    first = open_table(files[0], encoding, chosen)
    notes = [f"{files[0].name}: {first.note}"] * bool(first.note)
    for file in files[1:]:
        other = open_table(file, encoding, chosen)
        notes += [f"{file.name}: {other.note}"] * bool(other.note)
        if first.names is not None and set(other.names or ()) != set(first.names):
            only = [name for name in first.names if name not in (other.names or ())]
            added = [name for name in other.names or () if name not in first.names]
            said = [f"lacks {listed(only)}"] * bool(only) + [f"has {listed(added)} besides"] * bool(added)
            raise DataError(
                f"{file.name} has not the same columns as {files[0].name}, it {' and '.join(said)}: rename them alike, "
                "or name the files that belong together."
            )
    marked = FILE_COLUMN not in (first.names or ())
    begins: list[int] = []
    tables: list[Table] = []

    def read(columns: Collection[str]) -> Iterator[Row]:
        begins.clear()
        tables.clear()
        last = 0
        for file in files:
            table = open_table(file, encoding, chosen)
            begin = last
            begins.append(begin)
            tables.append(table)
            for number, cells in table.read({name for name in columns if name != FILE_COLUMN or not marked}):
                last = begin + number
                if marked:
                    cells.setdefault(FILE_COLUMN, file.name)
                yield last, cells

    def place(number: int) -> str:
        index = bisect.bisect_left(begins, number) - 1
        table, number = tables[index], number - begins[index]
        return table.place(number) if table.place else f"{files[index].name}, {table.unit} {number}"

    names = None if first.names is None else [*first.names, *[FILE_COLUMN] * marked]
    return Table(names, first.unit, read, place, "; ".join(notes))
