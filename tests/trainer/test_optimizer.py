"""Schedules at their borders, weight decay, and clipping on one rank and on several."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.support.models import full, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.optimizer import build_optimizer, clip_gradients, learning_rate_at, set_learning_rate

PEAK = 2.0


def _rates(steps: int, **schedule: Any) -> list[float]:
    """Learning rates of steps 1 to `steps`."""
    return [
        learning_rate_at(step, steps=steps, peak=PEAK, schedule=ScheduleConfig(**schedule))
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(name: Any) -> None:
    rates = _rates(100, name=name, warmup_steps=4, min_ratio=0.1)
    assert rates[:4] == [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK]
    assert rates[4] <= PEAK and rates[4] > 0.97 * PEAK


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(name: Any) -> None:
    for min_ratio in (0.0, 0.25):
        rates = _rates(50, name=name, warmup_steps=5, min_ratio=min_ratio)
        assert rates[-1] == pytest.approx(PEAK * min_ratio, abs=1e-12)
        assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_shapes_between_the_ends() -> None:
    assert set(_rates(10, name="constant")) == {PEAK}
    assert _rates(10, name="linear")[4] == pytest.approx(PEAK / 2)
    assert _rates(10, name="cosine")[4] == pytest.approx(PEAK / 2)
    assert _rates(12, name="cosine")[3] == pytest.approx(PEAK * 0.75)  # a third of half a cosine
    wsd = _rates(100, name="wsd", decay_pct=20.0)
    assert wsd[:80] == [PEAK] * 80 and wsd[80] == pytest.approx(PEAK * 19 / 20)


def test_short_runs_have_rates_too() -> None:
    for name in ("cosine", "linear", "constant", "wsd"):
        assert all(0 <= rate <= PEAK for rate in _rates(1, name=name))
        assert _rates(3, name=name, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])


def test_only_matrices_decay() -> None:
    model = tiny_model("qwen2")  # norms, and biases of query, key and value
    model.hf.base_model.norm.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == set(trained.values())
    for name, parameter in trained.items():
        plain = name.endswith("bias") or "norm" in name
        assert decay[parameter] == (0.0 if plain else 0.5), name


def test_an_update_is_adamw_with_the_rate_that_was_set() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = nn.Module()
    model.weight = weight
    config = OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.01)
    weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # In the first step AdamW's update is the sign of the gradient.
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.01 * 0.1) - 0.01 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)
    assert {s.dtype for s in optimizer.state[weight].values()} == {torch.float32}


def _small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def _set_gradients(model: nn.Module, scale: float) -> None:
    x = torch.arange(20.0).reshape(4, 5) / 10
    model(x).pow(2).sum().mul(scale).backward()


def _clipped(max_grad_norm: float, scale: float) -> tuple[float, list[torch.Tensor]]:
    model = _small_model()
    for module in (*model, model):
        fully_shard(module)
    _set_gradients(model, scale)
    norm = clip_gradients(model.parameters(), max_grad_norm)
    return norm, [full(p.grad) for p in model.parameters()]


@pytest.mark.distributed
def test_clipping_over_shards_is_clipping_in_one_process() -> None:
    model = _small_model()
    _set_gradients(model, 1.0)
    expected_norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    for world_size in (1, 3):
        for norm, gradients in run_ranks(_clipped, world_size, 0.5, 1.0):
            assert norm == pytest.approx(float(expected_norm), rel=1e-6)
            for ours, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-7)


def test_no_clipping_below_the_limit_at_zero_or_when_not_finite() -> None:
    for limit, scale in ((1e9, 1.0), (0.0, 1.0), (0.5, math.inf)):
        model, same = _small_model(), _small_model()
        _set_gradients(model, scale)
        _set_gradients(same, scale)
        norm = clip_gradients(model.parameters(), limit)
        assert math.isfinite(norm) == math.isfinite(scale)
        for ours, untouched in zip(model.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, untouched.grad, rtol=0, atol=0, equal_nan=True)
