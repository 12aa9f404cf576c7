"""Weights from safetensors, straight into each rank's shard, with every tensor accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from models.causal_lm import PackedCausalLM
from models.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# What a parameter may be stored as, by its name in safetensors and in torch. All others are quantised.
_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What partial training adds to a model, and no pretrained one has.
_ADDED = re.compile(r"\.(lora_\w+|token_rows)(\.|$)")
_COMPUTED = r"(^|\.)rotary_emb\.inv_freq$"


@dataclass
class LoadReport:
    """What happened to every tensor of the checkpoint and of the model, by name."""

    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    """Tensors of the model that are another one; the checkpoint may hold an equal copy."""
    grown: list[str] = field(default_factory=list)
    """Loaded, with new rows set to the mean of the stored ones."""
    unused: list[str] = field(default_factory=list)
    """In the checkpoint, and left there on purpose."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """How many of the loaded and grown tensors the checkpoint holds in which floating-point type."""
    files: int = 0

    def __str__(self) -> str:
        parts = [f"{len(self.loaded) + len(self.grown)} tensors loaded ({', '.join(self.dtypes)})"]
        if self.tied:
            parts.append(f"{', '.join(self.tied)} tied")
        if self.grown:
            parts.append(f"new rows of {', '.join(self.grown)} set to the mean")
        if self.unused:
            parts.append(f"{len(self.unused)} unused on purpose")
        return "; ".join(parts)

    def summary(self) -> dict[str, Any]:
        """As JSON can hold it: how many were plainly loaded, and the names of all others."""
        return {**asdict(self), "loaded": len(self.loaded)}


def pretrained_name(name: str) -> str | None:
    """The name in a pretrained model of a parameter, around which peft may have put a `base_layer`; None of an adapter's own."""
    return None if _ADDED.search(name) else name.replace(".base_layer.", ".")


def is_computed(name: str) -> bool:
    """Whether it is computed from config.json today; old exports still hold it."""
    return re.search(_COMPUTED, name) is not None


def named_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by their names in a pretrained model, without what adapters have added."""
    return {known: tensor for name, tensor in tensors.items() if (known := pretrained_name(name))}


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

    Nothing is copied before every tensor of the checkpoint and of the model is accounted for.

    Args:
        model: sharded by `fully_shard` (or not sharded at all), fp32 parameters.
        folder: a Hugging Face model folder with safetensors of any floating-point type.

    Raises:
        ModelError: tensors are missing, left over, quantised or of another shape (all are listed), a
            stored head is not the embedding it is tied to, or a file is damaged.
    """
    files = tensor_files(folder)
    stored = _open_tensors(files)
    # A tied head appears once, as the embedding.
    parameters = named_tensors(dict(model.hf.named_parameters()))
    ties: dict[str, str] = {
        name: source
        for name, source in dict(model.hf._tied_weights_keys or {}).items()
        if name not in parameters
    }
    ignored = [_COMPUTED, *(model.hf._keys_to_ignore_on_load_unexpected or ())]
    rest = sorted(set(files) - set(parameters) - set(ties))
    report = LoadReport(
        tied=sorted(ties),
        unused=[name for name in rest if any(re.search(pattern, name) for pattern in ignored)],
        files=len(set(files.values())),
    )
    quantised, reshaped = [], []
    for name in sorted(set(parameters) & set(stored)):
        parameter, shape, kind = (
            parameters[name],
            stored[name].get_shape(),
            stored[name].get_dtype(),
        )
        if kind not in _FLOAT_TYPES:
            quantised.append(f"{name} is {kind}")
        elif shape == list(parameter.shape):
            report.loaded.append(name)
        elif (
            _may_grow(name)
            and shape[0] < parameter.shape[0]
            and shape[1:] == list(parameter.shape[1:])
        ):
            report.grown.append(name)
        else:
            reshaped.append(f"{name} is {shape}, the model has {list(parameter.shape)}")
    faults = {
        "missing": sorted(set(parameters) - set(stored)),
        "unexpected": sorted(set(rest) - set(report.unused)),
        "tensors of another shape:": reshaped,
        "quantised, which cannot be trained:": quantised,
    }
    if any(faults.values()):
        listed = "; ".join(f"{what} {_shown(names)}" for what, names in faults.items() if names)
        raise ModelError(f"the tensors in {folder} are not the model's: {listed}")
    for name in (*report.loaded, *report.grown):
        kind = _FLOAT_TYPES[stored[name].get_dtype()]
        report.dtypes[kind] = report.dtypes.get(kind, 0) + 1
        try:
            _copy_local(parameters[name], stored[name], rows=stored[name].get_shape()[0])
        except SafetensorError as error:
            raise ModelError(f"{files[name]} is damaged ({error}); download it again") from None
    for name, source in ties.items():
        if name in stored and not _equal(stored[name], stored[source]):
            raise ModelError(
                f"{files[name]}: {name} is not {source}, though config.json ties them; set "
                "tie_word_embeddings to false in it, or download the model again"
            )
    return report


def _open_tensors(files: dict[str, Path]) -> dict[str, Any]:
    """Each tensor as a slice that is read on demand; every file holds exactly the tensors that `files` says."""
    stored = {}
    for path in sorted(set(files.values())):
        file = _open(path)
        named, held = {name for name in files if files[name] == path}, set(file.keys())
        if named != held:
            raise ModelError(
                f"{path} does not fit {INDEX_FILE} ({_shown(sorted(named ^ held))} only in one of "
                "them); download the model again"
            )
        stored |= {name: file.get_slice(name) for name in held}
    return stored


def _may_grow(name: str) -> bool:
    """Whether it has a row for each token."""
    return name.rsplit(".", 2)[-2] in ("embed_tokens", "lm_head")


def _equal(one: Any, other: Any) -> bool:
    """Whether two stored tensors hold the same; streamed, for neither need fit into memory."""
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    return all(
        torch.equal(one[start : start + 4096].float(), other[start : start + 4096].float())
        for start in range(0, rows, 4096)
    )


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
    tensors = named_tensors(model.hf.state_dict())
    return {name: tensor for name, tensor in tensors.items() if name not in skip}
