"""The table of what fits where, and the other computed tables of the docs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.config import TrainConfig
from scripts.plan import main
from scripts.planner.documents import bytes_table, recipe_row, recipes, written
from scripts.planner.facts import find_model
from scripts.planner.matrix import MACHINES, METHODS, MODELS, at_ranks, cells_of_model
from scripts.planner.memory import plan_memory
from scripts.planner.work import batch_of
from tests.scripts.test_planner_memory import SHAPE, run_config
from tests.support.command import ROOT
from tests.support.models import tiny_config

_REMEDY = "write it anew with python -m scripts.planner.documents"


def shown(model: str, method: str, gpus: int, gpu: str) -> str:
    """A cell of the table in the docs."""
    lines = written("matrix").splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith(f"| {gpus} x {gpu} |")]
    names = [cell.strip() for cell in lines[head].strip("|").split("|")]
    for line in lines[head:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == model.rpartition("/")[2]:
            return cells[names.index(method)]
    raise AssertionError(model)


@pytest.mark.slow
def test_cells_of_the_docs_are_those_of_the_command() -> None:
    full, adapters = "fp32 masters and state", "LoRA, rank 16"
    machine = MACHINES[:1]
    cells = cells_of_model(TrainConfig(), "Qwen/Qwen3-8B", methods=[full], machines=machine)
    cells += cells_of_model(TrainConfig(), "Qwen/Qwen3-0.6B", methods=[adapters], machines=machine)
    assert len(cells) == 2
    for cell in cells:
        assert shown(cell.model, cell.method, cell.gpus, cell.gpu) == str(cell), _REMEDY


def test_the_docs_have_a_cell_for_every_model_method_and_machine() -> None:
    for model in MODELS:
        for method in METHODS:
            for gpus, gpu in MACHINES:
                assert shown(model, method, gpus, gpu)


def test_bytes_of_a_parameter_are_those_of_the_docs() -> None:
    assert written("bytes") == bytes_table(), _REMEDY


def test_recipes_divide_their_batches() -> None:
    found = [*recipes()]  # each read as train.py reads it
    # The rest are presets for a model that flags name.
    others = {"embedded.yaml", "lora.yaml"}
    assert {file.name for file, *_ in found} | others == {
        file.name for file in (ROOT / "scripts" / "recipes").iterdir()
    }
    assert len(found) > 10
    for file, gpus, _, config in found:
        micro, rows, _ = batch_of(config, gpus=gpus)
        assert (config.micro_batch_size, config.global_batch_size) == (micro, rows), file.name
        model = find_model(config.model.name or "")
        assert config.data.seq_len <= model["max_position_embeddings"], file.name


def test_a_recipe_fits_as_the_docs_say() -> None:
    (recipe,) = [recipe for recipe in recipes() if recipe[0].name == "qwen3-8b.yaml"]
    assert recipe_row(*recipe) in written("recipes").splitlines(), _REMEDY


def test_memory_on_many_ranks_follows_from_that_on_few() -> None:
    def traced(ranks: int) -> Any:
        # Rows that divide by 64, as those of published models do.
        shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        hf_config = tiny_config(**shape | {"vocab_size": 4096, "tied": False})
        return plan_memory(
            run_config(),
            hf_config,
            world_size=ranks,
            micro_batch_size=1,
            grad_accum_steps=1,
            gpu_gib=80,
        )

    found, expected = at_ranks({2: traced(2), 8: traced(8)}, 64), traced(64)
    for phase, parts in expected.phases.items():
        assert found.phases[phase].total() == pytest.approx(parts.total(), rel=0.005), phase
    assert found.reserved_bytes == pytest.approx(expected.reserved_bytes, rel=0.005)


def test_a_matrix_of_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--matrix", "--model.name", "Foo/Bar"]) == 2
    error = capsys.readouterr().err
    assert "--matrix does not know Foo/Bar; there are Qwen2.5-0.5B" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_matrix_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.name", "Qwen/Qwen3-0.6B", "--data.seq_len", "512"]
    assert main(["--matrix", "--json", *flags]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert len(cells) == len(MACHINES) * len(METHODS)
    assert all(cell["fits"] and cell["recompute"] == "none" for cell in cells)
    needed = {(cell["method"], cell["gpus"], cell["gpu"]): cell["needed_gib"] for cell in cells}
    full, half, adapters = "fp32 masters and state", "bf16 masters and state", "LoRA, rank 16"
    for gpus, gpu in MACHINES:
        assert needed[full, gpus, gpu] > needed[half, gpus, gpu] > needed[adapters, gpus, gpu]
    assert needed[full, 2, "h100-nvl"] > needed[full, 8, "h200"] > needed[full, 64, "h100-sxm"]
