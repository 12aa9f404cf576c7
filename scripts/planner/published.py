"""Published measurements: what was run, read from a table, and how far the prediction is from it.

Columns: source, model, gpus, gpu, seq_len, micro_batch (sequences), grad_accum, ac, compile, precision, sharding,
tokens_per_second_per_gpu, and optionally memory_gib and note. `?` or nothing means that the source does not say.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.planner.facts import find_gpu, find_model, shape_of
from scripts.planner.speed import Constants, Work, fit, predict, relative_deviation

PUBLISHED = Path(__file__).with_name("published.csv")
# A rank-16 adapter of all linear layers has about so many of the parameters.
_LORA_SHARE = 0.005
# How far the formula itself may be off, as a logarithm: what rows of a source it was not fitted to show, and, where there
# are no such rows, a belief.
_FORMULA = 0.08
_UNLIKE = {"gpu": 0.08, "experts": 0.2, "split": 0.15, "offload": 0.4, "frozen": 0.1}


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
        ValueError: a column is missing or a number is none.
    """
    points, skipped = [], []
    with file.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            try:
                points.append(_point(row))
            except KeyError as error:
                skipped.append(f"{file.name} line {number}: {error.args[0]!r} is not known")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} line {number}: {error}") from None
    return points, skipped


def _point(row: dict[str, str]) -> Point:
    missing = {"source", "model", "gpus", "gpu", "seq_len", "micro_batch"} - set(row)
    if missing or "tokens_per_second_per_gpu" not in row:
        raise ValueError(
            f"the column {', '.join(sorted(missing)) or 'tokens_per_second_per_gpu'} is missing"
        )
    said = {name: (value or "").strip().lower() for name, value in row.items() if name}
    model, adapter = re.subn(r"\b(q?lora|peft)\b", "", row["model"], flags=re.IGNORECASE)
    config = find_model(model.strip(" ,()-"))
    foundry = config["model_type"] == "mpt"
    sharding = said.get("sharding", "")
    gpu, gpus = find_gpu(row["gpu"]), int(row["gpus"])
    split = {axis: int(n) for axis, n in re.findall(r"\b(tp|cp)[ =_-]*(\d+)", sharding)}
    tensor, context = split.get("tp", 1), split.get("cp", 1)
    ranks = gpus // tensor
    shards = {
        "hsdp": min(ranks, gpu.gpus_per_node),
        "hybrid": min(ranks, gpu.gpus_per_node),
        "none": 1,
        "ddp": 1,
        "no_shard": 1,
    }.get(re.split(r"[ _(x]", sharding.replace("no_shard", "none"))[0], ranks)
    length, sequences = int(row["seq_len"]), int(row["micro_batch"])
    recomputed = said.get("ac", "")
    return Point(
        source=row["source"],
        label=f"{row['model']}, {gpus} x {row['gpu']}, {sequences} x {length:,}",
        work=Work(
            shape=shape_of(config),
            gpu=gpu,
            gpus=gpus,
            tokens=sequences * length,
            squared_lengths=float(sequences * length**2),
            grad_accum_steps=int(row.get("grad_accum") or 1),
            recompute="op"
            if "op" in recomputed
            else recomputed
            if recomputed in ("full", "selective")
            else "none",
            compiled=said.get("compile") in ("yes", "true", "1"),
            float8=bool(re.search("fp8|float8", said.get("precision", ""))),
            shards=shards,
            gathers=1 if "grad_op" in sharding or "zero2" in sharding else 2,
            reduce_bytes=2 if foundry else 4,
            reduces_every_micro_batch=foundry,
            trained_share=_LORA_SHARE if adapter else 1.0,
            foundry=foundry,
            tensor_parallel=tensor,
            context_parallel=context,
        ),
        measured=float(row["tokens_per_second_per_gpu"]),
    )


def errors_pct(points: Sequence[Point], constants: Constants | None = None) -> np.ndarray:
    """Predicted over measured tokens per second, less 1, in percent."""
    said = [predict(point.work, constants).tokens_per_second_per_gpu for point in points]
    return 100 * (np.array(said) / np.array([point.measured for point in points]) - 1)


def deviation(work: Work) -> float:
    """Standard deviation of the logarithm of a predicted speed: of the constants, of the formula, of what no row is like."""
    points, _ = read_points(PUBLISHED)
    known = [point.work for point in points]
    unlike = {
        "gpu": work.gpu not in {other.gpu for other in known},
        "experts": work.shape.experts > 0,
        "split": work.tensor_parallel * work.context_parallel > 1,
        "offload": work.offload,
        "frozen": work.front_share > 0,
    }
    parts = [
        relative_deviation(work, known),
        _FORMULA,
        *(_UNLIKE[name] for name, is_so in unlike.items() if is_so),
        # Beyond the largest measured number of GPUs nobody knows how waiting grows.
        0.1 * max(0.0, math.log2(work.gpus / max(other.gpus for other in known))),
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
