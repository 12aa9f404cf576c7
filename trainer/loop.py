"""The training loop. Read `train` from top to bottom: it is the whole algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainer.config import OptimizerConfig, ParallelConfig
from trainer.distributed import max_over_ranks, sum_over_ranks
from trainer.documents import documents
from trainer.errors import TrainError
from trainer.guards import Guards
from trainer.hardware import peak_memory_gib
from trainer.optimizer import clip_gradients, rounding_metrics, set_learning_rate
from trainer.parallel import set_gradient_sync
from trainer.preemption import StopRequest

Batch = Mapping[str, Tensor]
DATA_PARALLEL = ParallelConfig()
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Any]]]
UNITS = ("labels", "documents", "pairs")
"""What a loss may be a sum over; its attribute `units` says which, `labels` if it has none."""


@dataclass
class Progress:
    """How far a run is: all that resuming needs beside tensors."""

    step: int = 0
    samples: int = 0
    """Cursor into the endless, world-size-invariant order of packed rows."""


@dataclass(frozen=True)
class Speedometer:
    """What turns tokens and seconds into shares of the machine."""

    flops: Callable[[float, float, float], float]
    """Model FLOPs of forward and backward, given real tokens, labels and the sum of squared document lengths."""
    peak_flops: float | None
    """Of all ranks together."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction,
    learning_rate: Callable[[int], float],
    optimizer_config: OptimizerConfig,
    progress: Progress,
    steps: int,
    global_batch_size: int,
    grad_accum_steps: int,
    samples_per_epoch: int | None,
    device: torch.device,
    evaluate: Callable[[int], None],
    evaluate_every: int,
    save: Callable[[Progress], None],
    save_every: int,
    log: Callable[[dict[str, Any]], None],
    log_every: int,
    advance: Callable[[int, float, float], None],
    stop: StopRequest,
    guards: Guards,
    speedometer: Speedometer,
    parallel: ParallelConfig = DATA_PARALLEL,
) -> bool:
    """Run steps `progress.step + 1` to `steps`; every rank calls this with the batches of its data-parallel rank.

    Args:
        model: sharded (`trainer.parallel.parallelise`) or a plain module in a group of one rank.
        optimizer: over the model's parameters; its learning rate is set before every step.
        batches: this rank's micro-batches from `progress.samples` on. Each has, beside what the loss needs,
            `counts` [4] int64 on the host: real tokens, padding tokens, valid labels, squared document lengths.
        loss_fn: `loss_fn(model, batch) -> (loss_sum, metrics)`, summed over the valid labels of this rank's tokens, or
            over its `units`; see `Window.add` for the metrics.
        learning_rate: pure function of the step.
        optimizer_config: clipping.
        progress: advanced in place.
        steps: the last step of the run.
        global_batch_size: packed rows per step over all ranks.
        grad_accum_steps: micro-batches per step on this rank.
        samples_per_epoch: packed rows of one epoch, for the logged epoch; None where data have no end.
        device: where batches go.
        evaluate: called after every `evaluate_every`-th step and after the last.
        evaluate_every: 0 for only after the last.
        save: called after every `save_every`-th step, after the last, and before stopping on request.
        save_every: 0 for only at the end.
        log: gets one dictionary per `log_every` steps, on every rank.
        log_every: steps.
        advance: called after every step with it, its seconds, and those of them spent waiting for batches.
        stop: polled once per step.
        guards: decide whether a step counts, and end a run that went wrong.
        speedometer: turns counts into `mfu_pct`.
        parallel: how micro-batches accumulate; and of its axes, ranks along `cp` and `tp` have the same rows and counts, those along `tp` also the same loss.

    Returns:
        True when everything was done, False when a stop was requested: then all steps up to it are saved.

    Raises:
        TrainError: too many steps in a row had a gradient that is not finite, or the ranks disagree.
    """
    batches = iter(batches)
    window = Window(speedometer, loss_copies=parallel.tp)

    for step in range(progress.step + 1, steps + 1):
        # The whole step's batches are fetched first: their token counts are the divisor of every loss in it.
        guards.begin_step(step)
        window.begin_step()
        micro_batches = [next(batches) for _ in range(grad_accum_steps)]
        window.end_data_wait()
        counts = torch.stack([batch["counts"] for batch in micro_batches]).sum(0).tolist()
        units = sum(units_of(loss_fn, batch) for batch in micro_batches)
        *counts, units, stop_votes = sum_over_ranks(
            [*counts, units, stop.signal is not None], copies=parallel.cp * parallel.tp
        )

        for index, batch in enumerate(micro_batches):
            set_gradient_sync(model, last=index == grad_accum_steps - 1, config=parallel)
            loss_sum, metrics = loss_fn(model, to_device(batch, device))
            # FSDP averages gradients over all axes but tp; times their size makes that the sum over ranks, and the
            # global count makes it the mean over every valid token of the step, wherever it lies.
            scale = dist.get_world_size() / parallel.tp / max(units, 1)
            (loss_sum * scale).backward()
            window.add({"loss": loss_sum, **metrics})

        grad_norm = clip_gradients(model.parameters(), optimizer_config.max_grad_norm)
        if guards.accept(grad_norm, window.step_loss, micro_batches):  # alike on all ranks
            set_learning_rate(optimizer, learning_rate(step))
            optimizer.step()
        optimizer.zero_grad()
        progress.step, progress.samples = step, progress.samples + global_batch_size
        seconds, data_wait_seconds = window.end_step(counts, units)
        advance(step, seconds, data_wait_seconds)
        guards.end_step(progress.samples, data_wait_seconds)

        if step % log_every == 0 or step == steps:
            log(
                {
                    "step": step,
                    "epoch": progress.samples / samples_per_epoch if samples_per_epoch else None,
                    **window.row(device),
                    "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                    "learning_rate": learning_rate(step),
                    "skipped_steps": guards.skipped,
                    "loss_spikes": guards.count_spikes(window.losses),
                    **rounding_metrics(optimizer),
                }
            )
            window = Window(speedometer, loss_copies=parallel.tp)
        stopping = stop_votes > 0
        if (save_every and step % save_every == 0) or step == steps or stopping:
            save(progress)
        if stopping:
            return False
        if (evaluate_every and step % evaluate_every == 0) or step == steps:
            evaluate(step)
    return not stop.agreed()


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Copy a batch to the device; from pinned memory the host does not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def units_of(loss_fn: LossFunction, batch: Batch) -> int:
    """How many units a loss sums over in a batch on the host: its valid labels, its documents or pairs of them.

    Raises:
        TrainError: the loss names another unit.
    """
    unit = getattr(loss_fn, "units", "labels")
    if unit not in UNITS:
        raise TrainError(f"the loss has the units {unit!r}; they must be one of {', '.join(UNITS)}")
    if unit == "labels":
        return batch["counts"].tolist()[2]
    return int(documents(batch).exists.sum()) // (2 if unit == "pairs" else 1)


