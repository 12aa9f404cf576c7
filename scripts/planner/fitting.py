"""Constants that agree best with measurements and with what was believed before, and how sure they are then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.planner.constants import Constants, prior_constants, spreads
from scripts.planner.speed import Work, predict

# Of measurements: by how much of themselves they may be off.
ERROR = 0.03
_TINY = 1e-4

Misfit = Callable[[Constants], np.ndarray]
"""What constants make of some measurements: how far off, in errors of each."""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What a prediction of speed rests on."""

    constants: Constants
    precision: np.ndarray
    """Of the logarithms of the constants that may move, each over its spread: inverse of their covariance."""
    gpus: frozenset[str]
    """That were measured, by name."""
    most_gpus: int
    """That were measured at once."""


def fit(works: Sequence[Work], measured: Sequence[float]) -> Constants:
    """The constants for measured tokens per second and GPU; one that no measurement speaks about stays as believed."""
    return adjust(prior_constants(), misfit_of_speeds(works, measured))


def misfit_of_speeds(
    works: Sequence[Work], measured: Sequence[float], *, error: float = ERROR
) -> Misfit:
    """Of whole steps, in tokens per second and GPU."""
    target = np.log(np.array(measured, dtype=float))
    return lambda constants: (_log_speeds(works, constants) - target) / error


def adjust(start: Constants, misfit: Misfit) -> Constants:
    """Least squares of logarithms, by Levenberg and Marquardt (https://doi.org/10.1137/0111030).

    A measurement off by its error weighs as much as a constant off by its spread.
    """

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([misfit(_moved(start, x)), x])

    x, damping = np.zeros(len(spreads())), 1.0
    best = residuals(x)
    for _ in range(100):
        slope = np.concatenate([slopes(_moved(start, x), misfit), np.eye(len(x))])
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(x)), -slope.T @ best)
        there = residuals(x + step)
        if there @ there < best @ best:
            converged = best @ best - there @ there < 1e-7 * (best @ best)
            x, best, damping = x + step, there, damping / 4
            if converged:
                break
        elif (damping := damping * 4) > 1e9:
            break
    return _moved(start, x)


def slopes(constants: Constants, misfit: Misfit) -> np.ndarray:
    """By how much each measurement's misfit grows with each constant that may move: [measurements, constants]."""
    at = misfit(constants)
    axes = np.eye(len(spreads()))
    return np.stack([(misfit(_moved(constants, _TINY * axis)) - at) / _TINY for axis in axes], 1)


def precision(constants: Constants, misfit: Misfit) -> np.ndarray:
    """Of the linearised posterior: a constant that no measurement speaks about is as uncertain as was believed."""
    slope = slopes(constants, misfit)
    return slope.T @ slope + np.eye(slope.shape[1])


def relative_deviation(work: Work, known: Knowledge) -> float:
    """Standard deviation of the logarithm of a predicted speed that the constants' own uncertainty makes."""
    (slope,) = slopes(known.constants, lambda constants: _log_speeds([work], constants))
    return math.sqrt(slope @ np.linalg.solve(known.precision, slope))


def _log_speeds(works: Sequence[Work], constants: Constants) -> np.ndarray:
    return np.log([predict(work, constants).tokens_per_second_per_gpu for work in works])


def _moved(constants: Constants, x: np.ndarray) -> Constants:
    """Each constant that may move, moved by so many of its spreads; a share stays one."""
    moved = {}
    for (name, spread), value in zip(spreads().items(), x, strict=True):
        most = 1.0 if name.endswith("_share") else math.inf
        moved[name] = min(most, getattr(constants, name) * math.exp(value * spread))
    return replace(constants, **moved)
