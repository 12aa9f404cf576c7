"""What a run will take, before a GPU is spent on it: memory, speed, and what it waits for.

python scripts/plan.py --model.name Qwen/Qwen3-8B --gpus 2 --gpu h100-nvl [the flags of train.py] [--json]
python scripts/plan.py ... --search recipe.yaml  (the fastest way to train it that fits)
python scripts/plan.py ... --scale 2,8,64,512      (the same on so many GPUs)
python scripts/plan.py --matrix [--model.name Qwen/Qwen3-8B]  (which Qwen fits on which machine, trained how)
python scripts/plan.py ... --calibrate FILE  (with the measurements of scripts/benchmark.py gpu)
python scripts/plan.py --evaluate CSV     (how far predicted speeds are from published measurements)
python scripts/plan.py --fit CSV          (fit the constants to them)

Needs no GPU, and no network for the models in scripts/planner/models.json.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_run_config
from scripts.config import TrainConfig
from scripts.environment import use_cache_dir
from scripts.planner.facts import GPUS, find_gpu, find_model
from scripts.process import run_command
from trainer.errors import TrainError


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and those of the plan."""

    gpus: int = 2
    """GPUs of the run, as many as ranks."""

    gpu: str = "h100-nvl"
    """Each of them: h100-sxm, h100-nvl, h100-500w or h200, or a name that has one of these in it."""

    tokens: float | None = None
    """Tokens to train on, for the hours it takes; default: those of --steps."""

    document_length: float | None = None
    """Tokens of a document, for the cost of attention; of different ones the sum of squares over the sum. Default: a whole row."""

    labels_pct: float = 100.0
    """Percentage of the tokens that are predicted; the loss computes no others."""

    search: str | None = None
    """Look for the fastest way that fits: what is recomputed, rows of a micro-batch, hybrid sharding; at last offload and LoRA. Print them and write the first to this YAML file, for train.py. Takes a minute or more."""

    scale: str | None = None
    """Print memory and speed of the same run on each of these numbers of GPUs, such as 2,8,64,512."""

    matrix: bool = False
    """Print which known Qwen, or which methods for the one that is named, fit on 2 H100 NVL, 8 H100, 8 H200 and 64 H100, and how fast they are, as Markdown. Takes about a minute for each on a core, all cores at once."""

    calibrate: str | None = None
    """Plan with what scripts/benchmark.py gpu measured on such a GPU and wrote to this file (docs/planning.md), instead of published numbers."""

    json: bool = False
    """Print everything as JSON and nothing else."""

    evaluate: str | None = None
    """Compare predicted speeds with the measurements in this CSV, which has the columns of scripts/planner/published.csv, and stop."""

    fit: str | None = None
    """Fit the constants to the measurements in this CSV, write scripts/planner/constants.json, and stop."""


