"""The output folder of a run: one writer at a time, and the mark of a run that was told to stop."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import TrainError

PREEMPTED = "preempted"


@contextmanager
def sole_writer(output_dir: Path) -> Iterator[None]:
    """Hold OUTPUT_DIR/.lock, which the kernel drops when this process ends, however it ends.

    The file stays behind, empty. A file system without locks is written without one, with a warning.

    Raises:
        TrainError: another run holds it, or the folder cannot be written.
    """
    path = output_dir / ".lock"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}); give another folder"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read().split()) or "another process"
            raise TrainError(
                f"--output_dir {output_dir} is in use by {holder}; wait for it, end it, or give another folder"
            ) from None
        except OSError as error:
            line = f"warning: {output_dir} cannot be locked ({error.strerror}): do not start two runs in it"
            print(line, file=sys.stderr, flush=True)
            yield
            return
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {os.uname().nodename}, training since {since}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def mark_preempted(output_dir: Path, number: signal.Signals, step: int) -> None:
    """Leave OUTPUT_DIR/preempted: everything up to `step` is saved, and the same command goes on."""
    with suppress(OSError):
        (output_dir / PREEMPTED).write_text(
            json.dumps({"signal": number.name, "step": step}) + "\n", encoding="utf-8"
        )


def clear_preempted(output_dir: Path) -> bool:
    """Remove the mark, since the run goes on; True if there was one."""
    try:
        (output_dir / PREEMPTED).unlink()
    except OSError:
        return False
    return True
