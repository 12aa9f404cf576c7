"""Masters in bf16, float8 layers: that they train, on any number of ranks, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from models.build import decoder_layer_classes
from tests.support.models import full, packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from trainer import precision
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from trainer.errors import TrainError
from trainer.loss import causal_lm_loss
from trainer.optimizer import (
    build_optimizer,
    clip_gradients,
    rounding_metrics,
    set_learning_rate,
    state_bytes,
)
from trainer.parallel import build_mesh, parallelise
from trainer.precision import (
    bytes_per_parameter,
    compute_in_float8,
    definite,
    precision_table,
)

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="the extra [torchao] is not installed"
)
STEPS = 5
BF16 = ParallelConfig(param_dtype="float32", master_dtype="bfloat16")
ADAMW = OptimizerConfig(weight_decay=0.1)


class _Run:
    """A tiny sharded model in training; every rank has its share of eight packed rows."""

    def __init__(self, parallel: ParallelConfig, config: OptimizerConfig, **model: Any) -> None:
        self.model: Any = tiny_model(**model)
        mesh = build_mesh(parallel, world_size=dist.get_world_size(), device_type="cpu")
        classes = decoder_layer_classes(self.model)
        parallelise(
            self.model,
            parallel,
            mesh,
            layer_classes=classes,
            root_parameters=[self.model.head.weight],
        )
        self.optimizer = build_optimizer(self.model, config, layer_classes=classes)
        self.config = config

    def step(self) -> float:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = [random_documents([3 + 2 * seed, 9], seed=seed) for seed in range(8)]
        mine = rows[rank * 8 // ranks : (rank + 1) * 8 // ranks]
        loss, _ = causal_lm_loss(self.model, packed_batch(mine, 32))
        valid = sum(len(document) - 1 for row in rows for document in row)
        (loss * (ranks / valid)).backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        self.norm = clip_gradients(self.model.parameters(), 1.0)
        self.gradient_types = {p.grad.dtype for p in self.model.parameters()}
        set_learning_rate(self.optimizer, 3e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss) / valid

    def tensors(self) -> list[Tensor]:
        parameters = list(self.model.parameters())
        states = [self.optimizer.state[p] for p in parameters]
        values = [state[name] for state in states for name in sorted(state) if name != "step"]
        return [_plain(tensor) for tensor in (*parameters, *values)]


def _plain(tensor: Tensor) -> Tensor:
    """This rank's part, as numbers."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return (local.dequantize() if hasattr(local, "codes") else local).detach().clone()


def _trained(parallel: ParallelConfig, config: OptimizerConfig) -> dict[str, Any]:
    run = _Run(parallel, config)
    losses = [run.step() for _ in range(STEPS)]
    types = {p.dtype for p in run.model.parameters()}
    return {
        "losses": losses,
        "norm": run.norm,
        "types": types | run.gradient_types,
        "metrics": rounding_metrics(run.optimizer),
        "again": rounding_metrics(run.optimizer),
        "parameters": torch.cat([full(p).flatten() for p in run.model.parameters()]),
    }


