"""One all-reduce over the GPUs of this machine, in processes of their own: whether they can talk, and how fast.

For doctor.py. A GPU that hangs in it would hang the run too, after the model was loaded.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from scripts.machine import Finding

_NUMBERS = 64 * 2**20  # fp32: 256 MiB, enough for the links to run at full speed
_SECONDS = 120.0
_WARM_UP, _REPEATS = 2, 5
# Of a message to all ranks where the links do not work.
_REMEDY = (
    "NCCL_DEBUG=INFO shows what it chose; NCCL_P2P_DISABLE=1 goes around broken links between GPUs; "
    "/dev/shm must have room"
)


def check_collective(
    *, ranks: int, backend: str = "nccl", numbers: int = _NUMBERS, seconds: float = _SECONDS
) -> list[Finding]:
    """One finding, or none for a single rank; GPUs and NCCL are not yet run.

    Args:
        ranks: one for each GPU of this machine.
        backend: nccl, or gloo on CPUs.
        numbers: fp32 values that are summed.
        seconds: after which it is taken to hang.
    """
    if ranks < 2:
        return []
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_reduce, args=(rank, ranks, backend, numbers, folder))
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            # The first that fails ends it: the others would wait for it until their own timeout.
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            hung = not any(process.exitcode for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if all(process.exitcode == 0 for process in processes):
            result = json.loads((folder / "result").read_text(encoding="utf-8"))
            return [_finding(result, ranks, backend, numbers)]
        logs = [file.read_text(errors="replace") for file in sorted(folder.glob("log-*"))]
    said = [line.strip() for log in logs for line in log.splitlines() if line.strip()]
    reason = f"no answer in {seconds:.0f} s" if hung else (said or ["a process died"])[-1][:300]
    text = f"an all-reduce over the {ranks} ranks of this machine fails: {reason}"
    return [Finding("error", backend, text, _REMEDY)]


def _finding(result: dict[str, float | str], ranks: int, backend: str, numbers: int) -> Finding:
    if result["sum"] != ranks * (ranks + 1) / 2:
        text = f"an all-reduce over {ranks} ranks gives {result['sum']}: memory or links are broken"
        return Finding(
            "error", backend, text, "take this machine out of use; nvidia-smi -q shows ECC errors"
        )
    # Every byte is sent and received 2 (n - 1) / n times in a ring.
    moved = 2 * (ranks - 1) / ranks * 4 * numbers
    speed = moved / float(result["seconds"]) / 1e9
    text = f"{result['version']}: {ranks} ranks sum {4 * numbers / 2**20:,.0f} MiB at {speed:,.1f} GB/s each"
    return Finding("ok", backend, text)


def _reduce(rank: int, ranks: int, backend: str, numbers: int, folder: Path) -> None:
    """In a process of its own."""
    log = (folder / f"log-{rank}").open("wb")
    os.dup2(log.fileno(), 2)  # NCCL writes there
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    import torch
    import torch.distributed as dist

    on_gpu = backend == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    values = torch.empty(numbers, device=device)
    begin = 0.0
    for repeat in range(_WARM_UP + _REPEATS):
        if repeat == _WARM_UP:
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
        values.fill_(rank + 1)
        dist.all_reduce(values)
    low, high = values.aminmax()  # waits for the GPU
    total = float(low) if low == high else float("nan")
    taken = (time.perf_counter() - begin) / _REPEATS
    version = "gloo"
    if on_gpu:
        version = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    if rank == 0:
        facts = {"sum": total, "seconds": taken, "version": version}
        (folder / "result").write_text(json.dumps(facts), encoding="utf-8")
    dist.destroy_process_group()
