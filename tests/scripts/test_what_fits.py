"""The computed tables of the docs are what the code computes, from true counts of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.batching import batch_sizes
from scripts.config import TrainConfig
from scripts.planner.facts import find_model, shape_of
from scripts.what_fits import (
    GB,
    MODELS,
    activation_bytes,
    bytes_table,
    fits_table,
    models_table,
    need_of_rank,
    recipes,
    recipes_table,
)
from tests.support.command import ROOT
from tests.support.models import tiny_model
from trainer.config import ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.parallel import data_rank


def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    precision = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    what_fits = (ROOT / "docs" / "what-fits.md").read_text(encoding="utf-8")
    remedy = "paste what python scripts/what_fits.py prints"
    assert bytes_table() in precision, remedy
    assert models_table() in what_fits and fits_table() in what_fits, remedy
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipes_table() in recipes, remedy


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_in_closed_form_are_those_of_the_model(kind: str, tied: bool) -> None:
    model = tiny_model(kind, tied=tied)
    shape = shape_of(model.hf.config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layer = model.hf.base_model.layers[0]
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())


def test_models_have_the_parameters_their_cards_say() -> None:
    # From the model cards of Qwen2.5 and Qwen3, in thousand millions.
    cards = {"Qwen2.5-7B": 7.61, "Qwen2.5-72B": 72.7, "Qwen3-8B": 8.2, "Qwen3-30B-A3B": 30.5}
    cards |= {"Qwen2.5-0.5B": 0.49, "Qwen3-14B": 14.8, "Qwen3-235B-A22B": 235.0}
    for name, card in cards.items():
        assert MODELS[name].parameters / 1e9 == pytest.approx(card, rel=0.01), name


def test_recipes_divide_their_batches_and_fit_their_gpus() -> None:
    found = list(recipes())  # each read as train.py reads it
    # The rest are presets for a model that flags name.
    others = {"embedded.yaml", "lora.yaml"}
    assert {file.name for file, *_ in found} | others == {
        file.name for file in (ROOT / "scripts" / "recipes").iterdir()
    }
    assert len(found) > 10
    for file, ranks, gpu, config in found:
        data_ranks = data_rank(config.parallel, rank=0, world_size=ranks).size
        micro, rows, _ = batch_sizes(config, data_ranks)
        assert (config.micro_batch_size, config.global_batch_size) == (micro, rows), file.name
        model = find_model(config.model.name or "")
        assert config.data.seq_len <= model["max_position_embeddings"], file.name
        need = need_of_rank(shape_of(model), config, world_size=ranks)
        assert need.total <= 0.95 * gpu.memory_gib * 2**30, f"{file.name}: {need.total / GB:.0f} GB"


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("qwen3", {"intermediate_size": 192}),
        ("qwen2", {"intermediate_size": 192}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}),
    ],
)
def test_activations_in_closed_form_are_what_autograd_keeps(
    kind: str, shape: dict[str, Any]
) -> None:
    tokens = 256
    batch = {
        "input_ids": torch.arange(tokens)[None] % 90,
        "position_ids": torch.arange(tokens)[None],
        "labels": torch.arange(tokens)[None] % 90,
        "label_positions": torch.arange(tokens),
        "document_offsets": torch.tensor([0, tokens], dtype=torch.int32),
    }

    def kept(layers: int) -> tuple[int, float]:
        sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
        limits = {"num_hidden_layers": layers, "max_position_embeddings": tokens}
        # Not the attention for packed rows: on CPUs, unlike GPUs, it computes in fp32.
        model = tiny_model(kind, attention="sdpa", **sizes, **limits, **shape).to(torch.bfloat16)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # held, so that no other gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            causal_lm_loss(model, batch)
        config = TrainConfig(parallel=ParallelConfig(activation_checkpointing="none"))
        closed = activation_bytes(shape_of(model.hf.config.to_dict()), config, tokens=tokens)
        return sum(storage.nbytes() for storage in storages.values()), closed

    (counted_2, closed_2), (counted_3, closed_3) = kept(2), kept(3)
    assert closed_3 - closed_2 == pytest.approx(counted_3 - counted_2, rel=0.05)
