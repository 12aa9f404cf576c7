"""A calibration file replaces what it measures, and nothing else; what is wrong with one is one line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.plan import main
from scripts.planner.calibration import FORMAT, CalibrationError, read_calibration
from scripts.planner.constants import Constants, fitted_constants
from scripts.planner.facts import GPUS, find_model, shape_of
from scripts.planner.published import deviation
from scripts.planner.speed import (
    Work,
    attention_rate,
    bus_bandwidth,
    latency,
    matmul_rate,
    predict,
)

GPU = GPUS["h100-nvl"]
# Another machine than the published ones.
TRUE = replace(
    fitted_constants(),
    gemm_share=0.68,
    gemm_half_width=700.0,
    attention_flops=450e12,
    memory_share=0.85,
    link_share=0.6,
    network_share=0.5,
    float32_share=0.4,
)
QWEN = find_model("Qwen/Qwen3-8B")
FLAGS = ["--data.seq_len=4096", "--micro_batch_size=2"]
WORK = Work(
    shape_of(QWEN), GPU, 2, tokens=8192, squared_lengths=8192.0 * 4096, labels_share=0.5, shards=2
)


def written(**measurements: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "gpu": "h100-nvl",
        "device_name": "NVIDIA H100 NVL",
        "torch": "2.13.0",
        "date": "2026-11-28",
        "measurements": measurements,
    }


def measured_on(constants: Constants) -> dict[str, Any]:
    """What a machine with these constants measures."""

    def products(*, float32: bool) -> list[dict[str, float]]:
        return [
            {
                "m": tokens,
                "n": 3 * width,
                "k": width,
                "flops_per_second": matmul_rate(
                    GPU, constants, width=width, tokens=tokens, float32=float32
                ),
            }
            for width in (1024, 4096)
            for tokens in (1024, 8192)
        ]

    def collective(op: str, ranks: int, size: float) -> dict[str, Any]:
        moved = size * (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks
        rate = bus_bandwidth(GPU, constants, across_nodes=ranks > 2)
        seconds = moved / rate + latency(constants, ranks)
        return {"op": op, "ranks": ranks, "bytes": size, "bytes_per_second": moved / seconds}

    return written(
        matmul_flops={"bfloat16": products(float32=False), "float32": products(float32=True)},
        memory_bandwidth_bytes_per_second=constants.memory_share * GPU.memory_bytes_per_second,
        collectives=[
            collective(op, ranks, size)
            for op in ("all_gather", "reduce_scatter", "all_reduce")
            for ranks in (2, 4)
            for size in (2**20, 2**28)
        ],
        attention_flops=[
            # Too short to count.
            {"seq_len": 4096, "document": 512, "flops_per_second": 1e12},
            {
                "seq_len": 4096,
                "flops_per_second": 3
                * attention_rate(GPU, constants)
                / (1 + 2.5 / constants.attention_backward_share),
            },
        ],
        host_bytes_per_second=40e9,
        memory_total_bytes=93.5 * 2**30,
        reserved_over_allocated=1.08,
    )


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_constants_become_those_that_were_measured(tmp_path: Path) -> None:
    calibration = read_calibration(write(tmp_path, measured_on(TRUE)), GPU)

    changed = {name for name in vars(TRUE) if vars(TRUE)[name] != vars(fitted_constants())[name]}
    for name in changed:
        assert getattr(calibration.constants, name) == pytest.approx(
            getattr(TRUE, name), rel=0.015
        ), name
    untouched = ("elementwise_passes", "eager_factor", "loss_bytes_per_logit", "exposed_share")
    for name in (*untouched, "float8_gain", "optimizer_bytes"):
        assert getattr(calibration.constants, name) == getattr(fitted_constants(), name), name
    assert changed <= {*calibration.replaced} and not {*untouched} & {*calibration.replaced}
    assert calibration.gpu == replace(GPU, torch_gib=93.5, host_bytes_per_second=40e9)
    assert calibration.reserved_over_allocated == 1.08
    assert calibration.origin == "measured on NVIDIA H100 NVL, 2026-11-28"
    # What is measured is better known than what is not.
    assert deviation(WORK, calibration.known) < 0.9 * deviation(WORK)


def test_measured_steps_move_what_no_kernel_says(tmp_path: Path) -> None:
    slow = replace(TRUE, eager_factor=6.0)
    speed = predict(WORK, slow).tokens_per_second_per_gpu
    content = measured_on(TRUE)
    step = {"model": QWEN, "flags": FLAGS, "gpus": 2, "labels_pct": 50}
    step |= {"tokens_per_second_per_gpu": speed}
    content["measurements"]["steps"] = [step, step, {**step, "flags": [*FLAGS, "--lora.rank", "8"]}]
    calibration = read_calibration(write(tmp_path, content), GPU)

    believed = predict(WORK, TRUE).tokens_per_second_per_gpu
    told = predict(WORK, calibration.constants).tokens_per_second_per_gpu
    assert believed > 1.05 * speed and told == pytest.approx(speed, rel=0.02)
    assert calibration.constants.eager_factor > 1.05 * fitted_constants().eager_factor
    assert calibration.notes == ("steps[2] trains a part of its model: not used",)


def test_nothing_measured_changes_nothing(tmp_path: Path) -> None:
    calibration = read_calibration(write(tmp_path, written()), GPU)

    assert calibration.constants == fitted_constants() and not calibration.replaced
    assert calibration.gpu == GPU and calibration.reserved_over_allocated is None


@pytest.mark.slow
def test_the_plan_says_what_was_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, measured_on(TRUE))
    flags = ["--model.name", "Qwen/Qwen3-0.6B", "--data.seq_len", "512", "--calibrate", str(file)]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "measured on NVIDIA H100 NVL, 2026-11-28, instead of" in out
    assert "the GPU has 93.5" in out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if " -> " in line)
    assert float(lines["gemm_share"].split()[-1]) == pytest.approx(0.68, rel=0.015)

    assert main([*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    entry = plan["calibration"]["replaced"]["link_share"]
    assert entry["measured"] == pytest.approx(0.6, rel=0.015)
    assert entry["origin"] == "measured on NVIDIA H100 NVL, 2026-11-28"
    ratio = plan["memory_reserved_gib"] / plan["memory_allocated_gib"]
    assert ratio == pytest.approx(1.08)

    assert main(["--matrix", "--calibrate", str(file)]) == 2
    assert "leave it out with --matrix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (["format"], "shardloop-calibration/0", "format must be 'shardloop-calibration/1'"),
        (["gpu"], "h200", "gpu is 'h200', but the plan is for --gpu h100-nvl"),
        (["gpu"], "tpu", "gpu is 'tpu', but the plan is for --gpu h100-nvl"),
        (["device_name"], None, "device_name is missing"),
        (["measurements"], None, "measurements is missing"),
        (["measurements"], [], "measurements must be an object"),
        (["measurements", "matmul_flops", "bfloat16"], 3, "bfloat16 must be a list"),
        (
            ["measurements", "matmul_flops", "bfloat16", 1, "m"],
            -1,
            "measurements.matmul_flops.bfloat16[1].m must be a number above 0, got -1",
        ),
        (["measurements", "matmul_flops", "bfloat16", 0, "k"], 1.5, "must be a whole number"),
        (["measurements", "collectives", 0, "op"], "send", "must be one of all_gather, reduce"),
        (["measurements", "collectives", 0, "ranks"], 1, "[0].ranks must be 2 or more"),
        (["measurements", "collectives", 0], "x", "collectives[0] must be an object"),
        (["measurements", "memory_total_bytes"], True, "memory_total_bytes must be a number"),
        (["measurements", "steps", 0, "flags"], ["--stps", "2"], "did you mean --steps?"),
        (["measurements", "steps", 0, "flags"], "--steps 2", "must be a list of train.py's flags"),
        (["measurements", "steps", 0, "model"], {}, "steps[0].model lacks something"),
        (["measurements", "steps", 0, "gpus"], 3, "steps[0] is no step of train.py"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    tmp_path: Path, place: list[Any], value: Any, told: str
) -> None:
    content = copy.deepcopy(measured_on(TRUE))
    step = {"model": QWEN, "flags": [*FLAGS, "--global_batch_size", "4"], "gpus": 2}
    content["measurements"]["steps"] = [step | {"tokens_per_second_per_gpu": 5000}]
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    file = write(tmp_path, content)
    with pytest.raises(CalibrationError) as error:
        read_calibration(file, GPU)
    message = str(error.value)
    assert message.startswith(f"--calibrate {file}: ") and "\n" not in message
    assert told in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_what_is_no_calibration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    assert main(["--model.name", "Qwen/Qwen3-0.6B", "--calibrate", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(file) in error
    assert main(["--model.name", "Qwen/Qwen3-0.6B", "--calibrate", str(tmp_path / "no")]) == 1
    assert "No such file" in capsys.readouterr().err
