"""What watches the numbers of a run: gradients, losses, agreement of the ranks, slow ranks, memory."""

from __future__ import annotations

import math
import os
import re
import resource
import statistics
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.config import GuardConfig
from trainer.crashes import Attempt
from trainer.distributed import gather
from trainer.errors import PeerLostError, TrainError, TransientError
from trainer.watchdog import Watchdog

Tell = Callable[..., None]
"""`tell(step, event, line, **details)`: a warning, called on every rank alike."""

# Losses before the first is judged.
_FEWEST_LOSSES = 20
# A loss within this share of the median is no spike, however calm the window was.
_CALM = 0.02
# Steps before a check in which own work is timed.
_TIMED_STEPS = 10
# Differences below this are noise, seconds.
_NOISE_SECONDS = 0.01


class Guards:
    """The loop's guards; every rank calls every method at the same place.

    Attributes:
        skipped: steps in a row up to now whose gradient was not finite.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        max_skipped_steps: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        tell: Tell,
        attempt: Attempt | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._config, self._max_skipped_steps = config, max_skipped_steps
        self._model, self._optimizer = model, optimizer
        self._watchdog, self._tell = watchdog, tell
        self._attempt = attempt or Attempt(None, "")
        self._clock = WorkClock(model, device)
        self.skipped = 0
        self._skipped_samples: list[int] = []
        self._samples: dict[int, list[int]] = {}  # of this rank, of the steps since the last row
        self._losses: deque[float] = deque(maxlen=config.spike_window or 1)
        self._data_wait_seconds = 0.0
        self._timed_steps = 0

    def begin_step(self, step: int) -> None:
        """The step's batches are about to be fetched."""
        self._attempt.step = step
        if self._watchdog is not None:
            self._watchdog.arm()
        every = self._config.check_every
        self._clock.running = every > 0 and (step - 1) % every >= every - _TIMED_STEPS

    def accept(
        self, grad_norm: float, loss_sum: Tensor, micro_batches: Sequence[Mapping[str, Tensor]]
    ) -> bool:
        """Whether the step may change the parameters.

        Args:
            grad_norm: global, so that all ranks decide alike.
            loss_sum: this rank's loss of the step.
            micro_batches: this rank's; `sample_index` [B], where they have it, names their rows.

        Raises:
            TrainError: more than `max_skipped_steps` steps in a row were not finite.
        """
        step = self._attempt.step
        self._samples[step] = [
            sample
            for batch in micro_batches
            if "sample_index" in batch
            for sample in batch["sample_index"].tolist()
        ]
        if math.isfinite(grad_norm):
            self.skipped = 0
            self._skipped_samples.clear()
            return True
        self.skipped += 1
        # A rank whose loss is finite got its bad gradient from the others.
        of_ranks = gather((bool(torch.isfinite(loss_sum)), self._samples[step]))
        bad = [ids for finite, ids in of_ranks if not finite] or [ids for _, ids in of_ranks]
        samples = sorted({sample for ids in bad for sample in ids if sample >= 0})
        self._skipped_samples += samples
        line = f"step {step} is skipped: its gradient is not finite ({name_samples(samples)})"
        self._tell(step, "skipped_step", line, samples=samples)
        if self.skipped > self._max_skipped_steps:
            raise TrainError(
                f"the gradient was not finite in {self.skipped} steps in a row, the last being step "
                f"{step} ({name_samples(self._skipped_samples)}); lower --optimizer.learning_rate, or "
                "look at these samples"
            )
        return False

    def end_step(self, samples: int, data_wait_seconds: float) -> None:
        """The step is done, with the cursor at `samples`; check the ranks if it is time.

        Raises:
            TransientError: the ranks do not agree on what must be equal.
        """
        if self._watchdog is not None:
            self._watchdog.disarm()
        if self._clock.running:
            self._data_wait_seconds += data_wait_seconds
            self._timed_steps += 1
        step, every = self._attempt.step, self._config.check_every
        if not every or step % every or dist.get_world_size() == 1:
            return
        own_seconds = (self._clock.take() + self._data_wait_seconds) / max(self._timed_steps, 1)
        self._data_wait_seconds, self._timed_steps = 0.0, 0
        reports = gather(
            {
                "step": step,
                "samples": samples,
                "optimizer": optimizer_state_summary(self._optimizer),
                "replicas": replica_checksums(self._model),
                "own_seconds": own_seconds,
            }
        )
        if difference := disagreement(reports):
            raise TransientError(
                f"the ranks disagree after step {step}: {difference}; they no longer train one model. "
                "Continue from the last checkpoint; if it happens again, suspect the memory of that "
                "machine, or code that only some ranks run"
            )
        self._look_for_slow_rank(step, [report["own_seconds"] for report in reports])

    def _look_for_slow_rank(self, step: int, seconds: list[float]) -> None:
        slowest, typical = max(seconds), statistics.median_low(seconds)
        ratio = self._config.slow_rank_ratio
        if not ratio or slowest < ratio * typical or slowest - typical < _NOISE_SECONDS:
            return
        rank = seconds.index(slowest)
        line = (
            f"rank {rank} is slow: its own work takes {slowest:.3f} s of a step, the median rank's "
            f"{typical:.3f} s; the others wait for it"
        )
        details = {"rank": rank, "own_seconds": slowest, "median_seconds": typical}
        self._tell(step, "slow_rank", line, **details)

    def count_spikes(self, losses: Sequence[float]) -> int:
        """Judge the losses of the steps since the last row, the same on every rank; warn of spikes."""
        spikes = 0
        first = self._attempt.step - len(losses) + 1
        for step, loss in enumerate(losses, first) if self._config.spike_window else ():
            line = spike(self._losses, loss, deviations=self._config.spike_deviations)
            if math.isfinite(loss):
                self._losses.append(loss)
            if line is None:
                continue
            spikes += 1
            samples = sorted({i for ids in gather(self._samples[step]) for i in ids if i >= 0})
            line = f"loss spike in step {step}: {line} ({name_samples(samples)})"
            self._tell(step, "loss_spike", line, loss=loss, samples=samples)
        self._samples.clear()
        return spikes


