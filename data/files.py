"""Rows of files: JSON lines or arrays, parquet, Arrow, and folders that `datasets` has saved.

Every error names the file, and the line where there are lines.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, overload

from data.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
_BOM = b"\xef\xbb\xbf"
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


# ---------------------------------------------------------------------------------------- which ones


@dataclass(frozen=True)
class Files:
    """The files of a folder, or a single file, wherever they lie."""

    where: str
    """What a person calls it."""

    names: Sequence[str]
    """Relative to the folder, with slashes; of a single file its own name."""

    single: bool
    open: Callable[[str], BufferedIOBase]
    """Opens one by its name; raises DataError."""

    def place(self, name: str) -> str:
        """What a person calls one of them."""
        return self.where if self.single else f"{self.where}/{name}"


def local_files(path: Path) -> Files:
    """A file or a folder on a disk; raises DataError if it is not there."""
    if not path.exists():
        raise DataError(f"data.path {path} does not exist; give a file or a folder of files")
    if path.is_file():
        return Files(str(path), [path.name], True, lambda name: open_local(path))
    names = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
    return Files(str(path), names, False, lambda name: open_local(path / name))


def select_files(files: Files, split: str) -> list[str]:
    """The names of those that hold the rows of `split`; raises DataError.

    Folders of `save_to_disk` say it themselves. Otherwise a word in the name of file or folder does,
    as in `datasets`; files without such words are all train.
    """
    if "dataset_dict.json" in files.names:
        return _select_saved(files, split, f"{split}/", _read_saved(files, "dataset_dict.json"))
    if {"state.json", "dataset_info.json"} <= set(files.names):
        return _select_saved(files, split, "", {"splits": ["train"]})
    names = [
        name
        for name in files.names
        if name.endswith(SUFFIXES)
        and (files.single or not any(part[0] in "._" for part in name.split("/")))
    ]
    if not names:
        what = "not a" if files.single else "holds no"
        raise DataError(f"{files.where}: {what} {', '.join(SUFFIXES)} file")
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of("" if files.single else name, split) or "", []).append(name)
    if set(splits) == {""}:
        splits = {"train": names}
    if split not in splits:
        raise _no_split(files.where, split, [name for name in splits if name])
    suffixes = sorted({Path(name).suffix for name in splits[split]})
    if len(suffixes) > 1:
        raise DataError(f"{files.where}: mixes {' and '.join(suffixes)} files; keep one kind")
    return splits[split]


def _select_saved(files: Files, split: str, prefix: str, content: dict[str, Any]) -> list[str]:
    if split not in content.get("splits", []):
        raise _no_split(files.where, split, content.get("splits", []))
    state = _read_saved(files, f"{prefix}state.json")
    names = [prefix + str(entry.get("filename")) for entry in state.get("_data_files", [])]
    # A list from elsewhere must not lead out of the folder: only what is listed in it counts.
    missing = sorted(set(names) - set(files.names))
    if missing or not names:
        lacks = f"lacks {', '.join(missing)}" if names else "names no data files"
        raise DataError(f"{files.where}: {lacks}; save or copy the dataset again")
    return names


def _read_saved(files: Files, name: str) -> dict[str, Any]:
    if name not in files.names:
        raise DataError(f"{files.where}: lacks {name}; save or copy the dataset again")
    with files.open(name) as stream:
        value = _parse_json(stream.read(), files.place(name), 1)
    if not isinstance(value, dict):
        raise DataError(f"{files.place(name)}: not a JSON object")
    return value


def _no_split(where: str, split: str, known: list[str]) -> DataError:
    return DataError(f"{where}: no split {split!r}; its files give {', '.join(sorted(known))}")


def _split_of(name: str, wanted: str) -> str | None:
    words = re.split(r"[^a-z0-9]+", name.lower())
    stem = Path(name).stem
    if stem == wanted or stem.startswith(f"{wanted}-"):
        return wanted
    for split, aliases in _SPLIT_WORDS.items():
        if any(word in aliases for word in words):
            return split
    return None


def open_local(file: Path) -> BufferedReader:
    """Open a file to read its bytes; raises DataError."""
    try:
        return open(file, "rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error


# ------------------------------------------------------------------------------------- one after another


def lazy_rows(stream: BufferedIOBase, suffix: str, place: str) -> Iterator[Callable[[], Row]]:
    """One function per row of an open file, in order; a row is parsed only when its function is called.

    So a reader passes over rows at little cost: lines are not parsed, row groups of parquet not even
    read. Memory: a line, a row group or a record batch; of a JSON array the whole file. Raises
    DataError, here or in the functions.
    """
    if suffix == ".parquet":
        rows = _lazy_parquet(stream, place)
    elif suffix == ".arrow":
        rows = _lazy_arrow(stream, place)
    else:
        rows = _lazy_json(stream, place)
    return rows


def _lazy_json(stream: BufferedIOBase, place: str) -> Iterator[Callable[[], Row]]:
    array_rows = _read_json_array(stream, place)
    if array_rows is not None:
        for row in array_rows:
            yield partial(_identity, row)
        return
    empty = True
    # Files of a remote store read ahead, but are slow line by line.
    lines = BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]
    try:
        for number, line in enumerate(lines, 1):
            raw = line.removeprefix(_BOM) if number == 1 else line
            if raw.strip():
                empty = False
                yield partial(_parse_row, raw.rstrip(), place, number)
    finally:
        lines.detach()  # whoever opened the file closes it
    if empty:
        raise DataError(f"{place}: empty; give a file with one JSON object per line")


def _identity(row: Row) -> Row:
    return row


def _lazy_parquet(stream: BufferedIOBase, place: str) -> Iterator[Callable[[], Row]]:
    import pyarrow.parquet as pq

    parquet = _or_damaged(partial(pq.ParquetFile, stream), place, "parquet")
    for number in range(parquet.num_row_groups):
        read = cache(partial(_read_group, parquet, number, place))
        for row in range(parquet.metadata.row_group(number).num_rows):
            yield partial(_row_of, read, row)


def _read_group(parquet: Any, number: int, place: str) -> Any:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = _or_damaged(partial(parquet.read_row_group, number), place, "parquet")
    return Dataset(InMemoryTable(table))  # reads the columns' types as `datasets` wrote them


def _row_of(read: Callable[[], Sequence[Row]], row: int) -> Row:
    return read()[row]


def _lazy_arrow(stream: BufferedIOBase, place: str) -> Iterator[Callable[[], Row]]:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    batches = _arrow_batches(stream, place)
    while (batch := _or_damaged(lambda: next(batches, None), place, "Arrow")) is not None:
        rows = Dataset(InMemoryTable(pa.Table.from_batches([batch])))
        for row in range(len(rows)):
            yield partial(rows.__getitem__, row)


def _arrow_batches(source: Any, place: str) -> Iterator[Any]:
    import pyarrow as pa

    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = _or_damaged(partial(pa.ipc.open_file, source), place, "Arrow")
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(_or_damaged(partial(pa.ipc.open_stream, source), place, "Arrow"))


def _or_damaged(read: Callable[[], Any], place: str, kind: str) -> Any:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place}: damaged {kind} file: {one_line(error)}") from error


# -------------------------------------------------------------------------------------- at random


def read_arrow(files: Sequence[Path]) -> Any:
    """A `datasets.Dataset` over Arrow files, streams or not, memory-mapped; raises DataError."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets
    from datasets.table import MemoryMappedTable

    found = []
    for file in files:
        check_not_empty(file)
        mapped = _or_damaged(partial(pa.memory_map, str(file)), str(file), "Arrow")
        # Nothing is copied: the batches point into the mapping.
        batches = _or_damaged(
            lambda m=mapped, f=file: list(_arrow_batches(m, str(f))), str(file), "Arrow"
        )
        if batches:
            table = pa.Table.from_batches(batches)
            found.append(Dataset(MemoryMappedTable(table, str(file))))
    if not found:
        raise DataError(f"{files[0]}: no rows; give a file that has some")
    try:
        return concatenate_datasets(found)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{files[0].parent}: the files' columns do not agree: {one_line(error)}"
        ) from error


