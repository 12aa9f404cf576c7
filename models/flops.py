"""Floating-point operations of a model, counted in closed form."""

from __future__ import annotations

from transformers import PreTrainedConfig


def training_flops(
    hf_config: PreTrainedConfig, tokens: float, labels: float, squared_lengths: float
) -> float:
    """Model FLOPs of forward and backward: 2 per multiply-add, backward twice the forward, no recomputation.

    Linear layers count for every token, the head for every label, causal attention for half of each document's
    square; the embedding look-up, norms and other elementwise work count nothing.

    Args:
        hf_config: a dense Qwen2 or Qwen3.
        tokens: real tokens, without padding.
        labels: tokens that are predicted; the loss computes logits for no other.
        squared_lengths: sum over documents of their squared length in tokens.
    """
    h, f, layers = hf_config.hidden_size, hf_config.intermediate_size, hf_config.num_hidden_layers
    query, key_value = hf_config.num_attention_heads, hf_config.num_key_value_heads
    width = getattr(hf_config, "head_dim", None) or h // query
    per_layer = 2 * h * query * width + 2 * h * key_value * width + 3 * h * f
    linear = 6 * (tokens * layers * per_layer + labels * h * hf_config.vocab_size)
    attention = 12 * layers * query * width * squared_lengths * 0.5
    return linear + attention
