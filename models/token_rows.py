"""Embedding and head of which only some rows are trained: those of added tokens. The rest of each matrix is frozen.

Shapes: V rows of width D, of them N trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class _TrainedRows(nn.Module):
    """What `train_rows` adds to a layer with a `weight` [V, D]."""

    weight: Tensor
    tokens: tuple[int, ...]
    """Which rows, ascending."""
    token_ids: Tensor
    """The same [N], where the layer is."""
    token_rows: Tensor
    """Their values [N, D], which stand in place of the weight's own."""


class EmbeddingWithRows(_TrainedRows, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        place = torch.searchsorted(self.token_ids, input).clamp(max=len(self.tokens) - 1)
        is_trained = (self.token_ids[place] == input).unsqueeze(-1)
        return torch.where(
            is_trained,
            F.embedding(place, self.token_rows.to(self.weight.dtype)),
            F.embedding(input, self.weight),
        )


class HeadWithRows(_TrainedRows, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.whole_weight)

    @property
    def whole_weight(self) -> Tensor:
        """[V, D], a copy: the loss takes one matrix, and computes the gradient of all of it."""
        return self.weight.index_copy(0, self.token_ids, self.token_rows.to(self.weight.dtype))


def head_weight(head: nn.Linear) -> Tensor:
    """The matrix [V, D] that makes logits."""
    return head.whole_weight if isinstance(head, HeadWithRows) else head.weight


def train_rows(embedding: nn.Embedding, head: nn.Linear, tokens: Sequence[int]) -> None:
    """Give both layers trained fp32 rows for some tokens, one tensor if the layers are tied; in place, before sharding."""
    tied = embedding.weight is head.weight
    embedding.__class__, head.__class__ = EmbeddingWithRows, HeadWithRows
    for layer in (embedding, head):
        assert isinstance(layer, _TrainedRows)
        layer.tokens = tuple(sorted(set(tokens)))
        layer.register_buffer(
            "token_ids", torch.tensor(layer.tokens, device=layer.weight.device), persistent=False
        )
        shape = len(layer.tokens), layer.weight.shape[1]
        layer.token_rows = nn.Parameter(torch.empty(shape, device=layer.weight.device))
    if tied:
        head.token_rows = embedding.token_rows


@torch.no_grad()
def init_rows(layer: nn.Embedding | nn.Linear) -> None:
    """Begin with the values of the weight, which has been loaded. A collective, if the layer is sharded."""
    assert isinstance(layer, (EmbeddingWithRows, HeadWithRows))
    layer.token_ids.copy_(torch.tensor(layer.tokens))
    weight, rows = layer.weight, layer.token_rows
    if not isinstance(weight, DTensor):
        rows.copy_(weight[layer.token_ids])
        return
    assert isinstance(rows, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    held = torch.zeros(rows.shape, device=mesh.device_type)
    for row, token in enumerate(layer.tokens):
        if 0 <= token - offset[0] < shape[0]:
            held[row] = weight.to_local()[token - offset[0]]
    summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    whole = DTensor.from_local(held, mesh, summed).redistribute(placements=rows.placements)
    rows.to_local().copy_(whole.to_local())
