"""From a `TrainConfig` to a finished run: data, model and loop are put together here and nowhere else."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from data.formats import DOCUMENTS_OF_A_ROW
from data.loader import PackedBatches
from data.mixture import Mixture
from data.streaming import StreamedBatches
from models.causal_lm import PackedCausalLM
from models.flops import training_flops
from models.weights import LoadReport
from scripts import reporting
from scripts.batching import (
    batch_sizes,
    gather_data,
    open_batches,
    open_stream,
    slices,
    total_ledger,
)
from scripts.command_line import printable_lines
from scripts.config import TrainConfig, output_folder
from scripts.dry_run import plan_table, prove_checkpoint, summary, temporary_output
from scripts.evaluating import Evaluation, evaluate_model
from scripts.extensions import check_extensions
from scripts.job import Job
from scripts.modelling import (
    build_loss,
    build_sharded_model,
    check_units,
    export,
    judge_first_loss,
    optimizer_of,
    save_model_files,
)
from scripts.partial import flops_of_part, part_record, trains_part
from scripts.planned import (
    begin_plan,
    compare_plan,
    comparison_table,
    flags_of_rows,
    planned_memory,
)
from scripts.preparation import (
    open_mixture,
    pin_revisions,
    prepare,
    read_tokenizer,
)
from scripts.report import write_report
from scripts.resuming import lasting_settings, next_batches, open_mirror, resume
from scripts.trackers import tracking
from trainer.checkpoint import Checkpointer
from trainer.config import ParallelConfig
from trainer.crashes import Attempt
from trainer.distributed import Ranks, max_over_ranks, once, raise_together, start
from trainer.errors import PeerLostError, TrainError
from trainer.goodput import Goodput, goodput_table
from trainer.guards import Guards, explain
from trainer.hardware import (
    choose_device,
    configure,
    peak_flops,
    seed_generators,
    use_flash_attention,
)
from trainer.loop import LossFunction, Progress, Speedometer, train
from trainer.metrics import MetricsWriter, Tracker
from trainer.optimizer import learning_rates, state_bytes
from trainer.output import clear_preempted, mark_preempted, sole_writer
from trainer.parallel import DTYPES, build_mesh, data_rank
from trainer.precision import definite
from trainer.preemption import Stopped, StopRequest, end_stopped_siblings
from trainer.profiling import StepProfiler
from trainer.watchdog import Watchdog

Say = Callable[[str], None]
"""Prints on rank 0."""


def run(
    config: TrainConfig, cache_dir: Path, ranks: Ranks, stop: StopRequest, attempt: Attempt
) -> int:
    """One training job, from nothing to the export; every rank calls this.

    Returns:
        0 when the last step was reached, 128 + n when signal n stopped the run after saving.

    Raises:
        DataError, ModelError, TrainError: what the user can mend.
        Stopped: a signal came before the first step, or during the export.
    """
    check_extensions(config)
    device_type = choose_device(config.device, local_world_size=ranks.local_world_size)
    output_dir = output_folder(config)
    configure(
        device_type,
        local_world_size=ranks.local_world_size,
        output_dir=output_dir,
        symmetric_memory=config.parallel.symmetric_memory,
    )
    use_flash_attention(config.model.flash_attention, device_type)
    data = data_rank(config.parallel, rank=ranks.rank, world_size=ranks.world_size)
    batch_sizes(config, data.size)  # what does not divide is said before anything is fetched
    pinned = pin_revisions(config, output_dir)
    with ExitStack() as at_end:

        def prepare_alone() -> dict[str, Any]:
            if ranks.is_first and not config.dry_run:
                at_end.enter_context(sole_writer(output_dir))
            return prepare(pinned, cache_dir, world_size=data.size, device_type=device_type)

        # One rank of a node, or of all nodes that share the cache, downloads and tokenises. The process group, whose collectives time out, comes after.
        prepared = once(ranks, "prepare", prepare_alone, shared_folder=cache_dir)
        device = start(ranks, device_type, timeout_seconds=config.guards.collective_timeout_seconds)
        at_end.callback(dist.destroy_process_group)
        job = new_job(
            replace(config, parallel=_agreed(config.parallel, device.type)),
            cache_dir,
            ranks,
            device,
            prepared,
            output_dir,
            stop=stop,
            attempt=attempt,
        )
        if config.dry_run:
            folder = at_end.enter_context(temporary_output(ranks, output_dir))
            job = replace(job, output_dir=folder)
        with explained(job):
            return _run(job, at_end)


def _agreed(parallel: ParallelConfig, device_type: str) -> ParallelConfig:
    """With one type for all ranks, whose CPUs may be of different kinds."""
    parallel = definite(parallel, device_type)
    (emulated,) = max_over_ranks([parallel.param_dtype == "float32"])
    return replace(parallel, param_dtype="float32") if emulated else parallel


def new_job(
    config: TrainConfig,
    cache_dir: Path,
    ranks: Ranks,
    device: torch.device,
    prepared: dict[str, Any],
    output_dir: Path,
    *,
    stop: StopRequest | None = None,
    attempt: Attempt | None = None,
) -> Job:
    """A job, with its batch sizes and this rank's part of the data; without `stop` no signal is answered.

    Raises:
        TrainError: sizes that do not divide.
    """
    data = data_rank(config.parallel, rank=ranks.rank, world_size=ranks.world_size)
    micro_batch_size, global_batch_size, grad_accum_steps = batch_sizes(config, data.size)
    return Job(
        config=replace(config, parallel=definite(config.parallel, device.type)),
        cache_dir=cache_dir,
        output_dir=output_dir,
        ranks=ranks,
        data_rank=data,
        stop=stop or StopRequest(),
        attempt=attempt or Attempt(None, ""),
        device=device,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        grad_accum_steps=grad_accum_steps,
        prepared=prepared,
    )


@dataclass(frozen=True)
class Pieces:
    """What one run is made of."""

    tokenizer: PreTrainedTokenizerBase
    mixture: Mixture | None
    """None where rows are streamed."""
    steps: int
    mesh: DeviceMesh
    model: PackedCausalLM
    weights: LoadReport | None
    """None for random weights."""
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    settings: dict[str, Any]
    """That a checkpoint is only continued with."""
    part: dict[str, Any] | None
    """What is trained, if not everything."""
    progress: Progress
    batches: PackedBatches | StreamedBatches


def _run(job: Job, at_end: ExitStack) -> int:
    config, ranks = job.config, job.ranks

    def say(text: str) -> None:
        if ranks.is_first:
            print(printable_lines(text), flush=True)

    run = assemble(job, at_end)
    _announce(job, run, say)
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    planned = begin_plan(
        job.output_dir,
        gpu=gpu if ranks.is_first else None,
        gpus=ranks.world_size,
        rows=flags_of_rows(run.mixture, seq_len=config.data.seq_len),
    )
    goodput = Goodput(
        job.output_dir if ranks.is_first else None,
        began=job.attempt.began,
        compiled=config.parallel.compile,
    )
    peak, peak_origin = peak_flops(job.device, DTYPES[config.parallel.param_dtype])
    trackers: list[Tracker] = []
    if ranks.is_first and not config.dry_run:
        # Until everything is written: they take the report too.
        trackers = at_end.enter_context(
            tracking(config, job.output_dir, stopped=lambda: job.stop.signal is not None)
        )
    finished, before, after = train_steps(job, run, goodput, say, peak, trackers)
    if isinstance(run.batches, StreamedBatches):
        ledger = total_ledger(job, run.batches)
        raise_together(reporting.record_stream(job, ledger) if ranks.is_first else None)
        say(reporting.stream_line(job, ledger))

    def end_preempted(number: int) -> int:
        goodput.write(ended=True)
        if ranks.is_first:
            mark_preempted(job.output_dir, signal.Signals(number), run.progress.step)
            report(job)
        say(reporting.stopped(job, number, run.progress.step))
        return 128 + number

    try:
        if finished and config.checkpoint.export and not config.dry_run:
            export(job, run.model, run.tokenizer, step=run.progress.step)
    except Stopped as stopped:
        run.checkpointer.close()  # nothing collective any more: the ranks were at different places
        return end_preempted(stopped.signal)
    with job.stop.deferred(), goodput.measure("checkpoint"):
        run.checkpointer.wait()  # behind the export: a full disk or a store out of reach costs no trained model
    if not finished:
        (number,) = max_over_ranks([int(job.stop.signal or 0)])
        return end_preempted(int(number))
    goodput.write(ended=True)
    totals = goodput.totals()
    compared = compare_plan(job.output_dir, planned())
    known = {"goodput": totals} | ({"plan": compared} if compared else {})
    raise_together(reporting.record(job, **known) if ranks.is_first else None)
    if config.dry_run:
        prove_checkpoint(run.checkpointer, run.model, run.optimizer)
        say(summary(job.output_dir) if ranks.is_first else "")
        return 0
    if ranks.is_first:
        report(job)
    say(goodput_table(totals))
    if compared:
        say(comparison_table(compared))
    say(reporting.footer(job, before, after, mfu_peak=peak_origin))
    return 0


def assemble(job: Job, at_end: ExitStack) -> Pieces:
    """Data, model, optimizer and checkpoints, at the place where the run goes on."""
    config, ranks = job.config, job.ranks
    tokenizer = read_tokenizer(config, job.cache_dir, job.prepared["tokenizer"])
    mixture = None if config.data.streaming else open_mixture(config.data, job.prepared)
    # A stream has no length: it is given the steps.
    rows = 0 if mixture is None else len(mixture)
    steps = config.steps or math.ceil(rows * config.epochs / job.global_batch_size)
    mesh = build_mesh(config.parallel, world_size=ranks.world_size, device_type=job.device.type)
    model, weights = build_sharded_model(job, tokenizer, mesh)
    loss = build_loss(job, model)
    pairs = (
        mixture.sources[0].documents.group > 1
        if mixture is not None
        else job.prepared["stream"]["format"] in DOCUMENTS_OF_A_ROW
    )
    check_units(config, loss, pairs=pairs)
    # What a model draws while training differs by rank, but not on ranks that compute together.
    seed_generators(config.seed + ranks.rank // config.parallel.tp)
    optimizer = optimizer_of(model, config.optimizer, compile=config.parallel.compile)
    checkpointer = Checkpointer(
        job.output_dir / "checkpoints",
        model,
        optimizer,
        config.checkpoint,
        store=open_mirror(config),
        save_frozen=not trains_part(config),
    )
    at_end.callback(checkpointer.close)
    settings = lasting_settings(job, mixture, tokenizer, model, steps)
    part = part_record(job, model)
    progress, states = resume(job, checkpointer, settings, mixture, part)
    return Pieces(
        tokenizer=tokenizer,
        mixture=mixture,
        steps=steps,
        mesh=mesh,
        model=model,
        weights=weights,
        loss=loss,
        optimizer=optimizer,
        checkpointer=checkpointer,
        settings=settings,
        part=part,
        progress=progress,
        batches=open_stream(job, tokenizer, states)
        if mixture is None
        else open_batches(job, mixture, tokenizer, start_sample=progress.samples),
    )


def _announce(job: Job, run: Pieces, say: Say) -> None:
    """Say what is about to run, and write what says it later."""
    config, is_first = job.config, job.ranks.is_first
    step = run.progress.step
    say(reporting.header(job, run.model, run.weights, run.mixture, run.steps, run.progress))
    if config.dry_run:
        say(plan_table(run.model, config.parallel, state_bytes(run.optimizer, config.optimizer)))
    if step >= run.steps:
        say(f"nothing to train: {job.output_dir} is already at step {step} of {run.steps}")
    raise_together(
        reporting.write_run_files(
            job, run.model, run.mesh, run.weights, run.mixture, steps=run.steps
        )
        if is_first
        else None
    )
    raise_together(save_model_files(job, run.model, run.tokenizer) if is_first else None)


def train_steps(
    job: Job,
    run: Pieces,
    goodput: Goodput,
    say: Say,
    peak: float | None,
    trackers: Sequence[Tracker] = (),
) -> tuple[bool, dict[str, float], dict[str, float]]:
    """The loop with everything it calls.

    Returns:
        Whether it came to its end, and the evaluations before the first and after the last step.
    """
    config, ranks, device = job.config, job.ranks, job.device
    model, progress, steps = run.model, run.progress, run.steps
    micro_batches = slices(job, run.batches)
    if progress.step == 0 and run.weights is not None:
        micro_batches = judge_first_loss(job, model, micro_batches, say)
    (was_preempted,) = max_over_ranks([ranks.is_first and clear_preempted(job.output_dir)])
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    with (
        MetricsWriter(
            job.output_dir,
            config.log,
            is_first=ranks.is_first,
            steps=steps,
            step=progress.step,
            trackers=trackers,
        ) as writer,
        Watchdog(config.guards.hang_seconds, job.output_dir, job.attempt) as watchdog,
        StepProfiler(
            config.log.profiled_steps if not config.dry_run else range(0),
            job.output_dir / "profile",
            rank=ranks.rank,
            device=device,
        ) as profiler,
        job.stop.deferred(),
    ):

        def evaluate(step: int) -> dict[str, float]:
            with goodput.measure("evaluation"):
                found = Evaluation()
                if not config.dry_run:
                    found = evaluate_model(job, model, run.tokenizer, run.loss)
            if found.numbers:
                writer.write({"step": step, **found.numbers}, found.samples)
            return found.numbers

        def save(now: Progress) -> None:
            with goodput.measure("checkpoint"):
                save_checkpoint(job, run, now, say)
            writer.write_goodput(now.step, goodput.totals())

        def advance(step: int, seconds: float, data_wait_seconds: float) -> None:
            writer.advance()
            profiler.advance(step)
            goodput.step(step, seconds, data_wait_seconds)

        if ranks.is_first:
            writer.describe(*reporting.description(job, run.mixture))
        if progress.step == 0:
            before = evaluate(0)
        if progress.step >= steps and was_preempted:  # maybe before its last evaluation
            after = evaluate(progress.step)
        profiler.advance(progress.step)
        finished = train(
            model,
            run.optimizer,
            micro_batches,
            loss_fn=run.loss,
            learning_rate=learning_rates(
                config.schedule, steps=steps, peak=config.optimizer.learning_rate
            ),
            optimizer_config=config.optimizer,
            progress=progress,
            steps=min(progress.step + 1, steps) if config.dry_run else steps,
            global_batch_size=job.global_batch_size,
            grad_accum_steps=job.grad_accum_steps,
            samples_per_epoch=None if run.mixture is None else len(run.mixture),
            device=device,
            evaluate=lambda step: after.update(evaluate(step)),
            evaluate_every=config.evaluation.every,
            save=save,
            save_every=config.checkpoint.every,
            log=writer.write,
            log_every=config.log.every,
            advance=advance,
            stop=job.stop,
            guards=Guards(
                config.guards,
                max_skipped_steps=config.optimizer.max_skipped_steps,
                model=model,
                optimizer=run.optimizer,
                device=device,
                tell=writer.tell,
                attempt=job.attempt,
                watchdog=watchdog,
            ),
            speedometer=Speedometer(
                flops=partial(training_flops, model.hf.config, **flops_of_part(config, model)),
                peak_flops=None if peak is None else peak * ranks.world_size,
            ),
            parallel=config.parallel,
        )
    return finished, before, after


def report(job: Job) -> None:
    """Write the page of the run, or warn that it could not be written."""
    if error := write_report(job.output_dir):
        print(f"warning: {error}", file=sys.stderr, flush=True)


def save_checkpoint(job: Job, run: Pieces, now: Progress, say: Say) -> None:
    """Begin a checkpoint; one that failed is a warning, and an error only if it was the last."""
    state: dict[str, Any] = {
        "samples": now.samples,
        "settings": run.settings,
        "partial": run.part,
    }
    if isinstance(run.batches, StreamedBatches):
        state["stream"] = gather_data(job, run.batches.state)
    elif run.mixture is not None and job.ranks.is_first:
        state["next_batches"] = next_batches(job, run.mixture, now.samples)
    try:
        run.checkpointer.save(now.step, state)
    except TrainError as error:  # maybe of the save before; `wait` raises it if it was the last
        say(f"warning: {error}")


@contextmanager
def explained(job: Job) -> Iterator[None]:
    """Turn torch's errors that people meet into one line of ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        step, rank = job.attempt.step, job.ranks.rank
        ours = explain(
            error,
            step=step,
            rank=rank,
            micro_batch_size=job.micro_batch_size,
            plan=planned_memory(job.output_dir),
        )
        if isinstance(ours, PeerLostError):
            end_stopped_siblings()
        if ours is not None:
            raise ours from error
        raise
