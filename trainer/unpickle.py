"""Reading `.metadata` of a checkpoint, which torch.distributed.checkpoint pickles, without trusting it.

A pickle may name any function and call it. Here it may name the classes such a file consists of, and nothing else;
shards are read by `torch.load(weights_only=True)`, which has a list of its own.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from trainer.errors import TrainError

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look-up in a table of layouts
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
}


def _member(kind: Any, name: str) -> Any:
    """In place of `getattr`, which early versions of Python 3.11 pickle members of an enumeration with."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) not in _ALLOWED and not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside of it")


def read_metadata(folder: Path) -> Metadata:
    """Which tensors lie where in the shards in `folder`.

    Raises:
        TrainError: the file is no such account; nothing it may have wanted to run was run.
    """
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except Exception as error:  # whatever a broken or a malicious pickle brings about
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainError(f"{file} is refused: {reason}") from None
    problem = _problem(metadata)
    if problem:
        raise TrainError(f"{file} is refused: {problem}")
    return metadata


def _problem(metadata: Any) -> str | None:
    """Why this is no account of tensors in files beside it; None if it is."""
    if not isinstance(metadata, Metadata):
        return f"it holds {type(metadata).__name__}"
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return "it has no tables"
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
        return "it holds something that is no tensor"
    for index, place in places.items():
        path = getattr(place, "relative_path", None)
        if not isinstance(index, MetadataIndex) or not isinstance(path, str):
            return "its table of places is broken"
        if PurePath(path).name != path or getattr(place, "transform_descriptors", None):
            return f"it wants to read {path!r}"
    return None


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Type and shape of each tensor by name, and the parts it is stored in."""
    return metadata.state_dict_metadata  # type: ignore[return-value]  # `_problem` has seen to it


class SafeReader(FileSystemReader):
    """torch's reader of checkpoints, with `.metadata` read as above."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))
