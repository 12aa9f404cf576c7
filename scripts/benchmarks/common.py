"""What every comparison needs: sides that take turns, a stopwatch, and the machine it runs on."""

from __future__ import annotations

import multiprocessing
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Result = dict[str, Any]
Side = Callable[[], Result]
"""One run; it returns its wall `seconds` and whatever else it counts."""


def take_turns(sides: dict[str, Side], repeats: int) -> Result:
    """Medians of what each side returned, by its name; the first side runs first in every round.

    Beside a side named `shardloop`, `times_faster` is the other's median time as a multiple of ours.
    """
    runs: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            runs[name].append(run())
    result: Result = {
        name: {key: median(run[key] for run in done) for key in done[0]}
        | {"every_seconds": [run["seconds"] for run in done]}
        for name, done in runs.items()
    }
    for other in sides.keys() - {"shardloop"} if "shardloop" in sides else ():
        result["times_faster"] = result[other]["seconds"] / result["shardloop"]["seconds"]
    return result


@contextmanager
def stopwatch() -> Iterator[Result]:
    """Fills in `seconds`, and `cpu_seconds` of this process and those it started and joined.

    The latter tells more where other programs keep the cores busy.
    """
    result: Result = {}
    before, start = os.times(), time.perf_counter()
    yield result
    result["seconds"] = time.perf_counter() - start
    result["cpu_seconds"] = sum(os.times()[:4]) - sum(before[:4])


@contextmanager
def peak_memory(every_seconds: float = 0.002) -> Iterator[Result]:
    """Fills in `peak_bytes`: how far this process's anonymous resident memory rose above what it was (on Linux).

    That is resident less file-backed pages (/proc/self/statm), looked at by a thread every so many seconds.
    """

    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(every_seconds):
            highest = max(highest, anonymous_bytes())

    result: Result = {}
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
    result["peak_bytes"] = max(highest, anonymous_bytes()) - before


def anonymous_bytes() -> int:
    """Resident memory of this process that is no page of a file (on Linux)."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """From now on `peak_anonymous_bytes` is the peak since this call (on Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_anonymous_bytes() -> int:
    """The largest `anonymous_bytes` since `forget_peak`, as the kernel kept it: nothing has to look meanwhile.

    The kernel keeps the peak of all resident pages; pages of files and shared ones are taken to be what they are now.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {
        name: int(value.split()[0])
        for name, _, value in (x.partition(":") for x in lines)
        if name in _OF_PEAK
    }
    return 1024 * (kib["VmHWM"] - kib["RssFile"] - kib["RssShmem"])


_OF_PEAK = ("VmHWM", "RssFile", "RssShmem")


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns on each of so many new gloo ranks of one thread each."""
    return _run(world_size, _as_rank, function, arguments)


def as_launched(
    world_size: int, env: dict[str, str], function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """What `function` returns on each of so many new processes that torchrun might have started, with `env` as well.

    They have no process group yet.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    env = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **env,
    }
    return _run(world_size, _as_launched, env, function, arguments)


def _run(world_size: int, start: Callable[..., Any], *arguments: Any) -> list[Any]:
    context = multiprocessing.get_context("forkserver")  # it loads the libraries once
    context.set_forkserver_preload(["torch", "transformers.modeling_utils"])
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        ProcessPoolExecutor(world_size, mp_context=context) as pool,
    ):
        ranks = [
            pool.submit(start, rank, world_size, folder, *arguments) for rank in range(world_size)
        ]
        return [rank.result() for rank in ranks]


def _as_launched(
    rank: int, _world_size: int, _folder: str, env: dict[str, str], function: Any, arguments: Any
) -> Any:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    return function(*arguments)


def _as_rank(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: Any
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def cores() -> list[int]:
    """Numbers of the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread, and the threads and processes it starts, on `count` cores (on Linux)."""
    allowed = cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed[:count])
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, allowed)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> Result:
    return {"cpu": cpu_model(), "cores": len(cores())}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def setting(result: Result) -> str:
    """The machine and the versions of a result, in one line."""
    machine, versions = result["machine"], result["versions"]
    return f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(
        f"{name} {number}" for name, number in versions.items()
    )
