"""The chunked loss against cross-entropy of full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import loss as loss_module
from trainer.loss import linear_cross_entropy_sum, load_balancing_loss, map_logits

N, D, V = 37, 16, 53


def _inputs(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (n,), generator=generator)


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in fp64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def test_the_balancing_loss_of_a_row_is_that_of_transformers_over_its_real_tokens() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    rows, length, experts, chosen = 3, 8, 5, 2
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows * length, experts, generator=generator) for _ in range(4)]
    for layer in logits:
        layer.requires_grad_()
    tokens = torch.tensor([8, 5, 0])
    losses, load = load_balancing_loss(logits, tokens, chosen)
    expected = []
    for row, real in enumerate((8, 5)):
        part = tuple(x.unflatten(0, (rows, length))[row] for x in logits)
        mask = (torch.arange(length) < real).unsqueeze(0)
        expected.append(load_balancing_loss_func(part, experts, chosen, mask))
    torch.testing.assert_close(losses, torch.stack([*expected, torch.tensor(0.0)]))
    assert load.shape == (4, experts) and load.sum(1).tolist() == [chosen * 13.0] * 4
    gradients = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    for ours, theirs in zip(gradients, torch.autograd.grad(sum(expected), logits), strict=True):
        torch.testing.assert_close(ours, theirs)
    # Rows apart give what rows together give.
    apart = [
        load_balancing_loss(
            [x.unflatten(0, (rows, length))[row] for x in logits], tokens[row : row + 1], chosen
        )
        for row in range(rows)
    ]
    assert torch.equal(torch.cat([loss for loss, _ in apart]), losses)
    assert torch.equal(sum(part for _, part in apart), load)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, N - 1, N, 10 * N])
def test_value_and_gradients_are_those_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows_per_chunk * 4 * V)
    hidden, weight, targets = _inputs()
    value, hidden_grad, weight_grad = _reference(hidden, weight, targets)
    loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    (loss * 0.37).backward()
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), 0.37 * hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), 0.37 * weight_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_z_loss_and_label_smoothing_are_those_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, z_loss: float, label_smoothing: float
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 7 * 4 * V)
    hidden, weight, targets = _inputs()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h @ w.T
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    expected = expected + z_loss * logits.logsumexp(1).square().sum()
    expected.backward()
    objective, cross_entropy = linear_cross_entropy_sum(
        hidden, weight, targets, z_loss=z_loss, label_smoothing=label_smoothing
    )
    objective.backward()
    torch.testing.assert_close(objective.double(), expected, rtol=1e-6, atol=0)
    exact = _reference(hidden, weight, targets)[0]
    torch.testing.assert_close(cross_entropy.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=2e-6)


def test_a_chunk_smaller_than_one_row_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    torch.testing.assert_close(
        loss.double(), _reference(hidden, weight, targets)[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("units", [True, False])
def test_bf16_inputs_give_an_fp32_loss_and_bf16_gradients(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "has_bf16_units", lambda: units)
    hidden, weight, targets = _inputs(torch.bfloat16, n=1000)
    value, hidden_grad, weight_grad = _reference(hidden, weight, targets)
    loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    loss.backward()
    assert loss.dtype == torch.float32
    # Single logits carry bf16 rounding (2**-9); the sum of a thousand losses must be far better than that.
    torch.testing.assert_close(loss.double(), value, rtol=5e-4, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for ours, exact in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert (ours.double() - exact).norm() < 2**-7 * exact.norm()


def test_bf16_hidden_gradient_is_not_biased_by_the_scale_of_the_loss() -> None:
    # Between two neighbours of bf16: a rounded factor would be off by 0.2 % in every element alike.
    scale = 1 + 2**-8 + 2**-9 - 2**-12
    hidden, weight, targets = _inputs(torch.bfloat16, n=1000)
    (grad,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, targets)[0], hidden)
    loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    (scaled,) = torch.autograd.grad(loss, hidden, torch.tensor(scale))
    grad, scaled = grad.double(), scaled.double()
    assert abs(float((grad * scaled).sum() / (grad * grad).sum()) - scale) < 3e-4


def test_no_valid_token_is_loss_zero_and_zero_gradients() -> None:
    hidden, weight, targets = _inputs(n=0)
    loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D))


class _Shapes(TorchDispatchMode):
    """Records the shape of every tensor an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.shapes.append(tuple(value.shape))
        return result


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    hidden, weight, targets = _inputs()
    weight.requires_grad_(False)
    with _Shapes() as record:
        linear_cross_entropy_sum(hidden, weight, targets)[0].backward()
    assert weight.grad is None
    assert (V, D) not in record.shapes
    torch.testing.assert_close(
        hidden.grad.double(), _reference(hidden, weight, targets)[1], rtol=1e-5, atol=1e-6
    )


def test_without_gradients_nothing_of_backward_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 8 * 4 * V)
    hidden, weight, targets = _inputs()
    with torch.no_grad(), _Shapes() as record:
        loss = linear_cross_entropy_sum(hidden, weight, targets)[0]
    assert not loss.requires_grad
    assert not {(V, D), (N, D)} & set(record.shapes)
    torch.testing.assert_close(
        loss.double(), _reference(hidden, weight, targets)[0], rtol=1e-6, atol=0
    )


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 8 * 4 * V)
    hidden, weight, targets = _inputs(n=400)
    with _Shapes() as record:
        linear_cross_entropy_sum(hidden, weight, targets)[0].backward()
    with_vocabulary = [shape for shape in record.shapes if V in shape and D not in shape]
    assert with_vocabulary and max(max(set(s) - {V}, default=0) for s in with_vocabulary) <= 8


def _entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """[n, 2]: two values for each token, that both need every logit."""
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    return torch.stack([entropy, F.cross_entropy(logits, targets, reduction="none")], 1)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, N, 10 * N])
def test_a_function_of_logits_in_chunks_is_that_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows_per_chunk * 4 * V)
    hidden, weight, targets = _inputs()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected, values = _entropies(h @ w.T, targets), map_logits(_entropies, hidden, weight, targets)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (values * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-5)


def test_a_function_of_logits_of_a_frozen_head_and_of_no_tokens() -> None:
    hidden, weight, targets = _inputs()
    values = map_logits(_entropies, hidden, weight.detach(), targets)
    values.sum().backward()
    assert hidden.grad is not None and weight.grad is None
    hidden, weight, targets = _inputs(n=0)
    values = map_logits(_entropies, hidden, weight, targets)
    assert values.shape == (0, 2)
    values.sum().backward()
    assert not weight.grad.any()


def test_a_function_of_logits_in_bf16_accumulates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 16 * 4 * V)
    hidden, weight, targets = _inputs(torch.bfloat16, n=1000)
    value, hidden_grad, weight_grad = _reference(hidden, weight, targets)
    loss = -map_logits(loss_module.log_probabilities, hidden, weight, targets).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().detach(), value, rtol=5e-4, atol=0)
    for ours, exact in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 2**-7 * exact.norm()
