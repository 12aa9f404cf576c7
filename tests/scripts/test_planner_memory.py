"""The traced memory: against what real ranks allocate, against arithmetic, and extrapolated against traced whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.build import materialise
from models.config import LoraConfig, ModelConfig
from models.errors import ModelError
from scripts.config import TrainConfig
from scripts.modelling import optimizer_of, sharded_without_weights, training_loss
from scripts.planner.memory import (
    KERNEL_ATTENTION,
    MemoryPlan,
    fake_ranks,
    plan_memory,
    trace_step,
)
from tests.support.allocations import LiveBytes, register_variable_length_kernel
from tests.support.models import packed_batch, random_documents, tiny_config, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.optimizer import clip_gradients
from trainer.parallel import build_mesh, set_gradient_sync

S, LABELS = 256, 32
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 24,
    "max_position_embeddings": S,
    "vocab_size": 1500,
}


def run_config(
    *,
    parallel: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    lora: int = 0,
    last_layers: int = 0,
) -> TrainConfig:
    config = TrainConfig(
        model=ModelConfig(train_last_layers=last_layers),
        lora=LoraConfig(rank=lora),
        parallel=ParallelConfig(**{"param_dtype": "bfloat16"} | (parallel or {})),
        optimizer=OptimizerConfig(**(optimizer or {})),
    )
    return replace(config, data=replace(config.data, seq_len=S))


def ac(mode: str) -> dict[str, Any]:
    return {"activation_checkpointing": mode}


# Settings of a run, of the model, and micro-batches a step.
CASES: dict[str, tuple[TrainConfig, dict[str, Any], int]] = {
    "plain, tied": (run_config(), {"tied": True}, 1),
    "plain, untied": (run_config(), {"tied": False}, 1),
    "full": (run_config(parallel=ac("full")), {"tied": False}, 1),
    "selective": (run_config(parallel=ac("selective")), {"tied": True}, 1),
    "op": (run_config(parallel=ac("op")), {"tied": False}, 1),
    "accumulated": (run_config(), {"tied": False}, 4),
    "accumulated, recomputed": (run_config(parallel=ac("full")), {"tied": True}, 2),
    "accumulated in shards": (
        run_config(parallel={"accumulation": "sharded"}),
        {"tied": False},
        3,
    ),
    "LoRA": (run_config(lora=4), {"tied": False}, 1),
    "last layers": (run_config(last_layers=1), {"tied": False}, 1),
    "bf16 masters and state": (
        run_config(parallel={"master_dtype": "bfloat16"}, optimizer={"state_dtype": "bfloat16"}),
        {"tied": False},
        1,
    ),
    "Muon": (run_config(optimizer={"name": "muon"}), {"tied": True}, 1),
    "fp32, kept after forward": (
        run_config(parallel={"param_dtype": "float32", "reshard_after_forward": False}),
        {"tied": True},
        1,
    ),
    "experts": (
        run_config(parallel=ac("full")),
        {"kind": "qwen3_moe", "tied": False, "moe_intermediate_size": 64},
        1,
    ),
    "cp": (run_config(parallel={"cp": 2}), {"tied": True}, 1),
    "tp": (run_config(parallel={"tp": 2}), {"tied": False}, 1),
}


# The others take as long again: they are for the slow tests.
QUICK = [
    "plain, tied",
    "plain, untied",
    "selective",
    "op",
    "accumulated, recomputed",
    "LoRA",
    "experts",
]


def measure(names: list[str]) -> dict[str, int]:
    """Bytes of this rank at the peak of its second step, case by case."""
    register_variable_length_kernel()
    return {name: _measured(*CASES[name]) for name in names}


def _measured(config: TrainConfig, shape: dict[str, Any], grad_accum_steps: int) -> int:
    mesh = build_mesh(config.parallel, world_size=2, device_type="cpu")
    model = sharded_without_weights(config, tiny_config(**SHAPE | shape), [], mesh)
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.hf.set_attn_implementation(KERNEL_ATTENTION)
    optimizer = optimizer_of(model, config.optimizer)
    batch = packed_batch([random_documents([S])], S)
    batch |= {
        "labels": torch.ones(1, S, dtype=torch.int64),
        "label_positions": torch.arange(LABELS),
    }
    if config.parallel.cp > 1:
        part = S // config.parallel.cp
        names = ("input_ids", "labels", "position_ids")
        batch |= {name: batch[name][:, :part] for name in names}
        batch["label_positions"] = torch.arange(LABELS // config.parallel.cp)
    loss_fn = training_loss(config, model)

    def step() -> None:
        for micro_batch in range(grad_accum_steps):
            set_gradient_sync(model, micro_batch == grad_accum_steps - 1, config.parallel)
            loss_sum, _ = loss_fn(model, batch)
            loss_sum.backward()
        clip_gradients(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = (value for state in optimizer.state.values() for value in state.values())
    with LiveBytes([*model.parameters(), *states]) as live:
        step()
    return live.peak


def compare_with_ranks(names: list[str]) -> None:
    measured = run_ranks(measure, 2, names, timeout=280)[0]
    for name in names:
        config, shape, grad_accum_steps = CASES[name]
        traced = trace_step(
            config,
            tiny_config(**SHAPE | shape),
            world_size=2,
            micro_batch_size=1,
            grad_accum_steps=grad_accum_steps,
            gpu_gib=None,
            labels=LABELS / S,
        )
        peak = max(parts.total() for parts in traced.phases.values())
        assert peak == pytest.approx(measured[name], rel=0.02), name


@pytest.mark.slow
@pytest.mark.distributed
def test_traced_memory_is_what_two_ranks_allocate() -> None:
    compare_with_ranks(QUICK)


@pytest.mark.slow
@pytest.mark.distributed
def test_traced_memory_is_what_two_ranks_allocate_in_other_ways_to_train() -> None:
    compare_with_ranks([name for name in CASES if name not in QUICK])


def plan(config: TrainConfig, *, world_size: int = 2, **shape: Any) -> MemoryPlan:
    hf_config = tiny_config(**SHAPE | {"tied": False} | shape)
    return plan_memory(
        config,
        hf_config,
        world_size=world_size,
        micro_batch_size=1,
        grad_accum_steps=1,
        gpu_gib=80,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "grad_accum_steps"),
    [
        (run_config(), 1),
        (run_config(), 4),
        (run_config(parallel=ac("full")), 1),
        (run_config(parallel={**ac("selective"), "checkpoint_every": 3}), 4),
        (run_config(last_layers=9), 1),
    ],
    ids=["plain", "accumulated", "full", "selective and accumulated", "last layers"],
)
def test_extrapolated_memory_is_that_of_the_whole_model(
    config: TrainConfig, grad_accum_steps: int
) -> None:
    hf_config = tiny_config(**SHAPE | {"tied": False, "num_hidden_layers": 17})
    given: dict[str, Any] = {
        "world_size": 4,
        "micro_batch_size": 1,
        "grad_accum_steps": grad_accum_steps,
        "gpu_gib": 80,
    }
    planned = plan_memory(config, hf_config, **given)
    whole = trace_step(config, hf_config, **given)

    peaks: dict[str, int] = {}
    for place, parts in whole.phases.items():
        phase = place.partition("/")[0]
        peaks[phase] = max(peaks.get(phase, 0), parts.total())
    found = {phase: parts.total() for phase, parts in planned.phases.items()}
    assert found == pytest.approx(peaks, rel=1e-3)
    assert planned.parameters == whole.parameters
    assert planned.trained_parameters == whole.trained_parameters


def test_parts_are_those_that_arithmetic_gives() -> None:
    config = run_config(
        parallel={"master_dtype": "bfloat16"}, optimizer={"state_dtype": "bfloat16"}
    )
    held = plan(config, num_hidden_layers=2, vocab_size=1536).phases["optimizer"]
    parameters = plan(run_config(), num_hidden_layers=2, vocab_size=1536)

    per_rank = parameters.parameters / 2
    assert held["parameters"] == pytest.approx(2 * per_rank, rel=0.01)
    full = parameters.phases["optimizer"]
    for part, each in (("parameters", 4), ("gradients", 4), ("optimizer state", 8)):
        assert full[part] == pytest.approx(each * per_rank, rel=0.01)


def check_shards(replicas: int, shards: int) -> None:
    """Of every parameter of a model sharded over a world that does not exist."""
    config = run_config(parallel={"dp_replicate": replicas, "dp_shard": shards})
    hf_config: Any = tiny_config(**SHAPE | {"tied": False})
    with fake_ranks(replicas * shards):
        mesh = build_mesh(config.parallel, world_size=replicas * shards, device_type="cpu")
        model = sharded_without_weights(config, hf_config, [], mesh)
        whole = dict(tiny_model(**SHAPE | {"tied": False}).named_parameters())
        parameters = dict(model.named_parameters())
        assert parameters.keys() == whole.keys()
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            rows, *rest = whole[name].shape
            # Rank 0 has the largest part, and no rank's replicas share it again.
            assert parameter.to_local().shape == (-(-rows // shards), *rest), name
            assert parameter.device_mesh.shape == (replicas, shards)
            assert parameter.placements == (Replicate(), Shard(0))
    planned = plan(config, world_size=replicas * shards)
    expected = sum(-(-p.shape[0] // shards) * p[0].numel() * 4 for p in whole.values())
    assert planned.parts["parameters"] == pytest.approx(expected, rel=0.03)  # blocks of 512 bytes


def test_hybrid_sharding_over_64_ranks_that_do_not_exist() -> None:
    check_shards(8, 8)


@pytest.mark.slow
def test_hybrid_sharding_over_1024_ranks_that_do_not_exist() -> None:
    check_shards(128, 8)


def test_linear_attention_is_not_planned() -> None:
    with pytest.raises(ModelError, match="cannot be traced without a GPU"):
        plan(run_config(), kind="qwen3_next", num_hidden_layers=2)
