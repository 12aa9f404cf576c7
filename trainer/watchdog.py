"""A thread that ends a rank which hangs, or whose launcher has died."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from trainer.crashes import Attempt

# After the stacks are written: ranks hang together, and each has its own to write before a peer's end stops it.
_LAST_WORDS_SECONDS = 1.0
# How much later the process is ended where this module's thread cannot run.
_LATEST_SECONDS = 10.0


class HangError(RuntimeError):
    """A step took longer than it may."""


class Watchdog:
    """Between `arm` and `disarm` no more than `seconds` may pass; 0 waits for ever.

    Then the stacks of all threads go to FOLDER/stacks-rank-N.txt, and the process ends with exit code 1,
    so that the launcher restarts the ranks. Where even threads are stuck, C code does the same a little later.
    """

    def __init__(self, seconds: float, folder: Path, attempt: Attempt) -> None:
        self._seconds, self._attempt = seconds, attempt
        self._rank = os.environ.get("RANK", "0")
        self._path = folder / f"stacks-rank-{self._rank}.txt"
        self._deadline = float("inf")
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def arm(self) -> None:
        """A step begins."""
        if self._seconds:
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(
                self._seconds + _LATEST_SECONDS, exit=True, file=self._file
            )

    def disarm(self) -> None:
        """A step is done."""
        self._deadline = float("inf")
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")  # the C code needs it open
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disarm()
        self._ended.set()
        self._thread.join()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10 or 1.0)):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        line = (
            f"rank {self._rank}: step {self._attempt.step} has taken more than {self._seconds:g} s "
            f"(guards.hang_seconds); stacks of all threads in {self._path}"
        )
        self._file.write(f"{line}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._attempt.record(HangError(line), final=False)
        print(f"train.py: error: {line}", file=sys.stderr, flush=True)
        time.sleep(_LAST_WORDS_SECONDS)
        os._exit(1)
