"""Run a function on several gloo ranks of this machine.

The ranks are forked from one server process that has already imported the libraries, so that a
launch costs a fraction of a second instead of the imports once per rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_PRELOAD = ["tests.support.preload"]
# Thread pools do not survive a fork, and ranks share the cores: one thread each.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_TEARDOWN_SECONDS = 10.0
_STACK_SIGNAL = signal.SIGUSR2


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    init_group: bool = True,
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes and return what each rank returned.

    `function` is defined at module level; its arguments and results are pickled. `env` is added to
    the variables torchrun would set. With `init_group` the default gloo group exists during the
    call; without it the function starts its own. No rank outlives the call.

    Raises RuntimeError with the traceback of the first rank that failed, or with its exit code when
    it died; TimeoutError with the stack of every unfinished rank after `timeout` seconds.
    """
    context = start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        home = Path(folder, "home")
        home.mkdir()
        shared = {
            **os.environ,
            **_ONE_THREAD,
            "HOME": str(home),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(env or {}),
        }
        processes, pipes = [], {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                rank_env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                stack_file = str(Path(folder, f"stack-{rank}"))
                process = context.Process(
                    target=_run_rank,
                    args=(sender, rank_env, stack_file, init_group, function, args),
                )
                process.start()
                sender.close()  # so that the pipe reads as closed when the rank dies
                processes.append(process)
                pipes[receiver] = rank
            results = _collect(pipes, processes, timeout, Path(folder))
            for (
                process
            ) in processes:  # results are in; a hang or abort in teardown is not a failure
                process.join(_TEARDOWN_SECONDS)
            return results
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for receiver in pipes:
                receiver.close()


def start_server(env: dict[str, str] | None = None) -> ForkServerContext:
    """The context whose server has the libraries loaded; the first call starts it and does not wait.

    `env` is the server's environment, this process's by default; libraries read it when they load.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**(env or before), **_ONE_THREAD})  # OpenMP reads it when torch loads
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _collect(
    pipes: dict[multiprocessing.connection.Connection, int],
    processes: list[Any],
    timeout: float,
    folder: Path,
) -> list[Any]:
    deadline = time.monotonic() + timeout  # from here, so that the server's imports do not count
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = multiprocessing.connection.wait(
            list(waiting), max(0.0, deadline - time.monotonic())
        )
        if not ready:
            stacks = "".join(
                f"\nrank {rank}:\n{_stack(processes[rank].pid, folder / f'stack-{rank}')}"
                for rank in sorted(waiting.values())
            )
            raise TimeoutError(
                f"ranks {sorted(waiting.values())} of {len(processes)} did not finish within "
                f"{timeout:g} seconds and were ended{stacks}"
            )
        for receiver in ready:
            rank = waiting.pop(receiver)  # type: ignore[arg-type]
            try:
                succeeded, payload = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(_TEARDOWN_SECONDS)
                code = processes[rank].exitcode
                raise RuntimeError(f"rank {rank} died with exit code {code}, no result") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(processes))]


def _stack(pid: int, file: Path) -> str:
    """Where a rank hangs, as it writes it when it is asked by signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _STACK_SIGNAL)
    for _ in range(50):
        if file.exists() and file.stat().st_size:
            break
        time.sleep(0.1)
    time.sleep(0.1)  # it has begun to write: let it finish
    return file.read_text() if file.exists() else ""


def _run_rank(
    sender: multiprocessing.connection.Connection,
    env: dict[str, str],
    stack_file: str,
    init_group: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        faulthandler.register(_STACK_SIGNAL, file=stacks)
        try:
            if init_group:
                dist.init_process_group("gloo")
            # Plain pickle: torch's own reductions would pass handles that die with this process.
            message = pickle.dumps((True, function(*args)))
        except BaseException:  # DCP's CheckpointException is not an Exception
            message = pickle.dumps((False, traceback.format_exc()))
        # Before the group goes away: gloo now and then aborts while it is taken down.
        sender.send_bytes(message)
        sender.close()
        faulthandler.unregister(_STACK_SIGNAL)
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.stdout.flush()
