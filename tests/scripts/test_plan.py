"""plan.py as a command, and the plan of a run beside what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.command_line import parse_train_config, to_yaml
from scripts.config import TrainConfig
from scripts.plan import main
from scripts.planned import begin_plan, compare, comparison_table, planned_memory, read_plan
from scripts.planner.documents import sample, written
from scripts.planner.facts import GPUS, find_model, shape_of
from scripts.planner.planning import Plan, make_plan, planned_model
from scripts.planner.published import (
    PUBLISHED,
    deviation,
    errors_without_own_source,
    read_points,
)
from scripts.planner.search import recipe, search
from scripts.planner.speed import Work
from tests.support.models import tiny_config

NAMED = {
    "memory_allocated_gib",
    "memory_reserved_gib",
    "fits",
    "tokens_per_second_per_gpu",
    "mfu_pct",
    "step_seconds",
    "bound_by",
    "interval",
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with nothing but its configuration."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(tied=False).save_pretrained(folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_known_model_is_planned_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.name", "Qwen/Qwen3-8B", "--data.seq_len", "4096", "--steps", "100"]
    plan = planned(capsys, *flags, "--parallel.activation_checkpointing", "full")

    assert plan.keys() >= NAMED
    assert plan["gpus"] == 2 and plan["gpu"] == "h100-nvl"
    assert plan["fits"] and 65 < plan["memory_allocated_gib"] < 75  # 16 bytes a parameter, and more
    assert plan["memory_allocated_gib"] == pytest.approx(sum(plan["memory_parts_gib"].values()))
    assert plan["parameters"] == shape_of(find_model("Qwen/Qwen3-8B")).parameters
    low, high = plan["interval"]
    assert low < plan["tokens_per_second_per_gpu"] < high
    assert plan["tokens"] == 100 * 2 * 4096
    assert plan["gpu_hours"] == pytest.approx(100 * plan["step_seconds"] * 2 / 3600)
    assert sum(plan["step_parts_seconds"].values()) == pytest.approx(plan["step_seconds"])
    assert plan["hfu_pct"] > plan["mfu_pct"]


def test_the_docs_show_what_the_command_prints() -> None:
    assert written("sample") == sample(), "python -m scripts.planner.documents sample"


def test_the_plan_as_text(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    flags = ["--model.path", str(tiny_folder), "--data.seq_len", "64"]
    assert main([*flags, "--gpus", "4", "--parallel.prefetch_layers", "0", "--tokens", "1e6"]) == 0
    out = capsys.readouterr().out

    assert "on 4 x h100-nvl" in out
    assert "bound by communication (network)" in out  # two machines
    assert (
        "note     bound by communication: 2 machines of 2 h100-nvl, joined by 80 Gb/s each" in out
    )
    for line in ("memory ", "speed ", "step ", "run ", "remedy "):
        assert f"\n{line}" in out
    header, *rows = out.split("\n\n")[1].splitlines()
    assert header.startswith("GiB") and header.endswith("all")
    assert [row.split()[0] for row in rows] == [
        "forward",
        "loss",
        "backward",
        "clipping",
        "optimizer",
    ]
    assert max(map(len, out.splitlines())) < 140


def test_flags_change_the_plan(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    flags = ["--model.path", str(tiny_folder), "--data.seq_len", "64"]
    plain = planned(capsys, *flags)
    fewer = planned(capsys, *flags, "--labels_pct", "10", "--document_length", "8")
    offloaded = planned(capsys, *flags, "--parallel.cpu_offload")

    assert fewer["step_parts_seconds"]["loss"] < plain["step_parts_seconds"]["loss"]
    assert fewer["step_parts_seconds"]["attention"] < plain["step_parts_seconds"]["attention"]
    assert fewer["memory_allocated_gib"] < plain["memory_allocated_gib"]
    assert "parameters" not in offloaded["memory_parts_gib"]
    assert offloaded["memory_allocated_gib"] < plain["memory_allocated_gib"]
    # Masters, gradients and AdamW's state, shared by two; padding to 512 bytes a tensor comes on top.
    held = 16 * plain["parameters"] / 2 / 2**30
    assert plain["memory_host_gib"] == 0
    assert held < offloaded["memory_host_gib"] < 1.3 * held


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--gpu", "a100"], 2, "--gpu a100 is not known; there are h100-sxm, h100-nvl"),
        (["--tokns", "2"], 2, "did you mean --tokens?"),
        (["--gpus", "0"], 2, "--gpus must be at least 1"),
        (["--labels_pct", "0"], 2, "--labels_pct must be above 0"),
        (["--gpus", "6", "--parallel.tp", "4"], 1, "does not make 6 ranks"),
        (["--data.seq_len", "100000"], 1, "use --data.seq_len 40960 or less"),
        (["--global_batch_size", "7"], 1, "global_batch_size 7 is not divisible"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], code: int, told: str
) -> None:
    assert main(["--model.name", "Qwen/Qwen3-0.6B", *flags]) == code
    error = capsys.readouterr().err
    assert error.startswith("plan.py: error: ") and error.count("\n") == 1
    assert told in error


def test_the_interval_holds_what_was_measured_and_grows_where_little_is_known() -> None:
    points, _ = read_points(PUBLISHED)
    off = np.abs(np.log1p(errors_without_own_source(points) / 100))
    inside = [off[i] < 1.645 * deviation(point.work) for i, point in enumerate(points)]
    assert np.mean(inside) >= 0.9  # as docs/planning.md says

    shape = shape_of(find_model("Qwen/Qwen3-8B"))
    usual = Work(shape, GPUS["h100-sxm"], 8, tokens=8192, squared_lengths=8192.0**2)
    experts = shape_of(find_model("Qwen/Qwen3-30B-A3B"))
    for thin in (
        {"gpu": GPUS["h100-nvl"], "gpus": 2},
        {"shape": experts},
        {"gpus": 4096},
        {"tensor_parallel": 2},
    ):
        assert deviation(replace(usual, **thin)) > 1.02 * deviation(usual)


def rows(*speeds: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "tokens_per_second_per_gpu": speed,
            "tokens": 75,
            "padding_tokens": 25,
            "step_seconds": 100 / speed,
            "memory_peak_gib": 40.0 + step,
        }
        for step, speed in enumerate(speeds)
    ]


def test_a_run_is_compared_with_its_plan() -> None:
    plan = {
        "memory_allocated_gib": 44.0,
        "tokens_per_second_per_gpu": 4000.0,
        "step_seconds": 0.04,
    }
    # The first row has the warm-up in it; a quarter of what is computed is padding.
    compared = compare(plan, [*rows(10.0, 3000.0, 3000.0), {"step": 2, "eval_loss": 1.0}])

    assert compared["tokens_per_second_per_gpu"] == {
        "planned": 4000.0,
        "measured": 4000.0,
        "error_pct": 0.0,
    }
    assert compared["memory_allocated_gib"]["measured"] == 42.0
    assert compared["memory_allocated_gib"]["error_pct"] == pytest.approx(100 * 2 / 42)
    lines = comparison_table(compared).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["tokens/s/GPU", "4,000", "4,000"]
    assert compare(plan, []) == {}


def test_memory_that_runs_out_is_told_with_its_plan(tmp_path: Path) -> None:
    assert planned_memory(tmp_path) == ""
    plan = {
        "memory_allocated_gib": 82.8,
        "memory_gpu_gib": 93.1,
        "memory_parts_gib": {"parameters": 15.3, "activations": 67.5, "gradients": 0},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan)[:-3])  # still being written
    assert planned_memory(tmp_path) == ""
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert planned_memory(tmp_path) == (
        " (plan.py: 82.8 GiB at the peak, of 93.1: parameters 15.3, activations 67.5)"
    )


@pytest.mark.slow
def test_a_run_is_planned_beside_it(tmp_path: Path, tiny_folder: Path) -> None:
    flags = ["--model.path", str(tiny_folder), "--data.seq_len", "64", "--model.init", "random"]
    (tmp_path / "config.yaml").write_text(to_yaml(parse_train_config(flags)), encoding="utf-8")
    unknown = begin_plan(tmp_path, gpu="NVIDIA A100", gpus=2, rows=[])
    assert unknown() is None and not (tmp_path / "plan.json").exists()

    rows = ["--labels_pct", "50", "--document_length", "20"]
    planned = begin_plan(tmp_path, gpu="NVIDIA H100 NVL", gpus=2, rows=rows)()

    assert planned is not None and planned == read_plan(tmp_path)
    assert (planned["gpu"], planned["gpus"]) == ("h100-nvl", 2)
    assert f"of {planned['memory_gpu_gib']:.1f}: " in planned_memory(tmp_path)


def test_a_recipe_is_what_is_not_default(tmp_path: Path) -> None:
    flags = ["--model.name", "Qwen/Qwen3-8B", "--data.seq_len", "512", "--lora.targets", "[q_proj]"]
    config = parse_train_config([*flags, "--lora.rank", "8", "--parallel.cpu_offload"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(config), encoding="utf-8")

    assert parse_train_config(["--config", str(file)]) == config
    assert len(file.read_text(encoding="utf-8").splitlines()) < 12


@pytest.mark.slow
def test_search_writes_the_fastest_way_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    flags = ["--model.path", str(tiny_folder), "--data.seq_len", "64", "--global_batch_size", "4"]
    assert main([*flags, "--search", str(file)]) == 0
    header, *ways, last = capsys.readouterr().out.splitlines()

    assert header.split()[0] == "way" and last == (
        f"the first is in {file}: train.py --config {file}"
    )
    speeds = [int(way.split()[-3].replace(",", "")) for way in ways]
    assert len(ways) == 8 and speeds == sorted(speeds, reverse=True)  # 4 modes, 1 or 2 rows
    assert ways[0].startswith("2 rows, recompute none")
    assert parse_train_config(["--config", str(file)]).micro_batch_size == 2


@pytest.mark.slow
def test_the_last_resort_is_a_recipe_that_train_takes(tmp_path: Path) -> None:
    flags = ["--model.name", "Qwen/Qwen3-0.6B", "--data.seq_len", "512", "--global_batch_size", "2"]
    config = parse_train_config(flags)
    name, hf_config = planned_model(config, None)
    # 16 bytes a parameter fit neither the GPUs nor the host; 2 and adapters do.
    small = replace(GPUS["h100-nvl"], torch_gib=4.0, host_gib=4.0)

    def make(config: TrainConfig) -> Plan:
        return make_plan(config, name, hf_config, gpu=small, gpus=2)

    found = search(config, make, gpu=small, gpus=2)
    assert found and all("LoRA 16" in one.how for one in found)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(found[0].config), encoding="utf-8")
    assert parse_train_config(["--config", str(file)]) == found[0].config
    # Without pretrained weights there is nothing to adapt.
    random = parse_train_config([*flags, "--model.init", "random"])
    assert search(random, make, gpu=small, gpus=2) == []


def test_the_same_run_on_more_gpus(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    flags = ["--model.path", str(tiny_folder), "--gpu", "h100-sxm", "--data.seq_len", "64"]
    flags += ["--scale", "2,16"]
    few, many = planned(capsys, *flags)
    assert (few["gpus"], many["gpus"]) == (2, 16)
    assert many["memory_parts_gib"]["parameters"] < few["memory_parts_gib"]["parameters"]

    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split()[:3] == ["GPUs", "sharding", "GiB"]

    assert main([*flags[:-1], "2,x"]) == 2
    assert "--scale takes numbers such as 2,8,64, got '2,x'" in capsys.readouterr().err
    assert main([*flags, "--parallel.dp_shard", "2"]) == 1
    assert "on 16 GPUs: " in capsys.readouterr().err
