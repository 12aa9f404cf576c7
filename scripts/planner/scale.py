"""The same run on more and more GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from scripts.config import TrainConfig
from scripts.planner.facts import Gpu
from scripts.planner.planning import Plan, aligned
from trainer.errors import TrainError


def scaling(
    config: TrainConfig,
    make: Callable[[TrainConfig, int], Plan],
    *,
    gpu: Gpu,
    counts: Sequence[int],
) -> list[tuple[Plan, str]]:
    """A plan for each number of GPUs, and how it shards: as `config` says, or hybrid if that is faster and fits.

    Args:
        config: of the run; its micro-batch stays, and where it gives no global batch size, that grows with the GPUs.
        make: a plan for a configuration and a number of GPUs.
        gpu: each of them.
        counts: numbers of GPUs.

    Raises:
        TrainError: the configuration cannot be spread over one of the numbers.
    """
    plans = []
    for count in counts:
        ways = {"as given" if config.parallel.dp_replicate > 1 else "FSDP": config.parallel}
        nodes, rest = divmod(count, gpu.gpus_per_node)
        inside, left = divmod(gpu.gpus_per_node, config.parallel.cp * config.parallel.tp)
        if nodes > 1 and rest == left == 0 and config.parallel.dp_replicate == 1:
            ways[f"HSDP {nodes} x {inside}"] = replace(
                config.parallel, dp_replicate=nodes, dp_shard=inside
            )
        try:
            tried = [(make(replace(config, parallel=p), count), way) for way, p in ways.items()]
        except TrainError as error:
            raise TrainError(f"on {count} GPUs: {error}") from error
        plans.append(max(tried, key=_goodness))
    return plans


def _goodness(tried: tuple[Plan, str]) -> tuple[bool, float]:
    plan, _ = tried
    return plan.fits, plan.time.tokens_per_second_per_gpu


def as_table(plans: Sequence[tuple[Plan, str]]) -> str:
    """One line for each; `of the first` compares tokens per second and GPU."""
    first = plans[0][0].time.tokens_per_second_per_gpu
    rows = [("GPUs", "sharding", "GiB", "tokens/s/GPU", "interval", "of the first", "bound by")]
    for plan, way in plans:
        speed, (low, high) = plan.time.tokens_per_second_per_gpu, plan.interval
        rows.append(
            (
                f"{plan.gpus:,}",
                way,
                f"{plan.room.allocated:.1f}" + ("" if plan.fits else " (does not fit)"),
                f"{speed:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                f"{100 * speed / first:.0f} %",
                plan.time.bound_by,
            )
        )
    return aligned(rows)
