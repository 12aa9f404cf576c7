"""The command line of train.py: one frozen `TrainConfig` from flags and YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.config import DataConfig
from models.config import LoraConfig, ModelConfig
from trainer.config import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)

# What decides which samples come; and with what a step makes of them, the keys of `allow_changed`.
OF_SAMPLES = ("data", "packing", "seq_len", "global_batch_size", "seed")
LASTING = (*OF_SAMPLES, "model", "loss", "optimizer", "schedule", "steps", "precision")


@dataclass(frozen=True)
class TrainConfig:
    """Everything one training run depends on."""

    cache_dir: str = "cache"
    """The one folder for every download and every derived file: models, datasets, tokenised data,
    compiled code."""

    output_dir: str | None = None
    """Folder of this run's results; default outputs/RUN_NAME."""

    seed: int = 0
    """Seed of weight initialisation and of the order of the data."""

    steps: int | None = None
    """Optimizer steps to run; default: as many as `epochs` needs."""

    epochs: float = 1.0
    """Passes over the training data, when steps is not given."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU."""

    micro_batch_size: int | None = None
    """Packed rows per forward and backward on one rank; default: as many as make 4,096 tokens and divide a rank's share of a step."""

    global_batch_size: int | None = None
    """Packed rows per optimizer step over all ranks; default: micro_batch_size times the
    data-parallel ranks."""

    resume: str = "auto"
    """auto continues from the newest checkpoint in output_dir; never starts anew; or the path of a
    checkpoint."""

    allow_changed: tuple[str, ...] = ()
    """What may differ from the checkpoint that is continued, though it changes which samples come next or what a step computes: data, packing, seq_len, global_batch_size, seed, model, loss, optimizer, schedule, steps, precision."""

    dry_run: bool = False
    """Build everything, print what each rank will hold, run one step, save, reload and compare, and stop; output_dir is not touched."""

    loss: str | None = None
    """Own loss, as package.function: a function of (model, batch) that returns a sum over valid tokens and metrics, or a class that is made with (job, model) and then called so (docs/extend.md); default: cross-entropy."""

    loss_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the own loss, for example {beta: 0.1}."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)


def output_folder(config: TrainConfig) -> Path:
    """Where the results of a run go."""
    return Path(config.output_dir or f"outputs/{run_name(config)}")


def run_name(config: TrainConfig) -> str:
    """Model and data in one file name."""
    model = config.model.name or config.model.path or "embedded"
    data = config.data.name or config.data.path or config.data.prepared
    data = data or ("mixture" if config.data.sources else "chat")
    return "-".join(
        re.sub(r"[^A-Za-z0-9._]+", "_", Path(part).stem if Path(part).suffix else Path(part).name)
        for part in (model, data)
    )
