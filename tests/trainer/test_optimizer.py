"""Schedules at their borders, groups, AdamW and Muon in either state type, and clipping on one rank and on several."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from models.build import decoder_layer_classes
from tests.support.models import full, packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from trainer.errors import TrainError
from trainer.loss import causal_lm_loss
from trainer.optimizer import (
    ADAMW_STATE,
    STATE_DTYPES,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from trainer.parallel import build_mesh, parallelise
from trainer.rounding import places_in_whole, rounded_bfloat16, rounding_noise, seed_of

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


def _over_shards() -> list[Any]:
    """What torch's own and ours make of DTensors: uneven ones, and one of which a rank has nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Module()
        for number, shape in enumerate([(5, 3), (1, 4), (7,)]):
            whole = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
            model.register_parameter(f"p{number}", nn.Parameter(whole))
        if ours:
            optimizer = build_optimizer(model, OptimizerConfig())
        else:
            decay, none = [p for p in model.parameters() if p.ndim == 2], [model.p2]
            groups = [{"params": decay}, {"params": none, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = distribute_tensor(torch.randn(parameter.shape), mesh, [Shard(0)])
            optimizer.step()
        state = [optimizer.state[p][key] for p in model.parameters() for key in ADAMW_STATE]
        assert all(isinstance(x, DTensor) for x in state)
        found.append([x.full_tensor() for x in (*model.parameters(), *state)])
    return found


@pytest.mark.distributed
def test_an_update_of_shards_is_torchs_bit_for_bit() -> None:
    for ours, torchs in run_ranks(_over_shards, 2):
        assert len(ours) == 9 and _equal(ours, torchs)


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


def _build(model: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    return build_optimizer(
        model,
        config,
        layer_classes=decoder_layer_classes(model),
        embedding=model.hf.get_input_embeddings().weight,
        head=model.head.weight,
    )


def _groups(model: Any, **config: Any) -> dict[str, tuple[bool, float, float]]:
    """By name of a trained parameter: updated by Muon?, its decay, its rate at a rate of 2."""
    optimizer = _build(model, OptimizerConfig(weight_decay=0.5, **config))
    set_learning_rate(optimizer, 2.0)
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(of) == set(names.values())
    return {n: (of[p]["muon"], of[p]["weight_decay"], of[p]["lr"]) for n, p in names.items()}


def test_every_parameter_has_its_algorithm_decay_and_rate() -> None:
    ratios = {"embedding_lr_ratio": 0.25, "head_lr_ratio": 3.0}
    for name, tied in itertools.product(("muon", "adamw"), (True, False)):
        found = _groups(tiny_model("qwen2", tied=tied), name=name, **ratios)
        assert ("hf.lm_head.weight" in found) != tied
        for parameter, group in found.items():
            if "embed_tokens" in parameter:
                assert group == (False, 0.5, 0.5), parameter
            elif "lm_head" in parameter:
                assert group == (False, 0.5, 6.0), parameter
            elif "norm" in parameter or parameter.endswith("bias"):
                assert group == (False, 0.0, 2.0), parameter
            else:
                assert "layers." in parameter and group == (name == "muon", 0.5, 2.0), parameter


def test_muon_leaves_what_is_no_matrix_and_what_is_no_layer() -> None:
    model = tiny_model()
    layer = model.hf.base_model.layers[0]
    layer.experts = nn.Parameter(torch.zeros(2, 3, 4))
    layer.table = nn.Embedding(3, 4)
    model.outside = nn.Parameter(torch.zeros(3, 4))
    found = _groups(model, name="muon")
    assert not any(
        found[name][0]
        for name in ("hf.model.layers.0.experts", "hf.model.layers.0.table.weight", "outside")
    )
    layers = model.hf.base_model.layers
    for parameter in layers.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainError, match=r"optimizer.name muon .* none is trained; use adamw"):
        _build(model, OptimizerConfig(name="muon"))


RATES = [1e-4, 2e-4, 2e-4, 1e-4, 5e-5]


def _rows() -> list[list[torch.Tensor]]:
    """Eight packed rows."""
    lengths = [[24], [1], [2, 1], [12, 12], [1, 1, 1], [5], [3, 20], [2]]
    return [random_documents(row, seed=seed) for seed, row in enumerate(lengths)]


class _Run:
    """A tiny model with biases and its own head in training, over all ranks where it is sharded."""

    def __init__(self, config: OptimizerConfig, *, dp_replicate: int | None = None) -> None:
        self.model: Any = tiny_model("qwen2", tied=False)
        self.rank, self.ranks = 0, 1
        if dp_replicate is not None:
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            parallel = ParallelConfig(param_dtype="float32", dp_replicate=dp_replicate)
            parallelise(
                self.model,
                parallel,
                build_mesh(parallel, world_size=self.ranks, device_type="cpu"),
                layer_classes=decoder_layer_classes(self.model),
                root_parameters=[self.model.head.weight],
            )
        self.optimizer = _build(self.model, config)

    def step(self, rate: float) -> float:
        """Loss per token before the step."""
        rows = _rows()
        valid = sum(len(document) - 1 for row in rows for document in row)
        per_rank = len(rows) // self.ranks
        batch = packed_batch(rows[self.rank * per_rank : (self.rank + 1) * per_rank], 24)
        loss_sum, _ = causal_lm_loss(self.model, batch)
        (loss_sum * (self.ranks / valid)).backward()
        loss = loss_sum.detach()
        if self.ranks > 1:
            dist.all_reduce(loss)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss) / valid

    def tensors(self) -> list[torch.Tensor]:
        """Whole parameters and state, in a fixed order."""
        state = self.optimizer.state
        values = [state[p][n] for p in self.model.parameters() for n in sorted(state[p])]
        return [full(t) for t in (*self.model.parameters(), *values)]


def _trained(config: OptimizerConfig, dp_replicate: int) -> dict[str, Any]:
    run = _Run(config, dp_replicate=dp_replicate)
    losses = [run.step(rate) for rate in RATES]
    parameters = list(run.model.parameters())
    return {
        "losses": losses,
        "parameters": [full(p) for p in parameters],
        "shards": [p.to_local().detach() for p in parameters],
        "dtypes": {
            value.dtype
            for p in parameters
            for name, value in run.optimizer.state[p].items()
            if name != "step"
        },
    }


def _many(cases: list[tuple[OptimizerConfig, int]]) -> list[dict[str, Any]]:
    return [_trained(*case) for case in cases]


def _torch_reference(config: OptimizerConfig) -> tuple[list[float], list[torch.Tensor]]:
    """The same training by torch's own optimizers in one process: Muon for the layers' matrices, AdamW."""
    run = _Run(config)
    named = dict(run.model.named_parameters())
    muon = [
        p for n, p in named.items() if ".layers." in n and p.ndim == 2 and config.name == "muon"
    ]
    rest = [(n, p) for n, p in named.items() if not any(p is m for m in muon)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": config.weight_decay if p.ndim == 2 else 0.0}
                for _, p in rest
            ],
            betas=config.betas,
            eps=config.eps,
        )
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                muon,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn=config.muon_lr_adjustment,
            )
        )
    ratios = {"embed_tokens": config.embedding_lr_ratio, "lm_head": config.head_lr_ratio}
    names = [n for n, _ in rest]

    class Both:
        param_groups = optimizers[0].param_groups

        def step(self) -> None:
            rate = self.param_groups[-1]["lr"]
            for name, group in zip(names, self.param_groups, strict=True):
                group["lr"] = rate * next((r for k, r in ratios.items() if k in name), 1.0)
            for group in optimizers[-1].param_groups if muon else ():
                group["lr"] = rate
            for optimizer in optimizers:
                optimizer.step()

        def zero_grad(self) -> None:
            run.model.zero_grad()

    run.optimizer = Both()  # type: ignore[assignment]
    losses = [run.step(rate) for rate in RATES]
    return losses, [p.detach() for p in run.model.parameters()]