def _resumes(folder: Path, parallel: ParallelConfig, config: OptimizerConfig, **model: Any) -> bool:
    """A run continued from a checkpoint is, bit for bit, the run that was not interrupted."""
    run = _Run(parallel, config, **model)
    for _ in range(2):
        run.step()
    at_once = CheckpointConfig(asynchronous=False)
    Checkpointer(folder, run.model, run.optimizer, at_once).save(2, {})
    expected = [run.step() for _ in range(3)]
    again = _Run(parallel, config, **model)
    checkpointer = Checkpointer(folder, again.model, again.optimizer, CheckpointConfig())
    checkpointer.restore(folder / "step-00000002")
    torch.manual_seed(99)  # nothing depends on it
    found = [again.step() for _ in range(3)]
    pairs = zip(run.tensors(), again.tensors(), strict=True)
    return found == expected and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _bf16_masters(folder: Path) -> dict[str, Any]:
    half = replace(ADAMW, state_dtype="bfloat16")
    cases = {
        "exact": (replace(BF16, master_dtype="float32"), ADAMW),
        "adamw": (BF16, ADAMW),
        "muon": (BF16, replace(half, name="muon")),
        "offloaded": (replace(BF16, cpu_offload=True), ADAMW),
        "nearest": (BF16, replace(ADAMW, rounding="nearest")),
    }
    found: dict[str, Any] = {name: _trained(*case) for name, case in cases.items()}
    for name in ("adamw", "muon"):
        found[f"{name} resumes"] = _resumes(folder / name, *cases[name])
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_masters_train_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    (one,) = run_ranks(_bf16_masters, 1, tmp_path / "1")
    two, other = run_ranks(_bf16_masters, 2, tmp_path / "2")
    for name in ("adamw", "muon", "offloaded", "nearest"):
        exact, found = one["exact"], one[name]
        assert found["types"] == {torch.bfloat16}
        assert exact["losses"][-1] < exact["losses"][0] - 0.5
        if name != "muon":  # bf16 weights have 8 bits
            assert found["losses"] == pytest.approx(exact["losses"], rel=2e-2), name
        # Noise belongs to a place in the whole tensor: only sums in another order differ, and turn few roundings;
        # more under Muon, which orthogonalises in bf16.
        close = 1e-3 if name == "muon" else 1e-5
        assert two[name]["losses"] == pytest.approx(found["losses"], rel=close), name
        assert two[name]["losses"] == other[name]["losses"]
        differ = two[name]["parameters"] != found["parameters"]
        assert float(differ.float().mean()) < (0.2 if name == "muon" else 0.03), name
        assert two[name]["norm"] == pytest.approx(found["norm"], rel=1e-3), name
    assert one["adamw"]["losses"] != one["nearest"]["losses"]
    for results in (one, two):
        assert results["adamw resumes"] and results["muon resumes"]
        assert results["exact"]["metrics"] == {}
        for name in ("adamw", "nearest"):
            (share,) = results[name]["metrics"].values()
            assert 1 < share < 60
            assert results[name]["again"] == {"update_rounded_to_zero_pct": None}
    assert two["adamw"]["metrics"] == other["adamw"]["metrics"]  # of both ranks


def _one_weight(rounding: Any, rate: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0, rounding=rounding))
    set_learning_rate(optimizer, rate)
    return model.weight, optimizer


def test_small_updates_survive_only_stochastic_rounding_and_are_counted() -> None:
    shares = {}
    for rounding in ("stochastic", "nearest"):
        # A step of 2**-11 at 1.0, where the numbers below are 2**-8 apart: an eighth of them move.
        weight, optimizer = _one_weight(rounding, 2.0**-11)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved = 1 - float(weight.detach().float().mean())
        expected = 40 * 2.0**-11 if rounding == "stochastic" else 0.0
        assert moved == pytest.approx(expected, rel=0.1)
        shares[rounding] = rounding_metrics(optimizer)["update_rounded_to_zero_pct"]
    assert shares["nearest"] == 100.0
    assert shares["stochastic"] == pytest.approx(87.5, abs=1.0)
    weight, optimizer = _one_weight("nearest", 2.0**-6)
    weight.grad = torch.ones_like(weight)
    weight.grad[:16] = 0.0  # nothing to round away
    optimizer.step()
    assert rounding_metrics(optimizer) == {"update_rounded_to_zero_pct": 0.0}


def test_bf16_gradients_have_their_norm_in_fp32() -> None:
    weights = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.1)
    exact = (3000 * float(torch.tensor(0.1).bfloat16()) ** 2) ** 0.5
    assert clip_gradients(weights, 0.0) == pytest.approx(exact, rel=1e-6)


