"""Ranks: how they meet, who does what once, and how they agree.

Host-side numbers (token counts, stop flags, error texts) travel over gloo on CPU tensors, also on GPU machines:
no GPU is ever synchronised to learn one of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainer.errors import TrainError


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `store` is the launcher's key-value store, None for a single process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node: int
    store: dist.Store | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def meet() -> Ranks:
    """Connect to the store of torchrun; without a launcher, be the only rank.

    Nothing collective happens yet, so nothing can time out while one rank downloads a model for hours.
    """
    if "RANK" not in os.environ:
        return Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0, store=None)
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    # A restarted group meets in the same store of the launcher; its keys must not be those of the last attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        local_world_size=local_world_size,
        node=int(os.environ.get("GROUP_RANK", rank // local_world_size)),
        store=dist.PrefixStore(f"shardloop/{attempt}", store),
    )


def once_per_node(ranks: Ranks, name: str, work: Callable[[], Any]) -> Any:
    """Run `work` on one rank of every node and give its result to the other ranks of that node, however long it takes.

    Args:
        ranks: this process among the others.
        name: names the piece of work; used once per run.
        work: returns something JSON can hold.

    Raises:
        TrainError: on the waiting ranks, with the same line, when `work` raised a ValueError or OSError (what the
            user can mend); the working rank raises the original.
    """
    if ranks.store is None:
        return work()
    key = f"once/{name}/{ranks.node}"
    if ranks.local_rank == 0:
        try:
            result = work()
        except BaseException as error:
            ranks.store.set(key, json.dumps({"error": f"{error}" or type(error).__name__}))
            raise
        ranks.store.set(key, json.dumps({"result": result}))
        return result
    while not ranks.store.check([key]):  # polled, not waited for: a signal must be able to end this
        time.sleep(0.05)
    answer = json.loads(ranks.store.get(key))
    if "error" in answer:
        raise TrainError(answer["error"])
    return answer["result"]


def start(ranks: Ranks, device_type: Literal["cpu", "cuda"]) -> torch.device:
    """Create the process group (gloo on CPU; NCCL beside gloo on CUDA) and return this rank's device."""
    device = (
        torch.device(device_type, ranks.local_rank)
        if device_type == "cuda"
        else torch.device("cpu")
    )
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=ranks.store or dist.HashStore(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=30),
        device_id=device if device_type == "cuda" else None,
    )
    return device


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, in float64."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """Maxima over all ranks, in float64."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=operation)
    return tensor.tolist()


def raise_together(error: str | None) -> None:
    """Every rank calls this with its own error or None; if any has one, all raise the same line.

    Raises:
        TrainError: the first rank's error.
    """
    errors: list[str | None] = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise TrainError(first)


def claim_report(ranks: Ranks) -> bool:
    """True on the first rank of a node that asks: the one that prints an error all ranks have met."""
    if ranks.store is None:
        return True
    try:
        return ranks.store.add(f"report/{ranks.node}", 1) == 1
    except RuntimeError:  # the store went away with its host; better twice than never
        return True


def leave(ranks: Ranks, *, seconds: float = 5.0) -> None:
    """End after an error: the first rank waits for the others, since it may be the host of their store.

    One that never learns of the error is given up after `seconds`; the launcher ends it.
    """
    if ranks.store is None:
        return
    deadline = time.monotonic() + seconds
    with suppress(RuntimeError):  # the host is gone already
        left = ranks.store.add("left", 1)
        while ranks.is_first and left < ranks.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            left = ranks.store.add("left", 0)
