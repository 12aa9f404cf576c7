"""Attention that keeps packed documents apart, without a dense mask and without a flash-attn build.

Shapes: B rows, S tokens a row, N query heads, K key/value heads, H head width, M documents.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
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

# Tokens from which a document is attended to by itself, on a CPU and elsewhere; powers of two.
_LONG_DOCUMENT = {True: 32, False: 128}
# Of a document, whose scores exist at once on a CPU: small enough for its caches.
_TILE = 64


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
    elif query.is_cpu and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = tiled_attention(query, key, value, document_offsets, scaling)
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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # kernels for fp32 do not share keys among heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    documents, outputs = _documents_of(document_offsets), []
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
    return output


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


def _documents_of(document_offsets: Tensor) -> _Documents:
    documents = _DOCUMENTS.get(document_offsets)
    if documents is None:
        documents = _DOCUMENTS[document_offsets] = _find_documents(document_offsets)
    return documents


def _find_documents(document_offsets: Tensor) -> _Documents:
    offsets, device = np.array(document_offsets.tolist()), document_offsets.device
    starts, lengths = offsets[:-1], np.diff(offsets)
    long, short, places = [], [], []
    enough = _LONG_DOCUMENT[document_offsets.is_cpu]
    for index in np.flatnonzero(lengths >= enough):
        long.append(slice(int(offsets[index]), int(offsets[index + 1])))
        places.append(np.arange(offsets[index], offsets[index + 1]))
    for size in (2**power for power in range(enough.bit_length() - 1)):
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


# ---------------------------------------------------------------------------------------- on a CPU


@torch.library.custom_op("shardloop::tiled_attention", mutates_args=())
def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, document_offsets: Tensor, scaling: float
) -> Tensor:
    """Causal attention inside each document, by matrix products of tiles: query [T, N, H], key and value [T, K, H] -> [T, N, H].

    A CPU's flash kernel takes longer for documents of a few hundred tokens, has every query head its own copy of the keys,
    and slices of a batch cost a pass over the whole batch each in backward. Kept for backward are only the inputs; a tile is
    computed again there. Computed in fp32.
    """
    output = query.new_empty(query.shape)
    for group in _groups(document_offsets):
        q, k, v = group.queries(query, key), group.keys(key), group.keys(value)
        result = torch.empty_like(q)
        for rows, end, weights in _tiles(q, k, scaling):
            torch.bmm(weights, v[:, :end], out=result[:, rows])
        group.put(output, result)
    return output


@tiled_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("shardloop::tiled_attention_backward", mutates_args=())
def _tiled_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_offsets: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    for group in _groups(document_offsets):
        q, k, v = group.queries(query, key), group.keys(key), group.keys(value)
        given = group.queries(grad, key, zero_padding=True)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, end, weights in _tiles(q, k, scaling):
            grad_v[:, :end].baddbmm_(weights.transpose(1, 2), given[:, rows])
            grad_weights = torch.bmm(given[:, rows], v[:, :end].transpose(1, 2))
            # Through the softmax: weights * (gradient - sum of gradient * weights), in one pass.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, rows].baddbmm_(grad_scores, k[:, :end], beta=0, alpha=scaling)
            grad_k[:, :end].baddbmm_(grad_scores.transpose(1, 2), q[:, rows], alpha=scaling)
        for whole, part in zip(grads, (grad_q, grad_k, grad_v), strict=True):
            group.put(whole, part)
    return grads


@_tiled_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_tiled_backward(grad, *ctx.saved_tensors, ctx.scaling), None, None


tiled_attention.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class _Group:
    """Documents that are computed at once: one that is long, or D short ones padded to L tokens behind their last."""

    tokens: slice | Tensor
    """Of the T tokens: one document's; or [D, L]."""
    real: Tensor | None
    """Which of the D * L are no padding."""

    def queries(self, x: Tensor, key: Tensor, *, zero_padding: bool = False) -> Tensor:
        """[T, N, H] -> [D * K, L * N / K, H] in fp32: the rows of a token's heads that share keys follow each other."""
        x = self._taken(x)
        if zero_padding and self.real is not None:
            kept = x.flatten(0, 1)[self.real]
            x = torch.zeros_like(x)
            x.flatten(0, 1)[self.real] = kept
        x = x.unflatten(2, (key.shape[1], -1)).transpose(1, 2)
        return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """[T, K, H] -> [D * K, L, H] in fp32."""
        return self._taken(x).transpose(1, 2).flatten(0, 1)

    def _taken(self, x: Tensor) -> Tensor:
        x = x[self.tokens].float()
        return x if self.real is not None else x.unsqueeze(0)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write what belongs to these tokens, shaped as by `queries` or `keys`, into `whole` [T, heads, H]."""
        if isinstance(self.tokens, slice):
            documents, length = 1, self.tokens.stop - self.tokens.start
        else:
            documents, length = self.tokens.shape
        part = part.view(documents, -1, length, part.shape[1] // length, part.shape[2])
        part = part.transpose(1, 2).reshape(documents * length, *whole.shape[1:])
        if isinstance(self.tokens, slice):
            whole[self.tokens] = part
        else:
            whole[self.tokens.flatten()[self.real]] = part[self.real].to(whole.dtype)


def _groups(document_offsets: Tensor) -> Iterator[_Group]:
    documents = _documents_of(document_offsets)
    yield from (_Group(tokens, None) for tokens in documents.long)
    yield from (_Group(tokens, real) for tokens, real in documents.short)


def _tiles(q: Tensor, k: Tensor, scaling: float) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of `q` [b, L * g, H], the keys of `k` [b, L, H] up to their last token, and the weights of these, tile by tile."""
    length, shared = k.shape[1], q.shape[1] // k.shape[1]
    later = torch.full((_TILE, _TILE), -torch.inf).triu(1).repeat_interleave(shared, dim=0)
    for begin in range(0, length, _TILE):
        end = min(begin + _TILE, length)
        rows, size = slice(begin * shared, end * shared), end - begin
        scores = q.new_empty(q.shape[0], size * shared, end)
        scores.baddbmm_(q[:, rows], k[:, :end].transpose(1, 2), beta=0, alpha=scaling)
        scores[:, :, begin:] += later[: size * shared, :size]
        yield rows, end, torch.softmax(scores, dim=-1)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
