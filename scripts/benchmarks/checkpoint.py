"""`benchmark.py checkpoint`: how long the loop stands still for a save, in the background and not.

Both sides write the same state of two sharded ranks to the same disk: parameters and Adam's averages in fp32. Each saves
twice, and the second counts: the first also takes the host memory that later ones reuse.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import (
    Result,
    machine,
    on_ranks,
    setting,
    stopwatch,
    take_turns,
    versions,
)

HELP = "how long the loop stands still for a save"
WORLD_SIZE = 2
WIDTH = 1024
MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megabytes", type=int, default=200, help="size of the checkpoint (%(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured (the temporary one)"
    )


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""

    def side(asynchronous: bool) -> Result:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.folder) as folder:
            ranks = on_ranks(WORLD_SIZE, save, folder, arguments.megabytes, asynchronous)
        return {key: max(rank[key] for rank in ranks) for key in ranks[0]}

    sides = {"shardloop": partial(side, True), "synchronous": partial(side, False)}
    result = take_turns(sides, arguments.repeats)
    stall = result["shardloop"]["seconds"] / result["synchronous"]["seconds"]
    return {
        "machine": machine(),
        "versions": versions("torch"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "stall_pct": 100 * stall,
        **result,
    }


def save(folder: str, megabytes: int, asynchronous: bool) -> Result:
    """Seconds in which a save returned (`seconds`) and in which it was durable, its hashes and all.

    `loop_cpu_seconds` is what the loop's thread computed until the save returned: where other programs keep the cores
    busy, that tells more.
    """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from trainer.checkpoint import Checkpointer
    from trainer.config import CheckpointConfig

    layers = max(1, round(megabytes * MB / (WIDTH * WIDTH * 4 * 3)))
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, WIDTH)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(asynchronous=asynchronous, keep_last=1)
    checkpointer = Checkpointer(Path(folder), model, optimizer, config)
    watches = []
    for step in (1, 2):
        dist.barrier()
        with stopwatch() as durable:
            with stopwatch() as stall:
                began = time.thread_time()
                checkpointer.save(step, {})
                loop_cpu_seconds = time.thread_time() - began
            checkpointer.wait()
        watches.append((stall["seconds"], durable["seconds"]))
    checkpointer.close()
    (first_seconds, _), (seconds, durable_seconds) = watches
    dist.barrier()  # rank 0 has removed the first one
    size = sum(file.stat().st_size for file in Path(folder).rglob("*.distcp"))
    dist.barrier()
    return {
        "seconds": seconds,
        "loop_cpu_seconds": loop_cpu_seconds,
        "first_seconds": first_seconds,
        "durable_seconds": durable_seconds,
        "checkpoint_bytes": size,
    }


def as_markdown(result: Result) -> str:
    """The numbers as a Markdown table."""
    size = result["shardloop"]["checkpoint_bytes"] / MB
    lines = [
        setting(result),
        f"{result['ranks']} ranks, {size:,.0f} MB of fp32 state; medians of {result['repeats']} runs, of the "
        "slower rank",
        "",
        "| save | seconds the loop stands still | of them computing | the first time "
        "| seconds until durable |",
        "|---|---|---|---|---|",
    ]
    for name, title in (("shardloop", "in the background"), ("synchronous", "synchronous")):
        side = result[name]
        lines.append(
            f"| {title} | {side['seconds']:.3f} | {side['loop_cpu_seconds']:.3f} | {side['first_seconds']:.3f} "
            f"| {side['durable_seconds']:.3f} |"
        )
    lines += ["", f"In the background the loop stands still {result['stall_pct']:.1f} % as long."]
    return "\n".join(lines)
