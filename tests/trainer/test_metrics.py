"""metrics.jsonl: one row per object, none twice after a resume, only from the first rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import LogConfig
from trainer.metrics import MetricsWriter, by_group, forget_after

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


def test_numbers_are_in_groups_and_what_is_no_number_is_left_out() -> None:
    row = _row(1, mfu_pct=None, memory_peak_gib=2, tokens=9, own_penalty=0.5, grad_norm=math.inf)
    assert by_group(row) == {
        "train/loss": 1.5,
        "train/own_penalty": 0.5,
        "speed/tokens_per_second": 10.0,
        "speed/step_seconds": 2.0,
        "memory/memory_peak_gib": 2.0,
        "data/tokens": 9.0,
    }
    assert by_group({"step": 1, "eval_loss": 2.5, "own": 1}) == {
        "evaluation/eval_loss": 2.5,
        "evaluation/own": 1.0,
    }


_SAMPLE = {"prompt": "2 + 2?\nThink.", "expected": "4", "answer": "<b>5</b>"}


def test_tensorboard_has_numbers_samples_ledger_and_lengths(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=True, progress=False)
    with MetricsWriter(tmp_path, config, is_first=True, steps=2, step=0) as writer:
        writer.describe({"config": "seed: 0\nsteps: 2"}, {"1": np.array([3, 3, 200])})
        writer.write(_row(1, mfu_pct=None))
        writer.write({"step": 1, "eval_loss": 2.5}, [_SAMPLE, _SAMPLE])
        writer.write_goodput(2, {"goodput_pct": 50.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "speed/tokens_per_second",
        "speed/step_seconds",
        "evaluation/eval_loss",
        "goodput/goodput_pct",
    }
    (event,) = events.Scalars("evaluation/eval_loss")
    assert (event.step, event.value) == (1, 2.5)

    def text(name: str) -> tuple[int, str]:
        (event,) = events.Tensors(f"{name}/text_summary")
        return event.step, event.tensor_proto.string_val[0].decode()

    assert text("config") == (0, "    seed: 0\n    steps: 2\n")
    step, shown = text("samples/2")
    assert step == 1 and "    2 + 2?\n    Think.\n" in shown and "    <b>5</b>\n" in shown
    (event,) = events.Histograms("lengths/1")
    lengths = event.histogram_value
    assert (lengths.num, lengths.min, lengths.max, lengths.sum) == (3, 3, 200, 206)


def test_samples_are_kept_and_forgotten_with_their_steps(tmp_path: Path) -> None:
    for first, step in ((0, 0), (2, 2)):  # the second goes on behind step 2
        with MetricsWriter(tmp_path, QUIET, is_first=True, steps=5, step=step) as writer:
            for later in range(first, first + 4, 2):
                writer.write({"step": later + 1, "eval_loss": 1.0}, [_SAMPLE])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, **_SAMPLE} for step in (1, 3, 5)]
    with MetricsWriter(tmp_path / "other", QUIET, is_first=False, steps=5, step=0) as writer:
        writer.write({"step": 1, "eval_loss": 1.0}, [_SAMPLE])
        writer.describe({"config": "x"}, {})
    assert not (tmp_path / "other").exists()


def test_trackers_get_what_tensorboard_gets(tmp_path: Path) -> None:
    taken: list[Any] = []

    def track(*entry: Any) -> None:
        taken.append(entry)

    with MetricsWriter(tmp_path, QUIET, is_first=True, steps=2, step=0, trackers=[track]) as writer:
        writer.write({"step": 1, "eval_loss": 2.5}, [_SAMPLE])
        writer.write_goodput(1, {"goodput_pct": 50.0})
    assert taken == [
        (1, {"evaluation/eval_loss": 2.5}, [_SAMPLE]),
        (1, {"goodput/goodput_pct": 50.0}, ()),
    ]


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