def test_the_table_and_the_bytes_say_what_is_kept() -> None:
    parallel, optimizer = ParallelConfig(param_dtype="bfloat16"), OptimizerConfig()
    assert precision_table(parallel, optimizer, export_dtype="bfloat16") == {
        "masters": "float32",
        "optimizer state": "float32",
        "compute and all-gather": "bfloat16",
        "reduction": "float32",
        "export": "bfloat16",
    }
    least = replace(parallel, master_dtype="bfloat16", float8="rowwise")
    nearest = replace(optimizer, state_dtype="bfloat16", rounding="nearest")
    table = precision_table(least, nearest, export_dtype="float32")
    assert table["masters"] == "bfloat16 rounded to nearest"
    assert table["optimizer state"] == "bfloat16 rounded to nearest"
    assert table["compute and all-gather"] == "bfloat16, layers' products float8 rowwise"
    # Of a model that is all matrices the table's bytes are those the optimizer allocates.
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(state_dtype=dtype)
        model = nn.Linear(64, 64, bias=False)
        made = build_optimizer(model, config)
        model.weight.grad = torch.ones_like(model.weight)
        made.step()
        state = made.state[model.weight]
        allocated = sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
        assert state_bytes(made, config) == allocated
        assert bytes_per_parameter(parallel, config)["optimizer state"] * 64 * 64 == allocated


# Wide enough for float8's multiples of 16.
WIDE = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "vocab_size": 128}


def _with_torchao() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for recipe in ("tensorwise", "rowwise"):
        losses = []
        for float8 in (False, True):
            model = tiny_model(**WIDE)
            layers = [m for m in model.modules() if isinstance(m, decoder_layer_classes(model))]
            names = [name for name, _ in model.named_parameters()]
            if float8:
                assert compute_in_float8(layers, recipe, emulate=True) == 2 * 7
            assert [name for name, _ in model.named_parameters()] == names
            for module in (*layers, model):
                fully_shard(module)
            optimizer = build_optimizer(model, OptimizerConfig())
            set_learning_rate(optimizer, 3e-3)
            batch = packed_batch([random_documents([20, 9], seed=dist.get_rank())], 32)
            losses.append([])
            for _ in range(STEPS):
                loss, _ = causal_lm_loss(model, batch)
                (loss / 27).backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item() / 27)
        found[recipe] = losses
    return found


@needs_torchao
@pytest.mark.distributed
def test_float8_layers_train_sharded_close_to_fp32() -> None:
    found = run_ranks(_with_torchao, 2)[0]
    for name in ("tensorwise", "rowwise"):
        exact, ours = found[name]
        assert exact[-1] < exact[0] - 0.5, name
        assert ours == pytest.approx(exact, abs=0.1) and ours != exact, name


@needs_torchao
def test_float8_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**WIDE)
    layers = [m for m in model.modules() if isinstance(m, decoder_layer_classes(model))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainError, match=r"float8 rowwise needs a GPU .* 8\.9 .* here is no GPU"):
        compute_in_float8(layers, "rowwise")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(TrainError, match=r"8\.9 or more, and here is a GPU of 8\.0"):
        compute_in_float8(layers, "tensorwise")
    with pytest.raises(TrainError, match="multiples of 16, and this model has none"):
        compute_in_float8([nn.Linear(24, 32)], "tensorwise", emulate=True)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_float8_says_what_to_install() -> None:
    with pytest.raises(TrainError, match=r"pip install -c constraints.txt -e '.\[torchao\]'"):
        compute_in_float8([nn.Linear(32, 32)], "tensorwise")


@pytest.mark.parametrize(
    ("given", "device_type", "units", "expected"),
    [
        ("auto", "cuda", False, "bfloat16"),
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
    ],
)
def test_auto_is_bfloat16_but_where_it_is_emulated(
    monkeypatch: pytest.MonkeyPatch, given: Any, device_type: str, units: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda: units)
    assert definite(ParallelConfig(param_dtype=given), device_type).param_dtype == expected
