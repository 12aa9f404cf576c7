"""What a Hugging Face folder calls each tensor, and which part of which parameter of the model it is.

In memory transformers keeps all experts of a layer in one tensor, on the hub each expert has its own; a table of n-grams is
one tensor here and many there; a checkpoint of a larger model puts a prefix before the names. Which family does what is read from transformers' own conversion mapping.

Shapes: E experts, I width of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from models.errors import ModelError


@dataclass(frozen=True)
class Part:
    """A stored tensor as a part of a parameter, mostly all of it."""

    parameter: str
    box: tuple[slice, ...]
    """Where it is in the parameter: a slice for each of its dimensions."""
    shape: torch.Size
    """Of the stored tensor. One expert of [E, 2I, D] is stored as [I, D]."""
    dtype: torch.dtype | None = None
    """Of integers, which are stored as they are; None of weights."""

    def of(self, tensor: Tensor) -> Tensor:
        """The stored tensor, as a view of the whole parameter."""
        return tensor[self.box].view(self.shape)


def stored_parts(
    hf: PreTrainedModel, tensors: Mapping[str, Tensor], *, whole: Collection[str] = ()
) -> dict[str, Part]:
    """Every stored tensor by its name on the hub; those of one parameter follow each other, expert by expert.

    Args:
        hf: says how its family is stored.
        tensors: parameters by their name in memory, which may be sharded or on the meta device.
        whole: names of parameters that are stored as they are in memory, whatever the family does.

    Raises:
        ModelError: transformers converts a parameter in a way that is not known here.
    """
    converters = [t for t in get_model_conversion_mapping(hf) if isinstance(t, WeightConverter)]
    # What makes the stored tensors of a parameter out of its name.
    reverse = [converter.reverse_transform() for converter in converters]
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        box = tuple(slice(0, size) for size in tensor.shape)
        for converter, backward in zip(converters, reverse, strict=True):
            first, pattern = backward.rename_source_key(name)
            if pattern is None or name in whole:
                continue
            names = [
                first.replace(backward.target_patterns[0], target)
                for target in backward.target_patterns
            ]
            match converter.operations:
                case [Concatenate(dim=0, num_shards_attribute=str(count))] if len(names) == 1:
                    parts |= _split(name, box, names[0], getattr(hf.config, count))
                case _:
                    parts |= _fused(name, box, names, converter)
            break
        else:
            dtype = None if tensor.is_floating_point() else tensor.dtype
            parts[name] = Part(name, box, tensor.shape, dtype)
    return parts


def _split(parameter: str, box: tuple[slice, ...], name: str, count: int) -> dict[str, Part]:
    """The parts of a table whose rows are stored in `count` tensors, all of one size but the last.

    Args:
        name: of each of them, with * for its number.
    """
    rows = box[0].stop
    size = -(-rows // count)
    parts = {}
    for number, start in enumerate(range(0, rows, size)):
        place = slice(start, min(start + size, rows)), *box[1:]
        shape = torch.Size(side.stop - side.start for side in place)
        parts[name.replace("*", str(number))] = Part(parameter, place, shape)
    return parts


def _fused(
    parameter: str, box: tuple[slice, ...], names: list[str], converter: WeightConverter
) -> dict[str, Part]:
    """The parts of a parameter that stacks experts and may hold several tensors of each side by side.

    Args:
        names: of each of these tensors, with * for the number of the expert.
    """
    stack, *rest = converter.operations
    joins = [operation.dim for operation in rest if isinstance(operation, Concatenate)]
    stacks = isinstance(stack, MergeModulelist) and stack.dim == 0
    if not stacks or len(joins) != len(rest) or len(joins) != (len(names) > 1):
        raise ModelError(
            f"transformers makes {parameter} by {converter.operations}, which this trainer does not "
            "know; use the transformers release that constraints.txt names"
        )
    parts = {}
    for expert in range(box[0].stop):
        for number, name in enumerate(names):
            place = [slice(expert, expert + 1), *box[1:]]
            for dim in joins:
                size = box[dim].stop // len(names)
                place[dim] = slice(number * size, (number + 1) * size)
            shape = torch.Size(side.stop - side.start for side in place[1:])
            parts[name.replace("*", str(expert))] = Part(parameter, tuple(place), shape)
    return parts


class Renaming:
    """How a checkpoint's names become those of `stored_parts`: a vision-language model has a prefix more."""

    def __init__(self, hf: PreTrainedModel, known: Collection[str]) -> None:
        """
        Args:
            hf: the model that is filled.
            known: the names it can do something with.
        """
        mapping = get_model_conversion_mapping(hf)
        self._renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        self._prefix = hf.base_model_prefix
        self._known = dict.fromkeys(known, True)

    def known_as(self, stored: str) -> str:
        """What the model knows a stored tensor as; its own name if it does not know it."""
        if stored in self._known:
            return stored
        name, _ = rename_source_key(stored, self._renamings, [], self._prefix, self._known)
        return name

    def stored_as(self, names: Iterable[str]) -> list[str]:
        """What a checkpoint would call tensors that it lacks, given the names that have been asked for so far."""
        used = [renaming.reverse_transform() for renaming in self._renamings if renaming.was_used()]
        for renaming in reversed(used):
            names = [renaming.rename_source_key(name)[0] for name in names]
        return list(names)
