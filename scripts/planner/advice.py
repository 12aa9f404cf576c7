"""What a run that waits for communication waits for, and what would wait less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from scripts.planner.constants import Constants
from scripts.planner.speed import LINKS, NETWORK, StepTime, Work, bus_bandwidth, predict

_MORE_MICRO_BATCHES = 8


def explain_communication(
    work: Work, time: StepTime, constants: Constants, *, rows: int
) -> tuple[list[str], list[str]]:
    """Lines that say over what the step's time goes, and those that say what is faster, the fastest first; [] where compute
    takes longer.

    Args:
        work: of a rank.
        time: that it takes.
        constants: of the prediction.
        rows: of a step, over all ranks.
    """
    gpu = work.gpu
    if time.bound_by not in (NETWORK, LINKS):
        return [], []
    across = time.bound_by == NETWORK
    if across:
        nodes = -(-work.gpus // gpu.gpus_per_node)
        gigabits = 8e-9 * gpu.network_bytes_per_second * gpu.gpus_per_node
        where = f"{nodes} machines of {gpu.gpus_per_node} {gpu.name}, joined by {gigabits:.0f} Gb/s each"
    else:
        where = f"GPUs joined by {gpu.link_bytes_per_second / 1e9:.0f} GB/s"
    computing = time.seconds - time.communication_exposed - time.waiting - time.optimizer
    rate = bus_bandwidth(gpu, constants, across_nodes=across) / 1e9
    why = (
        f"bound by communication: {where} ({rate:.1f} GB/s reached); "
        f"computing takes {computing:.2f} of {time.seconds:.2f} s"
    )
    now = time.tokens_per_second_per_gpu * work.gpus
    ways = sorted(
        (predict(other, constants).tokens_per_second_per_gpu * other.gpus, how)
        for other, how in _others(work, rows)
    )
    better = [f"{speed:,.0f} {how}" for speed, how in reversed(ways) if speed > 1.02 * now]
    if not better:
        return [why], []
    return [why], [f"tokens/s of all GPUs, {now:,.0f} as it is:", *better]


def _others(work: Work, rows: int) -> Iterator[tuple[Work, str]]:
    """The same work done in other ways, and the flags of each."""
    more = replace(work, grad_accum_steps=_MORE_MICRO_BATCHES * work.grad_accum_steps)
    size = f"--global_batch_size {_MORE_MICRO_BATCHES * rows}"
    gpu = work.gpu
    split = work.tensor_parallel * work.context_parallel
    nodes, rest = divmod(work.gpus, gpu.gpus_per_node)
    if nodes < 2 or rest or gpu.gpus_per_node % split:
        yield more, f"with {size} (and 6 bytes per parameter more memory)"
        return
    inside = gpu.gpus_per_node // work.tensor_parallel
    yield replace(work, gpus=gpu.gpus_per_node, shards=inside), "on one of the machines alone"
    flags = f"--parallel.dp_replicate {nodes} --parallel.dp_shard {gpu.gpus_per_node // split}"
    yield replace(work, shards=inside), f"with {flags} (HSDP)"
    # Shards are reduced inside a machine in every micro-batch, and between machines once a step.
    hybrid = replace(more, shards=inside, accumulation="sharded")
    yield hybrid, f"with {flags} --parallel.accumulation sharded {size}"
