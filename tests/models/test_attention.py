"""Attention by tiles on a CPU, against torch's own in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import tiled_attention

H = 8


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _heads(lengths: list[int], query: int, key: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(lengths)
    return [torch.randn(tokens, heads, H).to(dtype).requires_grad_() for heads in (query, key, key)]


def _one_by_one(lengths: list[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each document by itself, in float64."""
    outputs = []
    for begin, end in pairwise(_offsets(lengths).tolist()):
        document = (x[begin:end].transpose(0, 1).double() for x in (query, key, value))
        output = F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64],
        [65],
        [200],
        [130, 0, 3, 31, 32, 33, 1, 16, 64, 127],  # long, short and empty ones, mixed
        [20, 21, 22, 23],  # padded to one length
    ],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_output_and_gradients_are_those_of_each_document_alone(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    inputs = _heads(lengths, *heads, torch.float32)
    output = tiled_attention(*inputs, _offsets(lengths), H**-0.5)
    expected = _one_by_one(lengths, *inputs)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, direction)
    for grad, wanted in zip(
        found, torch.autograd.grad(expected, inputs, direction.double()), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_bf16_is_computed_in_fp32() -> None:
    lengths = [70, 9]
    inputs = _heads(lengths, 4, 2, torch.bfloat16)
    output = tiled_attention(*inputs, _offsets(lengths), H**-0.5)
    assert output.dtype == torch.bfloat16
    # Rounded once, at the end.
    torch.testing.assert_close(
        output, _one_by_one(lengths, *inputs).to(torch.bfloat16), rtol=1e-2, atol=1e-3
    )
    grads = torch.autograd.grad(output.float().sum(), inputs)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_the_operation_keeps_to_what_torch_asks_of_it() -> None:
    lengths = [40, 7, 5]
    arguments = (*_heads(lengths, 4, 2, torch.float32), _offsets(lengths), H**-0.5)
    torch.library.opcheck(tiled_attention, arguments)
