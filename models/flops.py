"""Floating-point operations of a model, counted in closed form."""

from __future__ import annotations

from transformers import PreTrainedConfig


def training_flops(
    hf_config: PreTrainedConfig,
    tokens: float,
    labels: float,
    squared_lengths: float,
    *,
    front_layers: int = 0,
    frozen: bool = False,
    adapter_parameters: int = 0,
) -> float:
    """Model FLOPs of forward and backward: 2 per multiply-add, backward twice the forward, no recomputation.

    Linear layers count for every token, the head for every label, causal attention for half of each document's
    square; the embedding look-up, norms and other elementwise work count nothing.

    Args:
        hf_config: a dense Qwen2 or Qwen3.
        tokens: real tokens, without padding.
        labels: tokens that are predicted; the loss computes logits for no other.
        squared_lengths: sum over documents of their squared length in tokens.
        front_layers: frozen decoder layers before the first trained one, which have no backward.
        frozen: the weights take no gradient, it only passes through them to adapters.
        adapter_parameters: of low-rank adapters.
    """
    h, f, layers = hf_config.hidden_size, hf_config.intermediate_size, hf_config.num_hidden_layers
    query, key_value = hf_config.num_attention_heads, hf_config.num_key_value_heads
    width = getattr(hf_config, "head_dim", None) or h // query
    per_layer = 2 * h * query * width + 2 * h * key_value * width + 3 * h * f
    behind = layers - front_layers
    # The head that is the embedding is frozen with the layers in front.
    head_frozen = frozen or (front_layers > 0 and hf_config.tie_word_embeddings)
    linear = tokens * per_layer * (2 * front_layers + (4 if frozen else 6) * behind)
    adapters = 6 * tokens * adapter_parameters
    head = (4 if head_frozen else 6) * labels * h * hf_config.vocab_size
    attention = (4 * front_layers + 12 * behind) * query * width * squared_lengths * 0.5
    return linear + adapters + head + attention
