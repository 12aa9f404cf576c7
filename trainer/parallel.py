"""Sharding from outside: a plain single-device module becomes a sharded one, in a fixed order.

Tensor parallelism, float8, then compile, then activation checkpointing, then `fully_shard`: what is compiled is recomputed
as a whole, hooks of FSDP stay outside of both, and parameter names never change.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trainer.config import ParallelConfig
from trainer.errors import TrainError
from trainer.functions import CALLABLE, import_function, import_object
from trainer.gloo import send_among_peers
from trainer.precision import compute_in_float8, definite

# The protocol of torch.distributed.fsdp.wrap: called once with recurse=True (go into this module's children?), once
# with recurse=False (make it a group, given how many of its parameters its children have not taken?).
WrapPolicy = Callable[..., bool]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class DataRank:
    """Which part of the data a rank works on. Ranks that differ along `cp` and `tp` only work on the same rows."""

    rank: int
    size: int
    part: int
    """Along `cp`: which of `parts` slices of every row; ranks along `tp` work on the same."""
    parts: int


def data_rank(config: ParallelConfig, *, rank: int, world_size: int) -> DataRank:
    """The place of `rank` along `dp_replicate` and `dp_shard`; raises as `mesh_sizes`."""
    sizes = mesh_sizes(config, world_size=world_size)
    return DataRank(
        rank=rank // (sizes["cp"] * sizes["tp"]),
        size=sizes["dp_replicate"] * sizes["dp_shard"],
        part=rank // sizes["tp"] % sizes["cp"],
        parts=sizes["cp"],
    )


def mesh_sizes(config: ParallelConfig, *, world_size: int) -> dict[str, int]:
    """Ranks along the axes `dp_replicate`, `dp_shard`, `cp` and `tp`, the last one changing fastest.

    Raises:
        TrainError: their product is not the world size, or `reshard_after_forward` is a number that does not divide
            the ranks that share a copy of the parameters.
    """
    sizes = {name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "cp", "tp")}
    if config.dp_shard == -1:
        sizes["dp_shard"] = world_size // max(config.dp_replicate * config.cp * config.tp, 1)
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != world_size:
        axes = " x ".join(f"parallel.{name} {getattr(config, name)}" for name in sizes)
        raise TrainError(
            f"{axes} does not make {world_size} ranks; "
            "--parallel.dp_shard -1 takes what the others leave, if they divide the ranks"
        )
    keep, shard = config.reshard_after_forward, sizes["dp_shard"] * sizes["cp"]
    if not isinstance(keep, bool) and (keep < 2 or shard % keep):
        divisors = [str(n) for n in range(2, shard) if shard % n == 0]
        raise TrainError(
            f"parallel.reshard_after_forward {keep} does not divide the {shard} ranks of parallel.dp_shard"
            f"{' x parallel.cp' * (config.cp > 1)}; use {', '.join([*divisors, 'true'])} or false"
        )
    return sizes


def build_mesh(config: ParallelConfig, *, world_size: int, device_type: str) -> DeviceMesh:
    """Mesh of the axes of `mesh_sizes`; raises as that does."""
    sizes = mesh_sizes(config, world_size=world_size)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def fsdp_mesh(mesh: DeviceMesh, *, tp: bool = False) -> DeviceMesh:
    """The axes of FSDP: parameters are sharded over the last, and replicated over the first of two.

    Ranks along `cp` share the parameters like those along `dp_shard`: all of them reduce gradients together. So do with
    `tp` those along `tp`, for parameters that tensor parallelism leaves whole: their gradients are alike there, and so
    is the average.
    """
    axes = [name for name in ("cp", "tp") if mesh[name].size() > 1 and (tp or name == "cp")]
    shards = mesh["dp_shard", *axes]._flatten("_".join(["dp_shard", *axes]))
    # A mesh of (1, n) must not all-reduce over a single replica.
    replicas = mesh["dp_replicate"]
    return shards if replicas.size() == 1 else DeviceMesh._concatenate([replicas, shards])


def wrap_policy(
    config: ParallelConfig, *, model: nn.Module, layer_classes: Iterable[type[nn.Module]]
) -> WrapPolicy | CustomPolicy:
    """The policy the user named.

    Args:
        config: `wrap_policy` is `transformer`, `size`, `module:ClassA,ClassB` or `callable:package.function`.
        model: whose classes `module:` names; not sharded yet.
        layer_classes: the model's own decoder-layer classes, for `transformer`.

    Raises:
        TrainError: unknown name, a class the model lacks, or a callable that cannot be imported.
    """
    name = config.wrap_policy
    if name == "transformer":
        # The embedding is a group of its own where it is not tied to the head: its rows are free again after use.
        return partial(
            transformer_auto_wrap_policy, transformer_layer_cls={*layer_classes, nn.Embedding}
        )
    if name == "size":
        return partial(size_based_auto_wrap_policy, min_num_params=config.min_wrap_params)
    if name.startswith("module:"):
        # Only what holds parameters and has a forward can be a group; the root is one anyway.
        classes = {
            type(m).__name__: type(m)
            for m in model.modules()
            if m is not model
            and not isinstance(m, (nn.ModuleList, nn.ModuleDict))
            and any(True for _ in m.parameters())
        }
        wanted = [part.strip() for part in name.removeprefix("module:").split(",")]
        unknown = [part for part in wanted if part not in classes]
        if unknown:
            raise TrainError(
                f"parallel.wrap_policy: the model has no module of class {', '.join(unknown)}; "
                f"it has {', '.join(sorted(classes))}"
            )
        return ModuleWrapPolicy([classes[part] for part in wanted])
    if name.startswith(CALLABLE):
        flag, path = "--parallel.wrap_policy", name.removeprefix(CALLABLE)
        own = import_object(path, flag=flag)
        if isinstance(own, CustomPolicy):  # which is no function
            return own
        return import_function(path, flag=flag, takes="*, module, recurse, nonwrapped_numel")
    raise TrainError(
        f"parallel.wrap_policy {name!r} is unknown; "
        "use transformer, size, module:ClassA,ClassB or callable:package.function"
    )


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
    layer_plan: Mapping[str, ParallelStyle] | None = None,
) -> list[nn.Module]:
    """Apply tensor parallelism, masters' type, float8, compile, activation checkpointing and FSDP2, in place.

    Args:
        model: fp32 parameters, real or on the meta device; those that are trained get `config.master_dtype`.
        config: policy, precision, resharding, offloading, what is recomputed.
        mesh: from `build_mesh`.
        layer_classes: the decoder layers: what is recomputed and what is compiled.
        root_parameters: see `select_groups`.
        forward_methods: methods of `model`, beside `forward`, that run the model.
        layer_plan: how modules of a decoder layer, by their name in it, are split over `tp`.

    Returns:
        The groups that were sharded, the root last.
    """
    config = definite(config, mesh.device_type)
    layers = [module for module in model.modules() if isinstance(module, tuple(layer_classes))]
    if config.tp > 1:
        # Every rank would say that gathering a parameter of both axes, as for an export, takes two steps, and that
        # what a group of less than a layer returns must not be changed in place: transformers does not.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for layer in layers:
            # Every rank has the same whole parameters, or none yet: each takes its part of its own.
            parallelize_module(layer, mesh["tp"], dict(layer_plan or {}), src_data_rank=None)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != DTYPES[config.master_dtype]:
            parameter.data = parameter.data.to(DTYPES[config.master_dtype])
    if config.float8 != "none":
        compute_in_float8(layers, config.float8)
    if config.compile:
        compile_layers(layers)
    checkpoint_activations(layers, config)
    groups = [
        *select_groups(
            model,
            wrap_policy(config, model=model, layer_classes=layer_classes),
            root_parameters=root_parameters,
        ),
        model,
    ]
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.param_dtype], reduce_dtype=DTYPES[config.reduce_dtype]
    )
    on_gpu = mesh.device_type == "cuda"
    # Pinned memory is copied while the GPU computes.
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
    over_tp, beside_tp = fsdp_mesh(mesh, tp=True), fsdp_mesh(mesh)
    for group in groups:
        # What the groups inside it have taken lies on a mesh with dp_shard by now.
        split = any(
            isinstance(p, DTensor) and p.device_mesh == mesh["tp"] for p in group.parameters()
        )
        fully_shard(
            group,
            mesh=beside_tp if split else over_tp,
            mp_policy=precision,
            # Backward needs the root's parameters at once: freeing them after forward would only gather them twice.
            reshard_after_forward=False if group is model else config.reshard_after_forward,
            offload_policy=offload,
        )
        assert isinstance(group, FSDPModule)
        if on_gpu and config.symmetric_memory:
            group.set_symm_mem_for_comm()
        if dist.get_backend() == "gloo":
            send_among_peers(group)
    for method in forward_methods:
        register_fsdp_forward_method(model, method)
    if on_gpu:
        set_prefetch(layers, config.prefetch_layers)
    return groups


def compile_layers(layers: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Compile the forward of each of `layers`, for the shapes it meets; hooks, FSDP's too, run outside."""
    if not torch.cuda.is_available():
        # Compiling for a CPU where there is a CUDA toolkit, torch says on every rank that there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)


