"""Attention that keeps packed documents apart, without a dense mask and without a flash-attn build.

Shapes: B rows, S tokens a row, N query heads, K key/value heads, H head width, M documents.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED_ATTENTION = "packed_documents"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_offsets: Tensor,
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
        scaling: factor on the scores; default H ** -0.5.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, S, N, H] and no attention weights.
    """
    rows, _heads, length, _width = query.shape
    # [B, N, S, H] -> [B * S, N, H]: rows simply follow each other, the offsets keep them apart.
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
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
        output = _attention_per_document(  # pyright: ignore[reportCallIssue]  # decorated
            query, key, value, document_offsets, scaling, dropout
        )
    return output.unflatten(0, (rows, length)), None


@torch.compiler.disable  # the loop depends on the data; compiling it would mean a new graph for every batch
def _attention_per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_offsets: Tensor,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One SDPA call per document. Shapes: query [T, N, H], key and value [T, K, H] -> [T, N, H]."""
    offsets = document_offsets.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets) if end > start]
    # split has one backward (a cat) for all documents; slicing would zero-fill a full gradient for each of them.
    pieces = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(0, 1)
        for q, k, v in zip(
            query.split(lengths), key.split(lengths), value.split(lengths), strict=True
        )
    ]
    return torch.cat(pieces)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
