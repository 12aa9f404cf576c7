"""A look inside chosen steps: torch's profiler, and on a GPU the history of its memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

# Of the table of operations; the trace has them all.
_ROWS = 40
# Allocations that the history of memory keeps.
_ALLOCATIONS = 200_000


class StepProfiler:
    """Traces a range of this rank's steps; inside `with`, tell it how many are done, before the first and after each.

    Into `folder`, with R the rank, it writes `rank-R.json.gz`, a trace for https://ui.perfetto.dev; `rank-R.txt`, the
    operations that took most time; and on a GPU `rank-R.pickle`, allocations for https://pytorch.org/memory_viz.
    """

    def __init__(self, steps: range, folder: Path, *, rank: int, device: torch.device) -> None:
        """
        Args:
            steps: what to trace; empty for nothing.
            folder: made when it is needed.
            rank: names the files.
            device: of the run.
        """
        self._steps, self._file, self._device = steps, folder / f"rank-{rank}", device
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def advance(self, step: int) -> None:
        """With `step` steps done: begin or end where the range does."""
        if self._profile is not None and step + 1 not in self._steps:
            self._end()
        if self._profile is None and step + 1 in self._steps:
            self._begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels of these steps that still run
        self._profile.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(f"{self._file}.json.gz")
        operations = self._profile.key_averages().table(
            sort_by=f"self_{self._device.type}_time_total",
            row_limit=_ROWS,
            max_name_column_width=60,
        )
        self._file.with_suffix(".txt").write_text(operations + "\n", encoding="utf-8")
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{self._file}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
