"""`benchmark.py overhead`: what the loop costs beside forward, backward and optimizer.

train.py runs as it is on two gloo ranks, but in the place of its loop stand blocks of steps that take turns: of
`trainer.loop.train`, with everything train.py gives it, and of a bare loop over the same tensors, on the same model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.common import Result, machine, setting, versions
from scripts.benchmarks.step import launch, usual_dtypes, write_workload
from scripts.benchmarks.trainers import (
    MAX_GRAD_NORM,
    TIMES,
    WORLD_SIZE,
    Work,
    differences,
    now,
    run_main,
)
from scripts.benchmarks.workload import SHAPES

HELP = "what the loop costs beside forward, backward and optimizer"
SHAPE = "layers"
WARM_UP = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=4, help="steps of a block (%(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of each side (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    steps = (WARM_UP + arguments.blocks) * arguments.steps
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_workload(Path(folder), SHAPES[SHAPE], steps)
        for dtype in usual_dtypes():
            work = Work(folder, SHAPES[SHAPE], dtype, packed=True, warm_up=0, steps=steps)
            runs = [launch(work, compare, arguments.steps)[0] for _ in range(arguments.repeats)]
            sides = {
                name: {
                    key: median(step[key] for run in runs for step in run[name]) for key in TIMES
                }
                for name in ("train", "bare")
            }
            overhead = {
                f"overhead_{key}_pct": 100 * (sides["train"][key] / sides["bare"][key] - 1)
                for key in TIMES
            }
            rows.append({"dtype": dtype, **sides, **overhead})
    return {
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "blocks": arguments.blocks,
        "steps": arguments.steps,
        "rows": rows,
    }


def compare(
    work: Work,
    block: int,
    read: Callable[[], tuple[float, float]] = now,
    names: tuple[str, str] = TIMES,
) -> Result:
    """On a rank: seconds of every step of the loop and of the bare one, behind a block of each; or of what else `read` counts."""
    from trainer.loop import train

    found: dict[str, list[Result]] = {"train": [], "bare": []}

    def block_of_train(model: Any, optimizer: Any, batches: Iterator[Any], **options: Any) -> Any:
        """Whether it finished, and the ticks."""
        ticks, advance = [read()], options.pop("advance")

        def advanced(*told: Any) -> None:
            advance(*told)
            ticks.append(read())

        finished = train(model, optimizer, batches, advance=advanced, **options)
        ticks[-1] = read()  # what follows the last step belongs to it
        return finished, ticks

    def taking_turns(
        model: Any, optimizer: Any, batches: Iterator[Any], *, progress: Any, **options: Any
    ) -> bool:
        batches, last = iter(batches), options.pop("steps")
        options |= {"save": lambda _: None, "evaluate": lambda _: None, "progress": progress}
        finished = False
        while progress.step < last:
            steps, seen = progress.step + block, []
            finished, of_train = block_of_train(
                model, optimizer, kept(batches, seen), steps=steps, **options
            )
            of_bare = bare_loop(model, optimizer, seen, options["device"], read)
            if steps > block:
                found["train"] += differences(of_train, names)
                found["bare"] += differences(of_bare, names)
        return finished

    run_main(work, taking_turns)
    return found


def kept(batches: Iterator[Any], seen: list[Any]) -> Iterator[Any]:
    for batch in batches:
        seen.append(batch)
        yield batch


def bare_loop(
    model: Any,
    optimizer: Any,
    batches: Sequence[Any],
    device: Any,
    read: Callable[[], tuple[float, float]],
) -> list[tuple[float, float]]:
    """What any loop has to do; returns what was read when it began and when each step ended."""
    import torch

    from trainer.loop import to_device
    from trainer.loss import causal_lm_loss

    ticks = [read()]
    for batch in batches:
        loss, _ = causal_lm_loss(model, to_device(batch, device))
        (loss / len(batch["label_positions"])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        ticks.append(read())
    return ticks


def as_markdown(result: Result) -> str:
    """The numbers as a Markdown table."""
    lines = [
        setting(result),
        f"{result['ranks']} gloo ranks, shape {SHAPE!r}, packed; medians of the steps of "
        f"{result['repeats']} runs of {result['blocks']} blocks of {result['steps']} steps, CPU seconds of rank 0",
        "",
        "| dtype | train() seconds | bare seconds | overhead % | train() CPU seconds | bare CPU seconds | overhead % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row['train'][key]:.4f} | {row['bare'][key]:.4f} | {row[f'overhead_{key}_pct']:+.2f}"
            for key in TIMES
        ]
        lines.append(f"| {row['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)
