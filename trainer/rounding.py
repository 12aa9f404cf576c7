"""Rounding to bf16: to nearest, or stochastically by noise that neither ranks nor restarts change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def keep_(
    kept: Tensor,
    exact: Tensor,
    places: Tensor | None,
    seed: int | Tensor,
    *,
    count: bool = False,
) -> Tensor | None:
    """Round exact fp32 values into bf16 ones; fp32 ones were updated in place, `float()` copied nothing.

    Args:
        kept: this rank's part of a tensor, or a block of it.
        exact: its new values, fp32, of the same shape.
        places: of these elements in the whole tensor, int32; None to round to nearest.
        seed: of the noise, 32 bits.
        count: elements that stay as they are though they have an update, and those that have one.

    Returns:
        These two, [2], if they were counted and `kept` is bf16.
    """
    if kept.dtype == torch.float32:
        return None
    if places is None:
        # To nearest, ties to even. (A cast by itself is left out where a compiled kernel goes on with the result.)
        noise = 0x7FFF + ((exact.view(torch.int32) >> 16) & 1)
    else:
        noise = rounding_noise(places, seed)
    rounded = rounded_bfloat16(exact, noise)
    counts = None
    if count:
        moves = exact != kept
        counts = torch.stack([(moves & (rounded == kept)).sum(), moves.sum()])
    kept.copy_(rounded)
    return counts


def places_in_whole(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Where elements `begin` to `end` of this rank's part of a tensor are in the whole one; [end - begin] int32, which wraps."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    axes = _cut_axes(local.shape, tensor.shape, *layout)
    if len(axes) == 1 and end + axes[0][1] < 2**31:
        return torch.arange(
            begin + axes[0][1], end + axes[0][1], dtype=torch.int32, device=local.device
        )
    left = torch.arange(begin, end, device=local.device)
    places, stride = torch.zeros_like(left), 1
    for size, start, whole in reversed(axes[1:]):
        places += (left % size + start) * stride
        left, stride = left // size, stride * whole
    places += (left + axes[0][1]) * stride
    return places.to(torch.int32)


@cache
def _cut_axes(local: torch.Size, whole: torch.Size, *layout: Any) -> list[tuple[int, int, int]]:
    """Size, begin in the whole and size there of each axis of a rank's part; axes of which nothing is cut are one with that before."""
    starts: Sequence[int] = (0,) * len(whole)
    if layout:
        _, starts = compute_local_shape_and_global_offset(whole, *layout)
    axes = list(zip(local, starts, whole, strict=True)) or [(1, 0, 1)]
    while len(axes) > 1 and axes[-1][0] == axes[-1][2]:
        (size, start, total), (_, _, width) = axes[-2:]
        axes[-2:] = [(size * width, start * width, total * width)]
    return axes


def seed_of(step: int, place: int, tensor: int) -> int:
    """Of the noise of a step for a parameter, by its place in the groups, and one of its tensors; as an int32."""
    return random.Random(repr((step, place, tensor))).getrandbits(32) - (1 << 31)


def rounding_noise(places: Tensor, seed: int | Tensor) -> Tensor:
    """Sixteen random bits for each element, int32 in the shape of `places`.

    They are a hash of `seed` and of the element's place in the whole tensor, so however it is sharded, an element gets the
    same bits. (A generator would give every shard the same ones.)
    """
    bits = places ^ seed
    # Two rounds of the hash lowbias32, https://github.com/skeeto/hash-prospector; products wrap, shifts keep the sign out.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        bits = bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))
        bits = bits * factor
    return (bits >> 16) & 0xFFFF


def rounded_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Round finite fp32 values to one of their two bf16 neighbours.

    Args:
        values: fp32.
        noise: int32 of the same shape. If it is evenly spread over 0 to 65,535, the expectation is the value itself.
    """
    # A bf16 is the upper half of an fp32: a carry out of the lower half is as likely as that half is large.
    return (values.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
