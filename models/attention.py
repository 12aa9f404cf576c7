"""Attention that keeps packed documents apart, without a dense mask and without a flash-attn build.

Shapes: B rows, S tokens a row, N query heads, K key/value heads, H head width, M documents.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary
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
    documents = _DOCUMENTS.get(document_offsets)
    if documents is None:
        documents = _DOCUMENTS[document_offsets] = _find_documents(document_offsets)
    outputs = []
    for tokens in documents.long:
        document = (x[tokens].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            *document, is_causal=True, scale=scaling, dropout_p=dropout
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    for tokens, real in documents.short:
        padded = (x[tokens].transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            *padded, is_causal=True, scale=scaling, dropout_p=dropout
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1)[real])
    output = torch.cat(outputs)
    if documents.order is not None:
        output = output[documents.order]
    return output.to(dtype)


@dataclass(frozen=True)
class _Documents:
    """Where attention per document finds its tokens, among the B * S of a batch."""

    long: list[slice]
    """Each the tokens of one document."""
    short: list[tuple[Tensor, Tensor]]
    """Tokens of documents padded to one length, [documents, length], and which of these, flattened, are no padding."""
    order: Tensor | None
    """[T]: where each token is among all that were computed; None where they are in order."""


# Found once for a batch, whose layers all get the same tensor of offsets: reading it makes the host wait for a GPU.
_DOCUMENTS: MutableMapping[Tensor, _Documents] = WeakTensorKeyDictionary()


def _find_documents(document_offsets: Tensor) -> _Documents:
    offsets, device = np.array(document_offsets.tolist()), document_offsets.device
    starts, lengths = offsets[:-1], np.diff(offsets)
    long, short, places = [], [], []
    for index in np.flatnonzero(lengths >= _LONG_DOCUMENT):
        long.append(slice(int(offsets[index]), int(offsets[index + 1])))
        places.append(np.arange(offsets[index], offsets[index + 1]))
    for size in (2**power for power in range(_LONG_DOCUMENT.bit_length() - 1)):
        chosen = (lengths >= size) & (lengths < 2 * size)
        if not chosen.any():
            continue
        start, length = starts[chosen, None], lengths[chosen, None]
        column = np.arange(length.max())
        inside = column < length
        token = np.where(inside, start + column, start)  # padding: any token
        short.append((_indices(token, device), _indices(np.flatnonzero(inside), device)))
        places.append(token[inside])
    place = np.concatenate(places)
    in_order = bool((np.diff(place) == 1).all())  # as without short documents
    return _Documents(long, short, None if in_order else _indices(place.argsort(), device))


def _indices(places: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(places).to(device)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
