"""Measurements of one's own GPUs, as `scripts/benchmark.py gpu` writes them, instead of what was believed or published.

docs/planning.md describes the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scripts.command_line import CommandLineError, parse_run_config
from scripts.config import TrainConfig
from scripts.planner.constants import Constants
from scripts.planner.facts import Gpu, Shape, find_gpu, shape_of
from scripts.planner.fitting import Knowledge, Misfit, adjust, misfit_of_speeds, slopes
from scripts.planner.published import knowledge
from scripts.planner.speed import Work, attention_rate, bus_bandwidth, latency, matmul_rate
from scripts.planner.work import work_of
from trainer.errors import TrainError

FORMAT = "shardloop-calibration/1"
# A measurement of one kernel is believed more than a constant, and than a step, which is many.
_ERROR = 0.01
# Of a document; of shorter ones attention does not fill the GPU.
_LONG_TOKENS = 2048
_SHARES_OF_TRAFFIC = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


class CalibrationError(ValueError):
    """The file cannot be used; the message names file, place and remedy."""


@dataclass(frozen=True, eq=False)
class Calibration:
    gpu: Gpu
    """With the memory that was measured."""
    known: Knowledge
    reserved_over_allocated: float | None
    """Of memory, by torch's allocator."""
    origin: str
    replaced: dict[str, tuple[float, float]]
    """What was believed, and what was measured."""
    notes: tuple[str, ...]

    @property
    def constants(self) -> Constants:
        return self.known.constants

    def as_json(self) -> dict[str, Any]:
        replaced = {
            name: {"believed": before, "measured": after, "origin": self.origin}
            for name, (before, after) in self.replaced.items()
        }
        return {"origin": self.origin, "replaced": replaced, "notes": list(self.notes)}


