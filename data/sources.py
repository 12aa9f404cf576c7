"""Rows from the hub, from files here or in a remote store, or from the embedded generator."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from data.config import DataConfig
from data.errors import DataError
from data.files import (
    SUFFIXES,
    BrokenLine,
    BrokenRow,
    Row,
    check_file,
    lazy_rows,
    local_files,
    one_line,
    read_arrow,
    read_json,
    select_files,
)

T = TypeVar("T")

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0)
CLOCK_GRANULARITY_SECONDS = 2.0
"""Two writes this close may leave one modification time, on the coarsest file systems."""


@dataclass(frozen=True)
class Source:
    """One split of a dataset, identified before any row of it is read.

    It can be pickled; the copy reads the rows again, from what is on the disk, when it is asked.
    """

    name: str
    """What a person calls it: org/name, a path or URL, or embedded."""

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

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_rows(config: DataConfig, split: str, *, cache_dir: str | Path) -> Source:
    """Resolve where the rows of `split` come from, downloading them into `cache_dir` if need be.

    Raises DataError for whatever a user can fix: spelling, access, network, disk, files.
    """
    _check_one_place(config)
    if config.path is not None:
        keep_broken = config.broken_lines == "skip"
        return _file_source(config.path, split, Path(cache_dir), keep_broken=keep_broken)
    if config.name is not None:
        return _hub_source(config, config.name, split, Path(cache_dir))
    return _embedded_source(split)


def stream_rows(
    config: DataConfig,
    split: str,
    *,
    cache_dir: str | Path,
    skip: int = 0,
    every: int = 1,
    offset: int = 0,
) -> Iterator[Row]:
    """One pass over a reader's share of the rows, without downloading or indexing them beforehand.

    The share of reader `offset` of `every` readers is the rows number offset, offset + every, ...;
    the first `skip` rows of the share are passed over, unparsed where the format allows it. Files
    are read in the order of their names. Raises DataError, while it is iterated: also when a whole
    pass has no row for this reader.
    """
    _check_one_place(config)
    if config.path is not None:
        name, rows = config.path, _stream_files(config.path, split, Path(cache_dir))
    elif config.name is not None:
        name, rows = config.name, _stream_hub(config, config.name, split, Path(cache_dir))
    else:
        source = _embedded_source(split)
        name, rows = (
            source.name,
            (partial(_row_of, source.rows, i) for i in range(len(source.rows))),
        )
    wanted, number = offset + skip * every, -1
    for number, read in enumerate(rows):
        if number == wanted:
            wanted += every
            try:
                row = read()
            except BrokenLine:
                if config.broken_lines == "error":
                    raise
                row = BrokenRow()
            yield row
    if number < offset:
        raise DataError(
            f"{shown_url(name)}: {number + 1} rows for {every} readers; use fewer ranks or more rows"
        )


def _check_one_place(config: DataConfig) -> None:
    if config.name is not None and config.path is not None:
        raise DataError("data.name and data.path are both given; give the one to be used")


def _row_of(rows: Sequence[Row], index: int) -> Row:
    return rows[index]


def shown_url(url: str) -> str:
    """A path or URL as it may be printed: without user, password and signature."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    host, slash, path = rest.split("?")[0].partition("/")
    # abfs://container@account names a place before the @, no person.
    if "@" in host and (":" in host or scheme.startswith("http")):
        host = host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}"


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
        load=partial(embedded.generate_conversations, split),
    )


# ------------------------------------------------------------------------------------------- files


def _file_source(path: str, split: str, cache_dir: Path, *, keep_broken: bool) -> Source:
    """Rows of local files, or of the local copy of remote ones."""
    digests: Mapping[str, str] = {}
    folder = Path(path)
    if "://" in path:
        from data.remote import fetch  # and with it fsspec, which few runs need

        copy = fetch(path, cache_dir)
        folder, digests = copy.path, copy.sha256
    files = local_files(folder)
    names = select_files(files, split)
    root = folder.parent if files.single else folder
    paths = [root / name for name in names]
    # A copy was hashed when it was made.
    hashed = [digests[name] for name in names] if digests else file_digests(paths, cache_dir)
    digest = hashlib.sha256()
    for file, content in zip(paths, hashed, strict=True):
        digest.update(f"{file.name} {content}\n".encode())
    fingerprint = f"files/{digest.hexdigest()}"
    load = partial(_load_files, paths, cache_dir, fingerprint, keep_broken=keep_broken)
    return Source(shown_url(path), None, fingerprint, load)


def _load_files(
    paths: list[Path], cache_dir: Path, fingerprint: str, *, keep_broken: bool
) -> Sequence[Row]:
    suffix = paths[0].suffix
    if suffix == ".arrow":
        return read_arrow(paths)
    if suffix != ".parquet":
        return read_json(paths, keep_broken=keep_broken)
    for file in paths:
        check_file(file, footer_only=True)
    return _load_with_datasets(
        str(paths[0].parent if len(paths) > 1 else paths[0]),
        cache_dir,
        fingerprint,
        paths,
        "parquet",
        data_files={"train": [str(file) for file in paths]},
        split="train",
    )


