"""AdamW over sharded parameters, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.hardware import FUSED_OPTIMIZER


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices only, fused where the device has a fused kernel.

    State is kept in the type of the parameters: fp32 masters, fp32 state.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=FUSED_OPTIMIZER,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def learning_rate_at(step: int, *, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step 1, 2, ... `steps`.

    Linear warm-up from 0, then `cosine` (half a cosine, https://arxiv.org/abs/1608.03983), `linear`, `constant`, or
    `wsd` (constant, then linear decay over the last `decay_pct`, https://arxiv.org/abs/2404.06395) down to
    `min_ratio * peak`.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    # 0 just after warm-up, 1 at the last step
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.name == "constant":
        shape = 1.0
    elif schedule.name == "linear":
        shape = 1.0 - progress
    elif schedule.name == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1.0, steps * schedule.decay_pct / 100)
        shape = min(1.0, (steps - step) / decay_steps)
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * shape)


def clip_gradients(parameters: Iterable[Tensor], max_grad_norm: float) -> float:
    """Scale gradients so that their global norm is at most `max_grad_norm` (0: leave them), in place.

    Returns:
        The global norm before clipping, over all parameters and ranks; the same number on every rank. Reading it is
        the one point of a step where the host waits for the device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    value = float(norm)
    if max_grad_norm > 0 and value > max_grad_norm and math.isfinite(value):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return value
