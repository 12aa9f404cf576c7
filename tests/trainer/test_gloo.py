"""Gathering and reducing among CPU ranks by sends, against the group's own collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.support.ranks import run_ranks
from trainer.gloo import GatherFromPeers, ReduceFromPeers, send_among_peers


def _collectives(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """What was sent among peers, and what the group's own collective makes of the same."""
    group, size = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    generator = torch.Generator().manual_seed(dist.get_rank())
    given = torch.randint(-100, 100, (5 * size,), generator=generator).to(dtype)
    gathered = torch.empty(5 * size * size, dtype=dtype), torch.empty(5 * size * size, dtype=dtype)
    dist.all_gather_single(gathered[0], given)
    GatherFromPeers()(gathered[1], given, group)
    found = {"gather": gathered}
    for name, op in (("sum", dist.ReduceOp.SUM), ("mean", dist.ReduceOp.AVG)):
        whole = given.clone()
        dist.all_reduce(whole)
        whole = whole / size if name == "mean" else whole
        part = torch.empty(5, dtype=dtype)
        ReduceFromPeers()(part, given, group, op)
        found[name] = whole.chunk(size)[dist.get_rank()], part
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_sends_give_what_the_collectives_give(ranks: int) -> None:
    for found in run_ranks(_collectives, ranks, torch.float32):
        for name, (expected, sent) in found.items():
            torch.testing.assert_close(sent, expected, msg=name)


def _into_place() -> list[float]:
    """FSDP's own part is in the output already, and stays; a step as of one process."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    fully_shard(layer)
    assert isinstance(layer, FSDPModule)
    send_among_peers(layer)
    inputs = torch.ones(2, 4) * (dist.get_rank() + 1)
    output = layer(inputs)
    torch.testing.assert_close(output[0], weight.sum(1) * inputs[0, 0] + layer.bias)
    output.sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    return grad.full_tensor()[0].tolist()  # type: ignore[attr-defined]


@pytest.mark.distributed
def test_a_sharded_layer_computes_with_them() -> None:
    # The mean over ranks of 2 rows of ones, and of twos.
    assert run_ranks(_into_place, 2) == [[3.0] * 4] * 2
