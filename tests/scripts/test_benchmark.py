"""benchmark.py times our side, and says so where there is nothing to compare it with."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from scripts.benchmark import main
from scripts.benchmarks.data import NO_TRL


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
