"""Context parallelism by Ulysses (https://arxiv.org/abs/2309.14509): rows longer than one GPU can hold.

Each of P ranks holds S / P consecutive tokens of every row. What a layer does token by token needs nothing else. For
attention two all-to-alls turn all heads of these tokens into all tokens of N / P heads, and back, so that attention sees
whole rows and packed documents may cross the slices' borders.

Shapes: B rows, S tokens of a whole row, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from models.errors import ModelError

# Others need whole rows outside of attention too: routers for their loss, GatedDeltaNet for the state it hands along.
FAMILIES = ("qwen2", "qwen3")


def check_context_parallel(hf_config: PreTrainedConfig, *, cp: int, tp: int = 1) -> None:
    """Refuse a model whose rows cannot be shared by `cp` ranks, when its heads are divided among `tp` ranks before.

    Raises:
        ModelError: another family, or query heads that the ranks do not divide.
    """
    if cp == 1:
        return
    if hf_config.model_type not in FAMILIES:
        raise ModelError(
            f"parallel.cp {cp} is for {' and '.join(FAMILIES)} models, not for {hf_config.model_type}; "
            "leave it out"
        )
    heads = hf_config.num_attention_heads // tp
    if heads % cp:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ModelError(
            f"parallel.cp {cp} does not divide the {heads} query heads of a layer"
            f"{f' that parallel.tp {tp} leaves' if tp > 1 else ''}; use {divisors}"
        )


def heads_for_tokens(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """Give away this rank's tokens of the other ranks' heads for the other ranks' tokens of its own heads.

    Args:
        query: [B, S / P, N, H].
        key: [B, S / P, K, H]. Heads are repeated until P divides their number.
        value: [B, S / P, K, H].
        group: P ranks in the order of their slices.

    Returns:
        Query [B, S, N / P, H], key and value [B, S, lcm(K, P) / P, H].
    """
    ranks = group.size()
    copies = ranks // math.gcd(key.shape[2], ranks)  # divides N / K, since P divides N
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
    # [B, S / P, P, heads, H] -> [P, B, S / P, heads, H]: the part of each rank in one piece, all three in one message.
    parts = [x.unflatten(2, (ranks, -1)).movedim(2, 0) for x in (query, key, value)]
    received = exchange(torch.cat(parts, dim=3), group)
    # [P, B, S / P, heads, H] -> [B, S, heads, H]: now the first dimension is the slice.
    tokens = received.movedim(0, 1).flatten(1, 2)
    return tokens.split([part.shape[3] for part in parts], dim=2)


def tokens_for_heads(output: Tensor, group: ProcessGroup) -> Tensor:
    """The way back: attention's output [B, S, N / P, H] -> [B, S / P, N, H]."""
    parts = output.unflatten(1, (group.size(), -1)).movedim(1, 0)
    received = exchange(parts, group)
    # [P, B, S / P, N / P, H] -> [B, S / P, N, H]: the first dimension is the part of the heads.
    return received.movedim(0, 2).flatten(2, 3)


def exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    """Send `parts[r]` to rank r and get one part from every rank, in their order; [P, ...] -> [P, ...]."""
    received = _Exchange.apply(parts, group)
    assert isinstance(received, Tensor)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        # A permutation of numbers over ranks: gradients take the same ways back, which is the same exchange.
        return exchange(grad_outputs[0], ctx.group), None
