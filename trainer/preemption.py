"""Being told to end: by a signal, or by the launcher's death.

Imports nothing heavy: a signal must find its handler before the libraries are loaded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A scheduler that signals every process of a job reaches a rank twice: itself, and through its launcher.
ECHO_SECONDS = 2.0
# Before the first step: for removing what is unfinished. A download that stalls would hold the process.
LATEST_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal while there was nothing to save. No Exception: nothing on the way out may take it for an error."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.signal = number


class StopRequest:
    """What SIGTERM, SIGUSR1 and ctrl-C ask for.

    The first raises `Stopped` in the main thread, or, within `deferred`, is remembered for the loop,
    which saves. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._deferred = self._trained = self._failed = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals; only in the main thread."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        hook = sys.unraisablehook

        def ask_again(lost: sys.UnraisableHookArgs) -> None:
            """A finaliser swallows what is raised while it runs, a signal's `Stopped` too."""
            if isinstance(lost.exc_value, Stopped):
                self.signal = None
                threading.Timer(0.01, os.kill, [os.getpid(), lost.exc_value.signal]).start()
            else:
                hook(lost)

        sys.unraisablehook = ask_again
        try:
            yield self
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this holds, a signal is only remembered.

        If an error ends it, what a launcher then sends is no request: it ends the siblings of a rank that failed, and
        the error is what has to be told.
        """
        self._deferred = self._trained = True
        try:
            yield
        except BaseException:
            self._failed = True
            raise
        finally:
            self._deferred = False

    def agreed(self) -> bool:
        """Whether any rank was signalled; every rank calls this."""
        from trainer.distributed import max_over_ranks

        return max_over_ranks([self.signal is not None])[0] > 0

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is None:
            if not self._trained or self._failed:
                late = threading.Timer(LATEST_SECONDS, os._exit, [128 + number])
                late.daemon = True
                late.start()
            if self._failed:
                return
            self.signal, self._since = signal.Signals(number), time.monotonic()
            if not self._deferred:
                raise Stopped(self.signal)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(128 + number)  # what is being written has no name yet: nothing to undo


def end_with_launcher() -> None:
    """Get SIGTERM when torchrun dies, however it dies: nobody would ever restart or end this rank.

    Linux only; elsewhere `trainer.watchdog` notices. A run without torchrun outlives its shell as before.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_stopped_siblings() -> None:
    """SIGKILL ranks of this node that are stopped (SIGSTOP): their launcher would wait 30 s for each. Linux only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # The name before the last bracket may hold anything.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state == "T" and int(parent) == os.getppid():
                os.kill(int(stat.parent.name), signal.SIGKILL)
