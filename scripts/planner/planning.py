"""The plan of a run: what it holds, how long a step takes, whether it fits; as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from models.build import (
    EMBEDDED_QWEN3,
    check_length,
    parse_model_config,
    read_config_values,
)
from scripts.config import TrainConfig
from scripts.planner.advice import explain_communication
from scripts.planner.calibration import Calibration
from scripts.planner.constants import fitted_constants
from scripts.planner.facts import Gpu, find_model, shape_of
from scripts.planner.memory import MemoryPlan, plan_memory
from scripts.planner.published import deviation
from scripts.planner.speed import StepTime, Work, predict
from scripts.planner.work import batch_of, work_of

_GIB = 2**30
# Of the interval: nine of ten runs are meant to be inside.
_DEVIATIONS = 1.645
# Of host memory, for what is offloaded; the rest is for Python, the data and a checkpoint on its way.
_HOST_SHARE = 0.8


@dataclass(frozen=True)
class Room:
    """Memory that a run takes of a GPU, in GiB."""

    allocated: float
    reserved: float
    beside: float
    """Outside torch's allocator."""
    there: float
    slack: float
    """What allocations take, over their sum."""
    on_host: float = 0.0
    host: float = math.inf
    """Of the host's memory: what the run takes for each GPU, and what is there."""

    @property
    def needed(self) -> float:
        return self.slack * self.allocated + self.beside

    @property
    def fits(self) -> bool:
        return self.needed <= self.there and self.on_host <= _HOST_SHARE * self.host

    @property
    def tight(self) -> bool:
        """It fits, but only while the allocator gives memory of one stream to another."""
        return self.fits and self.reserved + self.beside > self.there


def room_of(
    memory: MemoryPlan,
    *,
    gib: float,
    host_gib: float = math.inf,
    calibration: Calibration | None = None,
) -> Room:
    """Whether a GPU of so many GiB, as torch counts them, and its share of the host have the memory."""
    constants = calibration.constants if calibration else fitted_constants()
    ratio = calibration.reserved_over_allocated if calibration else None
    allocated = memory.allocated_bytes / _GIB
    return Room(
        allocated=allocated,
        reserved=ratio * allocated if ratio else memory.reserved_bytes / _GIB,
        beside=constants.outside_gib,
        there=gib,
        slack=constants.allocator_slack,
        on_host=memory.host_bytes / _GIB,
        host=host_gib,
    )