def main(argv: list[str] | None = None) -> int:
    """Plan, compare or fit; returns the exit code: 0, 1 for a fault, 2 for a wrong command line."""
    try:
        config = parse_run_config(PlanConfig, "plan.py", argv)
        _check(config)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here has nothing to do with it
        if config.matrix:
            return print_matrix(argv, config)
        if config.evaluate is not None:
            return evaluate(Path(config.evaluate))
        if config.fit is not None:
            return fit(Path(config.fit))
        with forked_map() as each:
            return plan(config, each)
    except KeyboardInterrupt:
        print("plan.py: interrupted", file=sys.stderr)
        return 130
    except (CommandLineError, ModelError, TrainError, ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1


def _check(config: PlanConfig) -> None:
    if config.gpus < 1:
        raise CommandLineError(f"--gpus must be at least 1, got {config.gpus}")
    if config.tokens is not None and config.tokens <= 0:
        raise CommandLineError(f"--tokens must be above 0, got {config.tokens}")
    if config.document_length is not None and config.document_length < 1:
        raise CommandLineError(
            f"--document_length must be at least 1, got {config.document_length}"
        )
    others = [n for n in ("matrix", "evaluate", "fit") if getattr(config, n)]
    if config.calibrate is not None and others:
        raise CommandLineError(f"--calibrate is of one GPU: leave it out with --{others[0]}")
    if config.scale is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", config.scale):
        raise CommandLineError(f"--scale takes numbers such as 2,8,64, got {config.scale!r}")
    if not 0 < config.labels_pct <= 100:
        raise CommandLineError(
            f"--labels_pct must be above 0 and at most 100, got {config.labels_pct}"
        )
    try:
        find_gpu(config.gpu)
    except KeyError:
        known = ", ".join(GPUS)
        raise CommandLineError(f"--gpu {config.gpu} is not known; there are {known}") from None


@contextmanager
def forked_map() -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` over processes, forked by its first call with all that was imported before; the usual one where a fork is not safe."""
    if sys.platform != "linux" or (os.cpu_count() or 1) == 1:
        yield map
        return
    leave_to_parent = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(2, get_context("fork"), *leave_to_parent) as pool:
        yield pool.map


def plan(config: PlanConfig, each: Callable[..., Iterable[Any]]) -> int:
    """Print what the run will take; `each` as for `plan_memory`."""
    folder = None if config.model.path is None else Path(config.model.path)
    if config.model.name is not None:
        try:
            find_model(config.model.name)
        except KeyError:
            cache_dir = use_cache_dir(config.cache_dir)
            from models.hub import fetch_model

            folder = fetch_model(
                config.model.name,
                revision=config.model.revision,
                cache_dir=cache_dir,
                only_tokenizer=True,
            ).path
    from scripts.planner.calibration import read_calibration
    from scripts.planner.planning import (
        calibration_lines,
        make_plan,
        planned_model,
        to_json,
        to_text,
    )

    name, hf_config = planned_model(config, folder)
    gpu = find_gpu(config.gpu)
    calibration = None
    if config.calibrate is not None:
        calibration = read_calibration(Path(config.calibrate), gpu)
    calibrated = "".join(f"\n{line}" for line in calibration_lines(calibration))
    make = partial(
        make_plan,
        name=name,
        hf_config=hf_config,
        gpu=gpu,
        document_length=config.document_length,
        labels=config.labels_pct / 100,
        tokens=config.tokens,
        calibration=calibration,
        each=each,
    )
    if config.scale is not None:
        from scripts.planner import scale

        counts = [int(count) for count in config.scale.split(",")]
        plans = scale.scaling(
            config, lambda config, gpus: make(config, gpus=gpus), gpu=gpu, counts=counts
        )
        if config.json:
            print(json.dumps([to_json(made) for made, _ in plans], indent=2))
        else:
            print(f"{name} on {gpu.name}\n{scale.as_table(plans)}{calibrated}")
        return 0
    make = partial(make, gpus=config.gpus)
    if config.search is not None:
        from scripts.planner.search import as_table, recipe, search

        found = search(config, make, gpu=gpu, gpus=config.gpus)
        if not found:
            raise TrainError(
                f"{name} does not fit on {config.gpus} x {gpu.name} in any way that was tried, LoRA and offload "
                "among them; take more GPUs, or a lower --data.seq_len"
            )
        Path(config.search).write_text(recipe(found[0].config), encoding="utf-8")
        print(
            f"{as_table(found)}{calibrated}\n"
            f"the first is in {config.search}: train.py --config {config.search}"
        )
        return 0
    made = make(config)
    print(json.dumps(to_json(made), indent=2) if config.json else to_text(made) + calibrated)
    return 0


def print_matrix(argv: list[str] | None, config: PlanConfig) -> int:
    """Print what fits where, of the model that is named or of all."""
    from scripts.planner.matrix import MODELS, as_markdown, matrix

    models = MODELS
    if config.model.path is not None:
        raise CommandLineError("--matrix is of models that are known by name: give --model.name")
    if config.model.name is None:  # without the settings of the built-in model
        given = sys.argv[1:] if argv is None else argv
        config = parse_run_config(PlanConfig, "plan.py", [*given, "--model.name", MODELS[0]])
    else:
        try:
            find_model(config.model.name)
        except KeyError:
            known = ", ".join(model.rpartition("/")[2] for model in MODELS)
            raise CommandLineError(
                f"--matrix does not know {config.model.name}; there are {known}"
            ) from None
        models = (config.model.name,)
    common = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
    cells = matrix(common, models)
    print(
        json.dumps([asdict(cell) for cell in cells], indent=2)
        if config.json
        else as_markdown(cells)
    )
    return 0


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
    from scripts.planner.constants import fitted_constants, keep_constants
    from scripts.planner.published import read_points, refit

    points, _ = read_points(file)
    before = fitted_constants()
    after = refit(points)
    keep_constants(after, origin=f"fitted to {len(points)} rows of {file.name}")
    for name, value in vars(after).items():
        print(f"{name:<26}{vars(before)[name]:>12.5g} -> {value:.5g}")
    return 0


if __name__ == "__main__":
    run_command(main, leave_at_once=True)
