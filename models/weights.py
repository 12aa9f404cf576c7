"""Weights from safetensors, straight into each rank's shard, with every tensor accounted for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.names import Part, Renaming, stored_parts

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# What a parameter may be stored as, by its name in safetensors and in torch. All others are quantised.
_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What partial training adds to a model, and no pretrained one has.
_ADDED = re.compile(r"\.(lora_\w+|token_rows)(\.|$)")
# Computed from config.json today; old exports still hold it.
_COMPUTED = r"(^|\.)rotary_emb\.inv_freq$"
_ROWS = 4096  # of a matrix that are read at once where all of them are needed


@dataclass
class LoadReport:
    """What happened to every tensor of the checkpoint, by its name there, and of the model."""

    loaded: list[str] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)
    """Parameters that were put together from several stored tensors (experts, tables), and from how many."""
    tied: list[str] = field(default_factory=list)
    """Tensors of the model that are another one; the checkpoint may hold an equal copy."""
    grown: list[str] = field(default_factory=list)
    """Loaded, with new rows set to the mean of the stored ones."""
    initialised: list[str] = field(default_factory=list)
    """Parameters that no checkpoint has and that were given values on purpose."""
    unused: list[str] = field(default_factory=list)
    """In the checkpoint, and left there on purpose."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """How many tensors of the model the checkpoint holds in which floating-point type."""
    files: int = 0

    def __str__(self) -> str:
        parts = [f"{sum(self.dtypes.values())} tensors loaded ({', '.join(self.dtypes)})"]
        if self.converted:
            parts.append(f"{sum(self.converted.values())} of them fused into {len(self.converted)}")
        if self.tied:
            parts.append(f"{', '.join(self.tied)} tied")
        if self.grown:
            parts.append(f"new rows of {', '.join(self.grown)} set to the mean")
        if self.initialised:
            parts.append(f"{len(self.initialised)} initialised on purpose")
        if self.unused:
            parts.append(f"{len(self.unused)} unused on purpose")
        return "; ".join(parts)

    def summary(self) -> dict[str, Any]:
        """As JSON can hold it: how many were plainly loaded, and the names of all others."""
        return {**asdict(self), "loaded": len(self.loaded)}


def pretrained_name(name: str) -> str | None:
    """The name in a pretrained model of a parameter, around which peft may have put a `base_layer`; None of an adapter's own."""
    return None if _ADDED.search(name) else name.replace(".base_layer.", ".")


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


