"""What a process really allocates on the CPU, and the GPU's attention kernel for it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, adds up after every operation the storages that are alive; `peak` is the largest sum.

    What a kernel of the CPU allocates inside an operation, to convert types for instance, does not count.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        """Count those that exist `before` as well."""
        super().__init__()
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0
        for tensor in before:
            self._add(tensor)

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            self._storages.add(local.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            self._add(value)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._storages))
        return output


def register_variable_length_kernel() -> None:
    """Let `torch.nn.attention.varlen` run on the CPU in this process, for its memory: gradients are zero.

    It allocates and keeps for backward what it does on a GPU, without copies of queries and keys.
    """
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *rest: Any) -> Any:
        output = torch.empty_like(query)
        ends = offsets.tolist()
        for start, end in itertools.pairwise(ends):
            heads = (x[start:end].transpose(0, 1) for x in (query, key, value))
            found = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            output[start:end] = found.transpose(0, 1)
        sums = torch.empty(query.shape[1], query.shape[0])
        return output, sums, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> Any:
        return tuple(torch.zeros_like(x) for x in (query, key, value))