@dataclass(frozen=True)
class Plan:
    model: str
    gpu: Gpu
    gpus: int
    memory: MemoryPlan
    room: Room
    work: Work
    time: StepTime
    batch: tuple[int, int, int]
    """Rows of a micro-batch and of a step, micro-batches."""
    step_tokens: int
    """Over all ranks."""
    tokens: float | None
    """Of the whole run."""
    calibration: Calibration | None
    notes: tuple[str, ...]
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.room.fits

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Tokens per second and GPU."""
        known = self.calibration.known if self.calibration else None
        factor = math.exp(_DEVIATIONS * deviation(self.work, known))
        speed = self.time.tokens_per_second_per_gpu
        return speed / factor, speed * factor

    @property
    def hours(self) -> float | None:
        if self.tokens is None:
            return None
        return self.tokens / self.step_tokens * self.time.seconds / 3600


def planned_model(config: TrainConfig, folder: Path | None) -> tuple[str, PreTrainedConfig]:
    """Name and configuration of the model of a run, without its tokenizer.

    Args:
        config: of the run.
        folder: of the model's files; None for one whose shape is known, and for the built-in model.

    Raises:
        ModelError: as the trainer would; KeyError: a name that is not known.
    """
    model = config.model
    if folder is not None:
        where = str(folder / "config.json")
        values = read_config_values(folder / "config.json")
    elif model.name is not None:
        where, values = model.name, find_model(model.name)
    else:
        from data.embedded import build_tokenizer

        rows = -(-len(build_tokenizer()) // 64) * 64
        where = "the built-in model"
        values = EMBEDDED_QWEN3 | {"vocab_size": rows, "model_type": "qwen3"}
    hf_config = parse_model_config(values, model, where)
    check_length(hf_config, seq_len=config.data.seq_len)
    return model.name or model.path or "built-in Qwen3", hf_config


def make_plan(
    config: TrainConfig,
    name: str,
    hf_config: PreTrainedConfig,
    *,
    gpu: Gpu,
    gpus: int,
    document_length: float | None = None,
    labels: float = 1.0,
    tokens: float | None = None,
    calibration: Calibration | None = None,
    memory: MemoryPlan | None = None,
    each: Callable[..., Iterable[Any]] = map,
) -> Plan:
    """Memory and time of a run.

    Args:
        config: as for train.py.
        name: of the model, for people.
        hf_config: of the model.
        gpu: each of them.
        gpus: ranks.
        document_length: sum of the documents' squared lengths over that of their lengths; None: rows are one document.
        labels: share of the tokens that are predicted.
        tokens: of the whole run; None: those of config.steps.
        calibration: measurements of this GPU; None: what is published.
        memory: where it is known; None: it is traced.
        each: see `plan_memory`.

    Raises:
        ModelError, TrainError: as the trainer would for this configuration.
    """
    gpu = calibration.gpu if calibration else gpu
    micro_batch_size, global_batch_size, grad_accum_steps = batch_of(config, gpus=gpus)
    memory = memory or plan_memory(
        config,
        hf_config,
        world_size=gpus,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        gpu_gib=gpu.torch_gib,
        labels=labels,
        each=each,
    )
    constants = calibration.constants if calibration else fitted_constants()
    work = work_of(
        config,
        shape_of(hf_config.to_dict()),
        gpu,
        gpus=gpus,
        trained_share=memory.trained_parameters / memory.parameters,
        document_length=document_length,
        labels=labels,
    )
    time = predict(work, constants)
    room = room_of(memory, gib=gpu.torch_gib, host_gib=gpu.host_gib, calibration=calibration)
    step_tokens = global_batch_size * config.data.seq_len
    if tokens is None and config.steps is not None:
        tokens = config.steps * step_tokens
    why, remedies = explain_communication(work, time, constants, rows=global_batch_size)
    return Plan(
        model=name,
        gpu=gpu,
        gpus=gpus,
        memory=memory,
        room=room,
        work=work,
        time=time,
        batch=(micro_batch_size, global_batch_size, grad_accum_steps),
        step_tokens=step_tokens,
        tokens=tokens,
        calibration=calibration,
        notes=(*why, *_notes(work, room)),
        remedies=tuple(remedies),
    )


def _notes(work: Work, room: Room) -> Iterator[str]:
    if work.compiled:
        yield "compiled layers are taken to hold as much as plain ones; they hold less"
    if work.float8:
        yield "float8 layers are taken to hold as much as bfloat16 ones"
    if room.tight:
        yield (
            "tight: what the allocator keeps apart for each stream is more than the GPU has, so it takes memory from one "
            "for another in every step, which costs time"
        )


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything, with units in the names."""
    low, high = plan.interval
    time = plan.time
    parts = {
        name: getattr(time, name)
        for name in ("matmul", "attention", "elementwise", "loss", "communication_exposed")
    }
    return {
        "model": plan.model,
        "gpus": plan.gpus,
        "gpu": plan.gpu.name,
        "micro_batch_size": plan.batch[0],
        "global_batch_size": plan.batch[1],
        "grad_accum_steps": plan.batch[2],
        "parameters": plan.memory.parameters,
        "trained_parameters": plan.memory.trained_parameters,
        "memory_allocated_gib": plan.room.allocated,
        "memory_reserved_gib": plan.room.reserved,
        "memory_gpu_gib": plan.room.there,
        "memory_host_gib": plan.room.on_host,
        "memory_parts_gib": _gib(plan.memory.parts),
        "memory_phases_gib": {
            phase: {"total": parts.total() / _GIB, **_gib(parts)}
            for phase, parts in plan.memory.phases.items()
        },
        "fits": plan.room.fits,
        "tight": plan.room.tight,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "interval": [low, high],
        "mfu_pct": time.mfu_pct(plan.gpu),
        "hfu_pct": time.hfu_pct(plan.gpu),
        "step_seconds": time.seconds,
        "step_parts_seconds": parts | {"optimizer": time.optimizer, "waiting": time.waiting},
        "bound_by": time.bound_by,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "gpu_hours": None if plan.hours is None else plan.hours * plan.gpus,
        "notes": list(plan.notes),
        "remedies": list(plan.remedies),
        "calibration": plan.calibration.as_json() if plan.calibration else None,
    }