def load_weights(
    model: PackedCausalLM, folder: Path, *, initialised: Collection[str] = ()
) -> LoadReport:
    """Copy a checkpoint into a materialised model; each rank reads only the part it keeps.

    Nothing is copied before every tensor of the checkpoint and of the model is accounted for. On the host it takes
    no more memory than the model's own shard and one part of a stored tensor.

    Args:
        model: sharded by `fully_shard`, also on top of tensor parallelism, or not sharded at all; fp32 parameters.
        folder: a Hugging Face model folder with safetensors of any floating-point type.
        initialised: parameters that the caller gives values to, because no checkpoint has them.

    Raises:
        ModelError: tensors are missing, left over, quantised or of another shape (all are listed by their names in
            the folder), a stored head is not the embedding it is tied to, a stored buffer is not what config.json
            makes of it, or a file is damaged.
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
    for name in initialised:
        del parameters[name]
    kept = model.hf.state_dict()
    computed = {name: buffer for name, buffer in model.hf.named_buffers() if name in kept}
    renaming = Renaming(
        model.hf, {*stored_parts(model.hf, parameters), *parameters, *ties, *computed}
    )
    ours = {renaming.known_as(name): name for name in stored}
    # A parameter that is there under its own name is taken as it is, whatever its family does on the hub.
    parts = stored_parts(model.hf, parameters, whole=ours.keys())
    wanted = {ours[name]: part for name, part in parts.items() if name in ours}
    there = {ours[name]: buffer for name, buffer in computed.items() if name in ours}
    rest = set(stored) - wanted.keys() - {ours[name] for name in ties if name in ours}
    ignored = [_COMPUTED, *(model.hf._keys_to_ignore_on_load_unexpected or ())]
    unused = {name for name in rest if any(re.search(pattern, name) for pattern in ignored)}
    unused |= there.keys()
    report, reshaped, quantised = _account(wanted, stored, parameters)
    faults = {
        "missing": sorted(renaming.stored_as(parts.keys() - ours.keys())),
        "unexpected": sorted(rest - unused),
        "other numbers than config.json gives:": sorted(
            name for name, buffer in there.items() if stored[name][:].tolist() != buffer.tolist()
        ),
        "tensors of another shape:": reshaped,
        "quantised, which cannot be trained:": quantised,
    }
    if any(faults.values()):
        listed = "; ".join(f"{what} {_shown(names)}" for what, names in faults.items() if names)
        raise ModelError(f"the tensors in {folder} are not the model's: {listed}")
    report.tied, report.initialised, report.unused = sorted(ties), [*initialised], sorted(unused)
    report.files = len(set(files.values()))
    for name in sorted(wanted, key=lambda name: (files[name], name)):  # one file after the other
        try:
            _copy_local(parameters[wanted[name].parameter], stored[name], wanted[name])
        except SafetensorError as error:
            raise ModelError(f"{files[name]} is damaged ({error}); download it again") from None
    for name, source in ties.items():
        if name in ours and not _equal(stored[ours[name]], stored[ours[source]]):
            raise ModelError(
                f"{files[ours[name]]}: {ours[name]} is not {ours[source]}, though config.json ties them; "
                "set tie_word_embeddings to false in it, or download the model again"
            )
    return report


def open_parameters(
    model: PackedCausalLM, folder: Path, *, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """A reader of single whole parameters of a checkpoint, by name, as `load_weights` would fill them.

    Args:
        model: without memory; gives names and shapes.
        folder: see `load_weights`, which has accepted it.
        dtype: of what is read.

    Raises:
        ModelError: a tensor is missing.
    """
    stored = _open_tensors(tensor_files(folder))
    parameters = named_tensors(dict(model.hf.named_parameters()))
    renaming = Renaming(model.hf, {*stored_parts(model.hf, parameters), *parameters})
    ours = {renaming.known_as(name): name for name in stored}
    parts = stored_parts(model.hf, parameters, whole=ours.keys())
    if missing := sorted(parts.keys() - ours.keys()):
        raise ModelError(f"{folder} lacks tensors of the model: {_shown(missing)}")

    def read(name: str) -> Tensor:
        whole = torch.empty(parameters[name].shape, dtype=dtype)
        for known, part in parts.items():
            if part.parameter == name:
                _copy_local(whole, stored[ours[known]], part)
        return whole

    return read


def _account(
    wanted: Mapping[str, Part], stored: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> tuple[LoadReport, list[str], list[str]]:
    """How each stored tensor would be loaded; and those that cannot be, by their shape and by their type."""
    report, reshaped, quantised = LoadReport(), [], []
    for name, part in sorted(wanted.items()):
        shape, kind = torch.Size(stored[name].get_shape()), stored[name].get_dtype()
        if kind not in _FLOAT_TYPES:
            quantised.append(f"{name} is {kind}")
            continue
        report.dtypes[_FLOAT_TYPES[kind]] = report.dtypes.get(_FLOAT_TYPES[kind], 0) + 1
        if part.shape != parameters[part.parameter].shape and shape == part.shape:
            report.converted[part.parameter] = report.converted.get(part.parameter, 0) + 1
        elif shape == part.shape:
            report.loaded.append(name)
        elif _may_grow(name) and shape[0] < part.shape[0] and shape[1:] == part.shape[1:]:
            report.grown.append(name)
        else:
            reshaped.append(f"{name} is {list(shape)}, the model has {list(part.shape)}")
    return report, reshaped, quantised


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
        torch.equal(one[start : start + _ROWS].float(), other[start : start + _ROWS].float())
        for start in range(0, rows, _ROWS)
    )


@torch.no_grad()
def _copy_local(parameter: Tensor, stored: Any, part: Part) -> None:
    """Copy what this rank keeps of a stored tensor; rows the checkpoint lacks become the mean of those it has."""
    local, kept = _shard(parameter)
    if local.numel() == 0:
        return  # more ranks than rows: nothing of this tensor lives here
    rows = stored.get_shape()[0]
    grown = part.shape == parameter.shape and rows < part.shape[0]
    into, out_of = [], []
    for side, mine in zip(
        (slice(0, rows), *part.box[1:]) if grown else part.box, kept, strict=True
    ):
        low, high = max(side.start, mine.start), min(side.stop, mine.stop)
        into.append(slice(low - mine.start, high - mine.start))
        out_of.append(slice(low - side.start, high - side.start))
    if all(side.start < side.stop for side in into):
        # One expert is stored without the dimension that counts them. Cast on the device: half the bytes travel.
        local[tuple(into)].copy_(stored[tuple(out_of[-len(part.shape) :])].to(local.device))
    if grown and rows < kept[0].stop:
        mean = torch.zeros(local.shape[1:], dtype=torch.float64)
        for start in range(0, rows, _ROWS):  # the whole embedding need not fit beside its shard
            block = slice(start, min(start + _ROWS, rows))
            mean += stored[(block, *kept[1:])].double().sum(0)
        local[max(0, rows - kept[0].start) :].copy_(mean / rows)


def _shard(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank has of a parameter, and where in the whole that is."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    box = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return parameter.to_local(), box


def init_weights(model: PackedCausalLM, seed: int) -> None:
    """Give a materialised model random weights by transformers' own rule, the same for any sharding.

    Every rank draws each tensor whole, on the CPU, and keeps its part: one tensor is in memory beside the shard.
    The embedding's row of a padding token is zero.
    """
    torch.manual_seed(seed)
    with _WholeTensors():
        model.hf.initialize_weights()
    embedding = model.hf.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    local, (rows, *_) = _shard(embedding.weight.detach())
    pad = embedding.padding_idx
    if pad is not None and rows.start <= pad < rows.stop:  # a row of a sharded tensor is a copy
        local[pad - rows.start].zero_()


def init_modules(model: PackedCausalLM, names: Collection[str], seed: int) -> None:
    """Give the modules of the parameters `names` random values by transformers' own rule, the same for any sharding.

    Raises:
        ModelError: transformers has no rule for one of them.
    """
    torch.manual_seed(seed)
    for name in names:
        parameter = model.hf.get_parameter(name)
        local, _ = _shard(parameter.detach())
        local.fill_(math.nan)
        with _WholeTensors():
            model.hf._init_weights(model.hf.get_submodule(name.rpartition(".")[0]))
        if local.isnan().any():
            raise ModelError(
                f"--model.function adds {name}, for which there is no rule of initial values; use a module such as "
                "nn.Linear or nn.Embedding for it"
            )


class _WholeTensors(TorchDispatchMode):
    """Runs what fills a sharded tensor on a whole one instead, whose part is kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if not (isinstance(target, DTensor) and func.__name__.partition(".")[0].endswith("_")):
            return func(*args, **(kwargs or {}))
        whole = torch.empty(target.shape, dtype=target.dtype)
        func(whole, *args[1:], **(kwargs or {}))
        local, box = _shard(target)
        local.copy_(whole[box])
        return target


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
