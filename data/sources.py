"""Rows from the hub, from local files, or from the embedded generator."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from data.config import DataConfig
from data.errors import DataError

Row = dict[str, Any]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Source:
    """One split of a dataset, identified before any row of it is read."""

    name: str
    """What a person calls it: org/name, a path, or embedded."""

    commit: str | None
    """Commit of the hub repository; None for anything else."""

    fingerprint: str
    """Changes exactly when the rows can have changed; derived data is kept under it."""

    load: Callable[[], Sequence[Row]]
    """Reads the rows; raises DataError. Use `rows`, which calls it once."""

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The rows, read on first use: a run whose tokens are already prepared reads none."""
        rows = self.load()
        if len(rows) == 0:
            raise DataError(f"{self.name}: no rows; give a dataset that has some")
        return rows


def load_rows(config: DataConfig, split: str, *, cache_dir: str | Path) -> Source:
    """Resolve where the rows of `split` come from, downloading them into `cache_dir` if need be.

    Raises DataError for whatever a user can fix: spelling, access, network, disk, files.
    """
    if config.name is not None and config.path is not None:
        raise DataError("data.name and data.path are both given; give the one to be used")
    if config.path is not None:
        return _local_source(Path(config.path), split, Path(cache_dir))
    if config.name is not None:
        return _hub_source(config, config.name, split, Path(cache_dir))
    return _embedded_source(split)


# ---------------------------------------------------------------------------------------- embedded


def _embedded_source(split: str) -> Source:
    from data import embedded

    if split not in embedded.DEFAULT_COUNTS:
        raise DataError(
            f"the embedded data has no split {split!r}; it has {', '.join(embedded.DEFAULT_COUNTS)}"
        )
    # The rows are a function of the generator's text, so its hash stands for them.
    code = hashlib.sha256(Path(embedded.__file__).read_bytes()).hexdigest()
    return Source(
        name="embedded",
        commit=None,
        fingerprint=f"embedded/{split}/{code}",
        load=lambda: embedded.generate_conversations(split),
    )


# --------------------------------------------------------------------------------------------- hub


def _hub_source(config: DataConfig, name: str, split: str, cache_dir: Path) -> Source:
    snapshot = download_dataset(name, revision=config.revision, cache_dir=cache_dir)
    subset = config.subset

    def load() -> Sequence[Row]:
        files = sorted(f for f in snapshot.rglob("*") if f.suffix in _SUFFIXES)
        return _load_with_datasets(name, cache_dir, files, str(snapshot), name=subset, split=split)

    return Source(
        name=name,
        commit=snapshot.name,
        fingerprint=f"hub/{name}@{snapshot.name}/{subset or ''}/{split}",
        load=load,
    )


def download_dataset(name: str, *, revision: str | None, cache_dir: Path) -> Path:
    """Download a dataset repository into `cache_dir`/hub and return its snapshot, named by commit.

    One call resolves the revision and fetches the files of that very commit, and leaves the
    revision's name in the cache for later runs without a network. Raises DataError.
    """
    from huggingface_hub import snapshot_download

    if revision and (".." in revision or not re.fullmatch(r"[\w./+-]+", revision)):
        raise DataError(f"data.revision {revision!r} is not the name of a branch, tag or commit")
    for delay in (*_RETRY_DELAYS_SECONDS, None):
        try:
            snapshot = snapshot_download(
                name, repo_type="dataset", revision=revision, cache_dir=cache_dir / "hub"
            )
            return Path(snapshot)
        except Exception as error:  # the client's errors share no base class
            if delay is not None and _is_transient(error):
                time.sleep(delay)
                continue
            explanation = _explain_hub_error(error, name, revision, cache_dir)
            if explanation is None:
                raise
            raise DataError(explanation) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def _status(error: BaseException | None) -> int | None:
    """HTTP status behind `error`, if there was an answer at all."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: rate limits, server errors, connections cut half-way."""
    cause = error if _status(error) is not None else error.__cause__ or error
    status = _status(cause)
    if status is not None:
        return status == 429 or status >= 500
    kind = type(cause)
    # A refused connection stays refused: say so at once instead.
    return kind.__module__.startswith("httpx") and "Connect" not in kind.__name__


