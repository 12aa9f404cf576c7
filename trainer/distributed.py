"""Ranks: how they meet, who does what once, and how they agree.

Host-side numbers (token counts, stop flags, error texts) travel over gloo on CPU tensors, also on GPU machines:
no GPU is ever synchronised to learn one of them.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainer.errors import TrainError

# Between the attempts to see a file another node has made: network file systems may show it late.
_LOOK_AGAIN_SECONDS = (0.1, 0.3, 1.0, 2.0)
# How much later than the first node another may start and still be waited for.
_LATEST_START_SECONDS = 600.0


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `store` is the launcher's key-value store, None for a single process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node: int
    store: dist.Store | None
    nodes: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def meet() -> Ranks:
    """Connect to the store of the launcher; without one, be the only rank.

    Nothing collective happens yet, so nothing can time out while one rank downloads a model for hours.
    """
    if "RANK" not in os.environ:
        return Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0, store=None)
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    # A restarted group meets in the same store of the launcher; its keys must not be those of the last attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"shardloop/{attempt}", store)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "LOCAL_WORLD_SIZE" in os.environ:
        local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        node, nodes = rank // local_world_size, world_size // local_world_size
    else:  # Azure ML's own launcher, for one, tells no more of a node than the local ranks
        store.set(f"local-rank/{rank}", str(local_rank))
        local_ranks = [int(store.get(f"local-rank/{other}")) for other in range(world_size)]
        firsts = [other for other, local in enumerate(local_ranks) if local == 0]
        node, nodes = sum(first <= rank for first in firsts) - 1, len(firsts)
        local_world_size = ([*firsts, world_size])[node + 1] - firsts[node]
    return Ranks(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node=int(os.environ.get("GROUP_RANK", node)),
        store=store,
        nodes=int(os.environ.get("GROUP_WORLD_SIZE", nodes)),
    )


def once(
    ranks: Ranks, name: str, work: Callable[[], Any], *, shared_folder: Path | None = None
) -> Any:
    """Run `work` on one rank for all that see what it leaves behind; the others get its result, however long it takes.

    Without `shared_folder` that is one rank of every node. With it, the folder `work` writes to,
    the first node works for every node that sees the same folder under the same path; the others,
    and every node when the folder cannot be written, work for themselves.

    There is no limit to the work, so a worker that is killed must be noticed by the launcher:
    torchrun ends the ranks of its node, and the store, which the first node's torchrun holds, ends
    with it for the other nodes.

    Args:
        ranks: this process among the others.
        name: names the piece of work; used once per run.
        work: returns something JSON can hold; paths in it must be absolute.
        shared_folder: nodes may have it in common, as on a network file system.

    Raises:
        TrainError: on the waiting ranks, with the same line, when `work` raised (the working rank
            raises the original); or when the store is gone.
    """
    if ranks.store is None:
        return work()
    key = f"once/{name}"
    if ranks.local_rank != 0:
        return _answer(ranks.store, f"{key}/{ranks.node}")
    try:
        if shared_folder is not None and _sees_folder_of_first(
            ranks, key, shared_folder.absolute()
        ):
            result = _answer(ranks.store, f"{key}/0")
        else:
            result = work()
        _publish(ranks.store, f"{key}/{ranks.node}", result=result)
    except BaseException as error:
        with suppress(RuntimeError):  # without a store nobody waits any more
            _publish(ranks.store, f"{key}/{ranks.node}", error=f"{error}" or type(error).__name__)
        raise
    return result


def _sees_folder_of_first(ranks: Ranks, key: str, folder: Path) -> bool:
    """Whether this node is not the first and has the first node's `folder` under the same path.

    Told by a file that the first node makes there and removes when all others have looked for it.
    Locks are not used: network file systems often have none.
    """
    store = ranks.store
    assert store is not None
    if ranks.nodes == 1:
        return False
    if not ranks.is_first:
        probe = _answer(store, f"{key}/probe")
        seen = probe is not None and _sees(Path(probe), folder)
        _publish(store, f"{key}/seen/{ranks.node}", result=seen)
        return seen
    probe = folder / f".probe-{secrets.token_hex(16)}"
    try:
        probe.touch(exist_ok=False)
    except OSError:
        _publish(store, f"{key}/probe", result=None)
        return False
    try:
        _publish(store, f"{key}/probe", result=str(probe))
        answers = [f"{key}/seen/{node}" for node in range(1, ranks.nodes)]
        # One that comes too late finds no probe, works for itself, and finds most of it done.
        _wait(store, answers, seconds=_LATEST_START_SECONDS)
    finally:
        with suppress(OSError):
            probe.unlink()
    return False


def _sees(probe: Path, folder: Path) -> bool:
    if probe.parent != folder:
        return False
    for delay in (*_LOOK_AGAIN_SECONDS, None):
        with suppress(OSError):
            os.listdir(folder)  # makes an NFS client ask its server again
            if probe.exists():
                return True
        if delay is not None:
            time.sleep(delay)
    return False


def _publish(store: dist.Store, key: str, **message: Any) -> None:
    store.set(key, json.dumps(message))


def _answer(store: dist.Store, key: str) -> Any:
    """Wait for what another rank publishes under `key`; raises TrainError with its error."""
    _wait(store, [key])
    message = json.loads(store.get(key))
    if "error" in message:
        raise TrainError(message["error"])
    return message["result"]


def _wait(store: dist.Store, keys: list[str], *, seconds: float = float("inf")) -> None:
    """Return when the store has all `keys`, or after `seconds`; raises TrainError when there is no store any more."""
    deadline = time.monotonic() + seconds
    try:
        # Polled, not waited for: a signal must be able to end this.
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)
    except RuntimeError as error:
        raise TrainError(
            "the store of the launcher is gone: the first node has ended; its log says why"
        ) from error


def start(
    ranks: Ranks, device_type: Literal["cpu", "cuda"], *, timeout_seconds: float = 1800
) -> torch.device:
    """Create the process group (gloo on CPU; NCCL beside gloo on CUDA) and return this rank's device.

    A collective operation fails when a rank has not joined it after `timeout_seconds`.
    """
    device = (
        torch.device(device_type, ranks.local_rank)
        if device_type == "cuda"
        else torch.device("cpu")
    )
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if ranks.nodes == 1 and sys.platform == "linux":
        # Ranks of one node meet on the loopback interface: nobody else can reach what gloo listens on.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=ranks.store or dist.HashStore(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device_type == "cuda" else None,
    )
    return device


def sum_over_ranks(values: Sequence[float], *, copies: int = 1) -> list[float]:
    """Sums over all ranks, in float64, of values that `copies` ranks at a time hold alike."""
    return [total / copies for total in _reduced(values, dist.ReduceOp.SUM)]


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """Maxima over all ranks, in float64."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=operation)
    return tensor.tolist()


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in their order, on every rank; a value is what pickle can hold.

    A thread beside the loop gives a `group` of its own, which holds every rank too. Without one, a process without
    ranks is the only one.
    """
    values = [value]
    if group is not None or (dist.is_initialized() and dist.get_world_size() > 1):
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def raise_together(error: str | None) -> None:
    """Every rank calls this with its own error or None; if any has one, all raise the same line.

    Raises:
        TrainError: the first rank's error.
    """
    first = next((e for e in gather(error) if e is not None), None)
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
