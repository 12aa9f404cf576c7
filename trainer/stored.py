"""The parameters in a checkpoint, one at a time: for a process without the model, without ranks and without a GPU."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from trainer.errors import TrainError
from trainer.manifest import TENSORS
from trainer.unpickle import read_metadata, tensor_entries

_MODEL = "model."  # what a parameter's name begins with beside the optimizer's state


class StoredTensors:
    """Reads the parameters of one checkpoint by name, without the optimizer's state."""

    def __init__(self, checkpoint: Path) -> None:
        """
        Raises:
            TrainError: the folder holds no tensors of a checkpoint.
        """
        self._folder = checkpoint / TENSORS
        metadata = read_metadata(self._folder)
        self._entries = {
            name.removeprefix(_MODEL): entry
            for name, entry in tensor_entries(metadata).items()
            if name.startswith(_MODEL)
        }
        self._places = metadata.storage_data

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter by name."""
        return {name: entry.size for name, entry in self._entries.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One whole parameter, or buffer of integers, on the CPU, put together from the parts that ranks have written.

        Memory: the tensor in `dtype` and one of its parts; in the stored type a single part is not copied.

        Raises:
            TrainError: a part is damaged, or no tensor.
        """
        entry = self._entries[name]
        if not entry.properties.dtype.is_floating_point:
            dtype = entry.properties.dtype
        if len(entry.chunks) == 1:
            return self._read_part(name, entry.chunks[0].offsets).to(dtype)
        whole = torch.empty(entry.size, dtype=dtype)
        for chunk in entry.chunks:
            ranges = zip(chunk.offsets, chunk.sizes, strict=True)
            index = tuple(slice(offset, offset + size) for offset, size in ranges)
            whole[index].copy_(self._read_part(name, chunk.offsets))
        return whole

    def _read_part(self, name: str, offsets: torch.Size) -> Tensor:
        place = self._places[MetadataIndex(_MODEL + name, offsets)]
        file = self._folder / place.relative_path
        try:
            with file.open("rb") as stream:
                part = _Part(stream, place.offset, place.length)
                # a file in all that torch.load asks of it
                return torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainError(f"{file}: {name} cannot be read ({reason})") from None


class _Part(io.RawIOBase):
    """A range of bytes of an open file as a file of its own, so that `torch.load` reads straight into the tensor."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._begin + self._position)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count
