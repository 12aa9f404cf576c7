"""Seconds of a training step in closed form, with constants fitted to published measurements.

Each part of a step is work divided by a rate: FLOPs by the GPU's matrix rate, bytes by its memory or its links. What a
data sheet cannot say (the share of the rate that kernels reach, how much of the traffic hides behind compute) is one of
the constants of constants.py.

Shapes: T tokens of a micro-batch, D model width, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scripts.planner.constants import Constants, fitted_constants
from scripts.planner.facts import GPUS, Gpu, Shape

# What a step can wait for instead of computing.
NETWORK, LINKS = "communication (network)", "communication (links)"


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
    accumulation: str = "whole"
    """whole: gradients are reduced in the last micro-batch, and parameters stay gathered from one backward to the next
    forward; sharded: in every micro-batch, and nothing stays."""
    trained_share: float = 1.0
    """Of the parameters; a frozen matrix needs no gradient of its own."""
    foundry: bool = False
    """llm-foundry's MPT: its own eager kernels and ALiBi."""
    tensor_parallel: int = 1
    context_parallel: int = 1
    offload: bool = False
    """Masters, gradients and state live in host memory, where the optimizer runs."""
    float32: bool = False
    """Parameters compute, and are gathered, in fp32 instead of bf16."""
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
    again = {"none": 0.0, "full": 1.0, "selective": 1 / work.checkpoint_every, "op": 0.0}[
        work.recompute
    ]

    # Forward 2 FLOPs per element and token, backward 2 for the input and 2 for what is trained.
    forward = 2.0 * tokens * layers * shape.active_matrices / split
    behind = 1 - work.front_share
    linear = forward * (1 + behind + work.trained_share)
    again *= behind
    head = 2.0 * (2 + work.trained_share) * tokens * work.labels_share * width * shape.vocabulary
    rate = matmul_rate(gpu, c, width=width, tokens=tokens, float32=work.float32)
    matmul = (linear + again * forward) / (
        rate * (c.float8_gain if work.float8 else 1)
    ) + head / rate

    # The flash kernel computes scores and products, and in backward five products for those two.
    attended = 4.0 * layers * shape.query_heads * shape.head_width * work.squared_lengths / 2
    attended /= split * work.context_parallel
    of_forward = 1 + again + 2.5 * behind / c.attention_backward_share
    attention = attended * of_forward / attention_rate(gpu, c, float32=work.float32)
    if work.foundry:
        attention *= c.alibi_slowdown

    # bf16 elements that norms, residuals and rotary embedding (14 D) and the MLP's activation (8 F) read and write.
    active = shape.mlp_width * max(1, shape.active_experts)
    passes = c.elementwise_passes * (14 * width + 8 * active / split)
    if work.foundry:
        passes *= c.foundry_factor
    elif not work.compiled:
        passes *= c.eager_factor
    recomputed = behind if work.recompute == "op" else again
    times = (1 + 2 * behind + recomputed) / 3
    memory_rate = gpu.memory_bytes_per_second * c.memory_share
    elementwise = _compute_bytes(work) * passes * tokens * layers * times / memory_rate
    logits = tokens * work.labels_share * shape.vocabulary
    loss = logits * c.loss_bytes_per_logit / memory_rate

    inside_layers = _layer_traffic(work, c)
    compute = matmul + attention + elementwise + loss + inside_layers
    gather, reduce, all_reduce = _traffic(work, c)
    exposed = total = work.grad_accum_steps * inside_layers
    waiting = 0.0
    for micro_batch in range(work.grad_accum_steps):
        whole, last = work.accumulation == "whole", micro_batch == work.grad_accum_steps - 1
        traffic = gather * (work.gathers - (whole and micro_batch > 0))
        traffic += (reduce if last or not whole else 0.0) + (all_reduce if last else 0.0)
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
    optimizer_rate = c.host_optimizer_rate if work.offload else memory_rate
    optimizer = trained / shards * c.optimizer_bytes / optimizer_rate
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
        bound_by = NETWORK if work.gpus > gpu.gpus_per_node else LINKS
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


