"""Bytes that are allocated while code runs on fake tensors, by what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Blocks of CUDA's caching allocator are multiples of it.
_BLOCK_BYTES = 512
GATHERED = "gathered parameters and reduction"


class MemoryTracker(TorchDispatchMode):
    """Counts every storage that operations of plain tensors make, until it is freed.

    A storage counts under the label of the moment it was made. What FSDP gathers and reduces is known by its
    operations, and by storages that it empties and fills again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        """Bytes by label, now."""
        self.peaks: dict[str, Counter[str]] = {}
        """The same at the peak of each phase."""
        self._label = "activations"
        self._phase = ""
        self._storages: dict[int, tuple[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the peak of this part of a step."""
        self._phase, before = name, self._phase
        self.peaks[name] = Counter(self.held)
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """What is made inside is for this."""
        self._label, before = label, self._label
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Say what these tensors are for, whatever they were counted as, or count them if they were not."""
        for tensor in tensors:
            if tensor is not None:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self._drop(self._key(local))
                self._count(local, label)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will come back with the local tensors
        output = func(*args, **(kwargs or {}))
        name = func.name()
        label = GATHERED if "all_gather" in name or "reduce_scatter" in name else self._label
        for value in tree_iter(output):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._count(value, label)
        return output

    def __enter__(self) -> MemoryTracker:
        self._resize = torch.UntypedStorage.resize_
        tracker = self

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            tracker._resize(storage, size)
            key = storage._cdata
            if key in tracker._storages:
                tracker._drop(key)
                tracker._add(key, GATHERED, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _count(self, tensor: Tensor, label: str) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._add(key, label, storage.nbytes())
            weakref.finalize(storage, self._drop, key)

    def _add(self, key: int, label: str, size: int) -> None:
        size = -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
        self._storages[key] = label, size
        self.held[label] += size
        if self._phase and self.held.total() > self.peaks[self._phase].total():
            self.peaks[self._phase] = Counter(self.held)

    def _drop(self, key: int) -> None:
        label, size = self._storages.pop(key, ("", 0))
        self.held[label] -= size
