"""Which model fits on which machine, trained how, and how fast: a plan for each.

Memory is traced on 2 and on 8 ranks; on more, each part of it is what these two say, since all that a rank holds is either
whole or a share.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

from models.build import parse_model_config
from models.config import LoraConfig
from scripts.config import TrainConfig
from scripts.planner.facts import GPUS, find_model, known_models
from scripts.planner.memory import MemoryPlan, plan_memory
from scripts.planner.planning import make_plan
from scripts.planner.work import batch_of

MODELS = tuple(name for name in known_models() if name.startswith("Qwen/"))
MACHINES = ((2, "h100-nvl"), (8, "h100-sxm"), (8, "h200"), (64, "h100-sxm"))
_TRACED = (2, 8)


def _half(config: TrainConfig) -> TrainConfig:
    parallel = replace(config.parallel, master_dtype="bfloat16")
    optimizer = replace(config.optimizer, state_dtype="bfloat16")
    return replace(config, parallel=parallel, optimizer=optimizer)


METHODS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "fp32 masters and state": lambda config: config,
    "bf16 masters and state": _half,
    "LoRA, rank 16": lambda config: replace(config, lora=LoraConfig(rank=16)),
}


@dataclass(frozen=True)
class Cell:
    model: str
    method: str
    gpus: int
    gpu: str
    recompute: str
    """none, or full where the run fits no other way."""
    fits: bool
    tight: bool
    needed_gib: float
    tokens_per_second_per_gpu: float
    bound_by: str

    def __str__(self) -> str:
        if not self.fits:
            return f"needs {self.needed_gib:,.0f} GiB"
        speed = f"{self.tokens_per_second_per_gpu:,.0f}"
        return speed + (", AC" if self.recompute == "full" else "") + (", tight" * self.tight)


def matrix(
    config: TrainConfig, models: Sequence[str] = MODELS, *, processes: int | None = None
) -> list[Cell]:
    """The cells of every model, method and machine, by model, method and machine.

    Args:
        config: what all have in common, such as `data.seq_len`.
        models: names in models.json.
        processes: that plan models at once; default: as many as there are cores.

    Raises:
        ModelError, TrainError: as the trainer would.
    """
    make = partial(cells_of_model, config)
    processes = min(processes or os.cpu_count() or 1, len(models))
    if processes == 1:
        return [cell for model in models for cell in make(model)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [cell for cells in pool.map(make, models) for cell in cells]


def cells_of_model(
    config: TrainConfig,
    name: str,
    *,
    methods: Sequence[str] = tuple(METHODS),
    machines: Sequence[tuple[int, str]] = MACHINES,
) -> list[Cell]:
    """Those of one model, by method and machine."""
    hf_config = parse_model_config(find_model(name), config.model, name)
    cells = []
    for method in methods:
        changed = METHODS[method](replace(config, model=replace(config.model, name=name)))

        @cache
        def traced(
            recompute: str, gpus: int, gpu: str, changed: TrainConfig = changed
        ) -> MemoryPlan:
            run = _recomputing(changed, recompute)
            rows, _, accumulated = batch_of(run, gpus=gpus)
            return plan_memory(
                run,
                hf_config,
                world_size=gpus,
                micro_batch_size=rows,
                grad_accum_steps=accumulated,
                gpu_gib=GPUS[gpu].torch_gib,
            )

        for gpus, gpu in machines:
            for recompute in ("none", "full"):
                if gpus in _TRACED:
                    memory = traced(recompute, gpus, gpu)
                else:
                    memory = at_ranks({n: traced(recompute, n, gpu) for n in _TRACED}, gpus)
                plan = make_plan(
                    _recomputing(changed, recompute),
                    name,
                    hf_config,
                    gpu=GPUS[gpu],
                    gpus=gpus,
                    memory=memory,
                )
                if plan.room.fits and not plan.room.tight:
                    break
            cells.append(
                Cell(
                    model=name,
                    method=method,
                    gpus=gpus,
                    gpu=gpu,
                    recompute=recompute,
                    fits=plan.room.fits,
                    tight=plan.room.tight,
                    needed_gib=plan.room.needed,
                    tokens_per_second_per_gpu=plan.time.tokens_per_second_per_gpu,
                    bound_by=plan.time.bound_by,
                )
            )
    return cells


def _recomputing(config: TrainConfig, mode: Any) -> TrainConfig:
    return replace(config, parallel=replace(config.parallel, activation_checkpointing=mode))


def at_ranks(traced: dict[int, MemoryPlan], ranks: int) -> MemoryPlan:
    """On another number of ranks than two that were traced: each part is a + b / ranks."""
    (few, less), (many, more) = traced.items()
    share = (1 / ranks - 1 / many) / (1 / few - 1 / many)

    def between(a: Counter[str], b: Counter[str]) -> Counter[str]:
        return Counter(
            {part: max(0, round(b[part] + share * (a[part] - b[part]))) for part in a | b}
        )

    return MemoryPlan(
        {phase: between(less.phases[phase], more.phases[phase]) for phase in less.phases},
        between(less.streams, more.streams),
        more.trained_parameters,
        more.parameters,
    )


def as_markdown(cells: Sequence[Cell]) -> str:
    """A table for each machine: a row for each model, a column for each method."""
    found = {(cell.gpus, cell.gpu, cell.model, cell.method): str(cell) for cell in cells}
    models = dict.fromkeys(cell.model for cell in cells)
    methods = dict.fromkeys(cell.method for cell in cells)
    lines = []
    for gpus, gpu in dict.fromkeys((cell.gpus, cell.gpu) for cell in cells):
        lines += [f"| {gpus} x {gpu} | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
        for model in models:
            row = [found[gpus, gpu, model, method] for method in methods]
            lines.append(f"| {model.rpartition('/')[2]} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)
