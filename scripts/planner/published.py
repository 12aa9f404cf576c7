"""Published measurements: what was run, read from a table, and how far the prediction is from it.

Columns: source, model, gpus, gpu, seq_len, micro_batch (sequences), grad_accum, ac, compile, precision, sharding,
tokens_per_second_per_gpu, and optionally memory_gib and note. `?` or nothing means that the source does not say.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from scripts.planner.constants import Constants, believed_deviations, fitted_constants
from scripts.planner.facts import find_gpu, find_model, shape_of
from scripts.planner.fitting import (
    Knowledge,
    fit,
    misfit_of_speeds,
    precision,
    relative_deviation,
)
from scripts.planner.speed import Work, predict

PUBLISHED = Path(__file__).with_name("published.csv")
_NEEDED = ("source", "model", "gpus", "gpu", "seq_len", "micro_batch", "tokens_per_second_per_gpu")
_UNSAID = ("", "?", "-", "n/a", "na", "none", "unknown")
# A rank-16 adapter of all linear layers has about so many of the parameters.
_LORA_SHARE = 0.005


@dataclass(frozen=True)
class Point:
    source: str
    label: str
    work: Work
    measured: float
    """Tokens per second and GPU."""


def read_points(file: Path) -> tuple[list[Point], list[str]]:
    """The rows of a table that can be predicted, and a line for each that cannot.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table, or columns are missing.
    """
    points, skipped = [], []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            missing = [name for name in _NEEDED if name not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(f"{file} has no column {', '.join(missing)}")
            for row in rows:
                said = {name: str(value or "").strip() for name, value in row.items() if name}
                if not any(said.values()):
                    continue
                try:
                    points.append(_point(said))
                except ValueError as error:
                    skipped.append(f"{file.name} line {rows.line_num}: {error}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no table of text: {error}") from None
    return points, skipped


def _point(said: Mapping[str, str]) -> Point:
    """Raises ValueError: something of it is not known, or makes no sense."""
    model, adapter = re.subn(r"\b(q?lora|peft)\b", "", said["model"], flags=re.IGNORECASE)
    try:
        config, gpu = find_model(model.strip(" ,()-+")), find_gpu(said["gpu"])
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is not known") from None
    foundry = config["model_type"] == "mpt"
    gpus, length = _whole(said, "gpus"), _whole(said, "seq_len")
    sequences = _whole(said, "micro_batch")
    sharding, recomputed = said.get("sharding", "").lower(), said.get("ac", "").lower()
    split = {axis: int(n) for axis, n in re.findall(r"(?<![a-z])(tp|cp|pp)[ =_-]*(\d+)", sharding)}
    tensor, context = split.get("tp", 1), split.get("cp", 1)
    if split.get("pp", 1) > 1:
        raise ValueError("pipeline parallelism is not predicted")
    if not (tensor and context) or gpus % (tensor * context):
        raise ValueError(f"{sharding!r} does not go into {gpus} GPUs")
    ranks = gpus // tensor
    inside = min(ranks, max(1, gpu.gpus_per_node // tensor))
    unsharded = dict.fromkeys(("none", "ddp", "no_shard", "single"), 1)
    shards = {**unsharded, "hsdp": inside, "hybrid": inside}.get(
        re.split(r"[ _(x,+-]", sharding.replace("no_shard", "none"))[0], ranks
    )
    if ranks % shards:
        raise ValueError(f"{gpus} GPUs are no whole number of nodes")
    types = said.get("precision", "").lower()
    return Point(
        source=said["source"],
        label=f"{said['model']}, {gpus} x {said['gpu']}, {sequences} x {length:,}",
        work=Work(
            shape=shape_of(config),
            gpu=gpu,
            gpus=gpus,
            tokens=sequences * length,
            squared_lengths=float(sequences * length**2),
            grad_accum_steps=_whole(said, "grad_accum", default=1),
            recompute="op"
            if re.search(r"\bop\b", recomputed)
            else "selective"
            if "selective" in recomputed
            else "full"
            if recomputed in ("full", "yes", "true", "1")
            else "none",
            compiled=said.get("compile", "").lower() in ("yes", "true", "1"),
            float8=bool(re.search("fp8|float8", types)),
            float32=types in ("fp32", "float32", "tf32"),
            shards=shards,
            gathers=1 if "grad_op" in sharding or "zero2" in sharding.replace("-", "") else 2,
            reduce_bytes=2 if foundry else 4,
            accumulation="sharded",
            trained_share=_LORA_SHARE if adapter else 1.0,
            foundry=foundry,
            tensor_parallel=tensor,
            context_parallel=context,
        ),
        measured=_number(said, "tokens_per_second_per_gpu"),
    )


def _number(said: Mapping[str, str], column: str) -> float:
    try:
        number = float(re.sub(r"[,_ ]", "", said[column]))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{column} is {said[column] or 'empty'!r}, no number above 0")
    return number


def _whole(said: Mapping[str, str], column: str, default: int | None = None) -> int:
    if default is not None and said.get(column, "").lower() in _UNSAID:
        return default
    number = _number(said, column)
    if number != int(number):
        raise ValueError(f"{column} is {said[column]!r}, no whole number")
    return int(number)


def errors_pct(points: Sequence[Point], constants: Constants | None = None) -> np.ndarray:
    """Predicted over measured tokens per second, less 1, in percent."""
    said = [predict(point.work, constants).tokens_per_second_per_gpu for point in points]
    return 100 * (np.array(said) / np.array([point.measured for point in points]) - 1)


@cache
def knowledge() -> Knowledge:
    """The constants in constants.json, and what the table of this folder says of them."""
    points, _ = read_points(PUBLISHED)
    works, constants = [point.work for point in points], fitted_constants()
    misfit = misfit_of_speeds(works, [point.measured for point in points])
    return Knowledge(
        constants,
        precision(constants, misfit),
        frozenset(work.gpu.name for work in works),
        max(work.gpus for work in works),
    )


def deviation(work: Work, known: Knowledge | None = None) -> float:
    """Standard deviation of the logarithm of a predicted speed: of the constants, of the formula, of what no row is like."""
    known, believed = known or knowledge(), believed_deviations()
    unlike = {
        "gpu": work.gpu.name not in known.gpus,
        "experts": work.shape.experts > 0,
        "split": work.tensor_parallel * work.context_parallel > 1,
        "offload": work.offload,
        "frozen": work.front_share > 0,
        "float32": work.float32,
    }
    parts = [
        relative_deviation(work, known),
        believed["formula"],
        *(believed[name] for name, is_so in unlike.items() if is_so),
        # Beyond the largest measured number of GPUs nobody knows how waiting grows.
        believed["doubling"] * max(0.0, math.log2(work.gpus / known.most_gpus)),
    ]
    return math.sqrt(sum(part**2 for part in parts))


def refit(points: Sequence[Point]) -> Constants:
    return fit([point.work for point in points], [point.measured for point in points])


def errors_without_own_source(points: Sequence[Point]) -> np.ndarray:
    """As `errors_pct`, with constants that were fitted without any point of the same source."""
    errors = np.zeros(len(points))
    for source in dict.fromkeys(point.source for point in points):
        own = [i for i, point in enumerate(points) if point.source == source]
        constants = refit([point for point in points if point.source != source])
        errors[own] = errors_pct([points[i] for i in own], constants)
    return errors
