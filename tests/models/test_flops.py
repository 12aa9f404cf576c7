"""The closed form against operations counted by PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.flops import training_flops
from tests.support.models import tiny_config, tiny_model

S = 48


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_equal_to_counted_matrix_products(kind: str, tied: bool) -> None:
    model = tiny_model(kind, tied=tied, attention="sdpa").hf
    ids = torch.randint(2, 90, (1, S))
    # The math kernel is made of matrix products; the fused ones are not counted on CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops()
    # Without a fused causal kernel all of the square is computed; our count is the half that matters.
    full_square = training_flops(model.config, S, S, 2 * S**2)
    assert counted == pytest.approx(full_square, rel=1e-3)


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
