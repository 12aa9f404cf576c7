"""Parts of a source tokenised by Ray Data: on the cluster that RAY_ADDRESS names, or on this machine.

Every worker must see this repository, the environment and the cache folder at the same paths. Only
the numbers of the parts travel; rows are read and tokens written in the cache.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import DataError
from data.prepare import Task, write_part
from trainer.preemption import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
_ATTEMPTS = 4
_OBJECT_STORE_BYTES = 100 << 20  # a Task is a tokenizer and some settings
# Unix sockets have paths of at most 107 bytes, and Ray adds about 80 to its folder's.
_LONGEST_FOLDER = 24


def write_parts_on_ray(task: Task, numbers: Sequence[int]) -> None:
    """`data.prepare.write_parts` on the running Ray (see `ray_running`); raises DataError."""
    import ray.data
    from ray.exceptions import RayError

    missing = sorted(set(task.missing_parts).intersection(numbers))
    if not missing:
        return
    # A block is what is scheduled, and tried again when a worker or its machine dies.
    parts = ray.data.from_items([{"part": n} for n in missing], override_num_blocks=len(missing))
    write = partial(_write_part, task, secrets.token_hex(8))
    try:
        with tqdm(total=len(missing), desc="tokenise", unit="part", disable=None) as bar:
            for row in parts.map(write).iter_rows():
                if row["error"]:
                    raise DataError(row["error"])
                bar.update()
    except RayError as error:
        raise DataError(
            f"{task.source.name}: Ray gave up ({' '.join(str(error).split())[:300]}); run again, "
            "finished parts are kept"
        ) from error


def _write_part(task: Task, run: str, row: dict[str, Any]) -> dict[str, Any]:
    """On a worker: an error of the data comes back as its one line, without a trace and another try."""
    number, error = row["part"], ""
    try:
        _count_attempt(task, run, number)
        if not task.part_folder(number).exists():
            write_part(task, number, lambda rows: None)
    except DataError as problem:
        error = str(problem)
    return {**row, "error": error}


def _count_attempt(task: Task, run: str, number: int) -> None:
    """Ray would start a part again for ever; raises DataError for one that has ended several workers."""
    record = task.in_progress / "attempts" / run / str(number)
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "ab") as file:
        file.write(b".")
        attempts = file.tell()
    if attempts > _ATTEMPTS:
        raise DataError(
            f"{task.source.name}: part {number} has ended {_ATTEMPTS} workers; is memory short? give "
            "fewer workers, with --data.prepare_workers or in the cluster, and run again"
        )


@contextmanager
def ray_running(cache_dir: Path, workers: int) -> Iterator[None]:
    """Join the Ray that RAY_ADDRESS names, or run one here with `workers` worker processes.

    One of this machine is reached from this machine only, keeps its files in a folder that goes with
    it, and has no dashboard. Raises DataError when Ray is not installed or not to be reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=_short_folder(), ignore_cleanup_errors=True
    ) as folder:
        # Read when ray is imported. On Linux the last two are what keeps its ports on loopback
        # and its key out of the home folder.
        settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        if address is None:
            settings |= {
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_AUTH_MODE": "token",
                # Ray keeps the first it reads in a process.
                "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
            }
        os.environ.update(settings)
        try:
            import ray
            from ray.data import DataContext
        except ImportError as error:
            raise DataError(
                "--engine ray needs Ray: pip install -c constraints.txt -e '.[ray]'"
            ) from error
        here: dict[str, Any] = {
            "num_cpus": workers,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": folder,
        }
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            if match := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address or ""):
                # Ray itself tries for minutes.
                with socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10):
                    pass
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _worker_environment(cache_dir)},
                **({} if address else here),
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"Ray cannot be {f'reached at {address}' if address else 'started'} ({reason}); "
                "check RAY_ADDRESS, or use --engine processes"
            ) from error
        # Ray puts its own in their place, which end this process without a chance to remove anything.
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well
        DataContext.get_current().enable_progress_bars = False  # there is one of our own
        try:
            yield
        finally:
            ray.shutdown()


def _worker_environment(cache_dir: Path) -> dict[str, str]:
    """What a worker on any machine needs to import this code and to keep to the cache; no secrets."""
    folders = {k: v for k, v in os.environ.items() if v.startswith(str(cache_dir))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **folders,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",  # the rows are in the cache already
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"
