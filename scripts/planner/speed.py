"""Seconds of a training step in closed form, with constants fitted to published measurements.

Each part of a step is work divided by a rate: FLOPs by the GPU's matrix rate, bytes by its memory or its links. What a
data sheet cannot say (the share of the rate that kernels reach, how much of the traffic hides behind compute) is one of
`Constants`; constants.json holds their values and where each comes from.

Shapes: T tokens of a micro-batch, D model width, L layers, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from scripts.planner.facts import Gpu, Shape

_CONSTANTS = Path(__file__).with_name("constants.json")
# Believed, not measured: fused AdamW on a GPU's share of the host's cores, bytes per second.
HOST_OPTIMIZER_RATE = 40e9


@dataclass(frozen=True)
class Constants:
    """All are positive; shares are of what the data sheet says."""

    gemm_share: float
    """Share of the bf16 rate that very large matrix products reach."""
    gemm_half_width: float
    """Model width at which half of that share is reached."""
    gemm_half_tokens: float
    """Tokens of a micro-batch at which half of it is reached."""
    attention_flops: float
    """Forward FLOPs per second of the flash kernel on an H100 SXM, in causal FLOPs."""
    attention_backward_share: float
    """Of that rate in backward."""
    alibi_slowdown: float
    """Of attention with a bias added to its scores."""
    float8_gain: float
    capped_power_share: float
    """Of the compute rates of a GPU with a lower power limit."""
    elementwise_passes: float
    """Factor on the counted elementwise traffic of compiled layers."""
    eager_factor: float
    """More traffic of layers that are not compiled."""
    foundry_factor: float
    """Likewise of llm-foundry's MPT, on which most of the measurements were made."""
    loss_bytes_per_logit: float
    link_share: float
    network_share: float
    exposed_share: float
    """Of the shorter one of compute and traffic that does not hide behind the longer one."""
    seconds_per_collective: float
    straggler_share: float
    """Slowdown with every doubling of the nodes: a step waits for the slowest rank."""
    optimizer_bytes: float
    """Per sharded parameter and step, with clipping."""


@dataclass(frozen=True)
class Work:
    """What one rank does in a step; everything the time depends on."""

    shape: Shape
    gpu: Gpu
    gpus: int
    tokens: int
    """Of a micro-batch on one data-parallel rank."""
    squared_lengths: float
    """Of the documents in them, summed."""
    grad_accum_steps: int = 1
    labels_share: float = 1.0
    """Of the tokens that have a label: the head computes no others."""
    recompute: str = "none"
    """none, full, selective or op: activation checkpointing."""
    checkpoint_every: int = 2
    compiled: bool = False
    float8: bool = False
    shards: int | None = None
    """Ranks that share one copy; None: all, 1: none, the GPUs are replicas."""
    gathers: int = 2
    """Of each layer's parameters per micro-batch: 1 where they stay gathered until backward."""
    reduce_bytes: int = 4
    reduces_every_micro_batch: bool = False
    trained_share: float = 1.0
    """Of the parameters; a frozen matrix needs no gradient of its own."""
    foundry: bool = False
    """llm-foundry's MPT: its own eager kernels and ALiBi."""
    tensor_parallel: int = 1
    context_parallel: int = 1
    offload: bool = False
    """Masters, gradients and state live in host memory, where the optimizer runs."""
    front_share: float = 0.0
    """Of the layers, frozen ones in front of all that is trained: they have no backward."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; the parts that compute and the exposed traffic add up to `seconds`."""

    matmul: float
    attention: float
    elementwise: float
    loss: float
    communication_exposed: float
    communication: float
    optimizer: float
    waiting: float
    seconds: float
    tokens_per_second_per_gpu: float
    model_flops: float
    """Of the step on one rank, without recomputation."""
    hardware_flops: float
    bound_by: str

    def mfu_pct(self, gpu: Gpu) -> float:
        return 100 * self.model_flops / self.seconds / gpu.bf16_flops

    def hfu_pct(self, gpu: Gpu) -> float:
        return 100 * self.hardware_flops / self.seconds / gpu.bf16_flops


