"""The fastest way to train a model on given GPUs that fits into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from models.config import LoraConfig
from scripts.command_line import CommandLineError, validate
from scripts.config import TrainConfig
from scripts.planner.facts import Gpu
from scripts.planner.planning import Plan, aligned
from trainer.config import ParallelConfig

_LARGEST_MICRO_BATCH_TOKENS = 65_536
_LORA_RANK = 16


@dataclass(frozen=True)
class Found:
    config: TrainConfig
    plan: Plan
    how: str


def search(
    config: TrainConfig, make: Callable[[TrainConfig], Plan], *, gpu: Gpu, gpus: int
) -> list[Found]:
    """Ways that fit, the fastest first; [] where none does.

    Tried are what is recomputed, the rows of a micro-batch, and over several nodes HSDP; if nothing fits, host memory, and at
    last LoRA instead of all weights. A `global_batch_size` that is given stays.

    Args:
        config: all else is as it says.
        make: a plan for a configuration.
        gpu: each of `gpus`.
    """
    offloaded = replace(config, parallel=replace(config.parallel, cpu_offload=True))
    resorts = [config, offloaded]
    if not config.lora.rank and not config.model.train_last_layers:
        resorts.append(replace(config, lora=LoraConfig(rank=_LORA_RANK)))
    for resort in resorts:
        ways = [replace(resort, parallel=p) for p in _shardings(resort.parallel, gpu, gpus)]
        found = [
            tried for way in ways if _is_allowed(way) for tried in _micro_batches(way, make, gpus)
        ]
        if found:
            return sorted(found, key=lambda one: -one.plan.time.tokens_per_second_per_gpu)
    return []


def _is_allowed(config: TrainConfig) -> bool:
    """Whether train.py takes it."""
    try:
        validate(config)
    except CommandLineError:
        return False
    return True


def _shardings(parallel: ParallelConfig, gpu: Gpu, gpus: int) -> Iterator[ParallelConfig]:
    """What is recomputed, from nothing to everything, with full and hybrid sharding."""
    inside = parallel.cp * parallel.tp
    nodes = gpus // gpu.gpus_per_node
    for mode in ("none", "op", "selective", "full"):
        one = replace(parallel, activation_checkpointing=mode)
        yield one
        if nodes > 1 and gpus % gpu.gpus_per_node == 0 and gpu.gpus_per_node % inside == 0:
            yield replace(one, dp_replicate=nodes, dp_shard=gpu.gpus_per_node // inside)


def _micro_batches(
    config: TrainConfig, make: Callable[[TrainConfig], Plan], gpus: int
) -> Iterator[Found]:
    """More and more rows, as long as they fit."""
    ranks = gpus // (config.parallel.cp * config.parallel.tp)
    rows = 1
    while rows * config.data.seq_len <= max(_LARGEST_MICRO_BATCH_TOKENS, config.data.seq_len):
        if config.global_batch_size and config.global_batch_size % (rows * ranks):
            return
        tried = replace(config, micro_batch_size=rows)
        plan = make(tried)
        if not plan.fits:
            return
        yield Found(tried, plan, _how(tried))
        rows *= 2


def _how(config: TrainConfig) -> str:
    parallel = config.parallel
    parts = [f"{config.micro_batch_size} rows", f"recompute {parallel.activation_checkpointing}"]
    if parallel.dp_replicate > 1:
        parts.append(f"HSDP {parallel.dp_replicate} x {parallel.dp_shard}")
    if parallel.cpu_offload:
        parts.append("offload")
    if config.lora.rank:
        parts.append(f"LoRA {config.lora.rank}")
    return ", ".join(parts)


def as_table(found: Sequence[Found]) -> str:
    """One line for each."""
    rows = [("way", "GiB", "tokens/s/GPU", "MFU %", "bound by")]
    for one in found:
        plan = one.plan
        rows.append(
            (
                one.how + (" (tight)" if plan.room.tight else ""),
                f"{plan.room.allocated:.1f}",
                f"{plan.time.tokens_per_second_per_gpu:,.0f}",
                f"{plan.time.mfu_pct(plan.gpu):.0f}",
                plan.time.bound_by,
            )
        )
    return aligned(rows)


def recipe(config: TrainConfig) -> str:
    """YAML for train.py: what is not a default."""
    values = _changed(asdict(config), asdict(TrainConfig()))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, default in defaults.items():
        value = values[key]
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value, default = _changed(value, default), {}
        if value != default:
            changed[key] = list(value) if isinstance(value, tuple) else value
    return changed