def _explain_hub_error(
    error: BaseException, name: str, revision: str | None, cache_dir: Path
) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"dataset {name}" + (f" at revision {revision}" if revision else "")
    if isinstance(error, HFValidationError):
        return f"data.name {name!r} is not a repository name; write it as org/name"
    if isinstance(error, GatedRepoError):
        return (
            f"{what}: access is gated; accept its terms on the hub and set HF_TOKEN to a token "
            "of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: no such branch, tag or commit; check data.revision"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: not found (HTTP {_status(error)}); check the spelling of data.name, or set "
            "HF_TOKEN if it is private"
        )
    if isinstance(error, IncompleteSnapshotError):
        return (
            f"{what}: only partly downloaded into {cache_dir} and the hub is out of reach; run "
            f"once with a network ({_one_line(error)})"
        )
    if isinstance(error, LocalEntryNotFoundError) and _status(error.__cause__) is not None:
        error = (
            error.__cause__ or error
        )  # the hub did answer; that the cache is cold as well says less
    if isinstance(error, LocalEntryNotFoundError):
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the hub did not answer ({_one_line(error.__cause__ or error)})"
        )
        return f"{what}: not in the cache {cache_dir} and {reason}; run once with a network"
    if isinstance(error, HfHubHTTPError) and not isinstance(error, EntryNotFoundError):
        if _status(error) in (401, 403):
            return f"{what}: the hub refuses access (HTTP {_status(error)}); set HF_TOKEN"
        return f"{what}: the hub answers HTTP {_status(error)}; try again later"
    if isinstance(error, OSError):
        return explain_os_error(error, cache_dir)
    if type(error).__module__.startswith("httpx"):
        return f"{what}: the download was cut ({_one_line(error)}); run again, it resumes"
    return None


def explain_os_error(error: OSError, folder: Path) -> str | None:
    """One line for a full disk or a folder that cannot be written; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(folder)).free
        return f"{folder}: no space left ({free:,} bytes free); free some or move --cache_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{error.filename or folder}: {error.strerror}; give a --cache_dir you can write to"
    return None


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _load_with_datasets(
    source: str, cache_dir: Path, files: list[Path], path: str, **options: Any
) -> Sequence[Row]:
    """`datasets.load_dataset` with its Arrow files under `cache_dir`; raises DataError."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(path, cache_dir=str(cache_dir / "datasets"), **options)
    except Exception as error:  # datasets raises bare StopIteration, ValueError, OSError, ...
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(cause, OSError) and (line := explain_os_error(cause, cache_dir)):
            raise DataError(line) from error
        # Only now, when it matters, look for the file and line that datasets does not name.
        for file in files:
            _check_file(file)
        if isinstance(error, DatasetNotFoundError):
            raise DataError(f"{source}: holds no data file that datasets can read") from error
        raise DataError(
            f"{source}: check data.split and data.subset; datasets cannot load it: "
            f"{_one_line(error)}"
        ) from error
    return dataset


# -------------------------------------------------------------------------------------------- files


def _local_source(path: Path, split: str, cache_dir: Path) -> Source:
    files = _select_files(path, split)
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        raise DataError(f"{path}: mixes {' and '.join(sorted(suffixes))} files; keep one kind")

    digest = hashlib.sha256()
    for file in files:
        with _open(file) as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())

    def load() -> Sequence[Row]:
        if suffixes == {".parquet"}:
            for file in files:
                _check_file(file, footer_only=True)
            names = [str(file) for file in files]
            return _load_with_datasets(
                str(path), cache_dir, files, "parquet", data_files={"train": names}, split="train"
            )
        arrays = [_read_json_array(file) for file in files]
        if all(rows is None for rows in arrays):
            return JsonLines(files)
        return [
            row
            for file, rows in zip(files, arrays, strict=True)
            for row in (rows if rows is not None else JsonLines([file]))
        ]

    return Source(str(path), None, f"files/{digest.hexdigest()}", load)