def checkpoint_activations(layers: Sequence[nn.Module], config: ParallelConfig) -> None:
    """Make backward recompute what `config.activation_checkpointing` names, in the forward of each of `layers`."""
    mode = config.activation_checkpointing
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "op":
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, _expensive_operations()
        )
    for layer in layers[:: config.checkpoint_every if mode == "selective" else 1]:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _expensive_operations() -> list[torch._ops.OpOverload]:
    """Matrix products and attention, as autograd sees them: costly to compute, small to keep."""
    # Registers the operation of variable-length attention.
    import torch.nn.attention.varlen

    aten = torch.ops.aten
    # Registered by models/attention.py, where that is used.
    on_cpu = getattr(torch.ops.shardloop, "tiled_attention", None)
    return [
        *([on_cpu.default] if on_cpu is not None else []),
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]


def set_prefetch(layers: Sequence[nn.Module], depth: int) -> None:
    """Start the all-gather of a layer `depth` layers before it is needed, in forward and in backward."""
    if depth == 0:
        return
    sharded: list[FSDPModule] = [layer for layer in layers if isinstance(layer, FSDPModule)]
    for index, layer in enumerate(sharded):
        layer.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + depth])
        layer.set_modules_to_backward_prefetch(sharded[max(0, index - depth) : index][::-1])


@dataclass(frozen=True)
class PlanRow:
    """One group of FSDP: what is gathered and freed together."""

    group: str
    """Name of the module in the model; the root is `(root)`."""
    parameters: int
    master_bytes: int
    """Of what is kept, masters or frozen weights, on the rank that holds most of it."""
    trained_bytes: int
    """Of the masters among them; gradients are as many."""
    gathered_bytes: int
    """While the group computes; of what tensor parallelism splits, a rank's part."""


def describe_plan(model: nn.Module, config: ParallelConfig) -> list[PlanRow]:
    """What each rank holds of every group of a model that `parallelise` has sharded, in the order of the model."""
    config = definite(config, next(model.parameters()).device.type)
    groups = [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    taken: set[int] = set()
    rows: list[PlanRow] = []
    for name in reversed(groups):  # children first: a parent holds what they have not taken
        parameters = [p for p in model.get_submodule(name).parameters() if id(p) not in taken]
        taken |= {id(p) for p in parameters}
        numel = sum(p.numel() for p in parameters)
        rows.append(
            PlanRow(
                group=name or "(root)",
                parameters=numel,
                master_bytes=sum(_largest_shard(p) * p.element_size() for p in parameters),
                trained_bytes=sum(
                    _largest_shard(p) * p.element_size() for p in parameters if p.requires_grad
                ),
                gathered_bytes=sum(_largest_shard(p, of="tp") for p in parameters)
                * DTYPES[config.param_dtype].itemsize,
            )
        )
    return rows[::-1]


def _largest_shard(parameter: nn.Parameter, *, of: str | None = None) -> int:
    """Elements on the first rank, which holds the most where a dimension cannot be divided; split over all axes or one."""
    assert isinstance(parameter, DTensor)
    mesh, sizes = parameter.device_mesh, list(parameter.shape)
    axes = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True)
    for name, ranks, placement in reversed(list(axes)):  # tp split it first
        if of in (None, name) and not placement.is_replicate():
            dim: int = getattr(placement, "dim")  # noqa: B009  # of both kinds of shards
            sizes[dim] = -(-sizes[dim] // ranks)
    return math.prod(sizes)


def set_gradient_sync(model: nn.Module, last: bool, config: ParallelConfig) -> None:
    """Before each micro-batch of a step: whether its backward reduces gradients over ranks and frees parameters.

    The last one does. Those before keep both whole on every rank, or as `config.accumulation` says only shards; then
    replicas, whose shards are reduced once more, still wait for the last.
    """
    if isinstance(model, FSDPModule):
        now = last or config.accumulation == "sharded"
        model.set_requires_gradient_sync(now)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(now)
        model.set_is_last_backward(last)
