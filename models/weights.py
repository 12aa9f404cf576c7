"""Weights from safetensors, straight into each rank's shard, with every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from models.causal_lm import PackedCausalLM
from models.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass
class LoadReport:
    """What happened to every tensor of the checkpoint and of the model, by name."""

    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.tied:
            parts.append(f"{', '.join(self.tied)} tied")
        if self.grown:
            parts.append(f"new rows of {', '.join(self.grown)} set to the mean")
        return "; ".join(parts)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor.

    Raises:
        ModelError: there are no safetensors, or a shard is missing.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            weight_map: dict[str, str] = dict(content["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{index} is not an index of safetensors ({error}); download the model again"
            ) from None
        for shard in set(weight_map.values()):
            if Path(shard).name != shard:
                raise ModelError(
                    f"{index} names the file {shard!r}, which is not in its own folder; refusing to read it"
                )
        missing = sorted({shard for shard in weight_map.values() if not (folder / shard).is_file()})
        if missing:
            raise ModelError(
                f"{folder} lacks {', '.join(missing)}, named in {INDEX_FILE}; download the model again"
            )
        return {name: folder / shard for name, shard in weight_map.items()}
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise ModelError(
            f"{folder} holds no {SINGLE_FILE}; only safetensors are read (convert other formats, "
            "or use --model.init random to train from scratch)"
        )
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def load_weights(model: PackedCausalLM, folder: Path) -> LoadReport:
    """Copy a checkpoint into a materialised model; each rank reads only the rows it keeps.

    Args:
        model: sharded by `fully_shard` (or not sharded at all), fp32 parameters.
        folder: a Hugging Face model folder with safetensors of any floating-point type.

    Raises:
        ModelError: a tensor is missing, left over, of another shape, or a file is damaged.
    """
    files = tensor_files(folder)
    parameters = dict(model.hf.named_parameters())  # a tied head appears once, as the embedding
    tied = set(model.hf.state_dict().keys()) - set(parameters) - set(dict(model.hf.named_buffers()))
    vocabulary = {
        name for name in parameters if name.rsplit(".", 2)[-2] in ("embed_tokens", "lm_head")
    }
    missing = sorted(set(parameters) - set(files))
    unexpected = sorted(set(files) - set(parameters) - tied)
    if missing or unexpected:
        raise ModelError(
            f"the tensors in {folder} are not the model's: missing {_shown(missing)}; unexpected {_shown(unexpected)}"
        )
    report = LoadReport(tied=sorted(tied & set(files) or tied))
    wrong: list[str] = []
    handles = {path: _open(path) for path in sorted(set(files.values()))}
    for name, parameter in parameters.items():
        try:
            stored = handles[files[name]].get_slice(name)
        except SafetensorError as error:
            raise ModelError(
                f"{files[name]} does not fit {INDEX_FILE} ({error}); download the model again"
            ) from None
        shape = tuple(stored.get_shape())
        grows = (
            name in vocabulary
            and shape[0] < parameter.shape[0]
            and shape[1:] == tuple(parameter.shape[1:])
        )
        if shape != tuple(parameter.shape) and not grows:
            wrong.append(f"{name} is {list(shape)}, the model has {list(parameter.shape)}")
            continue
        try:
            _copy_local(parameter, stored, rows=shape[0])
        except SafetensorError as error:
            raise ModelError(f"{files[name]} is damaged ({error}); download it again") from None
        (report.grown if grows else report.loaded).append(name)
    if wrong:
        raise ModelError(f"{folder} has tensors of another shape: {_shown(wrong)}")
    return report


@torch.no_grad()
def _copy_local(parameter: Tensor, stored: object, *, rows: int) -> None:
    """Copy this rank's part of a stored tensor; rows the checkpoint lacks become the mean of those it has."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    else:
        local, shape, offset = parameter, tuple(parameter.shape), (0,) * parameter.ndim
    if local.numel() == 0:
        return  # more ranks than rows: nothing of this tensor lives here
    known = max(0, min(rows, offset[0] + shape[0]) - offset[0])
    index = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    if known:
        first = slice(offset[0], offset[0] + known)
        local[:known].copy_(stored[(first, *index[1:])])  # type: ignore[index]
    if known < shape[0]:
        mean = torch.zeros(shape[1:], dtype=torch.float64)
        for start in range(
            0, rows, 4096
        ):  # streamed: the whole embedding need not fit beside its shard
            mean += stored[start : min(start + 4096, rows)].double().sum(0)  # type: ignore[index]
        local[known:].copy_(mean / rows)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}); download it again"
        ) from None


def _shown(names: list[str], most: int = 5) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def export_tensors(model: PackedCausalLM) -> Mapping[str, Tensor]:
    """The model's parameters and persistent buffers by their name on the hub; a tied head is left out."""
    skip = set(model.hf._tied_weights_keys or ()) if model.hf.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.hf.state_dict().items() if name not in skip}
