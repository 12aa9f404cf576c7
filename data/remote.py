"""Files of a remote store, any that fsspec can open: copied into the cache, read in place, written.

A copy lies in CACHE_DIR/files/DIGEST_OF_URL/VERSION/, VERSION being a digest of what the store says of
the files (names, sizes, ETags or times). Beside it
    listing.json    the last complete copy: version, and of each file its size and SHA-256
is written last, so that the copy is used when the store is out of reach.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data import sources
from data.errors import DataError
from data.files import Files, local_files, one_line
from data.lock import locked
from data.sources import explain_os_error, free_bytes, shown_url, write_json

T = TypeVar("T")

_DOWNLOADS = 8
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "adl": "adlfs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
_LOCAL = ("file", "local", "memory")
# What stores call the content's identity, best first; the times only where there is nothing better.
_TAGS = ("ETag", "etag", "checksum", "md5", "md5Hash", "content_md5")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "created")


@dataclass(frozen=True)
class Copy:
    """A complete copy of a file or folder in the cache."""

    path: Path
    """The file or folder."""

    sha256: Mapping[str, str]
    """Name relative to the folder, or the file's own name -> SHA-256 when it was copied."""


@dataclass(frozen=True)
class _Listing:
    """What a store holds under a URL."""

    single: bool
    sizes: dict[str, int]
    """Relative name -> bytes."""

    paths: dict[str, str]
    """Relative name -> what the store calls it."""

    version: str


def fetch(url: str, cache_dir: str | Path) -> Copy:
    """Copy the file or folder `url` into `cache_dir`, unless this version of it is there already.

    Files that are there whole are kept, also from a run that was stopped. If HF_HUB_OFFLINE is set or
    the store is out of reach the last complete copy serves. Raises DataError.
    """
    from huggingface_hub import constants

    home = Path(cache_dir, "files", hashlib.sha256(url.encode()).hexdigest()[:32]).absolute()
    if constants.HF_HUB_OFFLINE and not _is_local(url):
        return _last_copy(url, home, "HF_HUB_OFFLINE is set")
    try:
        store, listing = _list(url)
    except _OutOfReach as error:
        return _last_copy(url, home, str(error))
    copy = _find(home, listing.version)
    if copy is None:
        with locked(home.with_suffix(".lock"), f"fetching {shown_url(url)}"):
            copy = _find(home, listing.version) or _download(url, store, listing, home)
    return copy


def fetch_folder(url: str, cache_dir: str | Path) -> Path:
    """A folder of prepared tokens, copied into `cache_dir` if it is a URL; raises DataError.

    The copy is compared with the sizes and SHA-256 of its meta.json.
    """
    if "://" not in url:
        if not Path(url, "meta.json").is_file():
            raise DataError(f"{url}: no prepared tokens here (no meta.json)")
        return Path(url)
    copy = fetch(url, cache_dir)
    try:
        written = json.loads((copy.path / "meta.json").read_bytes())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{shown_url(url)}: no prepared tokens (no whole meta.json); is the upload finished?"
        ) from error
    for name, file in written.items():
        if copy.sha256.get(name) != file["sha256"]:
            raise DataError(
                f"{shown_url(url)}/{name}: missing, or other content than its meta.json says; "
                "upload the folder again"
            )
    return copy.path


def upload_folder(folder: str | Path, url: str) -> None:
    """Write the files of `folder` to `url`, meta.json last: it is whole when meta.json is there.

    A meta.json from before is removed first. Raises DataError.
    """
    folder, remote = Path(folder), RemoteFolder(url)
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    remote.remove("meta.json")
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        others = [name for name in names if name != "meta.json"]
        list(pool.map(lambda name: remote.put(folder / name, name), others))
    if "meta.json" in names:
        remote.put(folder / "meta.json", "meta.json")