def _stream_files(path: str, split: str, cache_dir: Path) -> Iterator[Callable[[], Row]]:
    if "://" in path:
        from data.remote import remote_files

        files = remote_files(path, cache_dir)
    else:
        files = local_files(Path(path))
    for name in select_files(files, split):
        place = files.place(name)
        with _reading(place), files.open(name) as stream:
            yield from lazy_rows(stream, Path(name).suffix, place)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Errors of a store in the middle of a file as one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{place}: cannot be read: {one_line(error)}") from error


def file_digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """SHA-256 of each file; of files hashed before and untouched since, from a record in the cache.

    Untouched means the same size, inode, and times of modification and change, none of them so close
    to the time of hashing that a later write could have left them as they are. Raises DataError.
    """
    files = [file.absolute() for file in files]
    name = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:32]
    record = cache_dir / "fingerprints" / f"{name}.json"
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(record.read_bytes()))

    def digest(file: Path) -> list[Any]:
        try:
            before = _identity(file)
            if known.get(str(file), [])[1:] == before:
                return known[str(file)]
            settled = max(before[1:3]) / 1e9 < time.time() - CLOCK_GRANULARITY_SECONDS
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            return [content, *(before if settled and before == _identity(file) else [])]
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the lock
        found = dict(zip(map(str, files), pool.map(digest, files), strict=True))
    if found != known:
        # A cache that cannot be written only costs hashing again.
        with suppress(OSError):
            write_json(record, found)
    return [entry[0] for entry in found.values()]


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def write_json(file: Path, value: Any) -> None:
    """Write a small file that is whole whenever it exists; raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}-{os.uname().nodename}-{os.getpid()}")
    try:
        staging.write_text(json.dumps(value))
        staging.replace(file)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------------------------- hub


def _hub_source(config: DataConfig, name: str, split: str, cache_dir: Path) -> Source:
    snapshot = download_dataset(name, revision=config.revision, cache_dir=cache_dir)
    fingerprint = f"hub/{name}@{snapshot.name}/{config.subset or ''}/{split}"
    load = partial(_load_hub, name, snapshot, cache_dir, fingerprint, config.subset, split)
    return Source(name=name, commit=snapshot.name, fingerprint=fingerprint, load=load)


def _load_hub(
    name: str, snapshot: Path, cache_dir: Path, fingerprint: str, subset: str | None, split: str
) -> Sequence[Row]:
    files = sorted(f for f in snapshot.rglob("*") if f.suffix in SUFFIXES)
    return _load_with_datasets(
        name, cache_dir, fingerprint, files, str(snapshot), subset, split=split
    )


def _stream_hub(
    config: DataConfig, name: str, split: str, cache_dir: Path
) -> Iterator[Callable[[], Row]]:
    """Rows through `datasets` streaming, of one commit; offline of the snapshot in the cache."""
    from datasets import load_dataset
    from huggingface_hub import constants

    place, revision = name, hub_commit(name, config.revision, cache_dir)
    if constants.HF_HUB_OFFLINE:
        place, revision = str(download_dataset(name, revision=revision, cache_dir=cache_dir)), None
    try:
        rows = iter(
            load_dataset(
                place,
                config.subset,
                split=split,
                revision=revision,
                streaming=True,
                cache_dir=str(cache_dir / "datasets"),
            )
        )
    except Exception as error:
        raise DataError(_explain_load(error, name)) from error
    # The iterator has done the work already: passing over a row of it saves nothing.
    for number in count():
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(f"{name}: row {number} cannot be read: {one_line(error)}") from error
        if row is None:
            return
        yield partial(_row_of, [row], 0)


def hub_commit(name: str, revision: str | None, cache_dir: Path) -> str:
    """The commit that `revision` of a dataset stands for now; offline that of the snapshot in the cache.

    Raises DataError.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return download_dataset(name, revision=revision, cache_dir=cache_dir).name
    _check_revision(revision)
    ask = partial(HfApi().dataset_info, name, revision=revision)
    return str(_ask_hub(ask, name, revision, cache_dir).sha)


def download_dataset(name: str, *, revision: str | None, cache_dir: Path) -> Path:
    """Download a dataset repository into `cache_dir`/hub and return its snapshot, named by commit.

    One call resolves the revision and fetches the files of that very commit, and leaves the
    revision's name in the cache for later runs without a network. Raises DataError.
    """
    from huggingface_hub import snapshot_download

    _check_revision(revision)
    fetch = partial(
        snapshot_download,
        name,
        repo_type="dataset",
        revision=revision,
        cache_dir=cache_dir / "hub",
    )
    return Path(_ask_hub(fetch, name, revision, cache_dir))


