"""Which layers of a Qwen are of which kind, as its configuration says."""

from __future__ import annotations

from transformers import PreTrainedConfig


def sparse_layers(hf_config: PreTrainedConfig) -> list[int]:
    """The decoder layers, from 0, whose MLP is a mixture of experts."""
    if getattr(hf_config, "num_experts", 0) < 1:
        return []
    dense = set(getattr(hf_config, "mlp_only_layers", None) or ())
    every = getattr(hf_config, "decoder_sparse_step", 1)
    layers = range(hf_config.num_hidden_layers)
    return [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]


def linear_attention_layers(hf_config: PreTrainedConfig) -> list[int]:
    """The decoder layers, from 0, that carry a state along the row (Gated DeltaNet) instead of attending."""
    types = getattr(hf_config, "layer_types", None) or ()
    return [layer for layer, kind in enumerate(types) if kind == "linear_attention"]


def indexed_layers(hf_config: PreTrainedConfig) -> list[int]:
    """The decoder layers, from 0, whose attention sees the tokens that an indexer chooses (Qwen4-Exp)."""
    types = getattr(hf_config, "layer_types", None) or ()
    return [layer for layer, kind in enumerate(types) if kind == "indexed_attention"]


def ngram_layers(hf_config: PreTrainedConfig) -> list[int]:
    """The decoder layers, from 0, that look up hashed n-grams of token ids (Qwen4-Exp)."""
    return [number - 1 for number in getattr(hf_config, "ple_layer_ids", None) or ()]


def has_sliding_window(hf_config: PreTrainedConfig) -> bool:
    """Whether a layer attends to the last `sliding_window` tokens only."""
    if types := getattr(hf_config, "layer_types", None):
        return "sliding_attention" in types
    return bool(getattr(hf_config, "sliding_window", None))
