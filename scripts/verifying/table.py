"""All checks of a configuration: one process for most of them, and ranks beside it for the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scripts.config import TrainConfig
from scripts.extensions import check_extensions
from scripts.verifying.checks import Check, Measure, Result, compare_runs, make, one_rank
from scripts.verifying.copy import copy_of
from scripts.verifying.runs import Bench, Record
from trainer.config import ParallelConfig
from trainer.distributed import Ranks, start
from trainer.errors import TrainError
from trainer.functions import import_function

_RANKS_SECONDS = 600.0


def verify(
    config: TrainConfig, cache_dir: Path, *, full: bool, step: str | None, only: tuple[str, ...]
) -> int:
    """Print a line for every check; returns 0 when all hold, else 1.

    Raises:
        DataError, ModelError, TrainError: there is nothing to prove, because the configuration itself does not run.
    """
    began = time.perf_counter()
    check_extensions(config)
    if step is not None:
        _own_step(step)
    world_size = ranks_of(config.parallel)
    with ExitStack() as at_end:
        place = tempfile.TemporaryDirectory(prefix=".verify-", dir=cache_dir)
        folder = Path(at_end.enter_context(place))
        data_ranks = world_size // (config.parallel.cp * config.parallel.tp)
        chosen, prepared = copy_of(
            config, cache_dir, folder, full=full, global_batch_size=2 * data_ranks
        )
        checks = at_end.enter_context(
            closing(_checks(config, chosen, prepared, cache_dir, folder, world_size, step, only))
        )
        results = []
        print(f"{'check':<27}{'result':<8}{'difference':>12}{'tolerance':>11}", flush=True)
        for name, measure in checks:
            if _wanted(name, only):
                results.append(make(name, measure))
                print(line(results[-1]), flush=True)
    if not results:
        raise TrainError(f"--only {', '.join(only)} is in no check's name: see docs/verify.md")
    failed = [result.name for result in results if result.failed]
    made = sum(result.worst is not None for result in results)
    seconds = time.perf_counter() - began
    if failed:
        print(f"{len(failed)} of {made} checks FAILED in {seconds:.0f} s: {', '.join(failed)}")
        return 1
    print(f"all {made} checks hold, in {seconds:.0f} s")
    return 0


def _wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(word in name for word in only)


def ranks_of(parallel: ParallelConfig) -> int:
    """The fewest ranks on which this way of spreading a model differs from one process in every axis."""
    replicas = min(parallel.dp_replicate, 2)
    return 2 * replicas * parallel.cp * parallel.tp


def line(result: Result) -> str:
    """A result as one line of the table."""
    if result.worst is None:
        return f"{result.name:<27}{'skipped':<8}  {result.note}"
    numbers = f"{result.worst.difference:>12.1e}{result.worst.tolerance:>11.1e}"
    word = "FAILED" if result.failed else "ok"
    return f"{result.name:<27}{word:<8}{numbers}  {result.note}".rstrip()


def _checks(
    config: TrainConfig,
    chosen: TrainConfig,
    prepared: dict[str, Any],
    cache_dir: Path,
    folder: Path,
    world_size: int,
    step: str | None,
    only: tuple[str, ...],
) -> Generator[Check, None, None]:
    # The ranks import and run while the checks of this process are made.
    spread = replace(
        chosen,
        micro_batch_size=1,
        parallel=replace(
            chosen.parallel, dp_replicate=min(chosen.parallel.dp_replicate, 2), dp_shard=-1
        ),
    )
    alone = replace(
        chosen, parallel=replace(chosen.parallel, dp_replicate=1, dp_shard=-1, cp=1, tp=1)
    )
    recompute = config.parallel.activation_checkpointing
    device_type = chosen.device
    assert device_type != "auto"
    name = f"{world_size} ranks = 1 rank"
    started = world_size if _wanted(name, only) else 0
    with _ranks(started, spread, prepared, cache_dir, folder, step) as pipe:
        ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0, store=None)
        device = start(ranks, device_type)
        try:
            bench = Bench(
                config=alone,
                prepared=prepared,
                cache_dir=cache_dir,
                folder=folder,
                ranks=ranks,
                device=device,
                own_step=_own_step(step),
            )
            whole: list[Record] = []
            yield from one_rank(
                bench, whole.append, recompute="full" if recompute == "none" else recompute
            )
        finally:
            dist.destroy_process_group()
        yield name, lambda: _compare_ranks(pipe, whole[0])


def _compare_ranks(pipe: Connection, whole: Record) -> list[Measure]:
    if not pipe.poll(_RANKS_SECONDS):
        raise TrainError(f"they did not end within {_RANKS_SECONDS:.0f} s")
    try:
        found = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise TrainError("a rank ended without a result; its lines are above") from None
    if isinstance(found, str):
        raise TrainError(found)
    return compare_runs(found, whole)


@contextmanager
def _ranks(
    world_size: int,
    config: TrainConfig,
    prepared: dict[str, Any],
    cache_dir: Path,
    folder: Path,
    step: str | None,
) -> Iterator[Connection]:
    """Ranks that make one run; its record, or an error's line, comes through the pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    # The ranks share the cores with each other and with this process.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (world_size + 1)))
    try:
        processes = [
            context.Process(
                target=_run_rank,
                args=(rank, world_size, config, prepared, cache_dir, folder, step, there),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    there.close()
    try:
        yield here
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run_rank(
    rank: int,
    world_size: int,
    config: TrainConfig,
    prepared: dict[str, Any],
    cache_dir: Path,
    folder: Path,
    step: str | None,
    pipe: Connection,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    ranks = Ranks(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        node=0,
        store=dist.FileStore(str(folder / "store"), world_size),
    )
    answer: Record | str
    try:
        assert config.device != "auto"
        device = start(
            ranks, config.device, timeout_seconds=config.guards.collective_timeout_seconds
        )
        bench = Bench(
            config=config,
            prepared=prepared,
            cache_dir=cache_dir,
            folder=folder,
            ranks=ranks,
            device=device,
            own_step=_own_step(step),
        )
        answer = bench.record(bench.job("ranks"))
    except Exception as error:
        answer = f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"
    if ranks.is_first or isinstance(answer, str):
        # Plain pickle: torch's own would send handles that end with this process.
        pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


def _own_step(path: str | None) -> Any:
    if path is None:
        return None
    return import_function(path, flag="--step", takes="model, optimizer, micro_batches, loss_fn")
