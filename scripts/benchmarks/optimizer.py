"""`benchmark.py optimizer`: steps of the optimizer, over many small parameters and over a few large ones.

Of small ones, of which computing is nothing, what is left is what the host does for each, with which a GPU waits. Each side runs on new
gloo ranks, over DTensors as FSDP makes them; the last over plain tensors, which is the least that torch takes.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

from scripts.benchmarks.common import Result, machine, on_ranks, setting, take_turns, versions
from scripts.benchmarks.trainers import WORLD_SIZE

HELP = "steps of the optimizer, beside torch's AdamW"
CASES = {"many small": (400, 64), "few large": (4, 8_000_000)}
"""Parameters, as many as in 36 layers, and elements of each."""
OURS = "trainer.optimizer"
LOW_BIT = f"{OURS}, state in bf16"
SIDES = (
    OURS,
    LOW_BIT,
    f"{LOW_BIT}, compiled",
    "torch.optim.AdamW",
    "torch.optim.AdamW, plain tensors",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="behind the first (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    return {
        "machine": machine(),
        "versions": versions("torch"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "steps": arguments.steps,
        "cases": {
            name: take_turns(
                {side: partial(steps_of_ranks, side, *size, arguments.steps) for side in SIDES},
                arguments.repeats,
            )
            for name, size in CASES.items()
        },
    }


def steps_of_ranks(side: str, parameters: int, elements: int, steps: int) -> Result:
    return on_ranks(WORLD_SIZE, steps_of, side, parameters, elements, steps)[0]


def steps_of(side: str, parameters: int, elements: int, steps: int) -> Result:
    """On a rank: seconds of the first step, which makes the state, and the median of the others."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from trainer.config import OptimizerConfig
    from trainer.optimizer import build_optimizer

    config = OptimizerConfig(state_dtype="bfloat16" if side.startswith(LOW_BIT) else "float32")
    model = nn.Module()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for number in range(parameters):
        if side.endswith("plain tensors"):
            value = torch.randn(elements // WORLD_SIZE)
        else:
            value = distribute_tensor(torch.randn(elements), mesh, [Shard(0)])
        parameter = nn.Parameter(value)
        parameter.grad = torch.zeros_like(parameter)
        model.register_parameter(f"p{number}", parameter)
    if side.startswith(OURS):
        optimizer = build_optimizer(model, config, compile=side.endswith("compiled"))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        optimizer.step()
        found.append(time.perf_counter() - began)
    return {"first_seconds": found[0], "seconds": median(found[1:])}


def as_markdown(result: Result) -> str:
    """The numbers as a Markdown table."""
    lines = [
        setting(result),
        f"{result['ranks']} gloo ranks; medians of {result['repeats']} runs of {result['steps']} steps",
    ]
    for name, sides in result["cases"].items():
        parameters, elements = CASES[name]
        lines += [
            "",
            f"| {parameters} parameters of {elements:,} elements | first step, ms | a step, ms | of the first side's |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {side} | {1e3 * found['first_seconds']:,.0f} | {1e3 * found['seconds']:,.1f} "
            f"| {found['seconds'] / sides[OURS]['seconds']:.2f} |"
            for side, found in sides.items()
        ]
    return "\n".join(lines)