MUON = OptimizerConfig(
    name="muon", weight_decay=0.1, embedding_lr_ratio=0.5, head_lr_ratio=2.0, betas=(0.9, 0.99)
)


@pytest.mark.slow
@pytest.mark.distributed
def test_muon_and_adamw_over_shards_are_torchs_own_in_one_process() -> None:
    configs = [
        MUON,
        replace(MUON, muon_lr_adjustment="original", muon_momentum=0.5),
        replace(MUON, name="adamw"),
    ]
    begin = [p.detach() for p in tiny_model("qwen2", tied=False).parameters()]
    expected = [_torch_reference(config) for config in configs]
    assert abs(expected[0][0][-1] - expected[2][0][-1]) > 1e-3  # Muon is not AdamW
    layouts = {1: [1], 2: [1, 2], 4: [1, 2]}  # world size: dp_replicate
    for world_size, replicas in layouts.items():
        cases = [(config, n) for config in configs for n in replicas]
        wanted = [reference for reference in expected for _ in replicas]
        for results in run_ranks(_many, world_size, cases):
            for case, result, (losses, parameters) in zip(cases, results, wanted, strict=True):
                assert result["losses"] == pytest.approx(losses, abs=1e-5), (world_size, case)
                for ours, theirs, first in zip(
                    result["parameters"], parameters, begin, strict=True
                ):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
                    # A wrong update would be off by as much as the parameter has moved.
                    assert (ours - theirs).norm() < 0.02 * (theirs - first).norm(), (
                        world_size,
                        case,
                    )


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_state_stays_close_and_replicas_stay_equal() -> None:
    exact = [replace(MUON, name=name) for name in ("muon", "adamw")]
    cases = [(replace(config, state_dtype=d), 2) for config in exact for d in STATE_DTYPES]
    results = run_ranks(_many, 4, cases)
    for index, (config, _) in enumerate(cases):
        assert {r[index]["dtypes"] == {STATE_DTYPES[config.state_dtype]} for r in results} == {True}
        for one, other in ((0, 2), (1, 3)):
            shards = (results[rank][index]["shards"] for rank in (one, other))
            assert all(torch.equal(a, b) for a, b in zip(*shards, strict=True)), config
    for index, kept in ((0, 1), (2, 3)):
        a, b = results[0][index], results[0][kept]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3) and a["losses"] != b["losses"]


