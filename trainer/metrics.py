"""One dictionary per logged step, to metrics.jsonl, TensorBoard and the progress bar; rank 0 only."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from trainer.config import LogConfig

# TensorBoard groups by the part before the slash.
TENSORBOARD_GROUPS = {
    "loss": "train",
    "grad_norm": "train",
    "learning_rate": "train",
    "update_rounded_to_zero_pct": "train",
    "router_aux_loss": "train",
    "expert_load_max_ratio": "train",
    "expert_load_idle_pct": "train",
    "eval_loss": "evaluation",
    "exact_match_pct": "evaluation",
    "loss_spikes": "train",
    "skipped_steps": "train",
}


class MetricsWriter:
    """Writes rows of numbers; on ranks other than the first it does nothing."""

    def __init__(
        self, folder: Path, config: LogConfig, *, is_first: bool, steps: int, step: int
    ) -> None:
        """
        Args:
            folder: gets metrics.jsonl (appended to, so that a resumed run goes on) and tensorboard/.
            config: what to write. Where there is no terminal, lines take the place of the bar.
            is_first: True on rank 0.
            steps: steps of the whole run.
            step: steps already done.
        """
        self._file = self._tensorboard = self._bar = None
        self._events = folder / "events.jsonl"
        if not is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        forget_after(folder / "metrics.jsonl", step)
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

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; `row["step"]` says which."""
        if self._file is None:
            return
        # JSON knows no NaN and no infinity: what is not finite is null.
        known = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    group = TENSORBOARD_GROUPS.get(name, "speed")
                    self._tensorboard.add_scalar(f"{group}/{name}", value, row["step"])
        if "loss" in row:
            numbers = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
            if self._bar is not None:
                self._bar.set_postfix_str(numbers)
            elif self._lines:
                left = tqdm.format_interval((self._steps - row["step"]) * row["step_seconds"])
                print(f"step {row['step']}/{self._steps}  {numbers}, {left} left", flush=True)

    def write_goodput(self, step: int, totals: Mapping[str, float]) -> None:
        """Where the time of the run went up to `step`, to TensorBoard."""
        if self._tensorboard is not None:
            for name, value in totals.items():
                self._tensorboard.add_scalar(f"goodput/{name}", value, step)

    def tell(self, step: int, event: str, line: str, **details: Any) -> None:
        """Warn of something that people should know, and keep it in events.jsonl, also of steps that are run again."""
        if self._file is None:
            return
        tqdm.write(f"warning: {line}", file=sys.stderr)
        with self._events.open("a", encoding="utf-8") as file:
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
