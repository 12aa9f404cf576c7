"""The module that is trained: a transformers causal LM that does not have to make logits.

Shapes: B rows, S tokens a row, D model width, V vocabulary, M documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from models.attention import PACKED_ATTENTION
from models.layers import linear_attention_layers
from models.token_rows import head_weight

Batch = Mapping[str, Tensor]


class PackedCausalLM(nn.Module):
    """Runs `hf`, unchanged transformers code, on packed batches and hands its last hidden states to a function.

    This module is the root of FSDP. What runs inside its `forward` sees the gathered head weight, so a loss that
    never materialises [B, S, V] logits is passed in as `head` instead of being computed outside.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.cp_group: ProcessGroup | None = None
        """Ranks that share every row: `forward` then gets this rank's slice of it, and `document_offsets` of the whole."""
        self.added_parameters: tuple[str, ...] = ()
        """Of `hf`, by name: those that a user's function has added, which a pretrained model may lack."""
        self._linear_attention = bool(linear_attention_layers(hf.config))

    def forward(
        self,
        batch: Batch,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        *,
        router_logits: bool = False,
    ) -> Any:
        """
        Args:
            batch: `input_ids` [B, S], `position_ids` [B, S] restarting in every document, `document_offsets` [M + 1].
                M is at most 2 B, a document and its padding, where every row holds one document.
            head: function of the hidden states [B, S, D] and the head's weight [V, D].
            router_logits: return the routers' logits as well, [B * S, experts] of each layer with experts.

        Returns:
            What `head` returns, and without `head` logits [B, S, V]; with `router_logits` a tuple of that and theirs.
        """
        rows, length = batch["input_ids"].shape
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "document_offsets")}
        if self._linear_attention and len(inputs["document_offsets"]) > 2 * rows + 1:
            inputs = _with_borders(**inputs)
        output = self.hf.base_model(
            **inputs,
            attention_mask=None,  # a mask of ones would switch transformers' own document detection off
            cp_group=self.cp_group,
            use_cache=False,
            **({"output_router_logits": True} if router_logits else {}),
        )
        hidden = output.last_hidden_state.view(rows, length, -1)
        weight = head_weight(self.head)
        result = F.linear(hidden, weight) if head is None else head(hidden, weight)
        return (result, output.router_logits) if router_logits else result

    @property
    def head(self) -> nn.Linear:
        """The layer from hidden states to logits, whose weight may be the embedding's."""
        head = self.hf.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def embedding(self) -> nn.Embedding:
        embedding = self.hf.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' `generate`; under FSDP it is entered like a forward (`register_fsdp_forward_method`)."""
        # Every token of an answer has another shape: compiled layers would be compiled for each.
        with dense_attention(self.hf), torch.compiler.set_stance("force_eager"):
            return self.hf.generate(*args, **kwargs)  # type: ignore[operator]  # from GenerationMixin


def _with_borders(
    input_ids: Tensor, position_ids: Tensor, document_offsets: Tensor
) -> dict[str, Tensor]:
    """The inputs of linear attention over packed documents: one long row, and its borders in every form it reads.

    The recurrence (flash-linear-attention) takes cumulative lengths and a single row, the convolution
    (causal-conv1d) the number of each token's document. Without those libraries transformers raises.

    Args:
        input_ids, position_ids: [B, S].
        document_offsets: [M + 1].
    """
    places = torch.arange(input_ids.numel(), device=input_ids.device)
    documents = torch.searchsorted(document_offsets, places, right=True) - 1
    return {
        "input_ids": input_ids.view(1, -1),
        "position_ids": position_ids.view(1, -1),
        "document_offsets": document_offsets,
        "cu_seq_lens_q": document_offsets,
        "cu_seq_lens_k": document_offsets,
        "seq_idx": documents.int().view(1, -1),
    }


@contextmanager
def dense_attention(hf: PreTrainedModel) -> Iterator[None]:
    """Run `hf` with PyTorch SDPA and transformers' masks: generation pads and caches, it does not pack."""
    before = hf.config._attn_implementation or "eager"
    if before == PACKED_ATTENTION:
        hf.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)
