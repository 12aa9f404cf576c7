"""`benchmark.py step`: training steps of train.py, of TRL's SFTTrainer under FSDP2, and of a plain transformers loop.

Two gloo ranks on the CPU; all sides begin with the same weights and see the same rows. docs/benchmarks.md says what each
side does.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from scripts.benchmarks.common import Result, as_launched, machine, on_ranks, setting, versions
from scripts.benchmarks.trainers import WORLD_SIZE, Work, run_plain, run_shardloop, run_trl
from scripts.benchmarks.workload import SHAPES, Shape, write_model, write_rows
from scripts.environment import cache_settings

HELP = "tokens a second and memory of training steps, beside TRL and a plain loop"
DTYPES = ("float32", "bfloat16")
NO_BF16 = "this CPU has no bf16 units: bfloat16 only with --dtype bfloat16"
PACKINGS = ("packed", "padded")
WARM_UP = 2
NO_TRL = "TRL is not installed, so its rows are missing: pip install -e '.[bench]'"
# Of TRL's ways to pack those that keep whole documents, and cut one long stream of them.
STRATEGIES = ("bfd", "wrapped")
MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, choices in (("shape", SHAPES), ("dtype", DTYPES), ("packing", PACKINGS)):
        parser.add_argument(
            f"--{name}", choices=tuple(choices), help=f"only this {name} (all, one after the other)"
        )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    with_trl = importlib.util.find_spec("trl") is not None
    rows = []
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            write_workload(Path(folder), SHAPES[shape], arguments.steps)
            for dtype in [arguments.dtype] if arguments.dtype else usual_dtypes():
                for packing in [arguments.packing] if arguments.packing else PACKINGS:
                    work = Work(
                        folder, SHAPES[shape], dtype, packing == "packed", WARM_UP, arguments.steps
                    )
                    sides = compare(work, arguments.repeats, with_trl=with_trl)
                    row = {"shape": shape, "dtype": dtype, "packing": packing, "sides": sides}
                    rows.append(row | {"ratios": ratios(sides)})
    packages = ("torch", "transformers", *(("trl", "accelerate") if with_trl else ()))
    return {
        "machine": machine(),
        "versions": versions(*packages),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "warm_up": WARM_UP,
        "steps": arguments.steps,
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "rows": rows,
    }


def usual_dtypes() -> tuple[str, ...]:
    """Those that are measured unless one is asked for: where a CPU multiplies bf16 number by number, no bf16."""
    from trainer.hardware import has_bf16_units

    return DTYPES if has_bf16_units() else DTYPES[:1]


def write_workload(
    folder: Path, shape: Shape, steps: int, *, ranks: int = WORLD_SIZE, micro_batches: int = 1
) -> None:
    """A model, and rows for so many steps behind the warm-up, each of so many micro-batches of a rank."""
    on_ranks(1, write_model, folder / "model", shape)
    write_rows(folder, shape, steps=(WARM_UP + steps) * micro_batches, ranks=ranks)


def launch(
    work: Work, function: Callable[..., Result], *arguments: Any, ranks: int = WORLD_SIZE
) -> list[Result]:
    """What the ranks of one side return."""
    # Libraries that are imported already keep to the folders that train.py would choose.
    env = cache_settings(Path(work.folder, "cache")) | {"TOKENIZERS_PARALLELISM": "false"}
    return as_launched(ranks, env, function, work, *arguments)


def compare(work: Work, repeats: int, *, with_trl: bool, ranks: int = WORLD_SIZE) -> Result:
    """All sides, taking turns. TRL's ways to pack are tried once each, and the faster one is compared."""
    sides: dict[str, Callable[[], list[Result]]] = {
        "shardloop": partial(launch, work, run_shardloop, ranks=ranks),
        "plain": partial(launch, work, run_plain, ranks=ranks),
    }
    tried: dict[str, Result] = {}
    if with_trl:
        for strategy in STRATEGIES if work.packed else STRATEGIES[:1]:
            name = f"trl, {strategy}" if work.packed else "trl"
            sides[name] = partial(launch, work, run_trl, strategy, ranks=ranks)
            tried[name] = summary([attempt(sides[name])])
        best = max(tried, key=lambda name: tried[name].get("valid_tokens_per_second", 0))
        for name in tried.keys() - {best}:
            del sides[name]
    runs: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(attempt(side))
    return {name: summary(of_side) for name, of_side in runs.items()} | {
        f"{name} (one run)": result for name, result in tried.items() if name not in sides
    }


