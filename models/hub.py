"""Models from the Hugging Face hub, kept whole under one cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import ModelError

# Configuration, tokenizer and chat template. Never pickled weights or Python code.
_SMALL_FILES = ["*.json", "*.jinja", "merges.txt", "*.model"]
_WEIGHTS = ["*.safetensors"]
_IGNORED = ["*/*"]  # exports to other formats in folders of their own
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TEMPORARY_STATUSES = {408, 429, 500, 502, 503, 504}
_RETRY_AFTER_SECONDS = (1, 4)


@dataclass(frozen=True)
class Fetched:
    """A complete snapshot: its folder, and the commit that names its content."""

    path: Path
    commit: str


def fetch_model(
    name: str, *, revision: str | None, cache_dir: str | Path, only_tokenizer: bool = False
) -> Fetched:
    """Download the hub model `name` to CACHE_DIR/hub, or find it there.

    `revision` is a branch, tag or commit (None: the default branch). It is resolved once: what is
    returned is one commit's files. `only_tokenizer` leaves the weights out. With HF_HUB_OFFLINE=1 or
    without a network a complete earlier download is used; for a commit the network is not asked at
    all then. Temporary failures of the hub are tried again twice; a cut download goes on where it
    stopped, in this process.

    Raises ModelError when the model is not there, may not be read, is incomplete, or cannot be
    stored.
    """
    if revision and not _is_revision(revision):
        raise ModelError(f"model.revision {revision!r} is not the name of a branch, tag or commit")
    hub = Path(cache_dir, "hub").absolute()
    path = snapshot(name, revision, hub, _patterns(only_tokenizer))
    missing = _missing_files(path, only_tokenizer)
    if missing:
        raise ModelError(
            f"model {name}: {path} lacks {', '.join(missing)}; run once with network access to "
            "complete it, or choose a model that is published as safetensors"
        )
    return Fetched(path, path.name)


def check_snapshot(
    name: str,
    repo_type: Literal["model", "dataset"],
    revision: str | None,
    cache_dir: str | Path,
    *,
    only_tokenizer: bool = False,
) -> list[str]:
    """Compare a cached repository with what the hub listed when it was fetched; asks no network.

    Every file that a download brings (of a model what `fetch_model` takes, of a dataset all) must be
    there with the listed size and content: SHA-256 for large files, git's blob SHA-1 for the others.
    A model's shards must be those its index names.

    Returns one line per fault with its remedy; none when the snapshot is whole.
    """
    what = f"{repo_type} {name}" + (f" at revision {revision}" if revision else "")
    hub = Path(cache_dir, "hub").absolute()
    repository = hub / f"{repo_type}s--{name.replace('/', '--')}"
    commit = _cached_commit(repository, revision or "main")
    if commit is None or not (repository / "snapshots" / commit).is_dir():
        return [f"{what} is not in the cache {hub}; fetch it with network access"]
    try:
        listing = json.loads((repository / "trees" / f"{commit}.json").read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = listing["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [
            f"{what}: the cache {hub} holds no listing of commit {commit} to compare with; fetch it "
            "once with network access"
        ]
    snapshot = repository / "snapshots" / commit
    wanted = _wanted(listed, _patterns(only_tokenizer)) if repo_type == "model" else list(listed)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter lock to the others
        found = pool.map(lambda file: _fault(snapshot / file, listed[file]), wanted)
        faults = {file: fault for file, fault in zip(wanted, found, strict=True) if fault}
    if repo_type == "model" and _WEIGHTS_INDEX not in faults:
        for file in _missing_files(snapshot, only_tokenizer):
            faults.setdefault(file, f"{snapshot / file} is not in the repository either")
    return [f"{what}: {fault}" for _, fault in sorted(faults.items())]


def _is_revision(revision: str) -> bool:
    """Whether it can be a branch, tag or commit, and is safe as part of a path."""
    return ".." not in revision and re.fullmatch(r"\w[\w./+-]*", revision) is not None


def _patterns(only_tokenizer: bool) -> list[str]:
    return _SMALL_FILES + ([] if only_tokenizer else _WEIGHTS)


def _wanted(files: Iterable[str], patterns: list[str]) -> list[str]:
    """Those of a repository's files that a download takes, sorted."""
    from huggingface_hub.utils import filter_repo_objects

    return sorted(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=_IGNORED))