class RemoteFolder:
    """A folder of a remote store, to write and read back. Names are relative to it, with /.

    What fails is tried again while that may help. Every method raises DataError.

    Attributes:
        url: as it may be printed.
    """

    def __init__(self, url: str) -> None:
        self._given = url
        self.url = shown_url(url)
        self._store, self._root = _open_store(url)

    def names(self) -> list[str]:
        """All files in it, at any depth; none where there is no such folder."""
        with _explained(self._given, "read"):
            self._store.invalidate_cache()
            found = _attempt(partial(self._store.find, self._root))
        return [posixpath.relpath(path, self._root) for path in found]

    def put(self, file: Path, name: str) -> None:
        """Copy a file to the store; what bears the name there is replaced."""
        target = posixpath.join(self._root, name)
        with _explained(self._given, "write to"):
            # Stores behind a driver have no folders, only names.
            if self._given.partition("://")[0] not in _DRIVERS:
                self._store.makedirs(posixpath.dirname(target), exist_ok=True)
            _attempt(partial(self._store.put_file, str(file), target))

    def get(self, name: str, file: Path) -> None:
        """Copy a file from the store."""
        with _explained(self._given, "read"):
            _attempt(partial(self._store.get_file, posixpath.join(self._root, name), str(file)))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        target = posixpath.join(self._root, name)
        with _explained(self._given, "write to"):
            if _attempt(partial(self._store.exists, target)):
                _attempt(partial(self._store.rm_file, target))


def remote_files(url: str, cache_dir: str | Path) -> Files:
    """The files under `url`, to be read in place; out of reach, those of the last complete copy."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _is_local(url):
        return local_files(fetch(url, cache_dir).path)
    try:
        store, listing = _list(url)
    except _OutOfReach as error:
        raise DataError(f"{shown_url(url)}: out of reach ({error}); try again later") from error

    def read(name: str) -> Any:
        with _explained(url, "read"):
            return _attempt(partial(store.open, listing.paths[name], "rb"))

    return Files(shown_url(url), sorted(listing.paths), listing.single, read)


# ------------------------------------------------------------------------------------------ the copy


def _find(home: Path, version: str | None = None) -> Copy | None:
    """The last complete copy, if it is of `version` (None: of any) and all its files are there."""
    listing = _read_listing(home)
    if listing is None or version not in (None, listing["version"]) or _missing(home, listing):
        return None
    path = home / listing["version"]
    if listing["single"]:
        path /= next(iter(listing["files"]))
    return Copy(path, {name: file["sha256"] for name, file in listing["files"].items()})


def _read_listing(home: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return json.loads((home / "listing.json").read_bytes())
    return None


def _missing(home: Path, listing: dict[str, Any]) -> list[str]:
    folder = home / listing["version"]
    return [name for name, file in listing["files"].items() if _size(folder / name) != file["size"]]


def _size(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_size
    return None


def _last_copy(url: str, home: Path, reason: str) -> Copy:
    if copy := _find(home):
        return copy
    listing = _read_listing(home)
    if listing is None:
        what = f"not in the cache {home.parents[1]}"
    else:
        what = f"the copy {home / listing['version']} lacks {', '.join(_missing(home, listing))}"
    raise DataError(f"{shown_url(url)}: {what} and {reason}; run once with a network")


def _download(url: str, store: Any, listing: _Listing, home: Path) -> Copy:
    folder = home / listing.version
    absent = [name for name, size in listing.sizes.items() if _size(folder / name) != size]
    needed, free = sum(listing.sizes[name] for name in absent), free_bytes(folder)
    if needed > free:
        raise DataError(
            f"{folder}: no space for {shown_url(url)} ({needed:,} bytes needed, {free:,} bytes "
            "free); free some or move --cache_dir"
        )
    try:
        with _explained(url, "read"), ThreadPoolExecutor(_DOWNLOADS) as pool:
            one = partial(_download_file, store, listing, folder)
            list(pool.map(lambda name: _attempt(partial(one, name)), absent))
            digests = dict(
                zip(
                    listing.sizes,
                    pool.map(lambda n: _sha256(folder / n), listing.sizes),
                    strict=True,
                )
            )
        files = {name: {"size": listing.sizes[name], "sha256": digests[name]} for name in digests}
        value = {"version": listing.version, "single": listing.single, "files": files}
        write_json(home / "listing.json", value)
    except OSError as error:
        raise DataError(explain_os_error(error, folder, needed) or f"{folder}: {error}") from error
    copy = _find(home, listing.version)
    if copy is None:
        raise DataError(f"{folder}: files changed while they were fetched; run again")
    return copy


def _download_file(store: Any, listing: _Listing, folder: Path, name: str) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}-{os.uname().nodename}-{os.getpid()}")
    try:
        store.get_file(listing.paths[name], str(staging))
        if (size := staging.stat().st_size) != listing.sizes[name]:
            raise ConnectionError(f"{name}: {size:,} of {listing.sizes[name]:,} bytes arrived")
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------- the store


class _OutOfReach(Exception):
    """The store gave no answer, or none that helps."""


def _is_local(url: str) -> bool:
    return url.partition("://")[0] in _LOCAL


def _open_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it; raises DataError without its driver."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        store, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        driver = _DRIVERS.get(scheme)
        remedy = f"pip install {driver}" if driver else one_line(error)
        raise DataError(f"{shown_url(url)}: no driver for {scheme}:// here; {remedy}") from error
    except ValueError as error:
        raise DataError(
            f"{shown_url(url)}: fsspec knows no {scheme}:// ({one_line(error)})"
        ) from error
    return store, root


def _list(url: str) -> tuple[Any, _Listing]:
    """What there is under `url`. Raises DataError, or _OutOfReach where a copy may serve."""
    store, root = _open_store(url)
    try:
        with _explained(url, "read"):
            store.invalidate_cache()
            info = _attempt(partial(store.info, root))
            single = info["type"] == "file"
            found = {root: info} if single else _attempt(partial(store.find, root, detail=True))
    except DataError as error:
        if _is_unreachable(error.__cause__):
            raise _OutOfReach(one_line(error.__cause__ or error)) from error
        raise
    named = {}
    for path, entry in sorted(found.items()):
        if single:
            name = shown_url(url).rpartition("/")[2]
        else:
            name = posixpath.relpath(entry["name"], info["name"])
        if entry["type"] != "file" or name == ".":  # a store's mark that there is a folder
            continue
        if entry.get("size") is None:
            raise DataError(f"{shown_url(url)}: the store does not say the size of {name}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{shown_url(url)}: holds the name {name!r}, which leads out of it")
        named[name] = (path, entry)
    if not named:
        raise DataError(f"{shown_url(url)}: holds no file")
    versions = [(name, entry.get("size"), _tag(entry)) for name, (_, entry) in named.items()]
    version = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]
    sizes = {name: int(entry["size"]) for name, (_, entry) in named.items()}
    return store, _Listing(
        single, sizes, {name: path for name, (path, _) in named.items()}, version
    )


def _tag(entry: Mapping[str, Any]) -> str:
    found = (str(entry[key]) for key in (*_TAGS, *_TIMES) if entry.get(key))
    return next(found, "")


# ----------------------------------------------------------------------------------------- failures


def _attempt(call: Callable[[], T]) -> T:
    """What `call` returns, tried again while its failure may pass."""
    for delay in (*sources.RETRY_DELAYS_SECONDS, None):
        try:
            return call()
        except Exception as error:
            if delay is None or not _may_pass(error):
                raise
            time.sleep(delay)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of the drivers' clients."""
    found = getattr(error, "status", None) or getattr(error, "status_code", None)
    return found if isinstance(found, int) else None