def predict(work: Work, constants: Constants | None = None) -> StepTime:
    """The time of a step: for each micro-batch the longer of compute and traffic and a share of the shorter one."""
    c = constants or fitted_constants()
    shape, gpu = work.shape, work.gpu
    layers, width = shape.layers, shape.width
    # Context parallelism splits the tokens, and of attention the heads; tensor parallelism splits the layers' matrices.
    tokens = work.tokens / work.context_parallel
    split = work.tensor_parallel
    power = c.capped_power_share if gpu.capped_power else 1.0
    again = {"none": 0.0, "full": 1.0, "selective": 1 / work.checkpoint_every, "op": 0.0}[
        work.recompute
    ]

    # Forward 2 FLOPs per element and token, backward 2 for the input and 2 for what is trained.
    forward = 2.0 * tokens * layers * shape.active_matrices / split
    behind = 1 - work.front_share
    linear = forward * (1 + behind + work.trained_share)
    again *= behind
    head = 2.0 * (2 + work.trained_share) * tokens * work.labels_share * width * shape.vocabulary
    reached = (
        c.gemm_share * width / (width + c.gemm_half_width) * tokens / (tokens + c.gemm_half_tokens)
    )
    rate = gpu.bf16_flops * power * reached
    matmul = (linear + again * forward) / (
        rate * (c.float8_gain if work.float8 else 1)
    ) + head / rate

    # The flash kernel computes scores and products, and in backward five products for those two.
    attended = 4.0 * layers * shape.query_heads * shape.head_width * work.squared_lengths / 2
    attended /= split * work.context_parallel
    attention_rate = c.attention_flops * gpu.bf16_flops / 989e12 * power
    if work.foundry:
        attention_rate /= c.alibi_slowdown
    attention = attended * (1 + again + 2.5 * behind / c.attention_backward_share) / attention_rate

    # bf16 elements that norms, residuals and rotary embedding (14 D) and the MLP's activation (8 F) read and write.
    active = shape.mlp_width * max(1, shape.active_experts)
    passes = c.elementwise_passes * (14 * width + 8 * active / split)
    if work.foundry:
        passes *= c.foundry_factor
    elif not work.compiled:
        passes *= c.eager_factor
    recomputed = behind if work.recompute == "op" else again
    times = (1 + 2 * behind + recomputed) / 3
    elementwise = 2 * passes * tokens * layers * times / gpu.memory_bytes_per_second
    logits = tokens * work.labels_share * shape.vocabulary
    loss = logits * c.loss_bytes_per_logit / gpu.memory_bytes_per_second

    inside_layers = _layer_traffic(work, c)
    compute = matmul + attention + elementwise + loss + inside_layers
    gathering, reducing = _traffic(work, c)
    exposed = total = work.grad_accum_steps * inside_layers
    waiting = 0.0
    for micro_batch in range(work.grad_accum_steps):
        last = micro_batch == work.grad_accum_steps - 1
        traffic = gathering + (reducing if last or work.reduces_every_micro_batch else 0.0)
        busy = max(compute, traffic) + c.exposed_share * min(compute, traffic)
        exposed += busy - compute
        total += traffic
    nodes = work.gpus / gpu.gpus_per_node
    if nodes > 1:
        waiting = (
            (work.grad_accum_steps * (compute - inside_layers) + exposed)
            * c.straggler_share
            * math.log2(nodes)
        )
    shards = work.shards or work.gpus // split
    trained = shape.parameters * work.trained_share / split
    memory_rate = HOST_OPTIMIZER_RATE if work.offload else gpu.memory_bytes_per_second
    optimizer = trained / shards * c.optimizer_bytes / memory_rate
    n = work.grad_accum_steps
    seconds = n * (compute - inside_layers) + exposed + waiting + optimizer
    parts = {
        "matmul": n * matmul,
        "attention": n * attention,
        "elementwise": n * elementwise,
        "loss": n * loss,
        "communication_exposed": exposed,
        "optimizer": optimizer,
        "waiting": waiting,
    }
    if total > n * compute:
        across = work.gpus > gpu.gpus_per_node
        bound_by = "network" if across else "links"
    else:
        bound_by = max(("matmul", "attention", "elementwise", "loss"), key=lambda part: parts[part])
    model_flops = n * (linear + head + (1 + 2 * behind) * attended)
    return StepTime(
        **parts,
        communication=total,
        seconds=seconds,
        tokens_per_second_per_gpu=n * tokens / split / seconds,
        model_flops=model_flops,
        hardware_flops=model_flops + n * again * (forward + attended),
        bound_by=bound_by,
    )


def _traffic(work: Work, c: Constants) -> tuple[float, float]:
    """Seconds of gathering the parameters and of reducing the gradients, for one micro-batch."""
    shape, gpu = work.shape, work.gpu
    parameters = shape.parameters / work.tensor_parallel
    ranks = work.gpus // work.tensor_parallel
    shards = work.shards or ranks
    replicas = ranks // shards

    def bandwidth(node_apart: bool) -> float:
        inside = gpu.link_bytes_per_second * c.link_share
        if not node_apart:
            return inside
        # A ring enters and leaves each node once, over the network ports of all its GPUs.
        return min(inside, gpu.gpus_per_node * gpu.network_bytes_per_second * c.network_share)

    def latency(ranks: int) -> float:
        return shape.layers * c.seconds_per_collective * math.log2(ranks) if ranks > 1 else 0.0

    among = bandwidth(shards * work.tensor_parallel > gpu.gpus_per_node)
    part = (shards - 1) / shards
    gather = work.gathers * (2 * parameters * part / among + latency(shards))
    trained = parameters * work.trained_share
    if work.offload:  # shards come from the host before they are gathered, and gradients go there
        host = gpu.host_bytes_per_second
        gather += work.gathers * (2 * parameters + 2 * trained) / shards / host
    reduce = work.reduce_bytes * trained * part / among + latency(shards)
    if work.offload:
        reduce += 4 * trained / shards / gpu.host_bytes_per_second
    if replicas > 1:
        # An all-reduce of each shard over its replicas, which are on other nodes if there are several.
        across = bandwidth(work.gpus > gpu.gpus_per_node)
        together = 1 if shards == 1 else min(shards, gpu.gpus_per_node)  # rings of one node at once
        share = work.reduce_bytes * trained / shards * 2 * (replicas - 1) / replicas
        reduce += share * together / across + latency(replicas)
    return gather, reduce


