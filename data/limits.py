"""Bounds on a chat template: it is a program that comes with a model, and may loop or grow without end.

It runs in Jinja's sandbox, which keeps it from the interpreter, files and network, but not from time and memory.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data.errors import DataError

TEMPLATE_SECONDS = 10.0
TEMPLATE_GIB = 2.0
TEMPLATE_CHARACTERS = 1 << 20
REMEDY = "give --model.chat_template native, chatml or another file"


class _OutOfTime(BaseException):
    """Not an Exception: whoever takes those for a row that a template refuses must not take this."""


@contextmanager
def bounded(
    what: str, *, seconds: float | None = None, gib: float | None = None
) -> Iterator[Callable[[], object]]:
    """Let the body compute for `seconds` (TEMPLATE_SECONDS), of processor time, and with `gib` allocate so much; yields
    what restarts the clock.

    Only the main thread can be interrupted: in any other one nothing is bounded.

    Raises:
        DataError: a bound was reached; the line begins with `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    seconds = seconds or TEMPLATE_SECONDS

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    clock = partial(signal.setitimer, signal.ITIMER_VIRTUAL)
    clock(seconds)
    try:
        with _memory(gib):
            yield partial(clock, seconds)
    except _OutOfTime:
        raise DataError(f"{what} computes for more than {seconds:g} s; {REMEDY}") from None
    except MemoryError:
        raise DataError(f"{what} needs more than {gib or 0:g} GiB of memory; {REMEDY}") from None
    finally:
        clock(0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory(gib: float | None) -> Iterator[None]:
    """Refuse this process more than `gib` of address space beyond what it has; Linux only."""
    statm = Path("/proc/self/statm")
    if gib is None or not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + int(gib * 2**30)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
