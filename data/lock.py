"""A lock between processes that says who holds it and that no dead process can hold."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError
from data.sources import explain_os_error


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `path`; waits for whoever holds it, and prints who that is.

    The kernel drops the lock when its holder ends, however it ends. The file stays behind: removing
    it would let two processes lock two files of one name. Its text is only for people. Raises
    DataError where the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(explain_os_error(error, path.parent) or f"{path}: {error}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            print(f"waiting for {holder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {os.uname().nodename}, {purpose} since {since}\n")
        file.flush()
        yield