def _gib(parts: Any) -> dict[str, float]:
    return {part: size / _GIB for part, size in parts.items()}


def to_text(plan: Plan) -> str:
    """The same for people."""
    values, time = to_json(plan), plan.time
    low, high = plan.interval
    micro, rows, accumulated = plan.batch
    names = [*dict.fromkeys(part for held in plan.memory.phases.values() for part in held)]
    table = [("GiB", *names, "all")]
    for phase, held in values["memory_phases_gib"].items():
        table.append((phase, *(f"{held.get(n, 0):.1f}" for n in names), f"{held['total']:.1f}"))
    seconds = values["step_parts_seconds"]
    shown = {name.replace("_", " "): value for name, value in seconds.items() if value > 0}
    room = plan.room
    verdict = "tight" if room.tight else "fits" if room.fits else "does NOT fit"
    lines = [
        f"{plan.model}, {values['parameters'] / 1e9:.2f} B parameters"
        + (
            f", {values['trained_parameters'] / 1e6:,.0f} M of them trained"
            if values["trained_parameters"] < values["parameters"]
            else ""
        )
        + f", on {plan.gpus} x {plan.gpu.name}",
        f"{rows} rows a step ({micro} in a micro-batch, {accumulated} accumulated), {plan.step_tokens:,} tokens",
        "",
        aligned(table),
        "",
        f"memory   {room.allocated:.1f} GiB allocated, {room.reserved:.1f} reserved, about {room.beside:.1f} beside; "
        f"the GPU has {room.there:.1f}: {verdict}",
        *(
            [f"host     {room.on_host:.1f} GiB for each GPU; of {room.host:.0f} there"]
            if room.on_host
            else []
        ),
        f"speed    {time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU ({low:,.0f} to {high:,.0f}), "
        f"MFU {values['mfu_pct']:.0f} %, HFU {values['hfu_pct']:.0f} %, bound by {time.bound_by}",
        f"step     {time.seconds:.2f} s: "
        + ", ".join(f"{name} {value:.2f}" for name, value in shown.items()),
    ]
    if plan.hours is not None:
        lines.append(
            f"run      {plan.tokens:,.0f} tokens in {plan.hours:,.1f} hours, {plan.hours * plan.gpus:,.1f} GPU-hours"
        )
    lines += [f"note     {note}" for note in plan.notes]
    lines += [f"remedy   {remedy}" for remedy in plan.remedies]
    return "\n".join(lines)


def calibration_lines(calibration: Calibration | None) -> list[str]:
    """What was replaced, and by what; [] where nothing was."""
    if calibration is None:
        return []
    lines = [f"{calibration.origin}, instead of what is published or believed:"]
    for name, (before, after) in calibration.replaced.items():
        lines.append(f"  {name:<26}{before:>12.5g} -> {after:.5g}")
    if calibration.reserved_over_allocated:
        ratio = calibration.reserved_over_allocated
        lines.append(f"  {'reserved over allocated':<26}{'traced':>12} -> {ratio:.5g}")
    return lines + [f"  {note}" for note in calibration.notes]


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{first:<{widths[0]}}"
        + "".join(f"{text:>{width + 2}}" for text, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )
