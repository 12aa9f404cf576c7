"""The traced memory: against what real ranks allocate, against arithmetic, and extrapolated against traced whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.build import decoder_layer_classes, materialise
from models.config import LoraConfig, ModelConfig
from models.weights import init_weights
from scripts.config import TrainConfig
from scripts.modelling import sharded_without_weights, training_loss
from scripts.planner.memory import _KERNEL_ATTENTION, plan_memory, trace_step
from tests.support.allocations import peak_bytes, register_variable_length_kernel
from tests.support.models import packed_batch, random_documents, tiny_config
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.parallel import build_mesh, set_gradient_sync

S = 256
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
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
        parallel=ParallelConfig(**(parallel or {})),
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
    "LoRA": (run_config(lora=4), {"tied": False}, 1),
    "last layers": (run_config(last_layers=2), {"tied": False}, 1),
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


def measure() -> dict[str, int]:
    """Bytes of this rank at the peak of its second step, case by case."""
    register_variable_length_kernel()
    return {name: _measured(*case) for name, case in CASES.items()}


def _measured(config: TrainConfig, shape: dict[str, Any], grad_accum_steps: int) -> int:
    mesh = build_mesh(config.parallel, world_size=2, device_type="cpu")
    model = sharded_without_weights(config, tiny_config(**SHAPE | shape), [], mesh)
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.hf.set_attn_implementation(_KERNEL_ATTENTION)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        layer_classes=decoder_layer_classes(model),
        embedding=model.embedding.weight,
        head=model.head.weight,
    )
    batch = packed_batch([random_documents([S])], S)
    batch |= {"labels": torch.ones(1, S, dtype=torch.int64), "label_positions": torch.arange(S)}
    if config.parallel.cp > 1:
        part = S // config.parallel.cp
        names = ("input_ids", "labels", "position_ids")
        batch |= {name: batch[name][:, :part] for name in names}
        batch["label_positions"] = torch.arange(part)
    loss_fn = training_loss(model)

    def step() -> None:
        for micro_batch in range(grad_accum_steps):
            set_gradient_sync(model, last=micro_batch == grad_accum_steps - 1)
            loss_sum, _ = loss_fn(model, batch)
            loss_sum.backward()
        clip_gradients(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    return sum(_local(tensor).nbytes for tensor in held) + peak_bytes(step)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.distributed
def test_traced_memory_is_what_two_ranks_allocate() -> None:
    measured = run_ranks(measure, 2)[0]

    for name, (config, shape, grad_accum_steps) in CASES.items():
        traced = trace_step(
            config,
            tiny_config(**SHAPE | shape),
            world_size=2,
            micro_batch_size=1,
            grad_accum_steps=grad_accum_steps,
            on_gpu=False,
        )
        peak = max(traced.phases.values(), key=lambda parts: parts.total())
        print(
            f"{name:<26}{measured[name]:>12,}{peak.total():>12,}{peak.total() / measured[name] - 1:>8.2%} {dict(peak)}"
        )
    for name, (config, shape, grad_accum_steps) in CASES.items():
        pass