def matmul_rate(
    gpu: Gpu, c: Constants, *, width: int, tokens: float, float32: bool = False
) -> float:
    """FLOPs per second of products of [tokens, width] with [width, about as much or more]."""
    rate = gpu.bf16_flops * c.gemm_share * (c.capped_power_share if gpu.capped_power else 1.0)
    rate *= c.float32_share if float32 else 1.0
    return rate * width / (width + c.gemm_half_width) * tokens / (tokens + c.gemm_half_tokens)


def attention_rate(gpu: Gpu, c: Constants, *, float32: bool = False) -> float:
    """Causal FLOPs per second of the flash kernel's forward."""
    rate = c.attention_flops * gpu.bf16_flops / GPUS["h100-sxm"].bf16_flops
    rate *= c.capped_power_share if gpu.capped_power else 1.0
    return rate * (c.float32_share if float32 else 1.0)


def bus_bandwidth(gpu: Gpu, c: Constants, *, across_nodes: bool) -> float:
    """Bytes per second that a collective moves through the slowest place of its ring."""
    inside = gpu.link_bytes_per_second * c.link_share
    if not across_nodes:
        return inside
    # A ring enters and leaves each node once, over the network ports of all its GPUs.
    return min(inside, gpu.gpus_per_node * gpu.network_bytes_per_second * c.network_share)


def latency(c: Constants, ranks: int) -> float:
    """Seconds of a collective of next to nothing."""
    return c.seconds_per_collective * math.log2(ranks) if ranks > 1 else 0.0


def _compute_bytes(work: Work) -> int:
    return 4 if work.float32 else 2


def _traffic(work: Work, c: Constants) -> tuple[float, float, float]:
    """Seconds of gathering the parameters once, of reducing the gradients to shards, and of adding those of replicas."""
    shape, gpu = work.shape, work.gpu
    parameters = shape.parameters / work.tensor_parallel
    ranks = work.gpus // work.tensor_parallel
    shards = work.shards or ranks
    replicas = ranks // shards
    apart = shards * work.tensor_parallel > gpu.gpus_per_node
    among = bus_bandwidth(gpu, c, across_nodes=apart)
    waiting = shape.layers * latency(c, shards)
    part, gathered = (shards - 1) / shards, _compute_bytes(work) * parameters
    gather, all_reduce = gathered * part / among + waiting, 0.0
    trained = parameters * work.trained_share
    if work.offload:  # shards come from the host before they are gathered, and gradients go there
        host = gpu.host_bytes_per_second
        gather += (gathered + 2 * trained) / shards / host
    reduce = work.reduce_bytes * trained * part / among + waiting
    if work.offload:
        reduce += 4 * trained / shards / gpu.host_bytes_per_second
    if replicas > 1:
        # An all-reduce of each shard over its replicas, which are on other nodes if there are several.
        across = bus_bandwidth(gpu, c, across_nodes=work.gpus > gpu.gpus_per_node)
        together = 1 if shards == 1 else min(shards, gpu.gpus_per_node)  # rings of one node at once
        share = work.reduce_bytes * trained / shards * 2 * (replicas - 1) / replicas
        all_reduce = share * together / across + shape.layers * latency(c, replicas)
    return gather, reduce, all_reduce


def _layer_traffic(work: Work, c: Constants) -> float:
    """Seconds of a micro-batch in which layers wait for tensor- or context-parallel ranks of the same node."""
    shape, seconds = work.shape, 0.0
    rate = work.gpu.link_bytes_per_second * c.link_share
    tokens = work.tokens / work.context_parallel
    if (ranks := work.tensor_parallel) > 1:
        # Behind attention and MLP, forward and backward: an all-reduce of [T, D].
        elements = 4 * 2 * tokens * shape.width
        seconds += shape.layers * (ranks - 1) / ranks * elements * _compute_bytes(work) / rate
    if (ranks := work.context_parallel) > 1:
        # An all-to-all of queries, keys and values, and of the result, forward and backward.
        heads = 2 * shape.query_heads + 2 * shape.key_value_heads
        elements = tokens * heads * shape.head_width / work.tensor_parallel
        seconds += shape.layers * (ranks - 1) / ranks * 2 * elements * _compute_bytes(work) / rate
    return seconds
