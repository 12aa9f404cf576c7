"""Run train.py under scripts/launch.py in the background, and do things to its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.chaos import ranks_of
from tests.support.command import ROOT, clean_environment
from tests.support.job import TRAIN


class Launch:
    """A running launch.py; its output is in `log`."""

    def __init__(self, process: subprocess.Popen[bytes], output_dir: Path, log: Path) -> None:
        self.process, self.output_dir, self.log = process, output_dir, log

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run now, by rank."""
        return ranks_of(self.process.pid)

    def steps(self) -> int:
        """Lines of metrics.jsonl."""
        with suppress(OSError):
            return (self.output_dir / "metrics.jsonl").read_text().count("\n")
        return 0

    def attempts(self) -> int:
        """Attempts that have come to a step."""
        with suppress(OSError, ValueError, IndexError):
            lines = (self.output_dir / "goodput.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["attempt"] + 1
        return 0

    def wait_for(self, condition: Callable[[], bool], *, seconds: float) -> float:
        """Seconds until `condition` holds; raises TimeoutError with the log if it does not, or the run has ended."""
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > seconds or self.process.poll() is not None:
                raise TimeoutError(f"not within {seconds} s:\n{self.log.read_text()}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def end(self, *, seconds: float) -> tuple[int, str]:
        """Wait for its exit code and output."""
        return self.process.wait(seconds), self.log.read_text(errors="replace")


@contextmanager
def launched(
    args: list[Any], output_dir: Path, *, nproc: int = 2, env: dict[str, str] | None = None
) -> Iterator[Launch]:
    """`launch.py --nproc_per_node=NPROC train.py ARGS`; whatever is left of it is killed at the end."""
    folder = output_dir.parent
    log = folder / f"{output_dir.name}.log"
    command = [
        ROOT / "scripts" / "launch.py",
        f"--nproc_per_node={nproc}",
        "--max-restarts=3",
        TRAIN,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command), f"--output_dir={output_dir}", *map(str, args)],
            cwd=ROOT,
            env=env or clean_environment(folder / "private"),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    launch = Launch(process, output_dir, log)
    try:
        yield launch
    finally:
        left = list(launch.ranks().values())
        process.kill()
        process.wait()
        for rank in left:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
