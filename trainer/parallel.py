"""Sharding from outside: a plain single-device module becomes a sharded one, in a fixed order.

Activation checkpointing, then compile, then `fully_shard`: hooks of FSDP stay outside of what is recomputed or
compiled, and parameter names never change.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from torch.utils.checkpoint import checkpoint

from trainer.config import ParallelConfig
from trainer.errors import TrainError
from trainer.hardware import PREFETCH_LAYERS

# The protocol of torch.distributed.fsdp.wrap: called once with recurse=True (go into this module's children?), once
# with recurse=False (make it a group, given how many of its parameters its children have not taken?).
WrapPolicy = Callable[..., bool]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_mesh(config: ParallelConfig, *, world_size: int, device_type: str) -> DeviceMesh:
    """Mesh of the axes `dp_replicate` and `dp_shard`, whose product is the world size.

    Raises:
        TrainError: it is not.
    """
    replicate, shard = config.dp_replicate, config.dp_shard
    if shard == -1:
        shard = world_size // max(replicate, 1)
    if replicate < 1 or shard < 1 or replicate * shard != world_size:
        raise TrainError(
            f"parallel.dp_replicate {config.dp_replicate} x parallel.dp_shard {config.dp_shard} does not make "
            f"{world_size} ranks; --parallel.dp_shard -1 takes what dp_replicate leaves"
        )
    return init_device_mesh(
        device_type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )


def wrap_policy(
    config: ParallelConfig, *, layer_classes: Iterable[type[nn.Module]]
) -> WrapPolicy | CustomPolicy:
    """The policy the user named.

    Args:
        config: `wrap_policy` is `transformer`, `size` or `callable:package.function`.
        layer_classes: the model's own decoder-layer classes, for `transformer`.

    Raises:
        TrainError: unknown name, or a callable that cannot be imported.
    """
    name = config.wrap_policy
    if name == "transformer":
        # The embedding is a group of its own where it is not tied to the head: its rows are free again after use.
        return partial(
            transformer_auto_wrap_policy, transformer_layer_cls={*layer_classes, nn.Embedding}
        )
    if name == "size":
        return partial(size_based_auto_wrap_policy, min_num_params=config.min_wrap_params)
    if name.startswith("callable:"):
        return import_object(name.removeprefix("callable:"), flag="parallel.wrap_policy")
    raise TrainError(
        f"parallel.wrap_policy {name!r} is unknown; use transformer, size or callable:package.function"
    )


def import_object(path: str, *, flag: str) -> Any:
    """The object at the dotted path `package.module.name`.

    Raises:
        TrainError: naming the flag and what could not be found.
    """
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainError(
            f"{flag}: {path!r} cannot be imported ({error}); give package.module.function"
        ) from None


def select_groups(
    root: nn.Module,
    policy: WrapPolicy | CustomPolicy,
    *,
    root_parameters: Collection[nn.Parameter] = (),
) -> list[nn.Module]:
    """The modules below `root` that become groups of their own, children before parents, in a stable order.

    Args:
        root: the whole model; it is always a group and never in the result.
        policy: a callable of the torch.distributed.fsdp.wrap protocol, or a `CustomPolicy`.
        root_parameters: parameters that must be gathered whenever the root is, because the root's forward uses them
            directly (the head's weight, and through it a tied embedding). No module that holds one becomes a group.
    """
    kept_in_root = {id(parameter) for parameter in root_parameters}
    if isinstance(policy, CustomPolicy):
        chosen = policy._run_policy(root, set(), {})
        policy = partial(_is_chosen, chosen=chosen)
    groups: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        """Add the groups in and below `module`; returns how many parameters they hold."""
        numel = sum(p.numel() for p in module.parameters())
        if not policy(module=module, recurse=True, nonwrapped_numel=numel):
            return 0
        taken = sum(visit(child) for child in module.children())
        holds_root_parameter = any(id(p) in kept_in_root for p in module.parameters())
        if (
            module is root
            or holds_root_parameter
            or numel == 0
            or not policy(module=module, recurse=False, nonwrapped_numel=numel - taken)
        ):
            return taken
        groups.append(module)
        return numel

    visit(root)
    return groups


def _is_chosen(*, module: nn.Module, recurse: bool, nonwrapped_numel: int, chosen: Any) -> bool:
    return recurse or module in chosen


def parallelise(
    model: nn.Module,
    config: ParallelConfig,
    mesh: DeviceMesh,
    *,
    layer_classes: Collection[type[nn.Module]],
    root_parameters: Collection[nn.Parameter] = (),
    forward_methods: Iterable[str] = (),
) -> list[nn.Module]:
    """Apply activation checkpointing, compile and FSDP2 to `model`, in place.

    Args:
        model: fp32 parameters, real or on the meta device.
        config: policy, precision, resharding.
        mesh: from `build_mesh`.
        layer_classes: the decoder layers: what is recomputed and what is compiled.
        root_parameters: see `select_groups`.
        forward_methods: methods of `model`, beside `forward`, that run the model.

    Returns:
        The groups that were sharded, the root last.
    """
    layers = [module for module in model.modules() if isinstance(module, tuple(layer_classes))]
    if config.activation_checkpointing == "full":
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.compile:
        for layer in layers:
            layer.compile()
    groups = [
        *select_groups(
            model, wrap_policy(config, layer_classes=layer_classes), root_parameters=root_parameters
        ),
        model,
    ]
    param_dtype = DTYPES[config.param_dtype]
    precision = MixedPrecisionPolicy(
        param_dtype=None if param_dtype == torch.float32 else param_dtype,
        reduce_dtype=DTYPES[config.reduce_dtype],
    )
    # A mesh of (1, n) must not all-reduce over a single replica.
    mesh = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh
    for group in groups:
        fully_shard(
            group,
            mesh=mesh,
            mp_policy=precision,
            # Backward needs the root's parameters at once: freeing them after forward would only gather them twice.
            reshard_after_forward=config.reshard_after_forward and group is not model,
        )
    for method in forward_methods:
        register_fsdp_forward_method(model, method)
    if mesh.device_type == "cuda":
        sharded: list[FSDPModule] = [layer for layer in layers if isinstance(layer, FSDPModule)]
        for index, layer in enumerate(sharded):
            layer.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + PREFETCH_LAYERS])
            layer.set_modules_to_backward_prefetch(
                sharded[max(0, index - PREFETCH_LAYERS) : index][::-1]
            )
    return groups


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks only in the last micro-batch of a step; keep parameters gathered until then."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def precision_table(
    config: ParallelConfig, *, state_dtype: str, export_dtype: str
) -> dict[str, str]:
    """The precision contract of a run, for people and for run.json."""
    return {
        "masters": "float32",
        "optimizer state": state_dtype,
        "compute and all-gather": config.param_dtype,
        "reduction": config.reduce_dtype,
        "export": export_dtype,
    }
