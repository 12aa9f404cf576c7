"""The plan of a run: what it holds, how long a step takes, whether it fits; as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from models.build import (
    EMBEDDED_QWEN3,
    check_length,
    parse_model_config,
    read_config_values,
)
from scripts.batching import batch_sizes
from scripts.config import TrainConfig
from scripts.planner.facts import Gpu, find_model, shape_of
from scripts.planner.memory import MemoryPlan, plan_memory
from scripts.planner.published import deviation
from scripts.planner.speed import StepTime, Work, predict
from trainer.parallel import data_rank, mesh_sizes

_GIB = 2**30
# Beside what torch's allocator reserves: CUDA's context, NCCL's buffers, cuBLAS's workspace. Believed, not measured.
OUTSIDE_GIB = 1.5
# Of what is allocated; segments grow in place (`trainer.hardware.configure`), so little is lost between blocks. Believed.
_FRAGMENTED = 1.03
# Of the interval: nine of ten runs are meant to be inside.
_DEVIATIONS = 1.645


@dataclass(frozen=True)
class Plan:
    model: str
    gpu: Gpu
    gpus: int
    memory: MemoryPlan
    time: StepTime
    deviation: float
    """Standard deviation of the logarithm of the speed."""
    batch: tuple[int, int, int]
    """Rows of a micro-batch and of a step, micro-batches."""
    step_tokens: int
    """Over all ranks."""
    tokens: float | None
    """Of the whole run."""
    notes: tuple[str, ...]

    @property
    def allocated_gib(self) -> float:
        return self.memory.allocated_bytes / _GIB

    @property
    def reserved_gib(self) -> float:
        return self.memory.reserved_bytes / _GIB

    @property
    def fits(self) -> bool:
        return _FRAGMENTED * self.allocated_gib + OUTSIDE_GIB <= self.gpu.torch_gib

    @property
    def tight(self) -> bool:
        """It fits, but only while the allocator gives memory of one stream to another."""
        return self.fits and self.reserved_gib + OUTSIDE_GIB > self.gpu.torch_gib

    @property
    def interval(self) -> tuple[float, float]:
        """Tokens per second and GPU."""
        factor = math.exp(_DEVIATIONS * self.deviation)
        speed = self.time.tokens_per_second_per_gpu
        return speed / factor, speed * factor

    @property
    def hours(self) -> float | None:
        return (
            None
            if self.tokens is None
            else self.tokens / self.step_tokens * self.time.seconds / 3600
        )


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

    Raises:
        ModelError, TrainError: as the trainer would for this configuration.
    """
    parallel, seq_len = config.parallel, config.data.seq_len
    ranks = data_rank(parallel, rank=0, world_size=gpus).size
    batch = micro_batch_size, global_batch_size, grad_accum_steps = batch_sizes(config, ranks)
    memory = plan_memory(
        config,
        hf_config,
        world_size=gpus,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        labels=labels,
    )
    sizes = mesh_sizes(parallel, world_size=gpus)
    layers, last = hf_config.num_hidden_layers, config.model.train_last_layers
    work = Work(
        shape=shape_of(hf_config.to_dict()),
        gpu=gpu,
        gpus=gpus,
        tokens=micro_batch_size * seq_len,
        squared_lengths=micro_batch_size * seq_len * min(document_length or seq_len, seq_len),
        grad_accum_steps=grad_accum_steps,
        labels_share=labels,
        recompute=parallel.activation_checkpointing,
        checkpoint_every=parallel.checkpoint_every,
        compiled=parallel.compile,
        float8=parallel.float8 != "none",
        shards=sizes["dp_shard"] * sizes["cp"],
        gathers=1 if parallel.reshard_after_forward is False else 2,
        reduce_bytes=4 if parallel.reduce_dtype == "float32" else 2,
        trained_share=memory.trained_parameters / memory.parameters,
        tensor_parallel=sizes["tp"],
        context_parallel=sizes["cp"],
        offload=parallel.cpu_offload,
        front_share=(layers - last) / layers if last else 0.0,
    )
    step_tokens = global_batch_size * seq_len
    if tokens is None and config.steps is not None:
        tokens = config.steps * step_tokens
    return Plan(
        model=name,
        gpu=gpu,
        gpus=gpus,
        memory=memory,
        time=predict(work),
        deviation=deviation(work),
        batch=batch,
        step_tokens=step_tokens,
        tokens=tokens,
        notes=tuple(_notes(work)),
    )


def _notes(work: Work) -> list[str]:
    notes = []
    gpu = work.gpu
    if work.gpus > gpu.gpus_per_node and gpu.network_bytes_per_second < 20e9:
        notes.append(
            f"machines of {gpu.gpus_per_node} {gpu.name} are joined by a network of "
            f"{8 * gpu.network_bytes_per_second * gpu.gpus_per_node / 1e9:.0f} Gb/s: a step waits for it"
        )
    if work.compiled:
        notes.append("compiled layers are taken to hold as much as plain ones; they hold less")
    if work.float8:
        notes.append("float8 layers are taken to hold as much as bfloat16 ones")
    return notes


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
        "memory_allocated_gib": plan.allocated_gib,
        "memory_reserved_gib": plan.reserved_gib,
        "memory_gpu_gib": plan.gpu.torch_gib,
        "memory_parts_gib": _gib(plan.memory.parts),
        "memory_phases_gib": {
            phase: {"total": parts.total() / _GIB, **_gib(parts)}
            for phase, parts in plan.memory.phases.items()
        },
        "fits": plan.fits,
        "tight": plan.tight,
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
    verdict = "tight" if plan.tight else "fits" if plan.fits else "does NOT fit"
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
        f"memory   {plan.allocated_gib:.1f} GiB allocated, {plan.reserved_gib:.1f} reserved, about {OUTSIDE_GIB:g} beside; "
        f"the GPU has {plan.gpu.torch_gib:.1f}: {verdict}",
        f"speed    {time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU ({low:,.0f} to {high:,.0f}), "
        f"MFU {values['mfu_pct']:.0f} %, HFU {values['hfu_pct']:.0f} %, bound by {time.bound_by}",
        f"step     {time.seconds:.2f} s: "
        + ", ".join(f"{name} {value:.2f}" for name, value in shown.items()),
    ]
    if plan.hours is not None:
        lines.append(
            f"run      {plan.tokens:,.0f} tokens in {plan.hours:,.1f} hours, {plan.hours * plan.gpus:,.1f} GPU-hours"
        )
    notes = plan.notes
    if plan.tight:
        notes += (
            "tight: what the allocator keeps apart for each stream is more than the GPU has, so it takes memory from one "
            "for another in every step, which costs time",
        )
    return "\n".join([*lines, *(f"note     {note}" for note in notes)])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{first:<{widths[0]}}"
        + "".join(f"{text:>{width + 2}}" for text, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )
