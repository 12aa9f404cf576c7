"""In which type things are kept, moved and computed: the contract of a run, its bytes, and float8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from trainer.config import OptimizerConfig, ParallelConfig
from trainer.errors import TrainError
from trainer.hardware import has_bf16_units

FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with float8 matrix products
_FLOAT8_MULTIPLE = 16  # what a float8 matrix product wants of its dimensions
BYTES = {"float32": 4, "bfloat16": 2}


def definite(parallel: ParallelConfig, device_type: str) -> ParallelConfig:
    """With the type that `param_dtype auto` stands for on this kind of device."""
    if parallel.param_dtype != "auto":
        return parallel
    emulated = device_type == "cpu" and not has_bf16_units()
    return replace(parallel, param_dtype="float32" if emulated else "bfloat16")


def precision_table(
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    *,
    export_dtype: str,
    partial: bool = False,
) -> dict[str, str]:
    """The precision contract of a run, for people and for run.json; `partial` training freezes what it does not train."""
    rounding = "stochastically" if optimizer.rounding == "stochastic" else "to nearest"
    kept = {"bfloat16": f"bfloat16 rounded {rounding}"}
    float8 = "" if parallel.float8 == "none" else f", layers' products float8 {parallel.float8}"
    return {
        "masters": kept.get(parallel.master_dtype, parallel.master_dtype),
        **({"frozen weights": parallel.param_dtype} if partial else {}),
        "optimizer state": kept.get(optimizer.state_dtype, optimizer.state_dtype),
        "compute and all-gather": parallel.param_dtype + float8,
        "reduction": parallel.reduce_dtype,
        "export": export_dtype,
    }


def bytes_per_parameter(
    parallel: ParallelConfig, optimizer: OptimizerConfig, *, muon: bool = False
) -> dict[str, int]:
    """What a trained parameter takes between steps, over all ranks that share it.

    Args:
        parallel: type of masters, and of gradients with them.
        optimizer: type of the running averages.
        muon: of a matrix that Muon updates, with one average; AdamW keeps two.
    """
    master = BYTES[parallel.master_dtype]
    return {
        "masters": master,
        "gradients": master,
        "optimizer state": (1 if muon else 2) * BYTES[optimizer.state_dtype],
    }


def compute_in_float8(layers: Iterable[nn.Module], recipe: str, *, emulate: bool = False) -> int:
    """Replace the linear layers in `layers` by torchao's that compute in float8, in place; names and parameters stay.

    Args:
        layers: not yet compiled or sharded; on any device.
        recipe: `tensorwise` or `rowwise`.
        emulate: round to float8 and multiply in fp32: for tests, where there is no such GPU.

    Returns:
        How many were replaced: those whose dimensions are multiples of 16.

    Raises:
        TrainError: torchao is missing, there is no GPU that can, or no layer's dimensions allow it.
    """
    try:
        from torchao.float8 import (  # type: ignore[import-not-found]  # an extra
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise TrainError(
            f"parallel.float8 {recipe} needs torchao ({error}): "
            "pip install -c constraints.txt -e '.[torchao]'"
        ) from None
    if not emulate:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        if capability is None or capability < FLOAT8_CAPABILITY:
            found = "no GPU" if capability is None else "a GPU of {}.{}".format(*capability)
            raise TrainError(
                f"parallel.float8 {recipe} needs a GPU of capability "
                f"{'.'.join(map(str, FLOAT8_CAPABILITY))} or more, and here is {found}; "
                "use --parallel.float8 none"
            )
    replaced: list[str] = []

    def fits(module: nn.Module, name: str) -> bool:
        chosen = isinstance(module, nn.Linear) and not any(
            size % _FLOAT8_MULTIPLE for size in (module.in_features, module.out_features)
        )
        if chosen:
            replaced.append(name)
        return chosen

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    for layer in layers:
        convert_to_float8_training(layer, module_filter_fn=fits, config=config)
    if not replaced:
        raise TrainError(
            f"parallel.float8 {recipe} needs linear layers whose dimensions are multiples of "
            f"{_FLOAT8_MULTIPLE}, and this model has none; use --parallel.float8 none"
        )
    return len(replaced)