def attempt(side: Callable[[], list[Result]]) -> list[Result] | str:
    """A side's ranks, or the line with which it failed."""
    try:
        return side()
    except Exception as error:  # whatever a peer cannot do here is what its row says
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def summary(runs: Sequence[list[Result] | str]) -> Result:
    """Medians over the steps of all runs; memory is that of the highest rank, the median of the runs."""
    done: list[list[Result]] = []
    for run in runs:
        if isinstance(run, str):
            return {"failed": run}
        done.append(run)
    steps = [step for run in done for step in steps_of(run)]
    return {
        "step_seconds": median(step["seconds"] for step in steps),
        "step_cpu_seconds": median(step["cpu_seconds"] for step in steps),
        "tokens_per_second": median(step["tokens"] / step["seconds"] for step in steps),
        "valid_tokens_per_second": median(step["valid_tokens"] / step["seconds"] for step in steps),
        "valid_tokens_per_cpu_second": median(
            step["valid_tokens"] / step["cpu_seconds"] for step in steps
        ),
        "peak_bytes": median(max(rank["peak_bytes"] for rank in run) for run in done),
        # A side that takes the mean on each rank has one on each.
        "first_loss": mean(rank["first_loss"] for rank in done[0]),
        "every_step": steps,
    }


def steps_of(run: list[Result]) -> list[Result]:
    """Of every step the seconds, which are alike on all ranks, and the sums over ranks of the rest."""
    summed = ("cpu_seconds", "tokens", "valid_tokens")
    return [
        {"seconds": seconds} | {key: sum(rank[key][step] for rank in run) for key in summed}
        for step, seconds in enumerate(run[0]["seconds"])
    ]


def ratios(sides: Result) -> Result:
    """Our tokens a second as a multiple of each other side's, and our memory as a share of theirs."""
    ours = sides["shardloop"]
    if "failed" in ours:
        return {}
    return {
        name: {
            "times_faster": ours["valid_tokens_per_second"] / side["valid_tokens_per_second"],
            "times_faster_cpu": ours["valid_tokens_per_cpu_second"]
            / side["valid_tokens_per_cpu_second"],
            "memory_ratio": ours["peak_bytes"] / side["peak_bytes"],
        }
        for name, side in sides.items()
        if name != "shardloop" and "failed" not in side
    }


def as_markdown(result: Result) -> str:
    """The numbers as a Markdown table."""
    lines = [
        setting(result),
        f"{result['ranks']} gloo ranks; medians of {result['repeats']} runs of {result['steps']} steps "
        f"behind {result['warm_up']} of warm-up",
    ]
    lines += [
        f"{name}: vocabulary {shape['vocabulary']:,}, width {shape['width']}, {shape['layers']} layers, "
        f"{shape['micro_batch_size']} rows of {shape['seq_len']} tokens on each rank"
        for name, shape in result["shapes"].items()
    ]
    lines += [
        "",
        "| shape | dtype | rows | side | step seconds | CPU seconds | valid tokens/s | real tokens/s "
        "| peak MB per rank | first loss | ours: times faster | by CPU seconds | memory of theirs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for name, side in row["sides"].items():
            begin = f"| {row['shape']} | {row['dtype']} | {row['packing']} | {name} |"
            if "failed" in side:
                lines.append(f"{begin} {side['failed']} |  |  |  |  |  |  |  |  |")
                continue
            ratio = row["ratios"].get(name)
            keys = ("times_faster", "times_faster_cpu", "memory_ratio")
            compared = " | ".join(f"{ratio[key]:.2f}" if ratio else "" for key in keys)
            lines.append(
                f"{begin} {side['step_seconds']:.3f} | {side['step_cpu_seconds']:.3f} "
                f"| {side['valid_tokens_per_second']:,.0f} "
                f"| {side['tokens_per_second']:,.0f} | {side['peak_bytes'] / MB:,.0f} "
                f"| {side['first_loss']:.4f} | {compared} |"
            )
    if "trl" not in result["versions"]:
        lines += ["", NO_TRL]
    if {row["dtype"] for row in result["rows"]} == {"float32"}:
        lines += ["", NO_BF16]
    return "\n".join(lines)
