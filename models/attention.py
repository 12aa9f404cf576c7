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
    kernel: bool | None = None,
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
        kernel: use the variable-length kernel; default: where there is one.

    Returns:
        [B, S, N, H] and no attention weights.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if cp_group is not None:
        query, key, value = heads_for_tokens(query, key, value, cp_group)
    rows, length = query.shape[:2]
    # [B, S, N, H] -> [B * S, N, H]: rows simply follow each other, the offsets keep them apart.
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    if kernel is None:
        kernel = query.is_cuda and query.dtype != torch.float32
    if kernel:
        # It takes the offsets as a tensor: nothing is copied to the host.
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

    Documents whose lengths share a power of two run as one call, padded behind their last token, where causal
    attention does not look. A call per document would be many small ones for a row of short documents.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the CPU's flash kernel does not share keys among heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    offsets = document_offsets.cpu()
    starts, lengths = offsets[:-1], offsets.diff()
    outputs, places = [], []
    for size in (2**power for power in range(query.shape[0].bit_length())):
        chosen = (lengths >= size) & (lengths < 2 * size)
        if not chosen.any():
            continue
        start, length = starts[chosen].unsqueeze(1), lengths[chosen].unsqueeze(1)
        column = torch.arange(int(length.max())).unsqueeze(0)
        inside = column < length
        token = torch.where(inside, start + column, start).to(query.device)  # padding: any token
        padded = (x[token].transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            *padded, is_causal=True, scale=scaling, dropout_p=dropout
        )
        inside = inside.to(query.device)
        outputs.append(output.transpose(1, 2)[inside])
        places.append(token[inside])
    return torch.cat(outputs)[torch.cat(places).argsort()]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