def _cached_commit(repository: Path, revision: str) -> str | None:
    """The commit that `revision` was when it was last fetched."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with suppress(OSError):
        if _is_revision(revision):
            return (repository / "refs" / revision).read_text(encoding="ascii").strip()
    return None


def _fault(file: Path, listed: dict[str, Any]) -> str | None:
    """What is wrong with one file of a snapshot."""
    content = file.resolve()  # snapshots hold links to content; to be fetched anew that must go
    try:
        size = content.stat().st_size
        if size != listed["size"]:
            return (
                f"{content} ({file.name}) has {size} bytes, the hub lists {listed['size']}; "
                "delete it and fetch again"
            )
        sha256 = listed.get("lfs_sha256")
        digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % size)
        with content.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    except FileNotFoundError:
        return f"{file} is missing; fetch again with network access"
    except OSError as error:
        return f"{content} ({file.name}) cannot be read: {error.strerror}"
    if digest.hexdigest() != (sha256 or listed["blob_id"]):
        return f"{content} ({file.name}) has other content than the hub lists; delete it and fetch again"
    return None


def snapshot(name: str, revision: str | None, hub: Path, patterns: list[str]) -> Path:
    """Folder of the files that match `patterns`; it may still lack some."""
    # Here and not above: the library reads its environment when it is imported.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for delay in (*_RETRY_AFTER_SECONDS, None):
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                cache_dir=hub,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
            )
            return Path(folder)
        except HFValidationError as error:
            raise ModelError(
                f"model.name {name!r} is not of the form org/name; a local folder goes to model.path"
            ) from error
        # RuntimeError: what the library's own transfer protocol raises.
        except (OSError, RuntimeError, httpx2.HTTPError) as error:
            if delay is None or not _is_temporary(error):
                raise ModelError(_explain(error, name, revision, hub, patterns)) from error
            time.sleep(delay)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _missing_files(path: Path, only_tokenizer: bool) -> list[str]:
    """Names of the files without which the model cannot be built."""
    if only_tokenizer:
        vocabularies = ["tokenizer.json", "vocab.json", "tokenizer.model"]
        found = any((path / vocabulary).is_file() for vocabulary in vocabularies)
        return [] if found else [vocabularies[0]]
    needed = {"config.json", "model.safetensors"}
    if (path / _WEIGHTS_INDEX).is_file():
        try:
            index = json.loads((path / _WEIGHTS_INDEX).read_text(encoding="utf-8"))
            needed = {"config.json", *index["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{(path / _WEIGHTS_INDEX).resolve()} ({_WEIGHTS_INDEX}) is no index of weights; "
                "delete it and run again with network access"
            ) from error
    return sorted(file for file in needed if not (path / file).is_file())


def bytes_to_fetch(name: str, revision: str | None, hub: Path, patterns: list[str]) -> int:
    """Bytes of the files that the hub lists and the cache lacks."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    blobs = hub / f"models--{name.replace('/', '--')}" / "blobs"
    tree = HfApi().list_repo_tree(name, revision=revision, recursive=True)
    files = {file.path: file for file in tree if isinstance(file, RepoFile)}
    absent = (
        file
        for file in map(files.__getitem__, _wanted(files, patterns))
        if not (blobs / (file.lfs.sha256 if file.lfs else file.blob_id)).exists()
    )
    return sum(file.size for file in absent)


def _is_temporary(error: BaseException) -> bool:
    """Whether trying again may help: the hub is busy, or a connection broke. A refused one stays refused."""
    import httpx2

    broken = (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, broken):
            return True
        cause = cause.__cause__
    return _status(error) in _TEMPORARY_STATUSES


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, None when the hub gave no answer."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
        cause = cause.__cause__
    return None


def _explain(
    error: Exception, name: str, revision: str | None, hub: Path, patterns: list[str]
) -> str:
    """One line: what went wrong with this model, and what to do."""
    import httpx2
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import (
        GatedRepoError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    status = _status(error)
    if isinstance(error, IncompleteSnapshotError):
        folder = Path(error.snapshot_path)
        listed = [
            file.path for file in get_cached_repo_tree(name, revision=revision, cache_dir=hub)
        ]
        missing = [file for file in _wanted(listed, patterns) if not (folder / file).is_file()]
        return (
            f"model {name}: {folder} lacks {', '.join(missing)} and the hub "
            + (f"answers with status {status}" if status else "cannot be reached")
            + "; run once with network access to complete it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"model {name} has no revision {revision!r} on the hub: check model.revision"
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return (
            f"model {name}: the hub refuses access (status {status}); accept the model's licence on "
            "its hub page and set HF_TOKEN in the environment, and check the spelling of the name"
        )
    if status == 404:
        return (
            f"model {name} is not on the hub: check the spelling of model.name "
            "(a private model needs HF_TOKEN in the environment)"
        )
    if status is not None:
        return f"model {name}: the hub answers with status {status}; try again later"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"model {name} is not in the cache {hub} and the hub cannot be reached; run once with "
            "network access and the same --cache_dir, or give a local folder with model.path"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        free = shutil.disk_usage(_existing_parent(hub)).free
        needed = "more"
        with suppress(OSError, httpx2.HTTPError):
            needed = str(bytes_to_fetch(name, revision, hub, patterns))
        return (
            f"model {name} does not fit into {hub}: {needed} bytes are needed and {free} are free; "
            "free some space or choose another --cache_dir"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"model {name} cannot be kept in {hub}: {error.strerror}; choose another --cache_dir"
    return f"model {name}: the download failed ({type(error).__name__}); run again, whole files are kept"


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
