"""AdamW and Muon over sharded parameters, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.errors import TrainError
from trainer.hardware import FUSED_OPTIMIZER

STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    layer_classes: Collection[type[nn.Module]] = (),
    embedding: Tensor | None = None,
    head: Tensor | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of what `model` trains: decoupled weight decay on matrices only, one rate ratio per group.

    Args:
        model: sharded or plain; parameters with `requires_grad` are trained.
        config: the user's choices.
        layer_classes: the decoder layers, whose matrices Muon updates; AdamW updates everything else.
        embedding: the parameter whose rate is multiplied by `embedding_lr_ratio`.
        head: likewise by `head_lr_ratio`; where it is the embedding, the embedding's ratio counts.

    Returns:
        torch's AdamW, fused where the device has a fused kernel, or a `GroupedOptimizer`. Hyperparameters stay as
        configured when a saved state is loaded.

    Raises:
        TrainError: Muon was asked for and has no matrix to update.
    """
    hidden = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, tuple(layer_classes))
        for parameter in layer.parameters()
        if parameter.ndim == 2 and config.name == "muon"
    }
    ratios = {"embedding": config.embedding_lr_ratio, "head": config.head_lr_ratio, "other": 1.0}
    # Apart by role even at equal ratios: a run may be continued with other ones.
    roles = {id(head): "head", id(embedding): "embedding"}  # tied: one parameter, the embedding
    groups: dict[tuple[bool, bool, str], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = roles.get(id(parameter), "other")
            decays = parameter.ndim >= 2  # norms and biases have one dimension
            groups.setdefault((id(parameter) in hidden, decays, role), []).append(parameter)
    if config.name == "muon" and not any(muon for muon, *_ in groups):
        raise TrainError(
            "optimizer.name muon updates matrices of decoder layers, and none is trained; use adamw"
        )
    described: list[dict[str, Any]] = [
        {
            "params": parameters,
            "muon": muon,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_ratio": ratios[role],
        }
        for (muon, decays, role), parameters in groups.items()
    ]
    if config.name == "muon" or config.state_dtype != "float32":
        optimizer = GroupedOptimizer(described, config)
    else:
        optimizer = torch.optim.AdamW(
            described,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=FUSED_OPTIMIZER,
        )
    configured = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]

    def keep_configured(loaded: torch.optim.Optimizer) -> None:
        for group, values in zip(loaded.param_groups, configured, strict=True):
            group.update(values)

    optimizer.register_load_state_dict_post_hook(keep_configured)
    return optimizer


class GroupedOptimizer(torch.optim.Optimizer):
    """Muon in groups with `muon` set, AdamW in the others; state in `config.state_dtype`, update in fp32.

    What is kept in bf16 is rounded stochastically: to nearest, a running average would stop moving as soon as a step
    changes it by less than its last bit. The noise depends on the step and the parameter's place only, so a continued
    run repeats it and replicas of a shard stay equal.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})
        self._config = config
        self._dtype = STATE_DTYPES[config.state_dtype]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes gradients before the step"
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    update = self._muon if group["muon"] else self._adamw
                    update(parameter, group["lr"], group["weight_decay"], place)

    def _adamw(self, parameter: Tensor, rate: float, weight_decay: float, place: int) -> None:
        """https://arxiv.org/abs/1711.05101"""
        beta1, beta2 = self._config.betas
        weight, grad = _local(parameter), _local(parameter.grad)
        state = self._state(parameter, "exp_avg", "exp_avg_sq")
        mean, square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        exact_mean = mean.float().lerp_(grad, 1 - beta1)
        exact_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = int(state["step"])
        denominator = exact_square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(self._config.eps)
        weight.mul_(1 - rate * weight_decay)
        weight.addcdiv_(exact_mean, denominator, value=-rate / (1 - beta1**step))
        _keep([(mean, exact_mean), (square, exact_square)], step, place)

    def _muon(self, parameter: Tensor, rate: float, weight_decay: float, place: int) -> None:
        """https://kellerjordan.github.io/posts/muon, with Nesterov momentum.

        The momentum is averaged shard by shard. Orthogonalising needs the whole matrix: it is gathered once, every
        rank computes the same result and takes its own shard of it.
        """
        momentum, adjustment = self._config.muon_momentum, self._config.muon_lr_adjustment
        weight, grad = _local(parameter), _local(parameter.grad)
        state = self._state(parameter, "momentum_buffer")
        kept = _local(state["momentum_buffer"])
        exact = kept.float().lerp_(grad, 1 - momentum)
        direction = grad.lerp(exact, momentum)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = DTensor.from_local(
                direction,
                mesh,
                placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()
            unit_step = distribute_tensor(
                _orthogonal_step(whole, adjustment), mesh, placements, src_data_rank=None
            ).to_local()
        else:
            unit_step = _orthogonal_step(direction, adjustment)
        weight.mul_(1 - rate * weight_decay).add_(unit_step, alpha=rate)
        _keep([(kept, exact)], int(state["step"]), place)

    def _state(self, parameter: Tensor, *names: str) -> dict[str, Any]:
        """The parameter's state in the step that begins, its count on the host; zeros at first."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in names:
                state[name] = torch.zeros_like(parameter, dtype=self._dtype)
        state["step"] += 1
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast state to the type of the parameters: here it keeps its own."""
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        super().load_state_dict({**state_dict, "state": {}})
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(saved, own, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device, self._dtype)
                    for key, value in state_dict["state"][name].items()
                }


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonal_step(matrix: Tensor, adjustment: str) -> Tensor:
    """The step of torch's Muon along a whole matrix: rate 1, no momentum, no decay."""
    target = nn.Parameter(torch.zeros_like(matrix))
    target.grad = matrix
    torch.optim.Muon(
        [target], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn=adjustment
    ).step()
    return target.detach()


def _keep(states: Iterable[tuple[Tensor, Tensor]], step: int, place: int) -> None:
    """Store exact fp32 values in the state. fp32 state was updated in place: `float()` did not copy it."""
    for number, (kept, exact) in enumerate(states):
        if kept.dtype == torch.bfloat16:
            seed = (step << 20) + 2 * place + number
            generator = torch.Generator(kept.device).manual_seed(seed)
            kept.copy_(stochastic_bfloat16(exact, generator))


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round finite fp32 values to one of their two bf16 neighbours, so that the expectation is the value itself."""
    noise = torch.randint(
        1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    # A bf16 is the upper half of an fp32: a carry out of the lower half is as likely as that half is large.
    return (values.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group this rate times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


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
    # Tensors of different meshes cannot meet in one operation.
    meshes: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            meshes.setdefault(mesh, []).append(parameter)
    norms = []
    for together in meshes.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in together if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.nn.utils.get_total_norm(norms) if len(norms) > 1 else norms[0]
    value = float(norm)
    if max_grad_norm > 0 and value > max_grad_norm and math.isfinite(value):
        for together in meshes.values():
            torch.nn.utils.clip_grads_with_norm_(together, max_grad_norm, norm)
    return value