def _may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: a busy store, a connection cut. A refused one stays refused."""
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EBUSY, errno.EAGAIN):
        return True
    cut = ("ClientPayloadError", "ServerDisconnectedError", "ResponseStreamingError")
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in cut


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the store gave no answer, or only that it is busy."""
    kind = type(error).__name__  # botocore, aiohttp and azure share no base class
    return (
        _may_pass(error)
        or isinstance(error, (ConnectionError, socket.gaierror))
        or any(part in kind for part in ("Connect", "Timeout", "ServiceRequestError"))
    )


@contextmanager
def _explained(url: str, what: str) -> Iterator[None]:
    """Errors of a store as one line without secrets; those of this machine's disk stay as they are."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        here = isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            or (error.filename is not None and not isinstance(error, FileNotFoundError))
        )
        if here:
            raise
        place, reason = shown_url(url), _without_secrets(one_line(error))
        kind = type(error).__name__
        if isinstance(error, FileNotFoundError) or _status(error) == 404:
            raise DataError(f"{place}: not found; check the URL") from error
        if (
            isinstance(error, PermissionError)
            or _status(error) in (401, 403)
            or "Credential" in kind
            or "Authentication" in kind
        ):
            raise DataError(
                f"{place}: the store refuses access ({reason}); give its credentials in the "
                "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        raise DataError(f"{place}: cannot {what} it ({kind}: {reason}); try again later") from error


def _without_secrets(text: str) -> str:
    """Without the values of query strings (signatures) and what stands before an @."""
    text = re.sub(r"([?&][\w.%-]+=)[^\s&'\")>]+", r"\1...", text)
    return re.sub(r"://[^/\s@]+@", "://", text)