def _select_files(path: Path, split: str) -> list[Path]:
    """The files of `split`: by a word of file or folder name as `datasets` does, else all train."""
    if not path.exists():
        raise DataError(f"data.path {path} does not exist; give a file or a folder of files")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path}: not a {', '.join(_SUFFIXES)} file")
        files = [path]
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in _SUFFIXES
            and not any(part[0] in "._" for part in file.relative_to(path).parts)
        )
        if not files:
            raise DataError(f"{path}: holds no {', '.join(_SUFFIXES)} file")
    splits: dict[str, list[Path]] = {}
    for file in files:
        name = _split_of(file.relative_to(path) if path.is_dir() else Path(), split)
        splits.setdefault(name or "", []).append(file)
    if set(splits) == {""}:
        splits = {"train": files}
    if split not in splits:
        found = ", ".join(sorted(name for name in splits if name))
        raise DataError(f"{path}: no split {split!r}; its files give {found}")
    return splits[split]


def _split_of(file: Path, wanted: str) -> str | None:
    words = re.split(r"[^a-z0-9]+", str(file).lower())
    if file.stem == wanted or file.stem.startswith(f"{wanted}-"):
        return wanted
    for split, aliases in _SPLIT_WORDS.items():
        if any(word in aliases for word in words):
            return split
    return None


def _open(file: Path):
    try:
        return open(file, "rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error


def _read_json_array(file: Path) -> list[Row] | None:
    """The rows of a file that is one JSON array; None where it holds one object per line."""
    with _open(file) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start.startswith(b"["):
            return None
        stream.seek(0)
        raw = stream.read().removeprefix(b"\xef\xbb\xbf")
    rows = _parse_json(raw, file, 1)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: item {number} is not a JSON object")
    return rows


class JsonLines(Sequence[Row]):
    """Rows of files with one JSON object per line, parsed when they are asked for.

    Only the position of every line is kept in memory. Each row is exactly what its line says, with
    no schema shared between rows: a key that only some messages have does not appear in the others.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._maps: list[mmap.mmap] = []
        self._file, self._start, self._stop, self._line = (array(kind) for kind in "iqqq")
        for index, file in enumerate(self._files):
            before, position = len(self._file), 0
            with _open(file) as stream:
                for number, line in enumerate(stream, 1):
                    skip = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
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
        row = _parse_json(raw, self._files[file], self._line[index])
        if not isinstance(row, dict):
            raise DataError(f"{self._files[file]}:{self._line[index]}: not a JSON object")
        return row


def _parse_json(raw: bytes, file: Path, line: int) -> Any:
    """The value of `raw`, which begins at `line` of `file`; raises DataError with the line."""
    if (position := raw.find(b"\0")) >= 0:
        line += raw.count(b"\n", 0, position)
        raise DataError(f"{file}:{line}: NUL byte; is it UTF-16? convert it to UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(f"{file}:{line}: not UTF-8 ({error.reason}); convert the file") from error
    try:
        value = json.loads(text)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise DataError(f"{file}:{line}: broken JSON: {error.msg}, column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{file}:{line}: half of a surrogate pair; it is not text") from error
    except RecursionError as error:
        raise DataError(f"{file}:{line}: JSON nested too deep") from error
    return value


def _check_file(file: Path, *, footer_only: bool = False) -> None:
    """Raise DataError with the place if `file` is damaged."""
    if file.stat().st_size == 0:
        raise DataError(f"{file}: empty")
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as parquet:
                for group in range(0 if footer_only else parquet.num_row_groups):
                    parquet.read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: damaged parquet file: {_one_line(error)}") from error
    elif _read_json_array(file) is None:
        for _ in _iterate(JsonLines([file])):
            pass


def _iterate(rows: Sequence[Row]) -> Iterator[Row]:
    return (rows[i] for i in range(len(rows)))


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