def read_json(files: Sequence[Path], *, keep_broken: bool = False) -> Sequence[Row]:
    """The rows of JSON files, each one array or one object per line (see JsonLines); raises DataError."""
    arrays = []
    for file in files:
        with open_local(file) as stream:
            arrays.append(_read_json_array(stream, str(file)))
    if all(rows is None for rows in arrays):
        return JsonLines(files, keep_broken=keep_broken)
    return [
        row
        for file, rows in zip(files, arrays, strict=True)
        for row in (rows if rows is not None else JsonLines([file], keep_broken=keep_broken))
    ]


def _read_json_array(stream: BufferedIOBase, place: str) -> list[Row] | None:
    """The rows of a file that is one JSON array; None, at its start again, where it is lines."""
    start = stream.read(4096).removeprefix(_BOM).lstrip()
    stream.seek(0)
    if not start.startswith(b"["):
        return None
    rows = _parse_json(stream.read().removeprefix(_BOM), place, 1)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{place}: item {number} is not a JSON object")
    return rows


class BrokenLine(DataError):
    """A line that is no JSON object, or no text."""


class BrokenRow(Row):
    """What stands for a broken line where those are left out: a row without columns."""

    reason = "the line is not a JSON object"


class JsonLines(Sequence[Row]):
    """Rows of files with one JSON object per line, parsed when they are asked for.

    Only the position of every line is kept in memory. Each row is exactly what its line says, with
    no schema shared between rows: a key that only some messages have does not appear in the others.
    A line that is none raises BrokenLine, or is a BrokenRow with `keep_broken`.
    """

    def __init__(self, files: Sequence[Path], *, keep_broken: bool = False) -> None:
        self._files, self._keep_broken = list(files), keep_broken
        self._maps: list[mmap.mmap] = []
        self._file, self._start, self._stop, self._line = (array(kind) for kind in "iqqq")
        for index, file in enumerate(self._files):
            before, position = len(self._file), 0
            with open_local(file) as stream:
                for number, line in enumerate(stream, 1):
                    skip = 3 if number == 1 and line.startswith(_BOM) else 0
                    if line[skip:].strip():
                        self._file.append(index)
                        self._start.append(position + skip)
                        self._stop.append(position + len(line))
                        self._line.append(number)
                    position += len(line)
                if len(self._file) == before:
                    raise DataError(f"{file}: empty; give a file with one JSON object per line")
                self._maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file = self._file[index]
        raw = self._maps[file][self._start[index] : self._stop[index]].rstrip()
        try:
            return _parse_row(raw, str(self._files[file]), self._line[index])
        except BrokenLine:
            if not self._keep_broken:
                raise
            return BrokenRow()


