"""Seconds of a run over its restarts, with a clock that the test sets."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from trainer import goodput
from trainer.goodput import FILE, Goodput, goodput_table, read_goodput


class _Clock:
    """Both clocks: what processes count, and the calendar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(goodput, "_now", lambda: self.now + 1e9)

    def start(self, folder: Path, *, compiled: bool = False, startup: float = 10) -> Goodput:
        """A process begins, and comes to its first step."""
        began = self.now
        self.now += startup
        return Goodput(folder, began=began, compiled=compiled)

    def step(self, run: Goodput, step: int, seconds: float = 2.0, wait: float = 0.5) -> None:
        self.now += seconds
        run.step(step, seconds, wait)

    def spend(self, run: Goodput, kind: str, seconds: float) -> None:
        with run.measure(kind):
            self.now += seconds


def test_every_second_of_a_run_with_a_crash_and_a_stop_is_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock(monkeypatch)
    run = clock.start(tmp_path)
    clock.spend(run, "evaluation", 3)
    for step in (1, 2, 3):
        clock.step(run, step)
    clock.spend(run, "checkpoint", 1)
    clock.step(run, 4)
    clock.now += 7  # killed in step 5, and 7 s until the next process begins
    with (tmp_path / FILE).open("a") as file:
        file.write('{"attempt": 0, "st')

    run = clock.start(tmp_path, startup=8)
    for step in (4, 5):
        clock.step(run, step)
    clock.now += 1  # export
    run.write(ended=True)
    assert run.totals() == {
        "productive_seconds": 5 * 1.5,
        "recompute_seconds": 1.5,
        "data_wait_seconds": 6 * 0.5,
        "checkpoint_seconds": 1,
        "evaluation_seconds": 3,
        "startup_seconds": 10,
        "restart_seconds": 15,
        "other_seconds": 1,
        "restarts": 1,
        "goodput_pct": round(100 * 7.5 / 42, 2),
    }
    assert read_goodput(tmp_path) == pytest.approx(run.totals())
    assert read_goodput(tmp_path / "none") == {}
    table = goodput_table(run.totals()).splitlines()
    assert table[0].split()[:5] == ["productive", "7.5", "s", "17.9", "%"]
    assert table[-1].split() == ["goodput", "17.9", "%"]

    clock.now += 3600  # stopped on purpose, and continued later
    run = clock.start(tmp_path)
    clock.step(run, 6)
    totals = run.totals()
    assert (totals["restart_seconds"], totals["startup_seconds"], totals["restarts"]) == (15, 20, 1)


def test_compiling_in_the_first_step_is_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock(monkeypatch)
    run = clock.start(tmp_path, compiled=True)
    clock.step(run, 1, seconds=60)
    clock.step(run, 2)
    totals = run.totals()
    assert (totals["startup_seconds"], totals["productive_seconds"]) == (70, 1.5)


def test_other_ranks_write_nothing_and_one_line_a_second_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock(monkeypatch)
    other = Goodput(None, began=clock.now, compiled=False)
    run = clock.start(tmp_path)
    for step in range(1, 101):
        clock.step(run, step, seconds=0.1, wait=0)
        other.step(step, 0.1, 0)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert 8 <= len(lines) <= 11
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]