def spike(before: Sequence[float], loss: float, *, deviations: float) -> str | None:
    """What is wrong with `loss` after the losses `before`; None where nothing is, or they are too few."""
    if len(before) < _FEWEST_LOSSES or not math.isfinite(loss):
        return None
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
    if loss - median <= max(deviations * deviation, _CALM * abs(median)):
        return None
    return f"{loss:.4f}, the median of the {len(before)} before is {median:.4f}, their deviation {deviation:.4f}"


def name_samples(samples: Iterable[int], *, at_most: int = 16) -> str:
    """[3, 4, 5, 9] -> "samples 3-5, 9"."""
    ordered = sorted(set(samples))
    runs: list[list[int]] = []
    for sample in ordered:
        if runs and sample == runs[-1][1] + 1:
            runs[-1][1] = sample
        else:
            runs.append([sample, sample])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    more = ["..."] if len(names) > at_most else []
    return f"samples {', '.join([*names[:at_most], *more])}" if names else "samples unknown"


def disagreement(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """What differs between ranks in what must be equal, naming the ranks in the minority."""
    named: dict[str, dict[int, Any]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for name in ("step", "samples", "optimizer"):
            named[name][rank] = report[name]
        for group, checksum in report["replicas"].items():
            named[f"parameters ({group})"][rank] = checksum
    for name, values in named.items():
        counts = Counter(map(str, values.values())).most_common()
        if len(counts) > 1:
            # Where two ranks differ nobody is in the minority: both are named.
            usual = counts[0][0] if counts[0][1] > counts[1][1] else None
            odd = [f"rank {r} has {v}" for r, v in values.items() if str(v) != usual]
            return f"{name}: {', '.join(odd)}" + (f", the others {usual}" if usual else "")
    return None


def optimizer_state_summary(optimizer: torch.optim.Optimizer) -> list[float]:
    """Learning rates, and how many steps the optimizer has counted: equal on all ranks, sharded or not."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    if steps:
        counted = torch.stack([torch.as_tensor(step).double().cpu() for step in steps])
        return [*rates, *counted.unique().tolist()]
    return rates


@torch.no_grad()
def replica_checksums(model: nn.Module) -> dict[str, int]:
    """Sums of the bits of parameters that other ranks hold too, per set of ranks that must agree.

    A change of one bit anywhere changes the sum. It is taken on the device, at the speed of its memory.
    """
    sums: dict[str, list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
        placements = parameter.placements
        copies = math.prod(
            n for n, place in zip(mesh.shape, placements, strict=True) if place.is_replicate()
        )
        if copies == 1 or coordinate is None:
            continue
        names = mesh.mesh_dim_names or tuple(f"dim {i}" for i in range(mesh.ndim))
        part = ", ".join(
            f"{name} {at}"
            for name, at, place in zip(names, coordinate, placements, strict=True)
            if not place.is_replicate()
        )
        # Ranks of another mesh hold something else under the same coordinates.
        ranks = zlib.crc32(repr(mesh.mesh.tolist()).encode())
        local = parameter.to_local().contiguous()
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = local.view(integers[local.element_size()])
        sums[f"{part or 'whole'}, mesh {ranks:08x}"].append(bits.sum(dtype=torch.int64))
    return {group: int(torch.stack(parts).sum()) for group, parts in sums.items()}


class WorkClock:
    """Seconds this rank spends in the forward pass of its layers: work in which it waits for no other rank.

    Timed on the device, without making the host wait. A compiled layer is not timed.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.running = False
        self._cuda = device.type == "cuda"
        self._seconds, self._began = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []
        for module in model.modules():
            inner = [m for m in module.modules() if isinstance(m, FSDPModule)]
            # Innermost groups of FSDP: theirs hooks gather before the first of ours and free after the second.
            if inner == [module] and getattr(module, "_compiled_call_impl", None) is None:
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, prepend=True)

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        if self.running and self._cuda:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        elif self.running:
            self._began = time.perf_counter()

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self.running and self._cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._event, end))
        elif self.running:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds since the last call; waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def explain(
    error: BaseException, *, step: int, rank: int, micro_batch_size: int, plan: str = ""
) -> TrainError | None:
    """The line for an error of torch that people meet: memory that ran out, with its `plan`, a rank that was lost."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        tried = re.search(r"tried to allocate (\d+ bytes|[\d.]+ [KMGT]?i?B)", text, re.IGNORECASE)
        amount = tried.group(1) if tried else "more memory"
        if tried and amount.endswith(" bytes"):
            amount = f"{int(amount[:-6]) / 2**30:,.2f} GiB"
        return TrainError(
            f"out of memory on rank {rank} in step {step}: tried to allocate {amount}, {_held()}{plan}; lower "
            f"--micro_batch_size (now {micro_batch_size}; the global batch stays, it is accumulated) or "
            "--data.seq_len, recompute with --parallel.activation_checkpointing full, move state to the "
            "host with --parallel.cpu_offload true, or shard over more ranks"
        )
    if isinstance(error, dist.DistError) or _LOST.search(text):
        return PeerLostError(
            f"rank {rank} lost the others in step {step}: another rank has ended or hangs, its own "
            f"message says why ({re.sub(r'^.[^]]*. ', '', text).split('. ')[0][:200]})"
        )
    return None


_LOST = re.compile(
    r"gloo.*(closed by peer|reset by peer|refused|timed out|broken pipe)|NCCL.*(abort|timeout|remote)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)


def _held() -> str:
    """How much memory there is, and how much of it this rank has."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free, {held / 2**30:.1f} GiB hold tensors "
            f"(at most {peak / 2**30:.1f})"
        )
    pages = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PHYS_PAGES")
    free, total = (count * os.sysconf("SC_PAGE_SIZE") / 2**30 for count in pages)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    bound = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v: {limit / 2**30:.1f})"
    return f"{free:.1f} of the machine's {total:.1f} GiB are free{bound}"