def _resumed(folder: Path, config: OptimizerConfig) -> tuple[bool, bool, bool]:
    """Restored state equals the saved, the run that goes on equals the uninterrupted one, and flags win."""
    run = _Run(config, dp_replicate=1)
    for rate in RATES[:3]:
        run.step(rate)
    saved = run.tensors()
    at_once = CheckpointConfig(asynchronous=False)
    Checkpointer(folder, run.model, run.optimizer, at_once).save(3, {})
    end = [run.step(rate) for rate in RATES[3:]]

    torch.manual_seed(1234)  # nothing depends on it
    changed = replace(config, weight_decay=0.7, head_lr_ratio=5.0)
    for settings in (changed, config):
        again = _Run(settings, dp_replicate=1)
        checkpointer = Checkpointer(folder, again.model, again.optimizer, CheckpointConfig())
        newest = checkpointer.newest()
        assert newest is not None
        checkpointer.restore(newest)
        groups = again.optimizer.param_groups
        assert {g["weight_decay"] for g in groups} == {0.0, settings.weight_decay}
        assert max(g["lr_ratio"] for g in groups) == settings.head_lr_ratio
        same = _equal(again.tensors(), saved)
    ended = [again.step(rate) for rate in RATES[3:]] == end
    return same, ended, _equal(again.tensors(), run.tensors())


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _resume_all(folder: Path, configs: list[OptimizerConfig]) -> list[Any]:
    return [_resumed(folder / str(index), config) for index, config in enumerate(configs)]


@pytest.mark.slow
@pytest.mark.distributed
def test_resuming_is_bit_exact_with_every_optimizer(tmp_path: Path) -> None:
    configs = [
        replace(MUON, name=name, state_dtype=dtype)
        for name in ("muon", "adamw")
        for dtype in STATE_DTYPES
    ]
    for results in run_ranks(_resume_all, 2, tmp_path, configs):
        assert results == [(True, True, True)] * 4


def _noise(tensor: torch.Tensor, *key: int) -> torch.Tensor:
    places = places_in_whole(tensor, 0, tensor.numel())
    return rounding_noise(places, seed_of(*key)).view_as(tensor)


