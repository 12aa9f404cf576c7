"""What code would allocate, while it runs on the meta device, in the order of events: by what it is for and by phase."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_META = torch.device("meta")
_BLOCK_BYTES = 512  # CUDA's caching allocator hands out multiples of it
HOST = "host"
"""What is for this is in another memory, and counts in no phase."""
ACTIVATIONS, GATHERED, GRADIENTS = "activations", "gather buffers", "gradients"
# Streams that FSDP allocates in; what is freed in one is not free for another.
COMPUTE, GATHERING, REDUCING = "compute", "all-gather", "reduce-scatter"


class MemoryTracker(TorchDispatchMode):
    """Keeps operations on the meta device, and notes every storage that those on plain tensors make, until it is freed.

    A storage is for what was the label when it was made, or for what it was relabelled to since: peaks are taken at the end.
    FSDP's own are known by its operations. A number that is read from a tensor without data is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._label = ACTIVATIONS
        self._events: list[tuple[int, int]] = []  # storage, bytes more or less
        self._phases: list[tuple[int, str]] = []  # event, what begins with it
        self._labels: list[str] = []  # of each storage
        self._streams: list[str] = []
        self._alive: dict[int, tuple[int, int]] = {}  # by address: storage, its bytes

    def begin(self, phase: str) -> None:
        """What follows belongs to this part of a step; "" is part of none."""
        self._phases.append((len(self._events), phase))

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """What is made inside is for this."""
        self._label, before = label, self._label
        try:
            yield
        finally:
            self._label = before

    def relabel(
        self, tensors: Iterable[Tensor | None], label: str, *, stream: str | None = None
    ) -> None:
        """Say what these tensors were for from the beginning; count them if they were not."""
        for tensor in tensors:
            if tensor is None:
                continue
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._note(local)
            number, _ = self._alive[local.untyped_storage()._cdata]
            self._labels[number] = label
            self._streams[number] = stream or self._streams[number]

    def peaks(self) -> dict[str, Counter[str]]:
        """Bytes by label at the peak of each phase; of one that came more than once, of its highest."""
        counted = [label != HOST for label in self._labels]
        held = np.cumsum([size * counted[number] for number, size in self._events])
        ends = [begin for begin, _ in self._phases[1:]] + [len(self._events)]
        found: dict[str, tuple[int, int]] = {}  # bytes, and after which event
        for (begin, phase), end in zip(self._phases, ends, strict=True):
            if not phase:
                continue
            place = max(begin - 1, 0)
            if end > begin:
                place = max(place, begin + int(held[begin:end].argmax()), key=lambda at: held[at])
            found[phase] = max(found.get(phase, (-1, 0)), (int(held[place]), place))
        return {phase: self._held_after(place) for phase, (_, place) in found.items()}

    def _held_after(self, event: int) -> Counter[str]:
        parts: Counter[str] = Counter()
        for number, size in self._events[: event + 1]:
            parts[self._labels[number]] += size
        parts.pop(HOST, None)
        return +parts

    def stream_peaks(self) -> Counter[str]:
        """The most bytes at once of each stream's allocations, whenever that was; of those in host memory as HOST."""
        held: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for number, size in self._events:
            stream = HOST if self._labels[number] == HOST else self._streams[number]
            held[stream] += size
            most[stream] = max(most[stream], held[stream])
        return most

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        if self.paused:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = kwargs or {}
        if func.namespace in ("fsdp", "c10d"):
            self._note_communication(func._opname, args, kwargs)
        if func.namespace == "c10d":
            return func(*_stand_ins(args), **_stand_ins(kwargs))
        if "device" in kwargs:  # also a move between host and device, which makes a copy
            kwargs = kwargs | {"device": _META}
        output = func(*args, **kwargs)
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._note(value)
        return output

    def _note_communication(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "all_gather_copy_in":  # shards in the computing type, the flat result
            self.relabel(self._temporary([*args[0], args[1]]), GATHERED, stream=GATHERING)
        elif name == "split_with_sizes_copy":  # the flat result, parameters
            self.relabel(kwargs["out"], GATHERED)
        elif name == "chunk_cat":  # whole gradients, the flat input of the reduction
            self.relabel(args[0], GRADIENTS)
            self.relabel([kwargs["out"]], GATHERED)
        elif name == "_reduce_scatter_base_":  # result, input
            self.relabel(self._temporary([args[0]]), GATHERED, stream=REDUCING)

    def _temporary(self, tensors: list[Tensor]) -> list[Tensor]:
        """Without those that are kept between steps: where no cast is needed, a shard is gathered as it is."""
        alive = (self._alive.get(tensor.untyped_storage()._cdata) for tensor in tensors)
        return [
            tensor
            for tensor, found in zip(tensors, alive, strict=True)
            if found is None or self._labels[found[0]] == ACTIVATIONS
        ]

    def __enter__(self) -> MemoryTracker:
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            if storage._cdata in self._alive:  # FSDP frees and fills what it keeps for parameters
                number, before = self._alive[storage._cdata]
                self._resized(storage._cdata, number, before, _rounded(size))

        self._patches = ExitStack()
        for target, name, new in (
            (torch.UntypedStorage, "resize_", resize),
            # What DTensor tries out on tensors of the whole shape, to know the result's, is no work of a step.
            (ShardingPropagator, "_fake_mode_lock", _Pause(self)),
            # That parameters have no data is meant.
            (FSDPParamGroup, "_validate_no_meta_params", lambda _: None),
            (FSDPParamGroup, "_validate_cpu_offload_params", lambda _: None),
            (optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        ):
            self._patches.enter_context(patch.object(target, name, new))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        number = len(self._labels)
        self._labels.append(self._label)
        self._streams.append(COMPUTE)
        self._resized(address, number, 0, _rounded(storage.nbytes()))
        weakref.finalize(storage, self._freed, address)

    def _resized(self, address: int, number: int, before: int, after: int) -> None:
        self._alive[address] = number, after
        self._events.append((number, after - before))

    def _freed(self, address: int) -> None:
        number, size = self._alive.pop(address)
        self._events.append((number, -size))


def _stand_ins(arguments: Any) -> Any:
    """With empty tensors on the host in place of those without data, which no process group takes."""
    return tree_map_only(Tensor, lambda _: torch.empty(0), arguments)


class _Pause:
    """A context in which the tracker notes nothing, to enter again and again."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._tracker.paused = True

    def __exit__(self, *_: object) -> None:
        self._tracker.paused = False


def _rounded(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
