"""FSDP's collectives among CPU ranks, as sends and receives.

Gloo reduces and scatters by an all-reduce of which most is thrown away, and gathers in rings. Between two ranks of a host,
sending each peer what it needs took a third of the time of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


class _Fresh:
    """Memory of one call."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GatherFromPeers(_Fresh, AllGather):
    """An all-gather: every rank sends its part to every other."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Fill `output_tensor` [ranks * n] with the `input_tensor` [n] of every rank; done when it returns."""
        parts = output_tensor.chunk(group.size())
        if parts[group.rank()].data_ptr() != input_tensor.data_ptr():
            parts[group.rank()].copy_(input_tensor)
        peers = [rank for rank in range(group.size()) if rank != group.rank()]
        _wait(
            [dist.irecv(parts[peer], group=group, group_src=peer) for peer in peers]
            + [dist.isend(input_tensor, group=group, group_dst=peer) for peer in peers]
        )


class ReduceFromPeers(_Fresh, ReduceScatter):
    """A reduce-scatter: every rank sends every other the part that it keeps, which adds up what comes."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Make `output_tensor` [n] the sum or the mean of this rank's part of every `input_tensor` [ranks * n].

        It is done when this returns; the order of the sum follows from the number of ranks alone.
        """
        # All that FSDP asks for in fp32 and bf16.
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        ranks, rank = group.size(), group.rank()
        parts = input_tensor.chunk(ranks)
        received = output_tensor
        for distance in range(1, ranks):
            source, target = (rank - distance) % ranks, (rank + distance) % ranks
            _wait(
                [
                    dist.irecv(received, group=group, group_src=source),
                    dist.isend(parts[target], group=group, group_dst=target),
                ]
            )
            if distance == 1:
                output_tensor.add_(parts[rank])
                received = torch.empty_like(output_tensor) if ranks > 2 else output_tensor
            else:
                output_tensor.add_(received)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(ranks)


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:  # None: this rank is not in the group
            work.wait()


def send_among_peers(module: FSDPModule) -> None:
    """Let this group of parameters be gathered and reduced so."""
    module.set_custom_all_gather(GatherFromPeers())
    module.set_custom_reduce_scatter(ReduceFromPeers())
