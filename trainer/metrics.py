"""What a run writes while it trains, on rank 0 only: rows and samples as files, TensorBoard, trackers, the progress bar."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from trainer.config import LogConfig

Sample = Mapping[str, str]
"""`prompt`, the `expected` answer, and the model's `answer`."""

Tracker = Callable[[int, Mapping[str, float], Sequence[Sample]], None]
"""Takes a step, its numbers by `GROUP/NAME`, and samples. It neither raises nor waits."""

# What of a row is about the machine and the data; the rest is about the model.
_GROUPS = {
    "tokens_per_second": "speed",
    "tokens_per_second_per_gpu": "speed",
    "mfu_pct": "speed",
    "step_seconds": "speed",
    "data_wait_seconds": "speed",
    "memory_peak_gib": "memory",
    "epoch": "data",
    "valid_tokens": "data",
    "tokens": "data",
    "padding_tokens": "data",
}


def by_group(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl as `speed/NAME`, `memory/NAME`, `data/NAME`, and the others as `train/NAME`, or `evaluation/NAME` in the row of an evaluation."""
    rest = "train" if "loss" in row else "evaluation"
    return {
        f"{_GROUPS.get(name, rest)}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class MetricsWriter:
    """Writes rows of numbers; on ranks other than the first it does nothing."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        is_first: bool,
        steps: int,
        step: int,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """
        Args:
            folder: gets metrics.jsonl and samples.jsonl (appended to, so that a resumed run goes on) and tensorboard/.
            config: what to write. Where there is no terminal, lines take the place of the bar.
            is_first: True on rank 0.
            steps: steps of the whole run.
            step: steps already done.
            trackers: get everything too.
        """
        self._file = self._tensorboard = self._bar = None
        self._folder, self._trackers, self._step = folder, trackers, step
        if not is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            forget_after(folder / name, step)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if config.tensorboard:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # a second to import: only where it is used

            # Rows a crash left behind are hidden from the step that is run again.
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._steps, self._lines = steps, config.progress and not sys.stderr.isatty()
        if config.progress and not self._lines:
            self._bar = tqdm(
                total=steps,
                initial=step,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                leave=True,
            )

    def describe(self, texts: Mapping[str, str], lengths: Mapping[str, Any]) -> None:
        """Show TensorBoard what is trained.

        Args:
            texts: by name, shown as they are.
            lengths: by source, tokens of each example [examples].
        """
        if self._tensorboard is not None:
            for name, text in texts.items():
                self._tensorboard.add_text(name, _verbatim(text), self._step)
            for name, values in lengths.items():
                self._tensorboard.add_histogram(f"lengths/{name}", values, self._step)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, row: Mapping[str, Any], samples: Sequence[Sample] = ()) -> None:
        """Write one row, and the samples of an evaluation; `row["step"]` says which step."""
        if self._file is None:
            return
        # JSON knows no NaN and no infinity: what is not finite is null.
        known = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        step = row["step"]
        if samples:
            with (self._folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **each}) + "\n" for each in samples)
        self._show(step, by_group(row), samples)
        if "loss" in row:
            numbers = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
            if self._bar is not None:
                self._bar.set_postfix_str(numbers)
            elif self._lines:
                left = tqdm.format_interval((self._steps - step) * row["step_seconds"])
                print(f"step {step}/{self._steps}  {numbers}, {left} left", flush=True)

    def write_goodput(self, step: int, totals: Mapping[str, float]) -> None:
        """Where the time of the run went up to `step`, to TensorBoard and trackers."""
        if self._file is not None:
            self._show(step, {f"goodput/{name}": value for name, value in totals.items()}, ())

    def _show(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            for number, sample in enumerate(samples, 1):
                text = "\n\n".join(f"[{part}]\n{text}" for part, text in sample.items())
                self._tensorboard.add_text(f"samples/{number}", _verbatim(text), step)
        for track in self._trackers:
            track(step, numbers, samples)

    def tell(self, step: int, event: str, line: str, **details: Any) -> None:
        """Warn of something that people should know, and keep it in events.jsonl, also of steps that are run again."""
        if self._file is None:
            return
        tqdm.write(f"warning: {line}", file=sys.stderr)
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": event, **details, "line": line}) + "\n")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sink in (self._bar, self._tensorboard, self._file):
            if sink is not None:
                sink.close()


def _verbatim(text: str) -> str:
    """TensorBoard reads Markdown: an indented block of it is shown as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def forget_after(file: Path, step: int) -> None:
    """Drop the rows of steps after `step` from a metrics file: they will be run, and written, again."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) != len(lines):
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(file)
