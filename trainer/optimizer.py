"""AdamW and Muon over sharded parameters, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.distributed import sum_over_ranks
from trainer.errors import TrainError
from trainer.functions import CALLABLE, import_function
from trainer.hardware import FUSED_OPTIMIZER
from trainer.precision import BYTES
from trainer.rounding import keep_, places_in_whole, seed_of

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
BLOCK = 2**24
"""Elements that `GroupedOptimizer` updates at once: what it computes in fp32 takes memory only for these."""
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    layer_classes: Collection[type[nn.Module]] = (),
    embedding: Tensor | None = None,
    head: Tensor | None = None,
    compile: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of what `model` trains: decoupled weight decay on matrices only, one rate ratio per group.

    Args:
        model: sharded or plain; parameters with `requires_grad` are trained.
        config: the user's choices.
        layer_classes: the decoder layers, whose matrices Muon updates but embeddings; AdamW updates everything else.
        embedding: the parameter whose rate is multiplied by `embedding_lr_ratio`.
        head: likewise by `head_lr_ratio`; where it is the embedding, the embedding's ratio counts.
        compile: compile the update by AdamW where parameters or state are bf16.

    A `config.name` of `callable:package.function` names a function of (model, groups, config): the groups are for
    torch.optim, with weight decay in those of matrices.

    Returns:
        torch's AdamW on shards, fused where the device has a fused kernel; a `GroupedOptimizer` for Muon and where parameters
        or state are bf16. Hyperparameters stay as configured when a saved state is loaded.

    Raises:
        TrainError: Muon was asked for and has no matrix to update; or an own function cannot be used, returns no
            optimizer, or leaves out a parameter that is trained.
    """
    hidden = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, tuple(layer_classes))
        for module in layer.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
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
    bf16_masters = any(p.dtype == torch.bfloat16 for trained in groups.values() for p in trained)
    if config.name.startswith(CALLABLE):
        optimizer = _own_optimizer(model, described, config)
    elif config.name == "muon" or config.state_dtype != "float32" or bf16_masters:
        optimizer = GroupedOptimizer(described, config, compile=compile)
    else:
        optimizer = ShardedAdamW(
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


def _own_optimizer(
    model: nn.Module, groups: list[dict[str, Any]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    flag, path = "--optimizer.name", config.name.removeprefix(CALLABLE)
    optimizer = import_function(path, flag=flag, takes="model, groups, config")(
        model, groups, config
    )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainError(
            f"{flag} {path} returned a {type(optimizer).__name__}; it must return a torch.optim.Optimizer"
        )
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in updated]
    if missing:
        raise TrainError(
            f"{flag} {path} leaves out {len(missing)} parameters that are trained, the first is {missing[0]}; "
            "give the optimizer all groups"
        )
    return optimizer


class ShardedAdamW(torch.optim.AdamW):
    """torch's AdamW, whose state are DTensors as the parameters are, but which computes on this rank's parts of them.

    An update of an element needs no other element, so nothing has to be worked out or sent; torch works it out for every
    DTensor in every step, with the GPU waiting, and for seconds in the first (`scripts/benchmark.py optimizer`).
    """

    def _init_group(
        self, group: dict[str, Any], parameters: list[Tensor], *lists: list[Tensor]
    ) -> bool:
        has_complex = super()._init_group(group, parameters, *lists)
        for tensors in (parameters, *lists):
            tensors[:] = map(_local, tensors)
        return has_complex


class GroupedOptimizer(torch.optim.Optimizer):
    """Muon in groups with `muon` set, AdamW in the others; every update is computed in fp32.

    Parameters are fp32 or bf16, state is in `config.state_dtype`. What is kept in bf16 is
    rounded stochastically unless `config.rounding` is `nearest`, where a weight or an average stops moving as soon as a
    step changes it by less than half of its last bit. The noise is a function of the step, the tensor and the element's
    place in the whole tensor: a continued run repeats it, replicas stay equal, and the number of ranks does not matter.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, *, compile: bool = False
    ) -> None:
        # With the keys of torch's AdamW, so that either continues what the other has saved.
        blank = torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=config.learning_rate)
        super().__init__(groups, blank.defaults)
        self._config = config
        self._dtype = STATE_DTYPES[config.state_dtype]
        masters = {p.dtype for group in self.param_groups for p in group["params"]}
        low_bit = torch.bfloat16 in masters | {self._dtype}
        self._noisy = low_bit and config.rounding == "stochastic"
        # What differs from call to call are tensors and their one length: one graph does for all.
        compiled = compile and low_bit
        self._update: Callable[..., Any] = (
            torch.compile(adamw_, dynamic=True) if compiled else adamw_
        )
        self._number: Callable[..., Any] = torch.tensor if compiled else _as_it_is
        self.unmoved = torch.zeros(2, dtype=torch.int64) if torch.bfloat16 in masters else None
        """Of this rank's bf16 masters since it was set to zero: elements that stayed as they were though their step
        had an update for them, and elements with an update; [2]. None where all masters are fp32."""

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
        state = self._state(parameter, *ADAMW_STATE)
        step = int(state["step"])
        beta1, beta2 = self._config.betas
        factors = 1 - rate * weight_decay, math.sqrt(1 - beta2**step), rate / (1 - beta1**step)
        numbers = [self._number(factor) for factor in factors]
        seeds = [
            self._number(seed_of(step, place, tensor), dtype=torch.int32) for tensor in range(3)
        ]
        own = [
            _local(x) for x in (parameter, *(state[name] for name in ADAMW_STATE), parameter.grad)
        ]
        flat = [x.contiguous().view(-1) for x in own]
        for begin in range(0, len(flat[0]), BLOCK):
            end = min(begin + BLOCK, len(flat[0]))
            # Without its base, which a graph would be compiled for.
            *kept, grad = (x[begin:end].data for x in flat)
            places = places_in_whole(parameter, begin, end) if self._noisy else None
            self._count(
                self._update(
                    *kept, grad, places, numbers, seeds, self._config.betas, self._config.eps
                )
            )
        for whole, part in zip(own[:-1], flat[:-1], strict=True):
            if part.data_ptr() != whole.data_ptr():  # it lay in another order
                whole.copy_(part.view_as(whole))

    def _muon(self, parameter: Tensor, rate: float, weight_decay: float, place: int) -> None:
        """https://kellerjordan.github.io/posts/muon, with Nesterov momentum.

        The momentum is averaged shard by shard. Orthogonalising needs the whole matrix: it is gathered once, every
        rank computes the same result and takes its own shard of it.
        """
        momentum, adjustment = self._config.muon_momentum, self._config.muon_lr_adjustment
        weight, grad = _local(parameter).float(), _local(parameter.grad).float()
        state = self._state(parameter, "momentum_buffer")
        average = _local(state["momentum_buffer"]).float().lerp_(grad, 1 - momentum)
        direction = grad.lerp(average, momentum)
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
        step = int(state["step"])
        places = None
        if self._noisy:
            places = places_in_whole(parameter, 0, weight.numel()).view_as(weight)
        seeds = [seed_of(step, place, tensor) for tensor in range(2)]
        self._count(keep_(_local(parameter), weight, places, seeds[0], count=True))
        keep_(_local(state["momentum_buffer"]), average, places, seeds[1])

    def _count(self, counts: Tensor | None) -> None:
        if counts is not None:
            assert self.unmoved is not None
            self.unmoved = self.unmoved.to(counts.device) + counts

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


def _as_it_is(number: float, **_: Any) -> float:
    return number


def _orthogonal_step(matrix: Tensor, adjustment: str) -> Tensor:
    """The step of torch's Muon along a whole matrix: rate 1, no momentum, no decay."""
    target = nn.Parameter(torch.zeros_like(matrix))
    target.grad = matrix
    torch.optim.Muon(
        [target], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn=adjustment
    ).step()
    return target.detach()


def state_bytes(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> float:
    """Bytes of the running averages of this rank once every parameter has been updated; an own optimizer is taken to keep two."""
    return sum(
        _local(parameter).numel() * BYTES[config.state_dtype] * (1 if group.get("muon") else 2)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def adamw_(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    places: Tensor | None,
    numbers: Sequence[float | Tensor],
    seeds: Sequence[int | Tensor],
    betas: tuple[float, float],
    eps: float,
) -> Tensor | None:
    """A step of AdamW (https://arxiv.org/abs/1711.05101), in place; all [n], fp32 or bf16, and computed in fp32.

    Args:
        weight: to be updated, as are `mean` and `square`, the running averages of the gradient and its square.
        mean: see `weight`.
        square: see `weight`.
        grad: the gradient.
        places: as for `keep_`.
        numbers: factor of the decay, root of the correction of `square`, rate over the correction of `mean`.
        seeds: as for `keep_`, of each that is updated.
        betas: decay rates of the averages.
        eps: added to the denominator.

    Returns:
        What `keep_` counts of the weight.
    """
    decay, correction, rate = numbers
    kept = weight, mean, square
    weight, mean, square, grad = (x.float() for x in (*kept, grad))
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = square.sqrt().div_(correction).add_(eps)
    weight.mul_(decay).sub_(mean.div(denominator).mul_(rate))
    counts = keep_(kept[0], weight, places, seeds[0], count=True)
    keep_(kept[1], mean, places, seeds[1])
    keep_(kept[2], square, places, seeds[2])
    return counts


def rounding_metrics(optimizer: torch.optim.Optimizer) -> dict[str, float | None]:
    """`update_rounded_to_zero_pct` of all ranks since the last call; {} where no master is bf16.

    Every rank calls this; it waits for the device.
    """
    if not isinstance(optimizer, GroupedOptimizer) or optimizer.unmoved is None:
        return {}
    unmoved, moving = sum_over_ranks(optimizer.unmoved.tolist())
    optimizer.unmoved.zero_()
    return {"update_rounded_to_zero_pct": 100 * unmoved / moving if moving else None}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group this rate times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def learning_rates(schedule: ScheduleConfig, *, steps: int, peak: float) -> Callable[[int], float]:
    """The learning rate as a function of the step: `learning_rate_at`, or the user's own with the same arguments.

    Raises:
        TrainError: the own function cannot be used, or gives no rate for the first or the last step.
    """
    if not schedule.name.startswith(CALLABLE):
        return partial(learning_rate_at, steps=steps, peak=peak, schedule=schedule)
    flag, path = "--schedule.name", schedule.name.removeprefix(CALLABLE)
    own = import_function(path, flag=flag, takes="step, *, steps, peak, schedule")
    rates = partial(own, steps=steps, peak=peak, schedule=schedule)
    for step in (1, steps):
        rate = rates(step)
        if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
            raise TrainError(
                f"{flag} {path} gives {rate!r} in step {step}; a learning rate is a number, 0 or above"
            )
    return rates


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
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = float(gradient_norm(parameters))
    if max_grad_norm > 0 and norm > max_grad_norm and math.isfinite(norm):
        torch._foreach_mul_([_local(p.grad) for p in parameters], max_grad_norm / norm)
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global norm of the gradients that `parameters` have: a scalar in fp32, the same on every rank.

    Every rank squares the shards it holds, and one all-reduce for each set of axes that shard adds up what its ranks
    hold: a norm of each DTensor would be a dispatch, and some a collective, for each of hundreds of parameters.
    """
    shards: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        held_by = None
        if isinstance(parameter, DTensor):
            placements = enumerate(parameter.placements)
            split = tuple(axis for axis, placement in placements if not placement.is_replicate())
            held_by = (parameter.device_mesh, split)
        shards.setdefault(held_by, []).append(_local(parameter.grad))
    squares = []
    for held_by, together in shards.items():
        # In fp32, also where gradients are bf16.
        norms = torch._foreach_norm(together, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        mesh, split = held_by or (None, ())
        for axis in split:
            assert mesh is not None
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