def test_rounding_to_bf16_is_unbiased_and_only_to_neighbours() -> None:
    last_bit = 2.0**-7  # of bf16 numbers from 1 to 2
    for sign, share in itertools.product((1.0, -1.0), (0.25, 0.9)):
        values = torch.full((40_000,), sign * (1 + share * last_bit))
        rounded = rounded_bfloat16(values, _noise(values, 1, 1, 0)).float()
        assert set(rounded.tolist()) == {sign, sign * (1 + last_bit)}
        assert float((rounded.abs() > 1).float().mean()) == pytest.approx(share, abs=0.01)
    exact = torch.randn(1000).bfloat16().float()
    exact[0] = 0.0
    assert torch.equal(rounded_bfloat16(exact, _noise(exact, 1, 1, 0)).float(), exact)


def test_rounding_noise_is_even_and_independent_of_its_neighbours() -> None:
    weight = torch.zeros(300, 700)
    first, *others = (
        _noise(weight, *key).double() for key in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))
    )
    assert first.min() >= 0 and first.max() < 2**16
    counts = torch.histc(first, 256, 0, 2**16)
    assert (
        float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 350
    )  # chi-squared, 255 degrees
    pairs = [(first, other) for other in others]
    pairs += [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    for one, other in pairs:
        both = torch.stack([one.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


def _places_of_ranks() -> list[bool]:
    """Whether a rank's places are those of its part of all places, by how tensors are cut."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (square, [Shard(0), Shard(1)])]
    layouts += [(square, [Shard(1), Replicate()])]
    found = []
    for shape in [(6, 7), (3, 5, 4), (1, 9), (16, 8, 2)]:
        whole = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
        for mesh, placements in layouts:
            cut = distribute_tensor(whole, mesh, placements)
            mine, number = cut.to_local().flatten(), cut.to_local().numel()
            found.append(torch.equal(places_in_whole(cut, 0, number), mine))
            found.append(
                torch.equal(places_in_whole(cut, number // 2, number), mine[number // 2 :])
            )
    return found


@pytest.mark.distributed
def test_every_rank_knows_where_its_elements_are() -> None:
    for found in run_ranks(_places_of_ranks, 4):
        assert found == [True] * 32


def _updated(shapes: list[tuple[int, ...]], **options: Any) -> tuple[Any, list[torch.Tensor]]:
    """An optimizer with masters and state in bf16 behind some steps, and what it keeps."""
    torch.manual_seed(0)
    model = nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape).bfloat16()))
    model.turned = nn.Parameter(torch.randn(20, 10).bfloat16().t())
    config = OptimizerConfig(state_dtype="bfloat16", rounding=options.pop("rounding", "stochastic"))
    optimizer = build_optimizer(model, config, **options)
    before, graphs = counters["stats"]["unique_graphs"], []
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).bfloat16()
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1  # nothing is compiled behind the first step
    assert (graphs[0] > before) == options.get("compile", False)
    kept = [optimizer.state[p][name] for p in model.parameters() for name in ADAMW_STATE]
    return optimizer, [*model.parameters(), *kept]


SHAPES: list[tuple[int, ...]] = [(64, 48), (33,), (1,), (5, 3, 7), (1, 9)]


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = _updated(SHAPES)
    monkeypatch.setattr("trainer.optimizer.BLOCK", 100)
    assert _equal(whole, _updated(SHAPES)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_compiled_update_rounds_as_an_uncompiled_one(rounding: str) -> None:
    plain, expected = _updated(SHAPES, rounding=rounding)
    compiled, found = _updated(SHAPES, rounding=rounding, compile=True)
    differing = [x != y for x, y in zip(expected, found, strict=True)]
    # What the last bit of an fp32 decides.
    assert sum(int(x.sum()) for x in differing) <= 1e-3 * sum(x.numel() for x in differing)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=2**-7, atol=1e-6)
    assert compiled.unmoved.tolist() == pytest.approx(plain.unmoved.tolist(), rel=1e-3)
    assert plain.unmoved[0] > 0


def test_a_slow_running_average_in_bf16_does_not_stop_moving() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(64, 64))
    config = OptimizerConfig(betas=(0.9, 0.999), state_dtype="bfloat16")
    optimizer = build_optimizer(model, config)
    for _ in range(600):
        model.weight.grad = torch.ones(64, 64)
        optimizer.step()
    square = optimizer.state[model.weight]["exp_avg_sq"]
    assert square.dtype == torch.bfloat16
    # Rounded to nearest it would stay at 0.25, where a step adds less than half of the last bit.
    assert float(square.float().mean()) == pytest.approx(1 - 0.999**600, rel=0.01)
