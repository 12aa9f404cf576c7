"""What a process really allocates on the CPU, and the GPU's attention kernel for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest sum of what `run` has allocated and not freed, from the allocator's own record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(np.cumsum([event.nbytes() for event in events]).max(), 0))


def register_variable_length_kernel() -> None:
    """Let `torch.nn.attention.varlen` run on the CPU in this process, for its memory: gradients are zero.

    It allocates and keeps for backward what it does on a GPU, without copies of queries and keys.
    """
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *rest: Any) -> Any:
        output = torch.empty_like(query)
        ends = offsets.tolist()
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            heads = (x[start:end].transpose(0, 1) for x in (query, key, value))
            found = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            output[start:end] = found.transpose(0, 1)
        sums = torch.empty(query.shape[1], query.shape[0])
        return output, sums, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> Any:
        return tuple(torch.zeros_like(x) for x in (query, key, value))
