"""How noisy the gradient is, and which layers it is in (docs/examples/gradient_noise.md).

torchrun --nproc_per_node=2 scripts/train.py --evaluation.every 50 \
    --evaluation.functions '[scripts.examples.gradient_noise.gradient_noise]'
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scripts.batching import open_batches, slices
from scripts.examples.own_loop import backward
from scripts.job import Job
from scripts.modelling import training_loss
from scripts.preparation import open_mixture
from trainer.errors import TrainError
from trainer.loop import to_device
from trainer.optimizer import gradient_norm

STEPS = 4
"""Global batches whose gradients are compared: the first of the run, the same at every evaluation."""


def gradient_noise(job: Job, model: Any, tokenizer: Any) -> dict[str, float]:
    """The simple noise scale of https://arxiv.org/abs/1812.06162 (appendix A.1), in packed rows, and gradients by layer.

    A batch much smaller than the noise scale is mostly noise; one much larger is wasted. Its estimate takes the gradients
    of STEPS global batches, each of B rows, and their mean:

        |G|^2 = (STEPS |mean|^2 - average |each|^2) / (STEPS - 1)
        trace = B (average |each|^2 - |mean|^2) STEPS / (STEPS - 1)
        noise scale = trace / |G|^2

    Returns:
        `gradient_noise_rows`, infinite where what is left of the gradient is not above 0; and the norm of the mean
        gradient in each decoder layer, and in everything else.
    """
    mixture = open_mixture(job.config.data, job.prepared)
    if len(mixture) < STEPS * job.global_batch_size:
        raise TrainError(
            f"gradient_noise compares {STEPS} steps of {job.global_batch_size} packed rows, and there are {len(mixture)}"
        )
    batches = slices(job, open_batches(job, mixture, tokenizer))
    loss_fn = training_loss(job.config, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: list[Tensor | None] = [None] * len(parameters)
    squares = []
    for _ in range(STEPS):
        micro_batches = [
            to_device(b, device=job.device) for b in islice(batches, job.grad_accum_steps)
        ]
        with torch.enable_grad():
            backward(model, micro_batches, loss_fn)
        squares.append(float(gradient_norm(parameters)) ** 2)
        for number, parameter in enumerate(parameters):
            if parameter.grad is not None:
                before = total[number]
                total[number] = parameter.grad if before is None else before + parameter.grad
            parameter.grad = None
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = None if gradient is None else gradient / STEPS
    mean, each = float(gradient_norm(parameters)) ** 2, sum(squares) / STEPS
    signal = (STEPS * mean - each) / (STEPS - 1)
    trace = job.global_batch_size * (each - mean) * STEPS / (STEPS - 1)
    noise = {"gradient_noise_rows": trace / signal if signal > 0 else float("inf")}
    norms = norms_by_layer(model)
    for parameter in parameters:
        parameter.grad = None
    return noise | norms


def norms_by_layer(model: Any) -> dict[str, float]:
    """`gradient_norm_layer_N` of every decoder layer, and `gradient_norm_rest`; every rank calls this."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if parameter.grad is not None:
            groups[f"layer_{layer[1]}" if layer else "rest"].append(parameter)
    return {f"gradient_norm_{name}": float(gradient_norm(group)) for name, group in groups.items()}
