"""Rows shared by ranks through train.py: the numbers of one process, with evaluation, resuming and streaming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.job import EXACT, losses, read_rows, train
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed

_SHARED = ["--parallel.cp=2", "--parallel.activation_checkpointing=full"]


@pytest.mark.slow
def test_a_run_is_that_of_one_process_and_is_continued_by_one(
    tmp_path: Path, cache_dir: Path
) -> None:
    given = [
        f"--model.path={write_model(tmp_path / 'model')}",
        "--model.check_first_loss=always",
        "--data.seq_len=128",
        "--evaluation.max_rows=24",
        "--evaluation.generate_rows=5",
        "--evaluation.max_new_tokens=4",
        "--micro_batch_size=2",
        "--global_batch_size=4",
        "--steps=4",
        "--checkpoint.every=2",
        *EXACT,
    ]

    def run(name: str, world_size: int, *more: str) -> Path:
        output_dir = tmp_path / name
        result = train([*given, *more], world_size, cache_dir=cache_dir, output_dir=output_dir)
        assert result.returncode == 0, result.output
        assert ("cp 2" in result.stdout) == (world_size == 2)
        assert "4 steps of 4 rows (2 x 1 " in result.stdout
        return output_dir

    def evaluations(output_dir: Path) -> list[float]:
        rows = [row for row in read_rows(output_dir) if "eval_loss" in row]
        return [row[name] for row in rows for name in ("eval_loss", "exact_match_pct")]

    alone, shared = run("alone", 1), run("shared", 2, *_SHARED)
    assert losses(shared) == pytest.approx(losses(alone), rel=0, abs=1e-5)
    assert evaluations(shared) == pytest.approx(evaluations(alone), rel=0, abs=1e-5)
    for name, tolerance in (
        ("tokens", 0.0),
        ("padding_tokens", 0.0),
        ("valid_tokens", 0.0),
        ("grad_norm", 1e-4),
    ):
        ours, theirs = (
            [row[name] for row in read_rows(d) if "loss" in row] for d in (shared, alone)
        )
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0.0), name

    shutil.rmtree(shared / "checkpoints" / "step-00000004")
    shutil.rmtree(shared / "export")
    assert losses(run("shared", 1)) == pytest.approx(losses(alone), rel=0, abs=1e-5)


@pytest.mark.slow
def test_a_stream_is_read_once_by_the_ranks_that_share_its_rows(
    tmp_path: Path, cache_dir: Path
) -> None:
    given = [
        f"--data.path={write_chat(tmp_path / 'chat.jsonl', count=60)}",
        "--data.streaming=true",
        "--data.stream_buffer_rows=16",
        "--data.seq_len=64",
        "--micro_batch_size=2",
        "--evaluation.generate_rows=0",
        "--steps=8",
        "--checkpoint.every=4",
        "--checkpoint.export=false",
        *EXACT,
    ]
    ledgers = {}
    for name, world_size, more in (("alone", 1, []), ("shared", 2, _SHARED), ("shared", 1, [])):
        output_dir = tmp_path / name
        result = train([*given, *more], world_size, cache_dir=cache_dir, output_dir=output_dir)
        assert result.returncode == 0, result.output
        assert losses(output_dir) == pytest.approx(losses(tmp_path / "alone"), rel=0, abs=1e-5)
        (source,) = json.loads((output_dir / "run.json").read_text())["data"]["sources"]
        ledgers[world_size, name] = source["ledger"]
        # What the last of them, one process again, has to do anew.
        shutil.rmtree(output_dir / "checkpoints" / "step-00000008")
    assert ledgers[2, "shared"] == ledgers[1, "alone"]


def test_heads_the_ranks_do_not_divide_are_refused_in_one_line(
    tmp_path: Path, cache_dir: Path
) -> None:
    model = write_model(tmp_path / "model", num_attention_heads=3, num_key_value_heads=1)
    result = train(
        [f"--model.path={model}", "--data.seq_len=128", "--parallel.cp=2", *EXACT],
        cache_dir=cache_dir,
        output_dir=tmp_path / "out",
    )
    assert result.returncode == 1
    assert "parallel.cp 2 does not divide the 3 query heads" in result.stderr
    assert len(result.stderr.splitlines()) == 1
