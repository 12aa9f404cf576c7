"""The computed tables of the docs are what the code computes, from true counts of parameters."""

from __future__ import annotations

import pytest

from scripts.planner.facts import shape_of
from scripts.what_fits import MODELS, bytes_table, fits_table, models_table
from tests.support.command import ROOT
from tests.support.models import tiny_model


def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    precision = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    what_fits = (ROOT / "docs" / "what-fits.md").read_text(encoding="utf-8")
    remedy = "paste what python scripts/what_fits.py prints"
    assert bytes_table() in precision, remedy
    assert models_table() in what_fits and fits_table() in what_fits, remedy


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
