"""benchmark.py times our side, and says so where there is nothing to compare it with."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.build import build_model
from models.flops import training_flops
from scripts.benchmark import main
from scripts.benchmarks import gpu, limit, optimizer, overhead, scaling, start, workload
from scripts.benchmarks import step as step_benchmark
from scripts.benchmarks.data import NO_TRL
from scripts.benchmarks.trainers import Work
from scripts.benchmarks.workload import Shape
from scripts.planner.calibration import read_calibration
from scripts.planner.facts import GPUS
from tests.support.ranks import start_server


@pytest.mark.slow
def test_data_without_trl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trl") is not None:
        pytest.skip("TRL is installed")
    monkeypatch.delenv("QWEN3_TOKENIZER_DIR", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # put back after the test
    before = os.sched_getaffinity(0)
    file = tmp_path / "numbers.json"

    assert main(["data", "--rows", "200", "--repeats", "1", "--json", str(file)]) == 0

    printed = capsys.readouterr().out
    assert NO_TRL in printed
    assert "| trl" not in printed
    result = json.loads(file.read_text())
    assert result["tokenizer"] == "built-in"
    assert set(result["versions"]) >= {"python", "torch", "tokenizers"}
    one, two = result["preparing"]["1"]["shardloop"], result["preparing"]["2"]["shardloop"]
    for counted in ("tokens", "supervised_tokens", "packed_rows"):
        assert one[counted] == two[counted] > 0
    assert f"| {one['tokens']:,} | {one['supervised_tokens']:,} |" in printed
    assert result["packing"]["shardloop"]["fill_pct"] > 98
    assert result["order"]["peak_kib"] < 1024
    assert os.sched_getaffinity(0) == before


def test_unusable_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--rows", "1", "--tokenizer", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_server()  # whose ranks have the libraries loaded
    file = tmp_path / "numbers.json"
    assert main(["load", "--megabytes=40", "--repeats=1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert set(result["models"]) == {"dense", "experts"}
    for kind, sides in result["models"].items():
        ours, theirs = sides["shardloop"], sides["from_pretrained"]
        # One rank holds half, in fp32, of what both find in bf16.
        assert ours["held_bytes"] == pytest.approx(theirs["held_bytes"] / 2, rel=0.01)
        assert theirs["held_bytes"] == pytest.approx(2 * sides["checkpoint_bytes"], rel=0.01)
        assert ours["held_bytes"] <= ours["highest_peak_bytes"] < theirs["highest_peak_bytes"]
        assert f"| {kind}, " in printed
    assert ": ok |" in printed


@pytest.mark.distributed
def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_server()  # whose ranks have the libraries loaded
    file = tmp_path / "numbers.json"
    flags = ["--megabytes=13", "--repeats=1", "--folder", str(tmp_path), "--json", str(file)]
    assert main(["checkpoint", *flags]) == 0
    result = json.loads(file.read_text())
    for name in ("shardloop", "synchronous"):
        side = result[name]
        assert 0 < side["seconds"] <= side["durable_seconds"]
        assert side["checkpoint_bytes"] == pytest.approx(13e6, rel=0.05)
    assert f"{result['stall_pct']:.1f} %" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_memory_of_recomputation_and_of_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    shape = ["--seq_len", "256", "--layers", "3", "--width", "64"]

    assert main(["memory", *shape, "--repeats", "1", "--json", str(file)]) == 0

    result = json.loads(file.read_text())
    peaks = {name: side["peak_mib"] for name, side in result["activations"].items()}
    assert peaks["full"] < peaks["selective, every 2nd"] < peaks["none"]
    assert peaks["op"] < peaks["none"]
    sizes = {name: side["bytes_per_parameter"] for name, side in result["states"].items()}
    assert sizes["AdamW, all float32"] == pytest.approx(16, rel=1e-3)  # and the step's number
    assert sizes["AdamW, masters and state bfloat16"] == pytest.approx(8, rel=1e-3)
    assert 12 < sizes["Muon, all float32"] < 16
    printed = capsys.readouterr().out
    assert f"| full | {peaks['full']:.0f} |" in printed and "| Muon, all float32 |" in printed


TINY = Shape(vocabulary=600, width=64, layers=2, seq_len=64, micro_batch_size=2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    start_server()  # whose ranks have the libraries loaded
    for name in workload.SHAPES:
        monkeypatch.setitem(workload.SHAPES, name, TINY)


@pytest.mark.distributed
def test_steps_of_all_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: None) -> None:
    file = tmp_path / "numbers.json"
    flags = ["--shape=layers", "--dtype=float32", "--packing=padded", "--steps=1", "--repeats=1"]

    assert main(["step", *flags, "--json", str(file)]) == 0

    (row,) = json.loads(file.read_text())["rows"]
    ours, plain = row["sides"]["shardloop"], row["sides"]["plain"]
    (step,), (same,) = ours["every_step"], plain["every_step"]
    # The same rows, and before the first update the same weights.
    assert step["tokens"] == same["tokens"] > step["valid_tokens"] == same["valid_tokens"] > 0
    assert ours["first_loss"] == pytest.approx(math.log(600), abs=0.3)
    assert ours["peak_bytes"] > 0 < plain["peak_bytes"]
    assert row["ratios"]["plain"]["times_faster"] > 0
    printed = capsys.readouterr().out
    if importlib.util.find_spec("trl") is None:
        assert step_benchmark.NO_TRL in printed
    else:
        trl = row["sides"]["trl"]
        assert trl["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-6)
        assert trl["every_step"][0]["tokens"] == step["tokens"]
        assert trl["every_step"][0]["valid_tokens"] == step["valid_tokens"]


@pytest.mark.slow
@pytest.mark.distributed
def test_steps_of_packed_rows(tmp_path: Path, tiny: None) -> None:
    file = tmp_path / "numbers.json"
    flags = ["--shape=layers", "--dtype=bfloat16", "--packing=packed", "--steps=1", "--repeats=1"]
    assert main(["step", *flags, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    for name, side in row["sides"].items():
        assert "failed" not in side, (name, side)
        (step,) = side["every_step"]
        # Nearly full rows on every side.
        assert 0.7 * 4 * TINY.seq_len < step["tokens"] <= 4 * TINY.seq_len
        assert side["first_loss"] == pytest.approx(math.log(600), abs=0.3)


def test_a_side_that_cannot_run_says_why() -> None:
    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("no kernel\nfor this")

    run = [{"seconds": [2.0], "cpu_seconds": [1.0], "tokens": [6], "valid_tokens": [4]}]
    done = [{**run[0], "peak_bytes": 10, "first_loss": 1.0}]
    failed = step_benchmark.summary([done, step_benchmark.attempt(broken)])
    assert failed == {"failed": "RuntimeError: no kernel for this"}
    sides = {"shardloop": step_benchmark.summary([done]), "trl": failed}
    assert step_benchmark.ratios(sides) == {}
    row = {"shape": "layers", "dtype": "float32", "packing": "packed", "sides": sides, "ratios": {}}
    known = {
        "machine": {"cpu": "one", "cores": 2},
        "versions": {"trl": "1"},
        "shapes": {},
        "rows": [row],
    }
    counts = {"ranks": 2, "repeats": 1, "steps": 1, "warm_up": 1}
    printed = step_benchmark.as_markdown(known | counts)
    assert "| trl | RuntimeError: no kernel for this |" in printed
    assert "| shardloop | 2.000 | 1.000 | 2 | 3 |" in printed


@pytest.mark.distributed
def test_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: None) -> None:
    file = tmp_path / "numbers.json"
    flags = ["--shape=layers", "--dtype=float32", "--steps=1", "--repeats=1", "--micro_batches=2"]
    assert main(["limit", *flags, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert 0 < row["share_pct"] < 100
    assert 0 < row["plain_share_pct"] < 100
    for category in ("matmul", "loss: matmul", "attention", "communication", "optimizer", "Python"):
        assert row["profile"][category] > 0, category
    assert "| % of a traced step | layers, float32 |" in capsys.readouterr().out


def test_products_of_a_step_are_its_matrix_flops() -> None:
    config = workload.model_config(TINY)
    model = build_model(config, attention="packed", seed=0)
    work = Work("", TINY, "float32", True, 1, 1)
    products = limit.products_of_step(model, work, labels=50)
    expected = training_flops(config, TINY.micro_batch_tokens, 50, squared_lengths=0)
    assert sum(product.flops for product in products.elements()) == expected


@pytest.mark.distributed
def test_overhead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: None
) -> None:
    monkeypatch.setattr(overhead, "usual_dtypes", lambda: ("float32",))
    file = tmp_path / "numbers.json"
    flags = ["--steps=2", "--blocks=2", "--repeats=1"]
    assert main(["overhead", *flags, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    # What a step of a tiny model costs beside its tensors is most of it, but not many times more.
    assert -50 < row["overhead_cpu_seconds_pct"] < 500
    assert f"{row['overhead_seconds_pct']:+.2f}" in capsys.readouterr().out


@pytest.mark.distributed
def test_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizer, "CASES", {"many small": (20, 64)})
    # Compiled is tested in tests/trainer/test_optimizer.py.
    monkeypatch.setattr(optimizer, "SIDES", [s for s in optimizer.SIDES if "compiled" not in s])
    file = tmp_path / "numbers.json"
    assert main(["optimizer", "--steps=3", "--repeats=1", "--json", str(file)]) == 0
    sides = json.loads(file.read_text())["cases"]["many small"]
    assert len(sides) == 4
    assert all(0 < side["seconds"] <= side["first_seconds"] for side in sides.values())
    assert "| trainer.optimizer, state in bf16 |" in capsys.readouterr().out


def test_kernels_count_by_kind_and_what_hides_communication() -> None:
    kernels = [
        ("ncclDevKernel_AllGather_RING_LL", 0.0, 4.0),
        ("nvjet_tst_128x64", 1.0, 2.0),
        ("flash_fwd_kernel", 1.5, 3.0),
        ("void at::native::vectorized_elementwise_kernel", 5.0, 5.5),
        ("Memcpy DtoD", 6.0, 6.25),
    ]
    found = limit.kernel_seconds(kernels)
    assert found == {
        "communication": 4.0,
        "attention": 1.5,
        "matmul": 1.0,
        "copies": 0.25,
        "elementwise": 0.5,
        "busy": 4.75,
        "exposed": 2.0,  # 0 to 1, and 3 to 4
    }
    assert limit.kernel_seconds([])["exposed"] == 0


def test_gpu_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if gpu.gpu_count():
        pytest.skip("there is a GPU")
    assert main(["gpu"]) == 1
    assert "torch finds 0 GPUs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_gpu_command_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_server()  # whose ranks have the libraries loaded
    monkeypatch.setattr(gpu, "SETTINGS", {"usual": (), "unknown": ("--parallel.compiled=true",)})
    file, kept = tmp_path / "numbers.json", tmp_path / "calibration.json"
    flags = ["--device=cpu", "--steps=1", "--calibration", str(kept), "--json", str(file)]
    assert main(["gpu", *flags]) == 0
    found = json.loads(file.read_text())["parts"]
    assert "parallel.compiled" in found.pop("tiny, unknown")["failed"]
    assert not [name for name, part in found.items() if "failed" in part]
    saves = found["saves"]["saves"]
    assert len(saves) == gpu.WARM_UP + 2
    assert all(0 < save["stall_seconds"] < save["durable_seconds"] for save in saves)
    assert found["peers"]["ratios"]["plain"]["times_faster"] > 0
    measured = json.loads(kept.read_text())
    assert measured["format"] == gpu.FORMAT
    (step,) = measured["measurements"]["steps"]
    assert step["gpus"] == 2 and step["model"]["hidden_size"] == 64
    assert (
        0 < step["tokens_per_second_per_gpu"] == found["tiny, usual"]["tokens_per_second_per_gpu"]
    )
    rates = measured["measurements"]["matmul_flops"]["float32"]
    assert {(rate["m"], rate["n"], rate["k"]) for rate in rates} == {(64, 64, 64), (64, 192, 64)}
    # plan.py reads it, once it is told that this was a GPU.
    measured |= {"gpu": "NVIDIA H100 NVL"}
    measured["measurements"]["memory_total_bytes"] = 2**36
    kept.write_text(json.dumps(measured))
    calibration = read_calibration(kept, GPUS["h100-nvl"])
    assert calibration.gpu.torch_gib == 64
    assert {"attention_flops", "gemm_share", "seconds_per_collective"} <= {*calibration.replaced}
    printed = capsys.readouterr().out
    assert "| tiny, usual |" in printed and "tiny, unknown: " in printed


@pytest.mark.slow
@pytest.mark.distributed
def test_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: None
) -> None:
    settings = {
        "SHAPE": replace(TINY, micro_batch_size=8),
        "RANKS": (1, 2),
        "SEQ_LENS": (64, 256),
        "ACCUMULATION": (1, 4),
        "MILLIONS_OF_ROWS": (0.02, 0.08),
    }
    for name, value in settings.items():
        monkeypatch.setattr(scaling, name, value)
    file = tmp_path / "numbers.json"
    assert main(["scaling", "--steps=1", "--repeats=1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    series = result["series"]
    assert [list(sides) for sides in series.values()] == [["1", "2"], ["64", "256"], ["1", "4"]]
    for sides in series.values():
        for side in sides.values():
            assert side["tokens_per_second"] > 0 < side["cpu_microseconds_per_token"]
    few, many = result["packing"].values()
    assert many["index_mib"] == pytest.approx(4 * few["index_mib"], rel=0.01)
    assert "| micro-batches per step | 4 |" in capsys.readouterr().out


@pytest.mark.slow
def test_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_server()
    monkeypatch.setattr(start, "SHAPE", TINY)
    file = tmp_path / "numbers.json"
    assert main(["start", "--job=folder", "--repeats=1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["runs"]) == {"folder, cold", "folder, warm"}
    for side in result["runs"].values():
        assert side["seconds"] > side["beyond_imports_seconds"]
        assert side["cpu_seconds"] > 1  # of the process itself, which has imported torch
    where = result["where"]["folder"]
    assert max(where, key=where.__getitem__) == start.IMPORTING
    assert set(start.PHASES.values()) - set(where) == set()
    assert "| first step | " in capsys.readouterr().out
