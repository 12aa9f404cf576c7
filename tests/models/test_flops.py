"""The closed form against operations counted by PyTorch."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.build import CONFIG_CLASSES
from models.flops import training_flops
from models.layers import indexed_layers, linear_attention_layers, ngram_layers
from tests.support.models import tiny_config, tiny_model

S = 48


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_equal_to_counted_matrix_products(
    monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    # Experts one by one (their width is no multiple of 8): the counter does not know the grouped product.
    model = tiny_model(kind, tied=tied, attention="sdpa").hf
    config: Any = model.config
    assert config._experts_implementation == "eager"
    by_hand = 0
    if layers := len(linear_attention_layers(config)):
        # A kernel is free to compute the recurrence by other products: it is left out here, and counted below:
        # three multiply-adds for each number of the state, 2 FLOPs each, three times with backward.
        source = sys.modules[type(model).__module__]
        monkeypatch.setattr(source, "torch_chunk_gated_delta_rule", _no_recurrence)
        key = config.linear_num_key_heads * config.linear_key_head_dim
        value = config.linear_num_value_heads * config.linear_value_head_dim
        by_hand = 18 * layers * S * value * config.linear_key_head_dim
        # The counter takes the backward of a convolution by channel for a full one.
        by_hand += 6 * layers * S * (2 * key + value) * config.linear_conv_kernel_dim
    for _ in ngram_layers(config):
        by_hand += 6 * S * config.hc_count * config.hidden_size * config.ple_conv_kernel_size
    for _ in indexed_layers(config):  # scores of the blocks that are complete, and of no others
        ratio, width = config.indexer_compress_ratio, config.indexer_n_heads * 8
        by_hand += 2 * width * (S**2 / ratio - sum(end // ratio for end in range(1, S + 1)))
    ids = torch.randint(2, 90, (1, S))
    # The math kernel is made of matrix products; the fused ones are not counted on CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flops for name, flops in counts.items() if "convolution" not in str(name))
    # Without a fused causal kernel all of the square is computed; our count is the half that matters.
    full_square = training_flops(model.config, S, S, 2 * S**2)
    assert counted + by_hand == pytest.approx(full_square, rel=1e-3)


def _no_recurrence(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> tuple[Tensor, None]:
    """The delta rule's inputs and outputs without a product."""
    scale = query.sum() + key.sum() + rest["g"].sum() + rest["beta"].sum()
    return value * scale, None


def test_a_token_pays_for_the_experts_it_is_sent_to() -> None:
    few, many = (
        training_flops(tiny_config("qwen3_moe", num_experts=n), 100, 0, 0) for n in (5, 50)
    )
    assert many - few == 6 * 100 * 2 * 45 * 32  # the router's rows alone
    dense = tiny_config("qwen3_moe", mlp_only_layers=[0, 1])
    assert training_flops(dense, 100, 100, 100) == training_flops(tiny_config(), 100, 100, 100)


def test_tokens_and_documents_count_apart() -> None:
    config: Any = tiny_config()
    linear = training_flops(config, 100, 0, 0)
    assert training_flops(config, 200, 0, 0) == 2 * linear
    attention = training_flops(config, 0, 0, 10_000)
    assert attention == 12 * 2 * 4 * 8 * 10_000 / 2  # layers, heads, width
    head = training_flops(config, 0, 100, 0)
    assert head == 6 * 100 * config.hidden_size * config.vocab_size
    assert training_flops(config, 100, 100, 10_000) == linear + head + attention
    longer = tiny_config(num_hidden_layers=4)
    assert training_flops(longer, 0, 0, 10_000) == 2 * attention
