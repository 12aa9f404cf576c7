"""`benchmark.py optimizer`: what a step of the optimizer takes of the host, with which a GPU waits.

Parameters are so small that computing them is nothing: what is left is the same with large ones. Each side runs on new gloo ranks,
over DTensors as FSDP makes them; the last over plain tensors, which is the least that torch takes.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

from scripts.benchmarks.common import Result, machine, on_ranks, setting, take_turns, versions
from scripts.benchmarks.trainers import WORLD_SIZE

HELP = "what a step of the optimizer takes of the host"
ELEMENTS = 64
OURS = "trainer.optimizer"
SIDES = (OURS, f"{OURS}, state in bf16", "torch.optim.AdamW", "torch.optim.AdamW, plain tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", type=int, default=400, help="(%(default)s, of 36 layers)")
    parser.add_argument("--steps", type=int, default=20, help="behind the first (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    shape = {"parameters": arguments.parameters, "steps": arguments.steps}
    sides = {name: partial(steps_of_ranks, name, *shape.values()) for name in SIDES}
    return {
        "machine": machine(),
        "versions": versions("torch"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        **shape,
        "sides": take_turns(sides, arguments.repeats),
    }


def steps_of_ranks(side: str, parameters: int, steps: int) -> Result:
    return on_ranks(WORLD_SIZE, steps_of, side, parameters, steps)[0]


def steps_of(side: str, parameters: int, steps: int) -> Result:
    """On a rank: seconds of the first step, which makes the state, and the median of the others."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from trainer.config import OptimizerConfig
    from trainer.optimizer import build_optimizer

    config = OptimizerConfig(state_dtype="bfloat16" if side.endswith("bf16") else "float32")
    model = nn.Module()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for number in range(parameters):
        if side.endswith("plain tensors"):
            value = torch.randn(ELEMENTS // WORLD_SIZE)
        else:
            value = distribute_tensor(torch.randn(ELEMENTS), mesh, [Shard(0)])
        parameter = nn.Parameter(value)
        parameter.grad = torch.zeros_like(parameter)
        model.register_parameter(f"p{number}", parameter)
    if side.startswith(OURS):
        optimizer = build_optimizer(model, config)
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
    ours = result["sides"][OURS]
    lines = [
        setting(result),
        f"{result['parameters']} parameters of {ELEMENTS} elements on {result['ranks']} gloo ranks; medians of {result['repeats']} runs of "
        f"{result['steps']} steps",
        "",
        "| side | first step, ms | a step, ms | of the first side's |",
        "|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        lines.append(
            f"| {name} | {1e3 * side['first_seconds']:,.0f} | {1e3 * side['seconds']:.1f} "
            f"| {side['seconds'] / ours['seconds']:.2f} |"
        )
    return "\n".join(lines)
