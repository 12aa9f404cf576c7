"""Where the time of a run went, over all its restarts: OUTPUT_DIR/goodput.jsonl.

One line per second or so with the seconds of this attempt up to then. Of an attempt that was killed
the last line counts, and the time from it to the first step of the next one was spent on the restart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "goodput.jsonl"
KINDS = {
    "productive": "steps that were new",
    "recompute": "steps done again after a restart",
    "data_wait": "waiting for batches",
    "checkpoint": "waiting for checkpoints",
    "evaluation": "evaluations",
    "startup": "from the start to the first step, and compiling",
    "restart": "from a crash to the first step after it",
    "other": "logging, export and the rest",
}
_WRITE_SECONDS = 1.0


class Goodput:
    """Counts the seconds of rank 0; steps end together, so they are the run's. Use `totals` after `write`."""

    def __init__(self, folder: Path | None, *, began: float, compiled: bool) -> None:
        """
        Args:
            folder: gets goodput.jsonl, and may hold that of earlier attempts; None counts but writes nothing.
            began: time.perf_counter() when the process began.
            compiled: the first step compiles, and is no step of training.
        """
        self._path = folder / FILE if folder is not None else None
        self._began, self._first_compiles = began, compiled
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._earlier = _last_lines(self._path) if self._path else []
        self._reached = max((line["step"] for line in self._earlier), default=0)
        self._number = len(self._earlier)
        self._crashed = bool(self._earlier) and not self._earlier[-1]["ended"]
        self._gap = 0.0
        if self._crashed:
            self._gap = max(0.0, _now() - self._elapsed() - self._earlier[-1]["time"])
        self._step = 0
        self._written = float("-inf")

    def step(self, step: int, seconds: float, data_wait_seconds: float) -> None:
        """A step has taken `seconds`, of which it waited `data_wait_seconds` for its batches."""
        if self._step == 0:
            kind = "restart" if self._crashed else "startup"
            spent = sum(self._seconds.values())
            if self._first_compiles:
                seconds = data_wait_seconds = 0.0
            self._seconds[kind] += self._gap + self._elapsed() - seconds - spent
        self._seconds["productive" if step > self._reached else "recompute"] += (
            seconds - data_wait_seconds
        )
        self._seconds["data_wait"] += data_wait_seconds
        self._step = step
        if time.perf_counter() - self._written > _WRITE_SECONDS:
            self.write()

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count what happens inside as `kind`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - begin

    def write(self, *, ended: bool = False) -> None:
        """Append a line; with `ended` the run stops here on purpose, and what comes until it goes on is no restart."""
        if self._path is None:
            return
        known = sum(seconds for kind, seconds in self._seconds.items() if kind != "other")
        self._seconds["other"] = max(0.0, self._gap + self._elapsed() - known)
        line = {
            "attempt": self._number,
            "step": self._step,
            "time": round(_now(), 3),
            "ended": ended,
            **{kind: round(seconds, 3) for kind, seconds in self._seconds.items()},
        }
        # A full disk is told by what matters.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._written = time.perf_counter()

    def totals(self) -> dict[str, float]:
        """`KIND_seconds` over all attempts, `restarts`, and `goodput_pct`: the share that was productive."""
        return _totals([*self._earlier, {**self._seconds, "ended": True}])

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began


def read_goodput(folder: Path) -> dict[str, float]:
    """`Goodput.totals` of the run in `folder`, also of one that did not come to its end; {} where it has no goodput.jsonl."""
    lines = _last_lines(folder / FILE)
    return _totals(lines) if lines else {}


def _totals(attempts: list[dict[str, Any]]) -> dict[str, float]:
    sums = {kind: sum(line[kind] for line in attempts) for kind in KINDS}
    total = sum(sums.values())
    return {
        **{f"{kind}_seconds": round(seconds, 3) for kind, seconds in sums.items()},
        "restarts": sum(not line["ended"] for line in attempts[:-1]),
        "goodput_pct": round(100 * sums["productive"] / total, 2) if total else 0.0,
    }


def goodput_table(totals: dict[str, float]) -> str:
    """The totals as lines: seconds, share, what they are."""
    seconds = {kind: totals[f"{kind}_seconds"] for kind in KINDS}
    total = sum(seconds.values())
    lines = [
        f"{kind:<12}{value:>10.1f} s{100 * value / total:>7.1f} %  {KINDS[kind]}"
        for kind, value in seconds.items()
        if value >= 0.05
    ]
    return "\n".join([*lines, f"{'goodput':<14}{'':>8}{totals['goodput_pct']:>9.1f} %"])


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last whole line of every attempt, in their order."""
    lines: dict[int, dict[str, Any]] = {}
    with suppress(OSError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # one that was cut off
                line = json.loads(text)
                lines[line["attempt"]] = line
    return list(lines.values())


def _now() -> float:
    """Between processes, which may be on different machines, only the calendar's clock counts on."""
    return time.time()
