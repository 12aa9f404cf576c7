"""metrics.jsonl: one row per object, none twice after a resume, only from the first rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import LogConfig
from trainer.metrics import MetricsWriter, forget_after

QUIET = LogConfig(tensorboard=False, progress=False)


def _row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "tokens_per_second": 10.0, "step_seconds": 2.0, **values}


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "a/b", QUIET, is_first=True, steps=2, step=0) as writer:
        for step in (1, 2):
            writer.write(_row(step, mfu_pct=None))
            writer.advance()
            assert _read(tmp_path / "a/b")[-1] == _row(step, mfu_pct=None)


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, LogConfig(), is_first=True, steps=2, step=0) as writer:
        writer.write(_row(1, loss=float("nan"), grad_norm=float("inf")))
    assert _read(tmp_path) == [_row(1, loss=None, grad_norm=None)]


def test_other_ranks_leave_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path / "out", LogConfig(), is_first=False, steps=2, step=0) as writer:
        writer.write(_row(1))
        writer.advance()
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, QUIET, is_first=True, steps=5, step=0) as writer:
        for step in (0, 1, 2, 3):
            writer.write(_row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a row
    with MetricsWriter(tmp_path, QUIET, is_first=True, steps=5, step=2) as writer:
        writer.write(_row(3, loss=9.0))
    assert [(row["step"], row["loss"]) for row in _read(tmp_path)] == [
        (0, 1.5),
        (1, 1.5),
        (2, 1.5),
        (3, 9.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_forget_leaves_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    forget_after(file, 3)
    assert not file.exists()
    file.write_text('{"step": 3}\n')
    before = file.stat().st_ino
    forget_after(file, 3)
    assert file.read_text() == '{"step": 3}\n' and file.stat().st_ino == before


def test_tensorboard_has_the_numbers_in_groups(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=True, progress=False)
    with MetricsWriter(tmp_path, config, is_first=True, steps=2, step=0) as writer:
        writer.write(_row(1, mfu_pct=None))
        writer.write({"step": 1, "eval_loss": 2.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "speed/tokens_per_second",
        "speed/step_seconds",
        "evaluation/eval_loss",
    }
    (event,) = events.Scalars("evaluation/eval_loss")
    assert (event.step, event.value) == (1, 2.5)


def test_the_progress_bar_shows_loss_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    config = LogConfig(tensorboard=False)
    with MetricsWriter(tmp_path, config, is_first=True, steps=7, step=3) as writer:
        writer.advance()
        writer.write(_row(4))
    shown = capsys.readouterr()
    assert "1.5" in shown.err + shown.out and "4/7" in shown.err + shown.out


def test_without_a_terminal_a_line_says_how_long_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LogConfig(tensorboard=False)
    with MetricsWriter(tmp_path, config, is_first=True, steps=7, step=3) as writer:
        writer.advance()
        writer.write(_row(4))
    assert capsys.readouterr() == ("step 4/7  loss 1.5000, 10 tokens/s, 00:06 left\n", "")
