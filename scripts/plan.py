"""How well the speed of a run can be predicted before a GPU is spent.

python scripts/plan.py --evaluate CSV     (how far predictions are from published measurements)
python scripts/plan.py --fit CSV          (fit the constants to them)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import CommandLineError, parse_run_config
from scripts.config import TrainConfig


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and some more."""

    evaluate: str | None = None
    """Compare with the measurements in this CSV file, in the columns of scripts/planner/published.csv, and stop."""

    fit: str | None = None
    """Fit the constants to the measurements in this CSV file, write them to scripts/planner/constants.json, and stop."""


def main(argv: list[str] | None = None) -> int:
    """Compare or fit; returns the exit code: 0, 1 for a fault, 2 for a wrong command line."""
    try:
        config = parse_run_config(PlanConfig, "plan.py", argv)
        if config.fit:
            return fit(Path(config.fit))
        if config.evaluate:
            return evaluate(Path(config.evaluate))
        raise CommandLineError(
            "give --evaluate CSV or --fit CSV, such as scripts/planner/published.csv"
        )
    except (CommandLineError, ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1


def evaluate(file: Path) -> int:
    """Print predicted and measured speed of every row, and how far apart they are on average."""
    import numpy as np

    from scripts.planner.published import errors_pct, errors_without_own_source, read_points
    from scripts.planner.speed import predict

    points, skipped = read_points(file)
    if not points:
        raise ValueError(
            f"{file} has no row that can be predicted ({'; '.join(skipped) or 'it is empty'})"
        )
    errors = errors_pct(points)
    rows = [("tokens/s/GPU", "measured", "predicted", "error %")]
    for point, error in zip(points, errors, strict=True):
        predicted = predict(point.work).tokens_per_second_per_gpu
        rows.append((point.label, f"{point.measured:,.0f}", f"{predicted:,.0f}", f"{error:+.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        print(
            f"{name:<{widths[0]}}"
            + "".join(f"{n:>{w + 2}}" for n, w in zip(numbers, widths[1:], strict=True))
        )
    for line in skipped:
        print(f"left out: {line}")
    if len({point.source for point in points}) > 1:
        apart = np.abs(errors_without_own_source(points)).mean()
        print(f"fitted anew without the source of each row: mean absolute error {apart:.1f} %")
    print(f"mean absolute error {np.abs(errors).mean():.1f} %")
    return 0


def fit(file: Path) -> int:
    """Fit the constants and keep them."""
    from scripts.planner.published import read_points, refit
    from scripts.planner.speed import fitted_constants, keep_constants

    points, _ = read_points(file)
    before = fitted_constants()
    after = refit(points)
    keep_constants(after, origin=f"fitted to {len(points)} rows of {file.name}")
    for name, value in vars(after).items():
        print(f"{name:<26}{vars(before)[name]:>12.5g} -> {value:.5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
