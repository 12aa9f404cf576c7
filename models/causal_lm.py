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
from transformers import PreTrainedModel

from models.attention import PACKED_ATTENTION

Batch = Mapping[str, Tensor]


class PackedCausalLM(nn.Module):
    """Runs `hf`, unchanged transformers code, on packed batches and hands its last hidden states to a function.

    This module is the root of FSDP. What runs inside its `forward` sees the gathered head weight, so a loss that
    never materialises [B, S, V] logits is passed in as `head` instead of being computed outside.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, batch: Batch, head: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """
        Args:
            batch: `input_ids` [B, S], `position_ids` [B, S] restarting in every document, `document_offsets` [M + 1].
            head: function of the hidden states [B, S, D] and the head's weight [V, D].

        Returns:
            What `head` returns; without `head`, logits [B, S, V].
        """
        hidden = self.hf.base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,  # a mask of ones would switch transformers' own document detection off
            document_offsets=batch["document_offsets"],
            use_cache=False,
        ).last_hidden_state
        weight = self.head.weight
        return F.linear(hidden, weight) if head is None else head(hidden, weight)

    @property
    def head(self) -> nn.Linear:
        """The layer from hidden states to logits, whose weight may be the embedding's."""
        head = self.hf.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' `generate`; under FSDP it is entered like a forward (`register_fsdp_forward_method`)."""
        # Every token of an answer has another shape: compiled layers would be compiled for each.
        with dense_attention(self.hf), torch.compiler.set_stance("force_eager"):
            return self.hf.generate(*args, **kwargs)  # type: ignore[operator]  # from GenerationMixin


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