def _layer_traffic(work: Work, c: Constants) -> float:
    """Seconds of a micro-batch in which layers wait for tensor- or context-parallel ranks of the same node."""
    shape, seconds = work.shape, 0.0
    rate = work.gpu.link_bytes_per_second * c.link_share
    tokens = work.tokens / work.context_parallel
    if (ranks := work.tensor_parallel) > 1:
        # Behind attention and MLP, forward and backward: an all-reduce of [T, D].
        seconds += shape.layers * 4 * 2 * (ranks - 1) / ranks * tokens * shape.width * 2 / rate
    if (ranks := work.context_parallel) > 1:
        # An all-to-all of queries, keys and values, and of the result, forward and backward.
        heads = 2 * shape.query_heads + 2 * shape.key_value_heads
        elements = tokens * heads * shape.head_width / work.tensor_parallel
        seconds += shape.layers * 2 * (ranks - 1) / ranks * elements * 2 / rate
    return seconds


def fitted_constants() -> Constants:
    """The values in constants.json."""
    held = json.loads(_CONSTANTS.read_text(encoding="utf-8"))["constants"]
    return Constants(**{name: entry["value"] for name, entry in held.items()})


def prior() -> tuple[Constants, dict[str, float]]:
    """What is believed of each constant before any measurement: its value, and the spread of its logarithm."""
    held = json.loads(_CONSTANTS.read_text(encoding="utf-8"))["constants"]
    values = Constants(**{name: entry["prior"] for name, entry in held.items()})
    return values, {name: entry["spread"] for name, entry in held.items()}


def fit(works: Sequence[Work], measured: Sequence[float], *, error: float = 0.03) -> Constants:
    """The constants that agree best with measured tokens per second and GPU, and with what was believed before.

    Least squares of logarithms, by Levenberg and Marquardt (https://doi.org/10.1137/0111030): a measurement off by
    `error` weighs as much as a constant off by its spread. What no measurement speaks about keeps its prior.
    """
    start, spreads = prior()
    free = [field.name for field in fields(Constants) if spreads[field.name] > 0]
    scale = np.array([spreads[name] for name in free])
    target = np.log(np.array(measured))

    def constants(x: np.ndarray) -> Constants:
        return replace(
            start,
            **{
                name: getattr(start, name) * math.exp(value)
                for name, value in zip(free, x * scale, strict=True)
            },
        )

    def residuals(x: np.ndarray) -> np.ndarray:
        now = constants(x)
        said = np.log([predict(work, now).tokens_per_second_per_gpu for work in works])
        return np.concatenate([(said - target) / error, x])

    x, damping = np.zeros(len(free)), 1.0
    best = residuals(x)
    for _ in range(100):
        slope = np.stack([(residuals(x + 1e-4 * axis) - best) / 1e-4 for axis in np.eye(len(x))], 1)
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(x)), -slope.T @ best)
        there = residuals(x + step)
        if there @ there < best @ best:
            converged = best @ best - there @ there < 1e-7 * (best @ best)
            x, best, damping = x + step, there, damping / 4
            if converged:
                break
        elif (damping := damping * 4) > 1e9:
            break
    return constants(x)


def relative_deviation(work: Work, fitted_to: Sequence[Work], *, error: float = 0.03) -> float:
    """Standard deviation of the logarithm of the predicted speed that the constants' own uncertainty makes.

    The linearised posterior of `fit`: a constant that no measurement speaks about is as uncertain as its prior.
    """
    now, (_, spreads) = fitted_constants(), prior()
    free = [name for name, spread in spreads.items() if spread > 0]

    def speeds(constants: Constants, works: Sequence[Work]) -> np.ndarray:
        return np.log([predict(work, constants).tokens_per_second_per_gpu for work in works])

    works, tiny = [*fitted_to, work], 1e-4
    at = speeds(now, works)
    moved = [
        speeds(replace(now, **{name: getattr(now, name) * math.exp(tiny * spreads[name])}), works)
        for name in free
    ]
    slopes = (np.stack(moved, 1) - at[:, None]) / tiny
    measured, asked = slopes[:-1] / error, slopes[-1]
    precision = measured.T @ measured + np.eye(len(free))
    return math.sqrt(asked @ np.linalg.solve(precision, asked))


def keep_constants(constants: Constants, *, origin: str) -> None:
    """Write fitted values to constants.json, beside what was believed of them."""
    content = json.loads(_CONSTANTS.read_text(encoding="utf-8"))
    content["fitted"] = origin
    for name, value in asdict(constants).items():
        content["constants"][name]["value"] = float(f"{value:.5g}")
    _CONSTANTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
