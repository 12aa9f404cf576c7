"""benchmark.py times our side, and says so where there is nothing to compare it with."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from scripts.benchmark import main
from scripts.benchmarks.data import NO_TRL
from tests.support.ranks import start_server


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
