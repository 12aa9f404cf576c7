"""Training a part of a model: low-rank adapters through peft, or its last layers. The rest is frozen.

A frozen weight takes no update, so it needs no fp32 master: it is kept in the type it computes in.

Shapes: D inputs and F outputs of a linear layer, R the rank of its adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.build import INDEXER, decoder_layer_classes
from models.causal_lm import PackedCausalLM
from models.config import LoraConfig
from models.errors import ModelError
from models.token_rows import HeadWithRows, init_rows, train_rows
from models.weights import tensor_files

if TYPE_CHECKING:
    import peft

ALL_LINEAR = ("all-linear",)
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Parts of our names of parameters, which are those in the model, and what peft's files have in their place.
_PEFT_NAMES = {
    ".lora_magnitude_vector.default.weight": ".lora_magnitude_vector",
    ".default.": ".",
    ".token_rows": ".token_adapter.trainable_tokens_delta",
}
_FINGERPRINT_BLOCKS, _FINGERPRINT_BYTES = 16, 1 << 16


def freeze(
    model: PackedCausalLM,
    lora: LoraConfig,
    *,
    last_layers: int,
    dtype: torch.dtype,
    tokens: Sequence[int] = (),
) -> None:
    """Leave a gradient only to adapters, which are inserted, or to the last layers; in place, before sharding.

    Without adapters everything behind the first trained layer is trained: the final norm, and the head unless it is
    the embedding. No gradient enters the frozen layers in front, so backward ends there.

    Args:
        model: on the meta device; adapters come without values (`init_adapters`).
        lora: rank 0 inserts none.
        last_layers: how many decoder layers are trained or adapted; 0 for all.
        dtype: what frozen parameters are kept in.
        tokens: ids whose rows of embedding and head are trained beside adapters.

    Raises:
        ModelError: a target or a number of layers that the model does not have.
    """
    layers = decoder_layers(model)
    if last_layers > len(layers):
        raise ModelError(
            f"model.train_last_layers {last_layers}: the model has {len(layers)} decoder layers"
        )
    if lora.rank:
        from peft import inject_adapter_in_model

        config = peft_config(
            lora, adapter_targets(model, lora), layers=len(layers), last=last_layers
        )
        inject_adapter_in_model(config, model.hf, low_cpu_mem_usage=True)
        if tokens:
            train_rows(model.embedding, model.head, tokens)
    else:
        for module in (model.embedding, *layers[:-last_layers]):
            module.requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def decoder_layers(model: PackedCausalLM) -> list[nn.Module]:
    """From the first to the last."""
    classes = decoder_layer_classes(model)
    return [module for module in model.modules() if isinstance(module, classes)]


def adapter_targets(model: PackedCausalLM, lora: LoraConfig) -> list[str]:
    """The last parts of the names of the linear layers that get an adapter.

    With experts, attention's alone: routed experts are fused into one parameter, and peft would take the names of shared
    ones for theirs. An indexer of attention gets no gradient, and no adapter.

    Raises:
        ModelError: a name that no linear layer of the decoder layers has.
    """
    layers = decoder_layers(model)
    fused = any(
        "experts" in name for layer in layers for name, p in layer.named_parameters() if p.ndim == 3
    )
    linear = sorted(
        {
            name.rpartition(".")[2]
            for layer in layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
            and (name.partition(".")[0].endswith("attn") or not fused)
            and INDEXER not in name
        }
    )
    if lora.targets == ALL_LINEAR:
        return linear
    if unknown := [name for name in lora.targets if name not in linear]:
        where = "attention has" if fused else "the decoder layers have"
        raise ModelError(
            f"lora.targets: {where} no linear layer {', '.join(unknown)}; there are "
            f"{', '.join(linear)}; [all-linear] takes them all"
            + (" (experts get no adapters)" if fused else "")
        )
    return sorted(set(lora.targets))


def adapted(model: PackedCausalLM) -> list[str]:
    """The same of a model in which they have been inserted; none where there are no adapters."""
    inserted: dict[str, peft.LoraConfig] = getattr(model.hf, "peft_config", {})
    return sorted({name for config in inserted.values() for name in config.target_modules or ()})


def trained_tokens(model: PackedCausalLM) -> list[int]:
    """Ids whose rows are trained beside adapters, ascending."""
    return list(model.head.tokens) if isinstance(model.head, HeadWithRows) else []


def peft_config(
    lora: LoraConfig,
    targets: Collection[str],
    *,
    layers: int,
    last: int,
    tokens: Mapping[str, Sequence[int]] | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> peft.LoraConfig:
    """peft's own configuration of the adapters, on the `last` of `layers` decoder layers (0: on all).

    `tokens` are the ids whose rows are trained, by the name of the layer that has them.
    """
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        layers_to_transform=list(range(layers - last, layers)) if last else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        trainable_token_indices={name: list(ids) for name, ids in (tokens or {}).items()} or None,
        base_model_name_or_path=base,
        revision=revision,
    )


@torch.no_grad()
def init_adapters(model: PackedCausalLM, seed: int) -> None:
    """Values of new adapters, the same for any number of ranks: A [R, D] random, B [F, R] zero, so that they add nothing.

    Every rank calls this: rows of tokens are fetched from the rank that has them.

    Args:
        model: materialised and loaded, sharded or not.
        seed: draws every A whole, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            whole = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            _set(parameter, whole)
        elif ".lora_B." in name:
            parameter.zero_()
        elif (
            ".lora_magnitude_vector." in name
        ):  # DoRA's norm of each row, of which a shard has whole ones
            layer = model.get_submodule(name.partition(".lora_magnitude_vector.")[0])
            weight = _local(layer.get_parameter("base_layer.weight"))
            _local(parameter).copy_(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32))
    if isinstance(model.head, HeadWithRows):
        init_rows(model.embedding)
        init_rows(model.head)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _set(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a tensor that every rank holds whole."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
    _local(parameter).copy_(whole)


def merged(
    read: Callable[[str], Tensor],
    names: Collection[str],
    lora: LoraConfig,
    tokens: Sequence[int] = (),
) -> Callable[[str], Tensor]:
    """A reader of whole weights with adapters merged into them, in fp32, one tensor at a time.

    Args:
        read: gives a whole tensor by the name of a pretrained model, or of an adapter.
        names: all that `read` knows; of a weight without an adapter it gives `read`'s own.
        lora: what the adapters were made with.
        tokens: ids whose rows are trained, ascending.
    """
    scaling = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else max(lora.rank, 1))

    def read_merged(name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        a, b, magnitude = (
            f"{layer}.lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector")
        )
        weight = read(name)
        if f"{layer}.token_rows" in names:
            rows = read(f"{layer}.token_rows")
            return weight.float().index_copy(
                0, torch.tensor(tokens, device=weight.device), rows.to(weight.device)
            )
        if a not in names:
            return weight
        weight = weight.to(torch.float32, copy=True)
        weight.addmm_(read(b).to(weight), read(a).to(weight), alpha=scaling)
        if magnitude in names:
            rows = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_((read(magnitude).to(weight) / rows).unsqueeze(1))
        return weight

    return read_merged


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: peft.LoraConfig) -> None:
    """Write adapters as `PeftModel.from_pretrained` reads them, in fp32.

    Args:
        folder: exists.
        tensors: whole, by the names they have in the model.
        config: names the base model.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in _PEFT_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[f"base_model.model.{name}"] = tensor.float().cpu().contiguous()
    save_file(renamed, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = config.to_dict() | {
        "inference_mode": True,
        "target_modules": sorted(config.target_modules or ()),
    }
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and of samples of every safetensors file: tells models apart without reading them whole."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(tensor_files(folder).values())):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for block in range(_FINGERPRINT_BLOCKS):
                stream.seek(size * block // _FINGERPRINT_BLOCKS)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
