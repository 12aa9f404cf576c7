"""Attention that keeps packed documents apart, without a dense mask and without a flash-attn build.

Shapes: B rows, S tokens a row, N query heads, K key/value heads, H head width, M documents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface

from models.context_parallel import heads_for_tokens, tokens_for_heads

PACKED_ATTENTION = "packed_documents"

# Tokens from which a document is attended to by itself; a power of two.
_LONG_DOCUMENT = 128


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_offsets: Tensor,
    cp_group: ProcessGroup | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed batch, in transformers' attention protocol.

    Args:
        module: the attention layer that calls (unused).
        query: [B, N, S, H].
        key: [B, K, S, H].
        value: [B, K, S, H].
        attention_mask: not used; the documents are given by their offsets.
        document_offsets: [M + 1] int32, cumulative document lengths over the B * S flattened tokens, from 0 to B * S.
            A row border is a document border. Repeated offsets (empty documents) are allowed.
        cp_group: ranks that share the rows: S is this rank's slice of them, the offsets are those of the whole rows.
        scaling: factor on the scores; default H ** -0.5.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, S, N, H] and no attention weights.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if cp_group is not None:
        query, key, value = heads_for_tokens(query, key, value, cp_group)
    rows, length = query.shape[:2]
    # [B, S, N, H] -> [B * S, N, H]: rows simply follow each other, the offsets keep them apart.
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype != torch.float32:
        # The flash kernel takes the offsets as a tensor: nothing is copied to the host. It has no fp32 version.
        from torch.nn.attention.varlen import varlen_attn

        attend: Any = varlen_attn
        output = attend(
            query,
            key,
            value,
            document_offsets,
            document_offsets,
            length,
            length,
            scale=scaling,
            window_size=(-1, 0),  # everything to the left, nothing to the right: causal
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        attend = _attention_per_document
        output = attend(query, key, value, document_offsets, scaling, dropout)
    output = output.unflatten(0, (rows, length))
    return output if cp_group is None else tokens_for_heads(output, cp_group), None


@torch.compiler.disable  # the shapes depend on the data; compiled, every batch would need a new graph
def _attention_per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_offsets: Tensor,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """SDPA inside each document. Shapes: query [T, N, H], key and value [T, K, H] -> [T, N, H].

    A long document is a call on a slice. Short ones, of which a call each would be many small ones, run together where
    their lengths share a power of two, padded behind their last token, where causal attention does not look.
    """
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    if groups > 1:  # the CPU's flash kernel does not share keys among heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if (
        query.device.type == "cpu"
    ):  # whose kernel takes many times as long for the gradients of bf16
        query, key, value = query.float(), key.float(), value.float()
    offsets = document_offsets.cpu()
    starts, lengths = offsets[:-1], offsets.diff()
    outputs, places = [], []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length >= _LONG_DOCUMENT:
            document = (
                x[start : start + length].transpose(0, 1).unsqueeze(0) for x in (query, key, value)
            )
            output = F.scaled_dot_product_attention(
                *document, is_causal=True, scale=scaling, dropout_p=dropout
            )
            outputs.append(output.squeeze(0).transpose(0, 1))
            places.append(torch.arange(start, start + length))
    for size in (2**power for power in range(_LONG_DOCUMENT.bit_length() - 1)):
        chosen = (lengths >= size) & (lengths < 2 * size)
        if not chosen.any():
            continue
        start, length = starts[chosen].unsqueeze(1), lengths[chosen].unsqueeze(1)
        column = torch.arange(int(length.max())).unsqueeze(0)
        inside = column < length
        token = torch.where(inside, start + column, start)  # padding: any token
        on_device = token.to(query.device)
        padded = (x[on_device].transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            *padded, is_causal=True, scale=scaling, dropout_p=dropout
        )
        outputs.append(output.transpose(1, 2)[inside.to(query.device)])
        places.append(token[inside])
    output, place = torch.cat(outputs), torch.cat(places)
    if bool((place.diff() != 1).any()):  # without short documents they are in order already
        output = output[place.argsort().to(output.device)]
    return output.to(dtype)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