class Window:
    """Sums over the steps since the last logged row. Nothing here waits for the device until `row`.

    Attributes:
        step_loss: this rank's loss of the step that is under way, on the device.
        losses: of each step, the mean over its valid tokens (the units of the loss) on all ranks; known after `row`.
    """

    def __init__(self, speedometer: Speedometer, *, loss_copies: int) -> None:
        self._speedometer = speedometer
        self._loss_copies = loss_copies
        self.step_loss, self.losses = torch.zeros(()), list[float]()
        self._sums: dict[str, Tensor] = {}
        self._ratios: set[str] = set()
        self._step_losses: list[Tensor] = []
        self._units: list[float] = []
        self._counts = [0.0] * 4
        self._steps = 0
        self._seconds = self._data_wait_seconds = 0.0

    def begin_step(self) -> None:
        self._began = time.perf_counter()
        self.step_loss = torch.zeros(())

    def end_data_wait(self) -> None:
        self._data_wait = time.perf_counter() - self._began

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take sums over a micro-batch of this rank; the same names come from every rank, in the same order.

        Args:
            metrics: on the device. A scalar is a sum over the units of the loss (valid tokens), logged as its mean; a
                tuple of two scalars is logged as the sum of the first over that of the second; counts [..., bins]
                are logged by how unevenly they fall on the bins (`unevenness`). What is named `loss` is logged
                as the loss, in place of the sum that is differentiated.
        """
        for name, value in metrics.items():
            if isinstance(value, tuple):
                self._ratios.add(name)
                value = torch.stack([part.double() for part in value])
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            if name == "loss":
                self.step_loss = value + self.step_loss

    def end_step(self, counts: Sequence[float], units: float) -> tuple[float, float]:
        """Take the step's counts over all ranks; returns its seconds, and those spent waiting for data."""
        seconds = time.perf_counter() - self._began
        self._step_losses.append(self.step_loss)
        self._units.append(units)
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]
        self._steps += 1
        self._seconds += seconds
        self._data_wait_seconds += self._data_wait
        return seconds, self._data_wait

    def row(self, device: torch.device) -> dict[str, Any]:
        """Means and sums over all ranks and the steps of the window; `loss` is the mean over all units."""
        losses = torch.stack(self._step_losses)
        sums = torch.cat([losses, *(value.flatten() for value in self._sums.values())])
        totals = torch.tensor(
            sum_over_ranks(sums.tolist(), copies=self._loss_copies), dtype=torch.float64
        )
        losses, totals = totals[: len(losses)], totals[len(losses) :]
        self.losses = (losses / torch.tensor(self._units).clamp(min=1)).tolist()
        # Steps end together, so the slowest rank's clock is the run's.
        seconds, data_wait, memory = max_over_ranks(
            [self._seconds, self._data_wait_seconds, peak_memory_gib(device)]
        )
        tokens, padding_tokens, valid_tokens, squared_lengths = self._counts
        flops = self._speedometer.flops(tokens, valid_tokens, squared_lengths)
        peak = self._speedometer.peak_flops
        metrics: dict[str, float | None] = {}
        sizes = [value.numel() for value in self._sums.values()]
        for (name, value), total in zip(self._sums.items(), totals.split(sizes), strict=True):
            if name in self._ratios:
                metrics[name] = float(total[0] / total[1]) if total[1] else None
            elif value.ndim == 0:
                metrics[name] = float(total) / max(sum(self._units), 1)
            else:
                metrics |= unevenness(name, total.view(value.shape))
        return {
            **metrics,
            "valid_tokens": int(valid_tokens),
            "tokens": int(tokens),
            "padding_tokens": int(padding_tokens),
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / dist.get_world_size(),
            "mfu_pct": None if peak is None else 100 * flops / seconds / peak,
            "step_seconds": seconds / self._steps,
            "data_wait_seconds": data_wait / self._steps,
            "memory_peak_gib": memory,
        }


