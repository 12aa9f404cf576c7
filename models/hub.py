"""Models from the Hugging Face hub, kept whole under one cache folder."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelError

# Configuration, tokenizer and chat template. Never pickled weights or Python code.
_SMALL_FILES = ["*.json", "*.jinja", "merges.txt", "*.model"]
_WEIGHTS = ["*.safetensors"]
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
    without a network a complete earlier download is used. Temporary failures of the hub are tried
    again twice; cut downloads go on where they stopped.

    Raises ModelError when the model is not there, may not be read, is incomplete, or cannot be
    stored.
    """
    if revision and (".." in revision or not re.fullmatch(r"[\w./+-]+", revision)):
        raise ModelError(f"model.revision {revision!r} is not the name of a branch, tag or commit")
    hub = Path(cache_dir, "hub").absolute()
    path = _snapshot(name, revision, hub, _SMALL_FILES + ([] if only_tokenizer else _WEIGHTS))
    missing = _missing_files(path, only_tokenizer)
    if missing:
        raise ModelError(
            f"model {name}: {path} lacks {', '.join(missing)}; run once with network access to "
            "complete it, or choose a model that is published as safetensors"
        )
    return Fetched(path, path.name)


def _snapshot(name: str, revision: str | None, hub: Path, patterns: list[str]) -> Path:
    """Folder of the files that match `patterns`; it may still lack some."""
    # Here and not above: the library reads its environment when it is imported.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError

    for delay in (*_RETRY_AFTER_SECONDS, None):
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                cache_dir=hub,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # exports to other formats in folders of their own
            )
            return Path(folder)
        except IncompleteSnapshotError as error:
            missing = _listed_but_absent(name, revision, hub, patterns, Path(error.snapshot_path))
            raise ModelError(
                f"model {name}: {error.snapshot_path} lacks {', '.join(missing)} and the hub cannot "
                "be reached; run once with network access to complete it"
            ) from error
        except HFValidationError as error:
            raise ModelError(
                f"model.name {name!r} is not of the form org/name; a local folder goes to model.path"
            ) from error
        except (OSError, httpx2.HTTPError) as error:
            if delay is None or _status(error) not in _TEMPORARY_STATUSES:
                raise ModelError(_explain(error, name, revision, hub)) from error
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
        shards = json.loads((path / _WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
        needed = {"config.json", *shards.values()}
    return sorted(file for file in needed if not (path / file).is_file())


def _listed_but_absent(
    name: str, revision: str | None, hub: Path, patterns: list[str], path: Path
) -> list[str]:
    """Files of the cached listing of the repository that a snapshot lacks."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.utils import filter_repo_objects

    listed = [file.path for file in get_cached_repo_tree(name, revision=revision, cache_dir=hub)]
    wanted = filter_repo_objects(listed, allow_patterns=patterns, ignore_patterns=["*/*"])
    return sorted(file for file in wanted if not (path / file).is_file())


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, None when the hub gave no answer."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
        cause = cause.__cause__
    return None


def _explain(error: Exception, name: str, revision: str | None, hub: Path) -> str:
    """One line: what went wrong with this model, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    status = _status(error)
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
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_existing_parent(hub)).free
        return (
            f"model {name} does not fit into {hub}: {free} bytes are free; free some space or "
            "choose another --cache_dir"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"model {name} cannot be kept in {hub}: {error.strerror}; choose another --cache_dir"
    return f"model {name}: the download failed ({type(error).__name__}); run again to continue it"


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