def _parse_row(raw: bytes, place: str, line: int) -> Row:
    row = _parse_json(raw, place, line)
    if not isinstance(row, dict):
        raise BrokenLine(f"{place}:{line}: not a JSON object")
    return row


def _parse_json(raw: bytes, place: str, line: int) -> Any:
    """The value of `raw`, which begins at `line` of `place`; raises DataError with the line."""
    if (position := raw.find(b"\0")) >= 0:
        line += raw.count(b"\n", 0, position)
        raise BrokenLine(f"{place}:{line}: NUL byte; is it UTF-16? convert it to UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise BrokenLine(f"{place}:{line}: not UTF-8 ({error.reason}); convert the file") from error
    try:
        value = json.loads(text)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise BrokenLine(
            f"{place}:{line}: broken JSON: {error.msg}, column {error.colno}"
        ) from error
    except UnicodeEncodeError as error:
        raise BrokenLine(f"{place}:{line}: half of a surrogate pair; it is not text") from error
    except RecursionError as error:
        raise BrokenLine(f"{place}:{line}: JSON nested too deep") from error
    return value


def check_not_empty(file: Path) -> None:
    """Raise DataError if a file has no bytes."""
    if file.stat().st_size == 0:
        raise DataError(f"{file}: empty")


def check_file(file: Path, *, footer_only: bool = False) -> None:
    """Raise DataError with the place if `file` is damaged; `footer_only` skips parquet's pages."""
    check_not_empty(file)
    with open_local(file) as stream:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            parquet = _or_damaged(partial(pq.ParquetFile, stream), str(file), "parquet")
            for number in range(0 if footer_only else parquet.num_row_groups):
                _read_group(parquet, number, str(file))
            if not footer_only and parquet.metadata.num_rows == 0:
                raise DataError(f"{file}: no rows")
        else:
            for read in lazy_rows(stream, file.suffix, str(file)):
                read()


def one_line(error: BaseException) -> str:
    """The message of an error, or else its kind, as a short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
