"""The computed tables of the docs are what the code computes, from true counts of parameters."""

from __future__ import annotations

import pytest

from scripts.what_fits import MODELS, Shape, bytes_table, fits_table, models_table
from tests.support.command import ROOT
from tests.support.models import tiny_config, tiny_model


def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    precision = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    what_fits = (ROOT / "docs" / "what-fits.md").read_text(encoding="utf-8")
    remedy = "paste what python scripts/what_fits.py prints"
    assert bytes_table() in precision, remedy
    assert models_table() in what_fits and fits_table() in what_fits, remedy


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_in_closed_form_are_those_of_the_model(kind: str, tied: bool) -> None:
    config = tiny_config(kind, tied=tied)
    shape = Shape(
        "tiny",
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        head_width=8,
        vocabulary=config.vocab_size,
        tied=tied,
        qwen2=kind == "qwen2",
    )
    model = tiny_model(kind, tied=tied)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.hf.base_model.layers[0].parameters())


def test_models_have_the_parameters_their_cards_say() -> None:
    # From the model cards of Qwen2.5 and Qwen3, in thousand millions.
    cards = {"Qwen2.5-7B": 7.61, "Qwen2.5-72B": 72.7, "Qwen3-8B": 8.2, "Qwen3-30B-A3B": 30.5}
    cards |= {"Qwen2.5-0.5B": 0.49, "Qwen3-14B": 14.8, "Qwen3-235B-A22B": 235.0}
    for model in MODELS:
        if model.name in cards:
            assert model.parameters / 1e9 == pytest.approx(cards[model.name], rel=0.01), model.name
