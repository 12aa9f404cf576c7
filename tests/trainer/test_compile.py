"""Compiled layers: nothing is compiled again after the first step, also where layers are recomputed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import trainer.parallel
from models.build import decoder_layer_classes
from tests.support.models import full, packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.parallel import build_mesh, compile_layers, parallelise, set_gradient_sync

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
LENGTHS = [[24], [12, 12], [3, 20], [1, 1, 1], [5], [2, 7, 9, 1], [4, 4, 4, 4, 4]]


def _compiled() -> dict[str, int]:
    """How much torch has compiled, and what it gave up."""
    names = ("calls_captured", "unique_graphs")
    return {
        **{name: counters["stats"][name] for name in names},
        "left uncompiled": counters["frames"]["total"] - counters["frames"]["ok"],
    }


def _train(config: ParallelConfig) -> dict[str, Any]:
    """Steps of two micro-batches with evaluation and generation between them."""
    # What dynamo captures and guards does not depend on what generates the code; inductor takes minutes here.
    trainer.parallel.compile_layers = partial(compile_layers, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(num_hidden_layers=4)
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        forward_methods=["generate"],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {"losses": [], "evaluations": [], "answers": [], "compiled": []}
    for step in range(3):
        for number in range(2):
            # Documents of other lengths and number; the shapes are those of every packed batch.
            lengths = LENGTHS[(2 * step + number + dist.get_rank()) % len(LENGTHS)]
            batch = packed_batch([random_documents(lengths, seed=step)], 24, max_documents=6)
            set_gradient_sync(model, last=number == 1, config=config)
            loss, _ = causal_lm_loss(model, batch)
            loss.backward()
            found["losses"].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found["evaluations"].append(causal_lm_loss(model, batch)[0].item())
            model.reshard()  # type: ignore[operator]  # a method of FSDP modules
            prompt = torch.arange(2, 7 + step)[None]
            answer = model.generate(prompt, max_new_tokens=4, do_sample=False)
            model.reshard()  # type: ignore[operator]
        model.train()
        found["answers"].append(answer.tolist())
        found["compiled"].append(_compiled())
    found["weights"] = [full(p) for p in model.parameters()]
    return found


def _all(configs: dict[str, ParallelConfig]) -> dict[str, Any]:
    return {name: _train(config) for name, config in configs.items()}


def test_nothing_is_compiled_again_and_recomputed_layers_are_compiled_too() -> None:
    fp32: dict[str, Any] = {"param_dtype": "float32"}
    inside: dict[str, Any] = {**fp32, "compile": True, "wrap_policy": "module:Qwen3MLP"}
    configs = {
        "eager": ParallelConfig(**fp32),
        "none": ParallelConfig(**fp32, compile=True),
        "full": ParallelConfig(**fp32, compile=True, activation_checkpointing="full"),
        "groups in layers": ParallelConfig(**inside, activation_checkpointing="full"),
    }
    for found in run_ranks(_all, 2, configs, timeout=280):
        eager = found.pop("eager")
        assert eager["compiled"][-1]["unique_graphs"] == 0
        for name, case in found.items():
            first, *later = case["compiled"]
            assert first["unique_graphs"] > 0 and first["left uncompiled"] == 0, name
            assert later == [first] * len(later), name
            assert case["losses"] == pytest.approx(eager["losses"], rel=1e-4), name
            assert case["evaluations"] == pytest.approx(eager["evaluations"], rel=1e-4), name
            assert case["answers"] == eager["answers"], name
        # The same layer is recomputed: what is compiled is what runs without recomputation.
        assert found["full"]["compiled"] == found["none"]["compiled"]
        for a, b in zip(found["full"]["weights"], found["none"]["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
