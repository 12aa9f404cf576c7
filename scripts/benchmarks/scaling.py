"""`benchmark.py scaling`: what a token costs with more ranks, longer rows, more micro-batches, and more rows of data.

train.py trains a small Qwen3 on packed rows on the CPU. Each series changes one thing; the lengths of the documents are
drawn from one distribution throughout, so a longer row holds more of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from scripts.benchmarks.common import (
    Result,
    Side,
    machine,
    on_cores,
    on_ranks,
    peak_memory,
    setting,
    take_turns,
    versions,
)
from scripts.benchmarks.data import draw_lengths, pack_lengths
from scripts.benchmarks.step import MB, launch, steps_of
from scripts.benchmarks.trainers import Work, run_shardloop
from scripts.benchmarks.workload import Shape, write_model, write_rows

HELP = "cost per token by ranks, seq_len, accumulation; packing by rows"
# Of a micro-batch at the shortest seq_len; documents are a third of that long.
SHAPE = Shape(vocabulary=4096, width=128, layers=2, seq_len=512, micro_batch_size=16)
RANKS = (1, 2, 4)
SEQ_LENS = (512, 2048, 8192)
ACCUMULATION = (1, 2, 4, 8)
MILLIONS_OF_ROWS = (0.25, 1.0, 4.0)
WARM_UP = 1
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        on_ranks(1, write_model, folder / "model", replace(SHAPE, seq_len=max(SEQ_LENS)))
        write_rows(folder, SHAPE, steps=WARM_UP + arguments.steps, ranks=max(RANKS))
        work = Work(name, SHAPE, "float32", True, WARM_UP, arguments.steps)
        series = {
            title: take_turns(sides, arguments.repeats) for title, sides in settings(work).items()
        }
    return {
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "repeats": arguments.repeats,
        "steps": arguments.steps,
        "shape": asdict(SHAPE),
        "series": series,
        "packing": pack_many(arguments.repeats),
    }


def settings(work: Work) -> dict[str, dict[str, Side]]:
    """The sides of each series, by their names; all but the ranks train the same tokens in a step."""
    tokens, few = SHAPE.micro_batch_tokens, 8

    def shaped(seq_len: int, rows: int, accumulated: int = 1) -> Work:
        shape = replace(SHAPE, seq_len=seq_len, micro_batch_size=rows)
        return replace(work, shape=shape, micro_batches=accumulated)

    return {
        "ranks": {str(ranks): partial(train_on, ranks, work) for ranks in RANKS},
        "seq_len": {str(n): partial(train_on, 1, shaped(n, tokens // n)) for n in SEQ_LENS},
        "micro-batches per step": {
            str(n): partial(train_on, 1, shaped(tokens // few, few // n, n)) for n in ACCUMULATION
        },
    }


def train_on(ranks: int, work: Work) -> Result:
    """Real tokens a second and CPU seconds a token of all ranks together, memory of the highest."""
    run = launch(work, on_one_thread, ranks=ranks)
    steps = steps_of(run)
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["seconds"] for step in steps)
    return {
        "seconds": seconds / len(steps),
        "tokens_per_second": tokens / seconds,
        "cpu_microseconds_per_token": 1e6 * sum(step["cpu_seconds"] for step in steps) / tokens,
        "peak_bytes": max(rank["peak_bytes"] for rank in run),
    }


def on_one_thread(work: Work) -> Result:
    """train.py divides the cores by the ranks; here a rank has one thread, however many cores there are."""
    import torch

    torch.set_num_threads(1)
    with patch.object(os, "cpu_count", return_value=1):
        return run_shardloop(work)


def pack_many(repeats: int) -> Result:
    """Packing so many documents, and what that takes; medians, by millions of documents."""

    def packed(millions: float) -> Result:
        lengths = draw_lengths(round(millions * 1e6))
        with peak_memory() as memory:
            result = pack_lengths(lengths)
        return result | {"peak_mib": memory["peak_bytes"] / _MIB}

    sides: dict[str, Side] = {str(n): partial(packed, n) for n in MILLIONS_OF_ROWS}
    with on_cores(1):
        return take_turns(sides, repeats)


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    shape = result["shape"]
    lines = [
        setting(result),
        f"Qwen3 of {shape['layers']} layers, width {shape['width']}, vocabulary {shape['vocabulary']:,}; fp32, packed, one "
        f"thread a rank; medians of {result['repeats']} runs of {result['steps']} steps behind {WARM_UP} of warm-up",
        "",
        "| what changes |  | step seconds | real tokens/s | CPU µs per token | of the first | peak MB per rank | of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, sides in result["series"].items():
        first = next(iter(sides.values()))
        for name, side in sides.items():
            cpu, memory = side["cpu_microseconds_per_token"], side["peak_bytes"]
            lines.append(
                f"| {title} | {name} | {side['seconds']:.3f} | {side['tokens_per_second']:,.0f} | {cpu:.1f} "
                f"| {cpu / first['cpu_microseconds_per_token']:.2f} | {memory / MB:,.0f} "
                f"| {memory / first['peak_bytes']:.2f} |"
            )
    lines += [
        "",
        "| documents packed | seconds | seconds per million | index MiB per million | peak MiB per million | fill % |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in result["packing"].items():
        millions = float(name)
        per_million = " | ".join(
            f"{side[key] / millions:.{digits}f}"
            for key, digits in (("seconds", 2), ("index_mib", 1), ("peak_mib", 1))
        )
        lines.append(
            f"| {round(millions * 1e6):,} | {side['seconds']:.2f} | {per_million} | {side['fill_pct']:.2f} |"
        )
    return "\n".join(lines)
