"""How well the speed of a run can be predicted before a GPU is spent.

python scripts/plan.py --evaluate CSV     (how far predictions are from published measurements)
python scripts/plan.py --fit CSV          (fit the constants to them)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    """Compare or fit; returns the exit code: 0, 1 for a fault, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description="Predicted training speed beside published measurements."
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--evaluate",
        type=Path,
        metavar="CSV",
        help="compare with the measurements in this file, in the columns of scripts/planner/published.csv",
    )
    wanted.add_argument(
        "--fit",
        type=Path,
        metavar="CSV",
        help="fit the constants to them and write scripts/planner/constants.json",
    )
    arguments = parser.parse_args(argv)
    try:
        return evaluate(arguments.evaluate) if arguments.evaluate else fit(arguments.fit)
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 1


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
