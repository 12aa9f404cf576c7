"""A few steps of the main job, and what is compared of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scripts.batching import slices
from scripts.config import TrainConfig
from scripts.dry_run import fingerprints
from scripts.job import Job
from scripts.wiring import Pieces, assemble, new_job, save_checkpoint, train_steps
from trainer.distributed import Ranks
from trainer.goodput import Goodput
from trainer.loop import to_device
from trainer.optimizer import learning_rates, set_learning_rate

# Elements of each gradient that are kept, evenly spread.
_SAMPLED = 1 << 16

OwnStep = Callable[..., Any]
"""`--step`: (model, optimizer, micro_batches, loss_fn) -> the step's mean loss per valid token, over all ranks."""


@dataclass
class Record:
    """What a run did."""

    losses: dict[int, float] = field(default_factory=dict)
    """Of each step."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the run's first step, clipped; elements of the whole tensors, fp32 on the host."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every parameter and of its optimizer state at the end."""


@dataclass(frozen=True)
class Bench:
    """Where runs are made, on each of its ranks."""

    config: TrainConfig
    prepared: dict[str, Any]
    cache_dir: Path
    folder: Path
    ranks: Ranks
    device: torch.device
    own_step: OwnStep | None

    def job(self, name: str, **changes: Any) -> Job:
        """A job of this configuration with `changes`, which writes to a folder of its own."""
        config = replace(self.config, **changes)
        output_dir = self.folder / name
        output_dir.mkdir(exist_ok=True)
        return new_job(config, self.cache_dir, self.ranks, self.device, self.prepared, output_dir)

    @contextmanager
    def trained(self, job: Job) -> Iterator[tuple[Pieces, Record]]:
        """The pieces of a run that has done its steps, and what they did."""
        record = Record()
        with ExitStack() as at_end:
            run = assemble(job, at_end)

            def keep_gradients(*_: Any) -> None:
                if not record.gradients:
                    record.gradients = {
                        name: sample(parameter.grad)
                        for name, parameter in run.model.named_parameters()
                        if parameter.requires_grad
                    }

            run.optimizer.register_step_pre_hook(keep_gradients)
            if self.own_step is None:
                goodput = Goodput(None, began=job.attempt.began, compiled=False)
                train_steps(job, run, goodput, lambda _: None, None)
                if job.ranks.is_first:
                    record.losses = _logged_losses(job.output_dir)
            else:
                record.losses = _own_steps(job, run, self.own_step)
            run.checkpointer.wait()
            record.fingerprints = fingerprints(run.model, run.optimizer)
            yield run, record

    def record(self, job: Job) -> Record:
        with self.trained(job) as (_, record):
            return record


def _logged_losses(output_dir: Path) -> dict[int, float]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def _own_steps(job: Job, run: Pieces, step_fn: OwnStep) -> dict[int, float]:
    """The loop around an own step: batches, learning rate and checkpoints as in trainer/loop.py."""
    config, progress, losses = job.config, run.progress, {}
    rates = learning_rates(config.schedule, steps=run.steps, peak=config.optimizer.learning_rate)
    batches = slices(job, run.batches)
    for step in range(progress.step + 1, run.steps + 1):
        micro_batches = [to_device(b, job.device) for b in islice(batches, job.grad_accum_steps)]
        set_learning_rate(run.optimizer, rates(step))
        losses[step] = float(step_fn(run.model, run.optimizer, micro_batches, run.loss))
        progress.step, progress.samples = step, progress.samples + job.global_batch_size
        if step % config.checkpoint.every == 0:
            save_checkpoint(job, run, progress, lambda _: None)
    return losses


def sample(gradient: Tensor | None) -> Tensor:
    """Evenly spread elements of a whole gradient, fp32 on the host; every rank calls this. None, a missing one, is empty."""
    if gradient is None:
        return torch.empty(0)
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    flat = whole.detach().flatten()
    return flat[:: -(-flat.numel() // _SAMPLED) | 1].float().cpu().clone()