def _check_revision(revision: str | None) -> None:
    if revision and (".." in revision or not re.fullmatch(r"[\w./+-]+", revision)):
        raise DataError(f"data.revision {revision!r} is not the name of a branch, tag or commit")


def _ask_hub(call: Callable[[], T], name: str, revision: str | None, cache_dir: Path) -> T:
    """What `call` returns, tried again while the hub is busy or cut off; raises DataError."""
    for delay in (*RETRY_DELAYS_SECONDS, None):
        try:
            return call()
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
    if type(error) is ValueError:  # of a name in the repository that leads out of the cache
        return f"{what}: refused by the hub's client: {one_line(error)}"
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
            f"once with a network ({one_line(error)})"
        )
    if isinstance(error, LocalEntryNotFoundError) and _status(error.__cause__) is not None:
        error = (
            error.__cause__ or error
        )  # the hub did answer; that the cache is cold as well says less
    if isinstance(error, LocalEntryNotFoundError):
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the hub did not answer ({one_line(error.__cause__ or error)})"
        )
        return f"{what}: not in the cache {cache_dir} and {reason}; run once with a network"
    if isinstance(error, HfHubHTTPError) and not isinstance(error, EntryNotFoundError):
        if _status(error) in (401, 403):
            return f"{what}: the hub refuses access (HTTP {_status(error)}); set HF_TOKEN"
        return f"{what}: the hub answers HTTP {_status(error)}; try again later"
    if isinstance(error, OSError):
        needed = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(Exception):  # the hub may be gone by now; the line is worth more
                needed = bytes_to_fetch(name, revision, cache_dir)
        return explain_os_error(error, cache_dir, needed)
    if "Connect" in type(error).__name__:
        return f"{what}: the hub did not answer ({one_line(error)}); run with a network"
    if type(error).__module__.startswith("httpx"):
        return f"{what}: the download was cut ({one_line(error)}); run again, it resumes"
    return None


def explain_os_error(error: OSError, folder: Path, needed: int | None = None) -> str | None:
    """One line for a full disk or a folder that cannot be written; None for any other error.

    `needed` is what was to be written, in bytes, where that is known.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"{free_bytes(folder):,} bytes free"
        room = free if needed is None else f"about {needed:,} bytes needed, {free}"
        return f"{folder}: no space left ({room}); free some or move --cache_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{error.filename or folder}: {error.strerror}; give a --cache_dir you can write to"
    return None


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or is to be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def bytes_to_fetch(name: str, revision: str | None, cache_dir: Path) -> int:
    """Bytes of the files that the hub lists and the cache lacks."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    blobs = cache_dir / "hub" / f"datasets--{name.replace('/', '--')}" / "blobs"
    listed = HfApi().list_repo_tree(name, revision=revision, recursive=True, repo_type="dataset")
    return sum(
        entry.size
        for entry in listed
        if isinstance(entry, RepoFile)
        and not (blobs / (entry.lfs.sha256 if entry.lfs else entry.blob_id)).exists()
    )


def _load_with_datasets(
    source: str,
    cache_dir: Path,
    fingerprint: str,
    files: list[Path],
    path: str,
    subset: str | None = None,
    **options: Any,
) -> Any:
    """`datasets.load_dataset` with its Arrow files under `cache_dir`; raises DataError.

    Which Arrow files these are is written down: the next process maps them at once, and needs to
    write nothing, where `load_dataset` would take a lock in the cache.
    """
    from datasets import load_dataset

    key = hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
    record = cache_dir / "datasets" / "rows" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        written = json.loads(record.read_bytes())
        rows = read_arrow([cache_dir / "datasets" / name for name in written["files"]])
        if len(rows) == written["rows"]:
            return rows
    try:
        dataset = load_dataset(path, subset, cache_dir=str(cache_dir / "datasets"), **options)
    except Exception as error:  # datasets raises bare StopIteration, ValueError, OSError, ...
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        needed = sum(file.stat().st_size for file in files)
        if isinstance(cause, OSError) and (line := explain_os_error(cause, cache_dir, needed)):
            raise DataError(line) from error
        # Only now, when it matters, look for the file and line that datasets does not name.
        for file in files:
            check_file(file)
        raise DataError(_explain_load(error, source)) from error
    with suppress(OSError, ValueError):
        root = (cache_dir / "datasets").absolute()
        names = [str(Path(f["filename"]).relative_to(root)) for f in dataset.cache_files]
        write_json(record, {"files": names, "rows": len(dataset)})
    return dataset


def _explain_load(error: Exception, source: str) -> str:
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return f"{source}: holds no data file that datasets can read"
    return f"{source}: check data.split and data.subset; datasets cannot load it: {one_line(error)}"
