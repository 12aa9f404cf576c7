"""Spikes, ranks that disagree or are slow, memory that runs out: found, and told in one line."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.ranks import run_ranks
from trainer.config import GuardConfig
from trainer.errors import PeerLostError, TransientError
from trainer.guards import Guards, disagreement, explain, name_samples, spike

CPU = torch.device("cpu")


def test_samples_are_named_in_runs() -> None:
    assert name_samples([5, 3, 4, 9, 4]) == "samples 3-5, 9"
    assert name_samples([]) == "samples unknown"
    assert name_samples(range(0, 100, 2), at_most=2) == "samples 0, 2, ..."


def test_T10_a_loss_far_above_the_median_is_a_spike() -> None:
    noisy = [2.0 + 0.1 * math.sin(i) for i in range(50)]
    assert spike(noisy, 2.3, deviations=8) is None
    assert spike(noisy, math.inf, deviations=8) is None  # skipped, and told as that
    assert spike(noisy[:10], 9.0, deviations=8) is None  # too few to know
    line = spike(noisy, 3.5, deviations=8)
    assert line is not None and line.startswith("3.5000, the median of the 50 before is 2.0")
    # One earlier spike does not hide the next, and a calm run has no spikes in its last digit.
    assert spike([*noisy, 50.0], 3.5, deviations=8) is not None
    assert spike([2.0] * 50, 2.01, deviations=8) is None
    assert spike([2.0] * 50, 2.10, deviations=8) is not None


def test_T13_the_ranks_in_the_minority_are_named() -> None:
    def report(step: int = 4, samples: int = 8, **replicas: int) -> dict[str, Any]:
        return {"step": step, "samples": samples, "optimizer": [1e-3, 4.0], "replicas": replicas}

    assert disagreement([report(shard_0=5), report(shard_1=6), report(shard_0=5)]) is None
    assert disagreement([report(), report(), report(samples=9), report()]) == (
        "samples: rank 2 has 9, the others 8"
    )
    assert disagreement([report(step=4), report(step=5)]) == "step: rank 0 has 4, rank 1 has 5"
    assert disagreement([report(shard_0=5), report(shard_1=6), report(shard_0=7)]) == (
        "parameters (shard_0): rank 0 has 5, rank 2 has 7"
    )


class _Layer(nn.Module):
    def __init__(self, slow_rank: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._slow_rank = slow_rank

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == self._slow_rank:
            time.sleep(0.03)
        return self.linear(x)


def _guarded(
    steps: int, *, replicate: int = 1, slow_rank: int | None = None, wrong: str = ""
) -> list[tuple[Any, ...]]:
    """Steps of a small sharded model under guards, with something `wrong` on rank 1 in the last one."""
    torch.manual_seed(0)
    mesh = init_device_mesh(
        "cpu",
        (replicate, dist.get_world_size() // replicate),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    model = nn.Sequential(_Layer(slow_rank), _Layer(None))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    events: list[tuple[Any, ...]] = []
    guards = Guards(
        GuardConfig(check_every=steps),
        max_skipped_steps=0,
        model=model,
        optimizer=optimizer,
        device=CPU,
        tell=lambda step, event, line, **details: events.append((step, event, line)),
    )
    here = dist.get_rank() == 1
    for step in range(1, steps + 1):
        guards.begin_step(step)
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        last = step == steps and here
        if not (last and wrong == "skipped"):
            optimizer.step()
        optimizer.zero_grad()
        if last and wrong == "bit":
            weight = next(model.parameters())
            assert isinstance(weight, DTensor)
            local = weight.to_local().detach().view(torch.int32)
            local[0, 0] ^= 1
        guards.end_step(step * 2 + (last and wrong == "cursor"), 0.0)
    return events


def _all_guarded() -> Any:
    errors = []
    for replicate, wrong in ((2, ""), (1, "skipped"), (2, "bit"), (1, "bit"), (1, "cursor")):
        try:
            _guarded(3, replicate=replicate, wrong=wrong)
            errors.append(None)
        except TransientError as error:
            errors.append(str(error))
    return errors, _guarded(4, slow_rank=1)


def test_T12_T13_slow_and_diverging_ranks_are_named_by_all() -> None:
    for errors, events in run_ranks(_all_guarded, 2):
        fine, skipped, bit, other_shard, cursor = errors
        # Under plain FSDP no other rank has a copy to compare with.
        assert fine is None and other_shard is None
        assert (
            "after step 3: optimizer: rank 0 has [0.001, 3.0], rank 1 has [0.001, 2.0]" in skipped
        )
        assert "after step 3: parameters (dp_shard 0, mesh" in bit
        assert "after step 3: samples: rank 0 has 6, rank 1 has 7" in cursor
        ((step, event, line),) = events
        assert (step, event) == (4, "slow_rank")
        assert line.startswith("rank 1 is slow: its own work takes 0.0")


def test_T14_memory_that_runs_out_is_one_line_with_sizes_and_advice() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    error = explain(caught.value, step=3, rank=1, micro_batch_size=4)
    assert error is not None and not isinstance(error, TransientError)
    line = str(error)
    assert line.startswith(
        "out of memory on rank 1 in step 3: tried to allocate 1,048,576.00 GiB, "
    )
    assert "GiB are free; lower --micro_batch_size (now 4;" in line and "\n" not in line
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    told = explain(gpu, step=3, rank=1, micro_batch_size=4, plan=" (planned were 90.0)")
    assert told is not None and "tried to allocate 2.50 GiB, " in str(told)
    assert " (planned were 90.0); lower --micro_batch_size" in str(told)


def test_a_lost_rank_is_told_from_other_errors() -> None:
    gloo = RuntimeError(
        "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12167: Connection reset by peer. This is"
    )
    error = explain(gloo, step=3, rank=0, micro_batch_size=4)
    assert isinstance(error, PeerLostError)
    assert str(error).endswith("says why (Read error [127.0.0.1]:12167: Connection reset by peer)")
    timeout = RuntimeError(
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for"
    )
    assert isinstance(explain(timeout, step=3, rank=0, micro_batch_size=4), PeerLostError)
    assert explain(RuntimeError("shape [2] is invalid"), step=3, rank=0, micro_batch_size=4) is None