def unevenness(name: str, counts: Tensor) -> dict[str, float]:
    """`NAME_max_ratio`, the fullest bin over the mean one, and `NAME_idle_pct`, the share of empty bins.

    Args:
        counts: [..., bins]; the ratio is that of the most uneven row.
    """
    ratio = (counts.amax(-1) / counts.mean(-1)).max()
    return {
        f"{name}_max_ratio": float(ratio),
        f"{name}_idle_pct": 100 * float((counts == 0).double().mean()),
    }


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction,
    device: torch.device,
    parallel: ParallelConfig = DATA_PARALLEL,
    stop: StopRequest | None = None,
) -> float:
    """Mean loss per valid token, or unit of the loss, over all batches of all ranks; the same for any number of ranks.

    Every rank must bring the same number of batches; one with nothing left brings padding. Of `parallel`, see `train`.
    When `stop` is requested meanwhile it ends early, and the value means nothing.
    """
    was_training = model.training
    model.eval()
    loss, units = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        loss_sum, metrics = loss_fn(model, to_device(batch, device))
        loss += metrics.get("loss", loss_sum).double().cpu()
        units += units_of(loss_fn, batch)
        if stop is not None and stop.agreed():
            break
    model.train(was_training)
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward nobody frees the root's gathered parameters
    (loss_sum,) = sum_over_ranks([float(loss)], copies=parallel.tp)
    (units,) = sum_over_ranks([units], copies=parallel.cp * parallel.tp)
    return loss_sum / max(units, 1)