def read_calibration(file: Path, gpu: Gpu) -> Calibration:
    """What a file says of this GPU.

    Constants that its measurements speak about are fitted to them, from the published values on; all others stay.

    Raises:
        CalibrationError: the file is no such, is of another GPU, or has something in it that makes no sense.
    """
    try:
        root = _Node(json.loads(file.read_text(encoding="utf-8")), file)
    except OSError as error:
        raise CalibrationError(f"--calibrate {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise CalibrationError(f"--calibrate {file} is no JSON ({error})") from None
    if root.get("format").text() != FORMAT:
        raise root.get("format").fault(
            f"must be {FORMAT!r}: write it with scripts/benchmark.py gpu"
        )
    of = root.get("gpu").text()
    try:
        is_ours = find_gpu(of) == gpu
    except KeyError:
        is_ours = False
    if not is_ours:
        raise root.get("gpu").fault(f"is {of!r}, but the plan is for --gpu {gpu.name}")
    origin = f"measured on {root.get('device_name').text()}, {root.get('date').text()}"
    measured = root.get("measurements")
    there, replaced = gpu, {}
    for key, fact, unit in (
        ("memory_total_bytes", "torch_gib", 2**30),
        ("host_bytes_per_second", "host_bytes_per_second", 1),
    ):
        if (node := measured.get(key, needed=False)) is not None:
            there = replace(there, **{fact: node.number() / unit})
            replaced[fact] = (getattr(gpu, fact), getattr(there, fact))
    steps, notes = _steps(measured, there)
    misfit = _together([*_kernels(measured, there), *steps])
    published = knowledge()
    known, names = published, []
    if misfit is not None:
        constants = adjust(published.constants, misfit)
        slope = slopes(constants, misfit)
        known = Knowledge(
            constants,
            published.precision + slope.T @ slope,
            published.gpus | {gpu.name},
            published.most_gpus,
        )
        before, after = asdict(published.constants), asdict(constants)
        names = [name for name in before if abs(after[name] / before[name] - 1) > 1e-3]
        replaced |= {name: (before[name], after[name]) for name in names}
    ratio = measured.get("reserved_over_allocated", needed=False)
    return Calibration(
        there,
        known,
        None if ratio is None else max(1.0, ratio.number()),
        origin,
        replaced,
        tuple(notes),
    )


def _together(misfits: list[Misfit]) -> Misfit | None:
    if not misfits:
        return None
    return lambda constants: np.concatenate([misfit(constants) for misfit in misfits])


def _kernels(measured: _Node, gpu: Gpu) -> Iterator[Misfit]:
    """Of everything but whole steps."""

    def rate(node: _Node, key: str, said: Callable[[Constants], float]) -> Misfit:
        value = math.log(node.get(key).number())
        return lambda constants: np.array([(math.log(said(constants)) - value) / _ERROR])

    for name in ("bfloat16", "float32"):
        for point in measured.items("matmul_flops", name):
            tokens, *sides = (point.get(axis).whole() for axis in "mnk")
            kind = {"width": min(sides), "tokens": tokens, "float32": name == "float32"}
            yield rate(point, "flops_per_second", lambda c, kind=kind: matmul_rate(gpu, c, **kind))
    if measured.get("memory_bandwidth_bytes_per_second", needed=False) is not None:
        yield rate(
            measured,
            "memory_bandwidth_bytes_per_second",
            lambda c: gpu.memory_bytes_per_second * c.memory_share,
        )
    for point in measured.items("collectives"):
        ranks, size, op = point.get("ranks").whole(), point.get("bytes").number(), point.get("op")
        if op.text() not in _SHARES_OF_TRAFFIC:
            raise op.fault(f"must be one of {', '.join(_SHARES_OF_TRAFFIC)}")
        if ranks < 2:
            raise point.get("ranks").fault("must be 2 or more")
        moved = size * _SHARES_OF_TRAFFIC[op.text()] * (ranks - 1) / ranks
        yield rate(
            point,
            "bytes_per_second",
            lambda c, ranks=ranks, moved=moved: (
                moved
                / (
                    moved / bus_bandwidth(gpu, c, across_nodes=ranks > gpu.gpus_per_node)
                    + latency(c, ranks)
                )
            ),
        )
    rows = [
        (row, (row.get("document", needed=False) or row.get("seq_len")).whole())
        for row in measured.items("attention_flops")
    ]
    longest = max((length for _, length in rows), default=0)
    for row, length in rows:
        if length >= min(longest, _LONG_TOKENS):
            yield rate(row, "flops_per_second", lambda c: _forward_and_backward(gpu, c))


def _forward_and_backward(gpu: Gpu, c: Constants) -> float:
    """Of attention, where 4 products are counted for the backward, and the kernel computes 5."""
    return 3 * attention_rate(gpu, c) / (1 + 2.5 / c.attention_backward_share)


def _steps(measured: _Node, gpu: Gpu) -> tuple[list[Misfit], list[str]]:
    """Of whole steps, and lines for those that are not used."""
    works: list[Work] = []
    speeds: list[float] = []
    notes = []
    for number, step in enumerate(measured.items("steps")):
        config = _flags(step.get("flags"))
        shape = _shape(step.get("model"))
        if config.lora.rank or config.model.train_last_layers:
            notes.append(f"steps[{number}] trains a part of its model: not used")
            continue
        gpus = step.get("gpus", needed=False)
        length = step.get("document_length", needed=False)
        labels = step.get("labels_pct", needed=False)
        try:
            work = work_of(
                config,
                shape,
                gpu,
                gpus=1 if gpus is None else gpus.whole(),
                document_length=None if length is None else length.number(),
                labels=1.0 if labels is None else min(100.0, labels.number()) / 100,
            )
        except TrainError as error:
            raise step.fault(f"is no step of train.py: {error}") from None
        works.append(work)
        speeds.append(step.get("tokens_per_second_per_gpu").number())
    return [misfit_of_speeds(works, speeds)] if works else [], notes


def _flags(node: _Node) -> TrainConfig:
    if not isinstance(node.value, list) or not all(isinstance(flag, str) for flag in node.value):
        raise node.fault("must be a list of train.py's flags")
    # Without a name it would get the settings of the built-in model.
    named = any(re.match(r"--model\.(name|path)\b", flag) for flag in node.value)
    model = [] if named else ["--model.name=Qwen/Qwen3-8B"]
    try:
        return parse_run_config(TrainConfig, "train.py", [*node.value, *model])
    except CommandLineError as error:
        raise node.fault(f"are not train.py's: {error}") from None


def _shape(node: _Node) -> Shape:
    if not isinstance(node.value, dict):
        raise node.fault("must be what config.json says of the model")
    try:
        return shape_of(node.value)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise node.fault(f"lacks something that config.json says ({error})") from None


class _Node:
    """A value of the file, which knows where it stands."""

    def __init__(self, value: Any, file: Path, place: str = "") -> None:
        self.value = value
        self._file, self._place = file, place

    def fault(self, text: str) -> CalibrationError:
        return CalibrationError(f"--calibrate {self._file}: {self._place or 'it'} {text}")

    def get(self, key: str, *, needed: bool = True) -> Any:
        """The value of a key, as a node; None where it may be missing, and is."""
        if not isinstance(self.value, dict):
            raise self.fault("must be an object")
        place = f"{self._place}.{key}" if self._place else key
        if self.value.get(key) is None:
            if needed:
                raise _Node(None, self._file, place).fault("is missing")
            return None
        return _Node(self.value[key], self._file, place)

    def items(self, *keys: str) -> list[_Node]:
        """Those of a list, [] where it is missing."""
        node = self
        for key in keys:
            node = node.get(key, needed=False)
            if node is None:
                return []
        if not isinstance(node.value, list):
            raise node.fault("must be a list")
        return [
            _Node(value, self._file, f"{node._place}[{index}]")
            for index, value in enumerate(node.value)
        ]

    def number(self) -> float:
        is_number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not is_number or not 0 < self.value < 1e300:
            raise self.fault(f"must be a number above 0, got {self.value!r:.40}")
        return float(self.value)

    def whole(self) -> int:
        if (number := self.number()) != int(number):
            raise self.fault(f"must be a whole number, got {self.value!r:.40}")
        return int(number)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.fault(f"must be text, got {self.value!r:.40}")
        return self.value
