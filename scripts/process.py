"""A command as a process of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_USUAL = gc.get_threshold()


def run_command(main: Callable[[], int], *, leave_at_once: bool = False) -> NoReturn:
    """Run `main` and end with its exit code, without collecting what lives to the end.

    A command that leaves nothing to finalisers (files, connections) can leave at once when the handlers of its exit have run:
    taking down half a million objects costs half a second more.

    Loading torch and transformers makes half a million objects: with Python's defaults the garbage collector goes through
    them about a hundred times while they load, and twice more when the process ends (together a third of the seconds of a
    process that only imports them).
    """
    gc.set_threshold(100_000, 10, 10)
    code: int | None = None

    def leave() -> None:
        gc.freeze()
        if code is None or not leave_at_once:
            return  # `main` did not return, or more is to do
        for stream in (sys.stdout, sys.stderr):
            with suppress(BrokenPipeError):  # whoever read it has left
                stream.flush()
        os._exit(code)

    # The first that is registered is the last that runs.
    atexit.register(leave)
    code = main()
    sys.exit(code)


def collect_as_usual() -> None:
    """Once everything is loaded: the garbage collector's usual rhythm, without what exists by now.

    A step must not wait long for the memory of tensors that refer to each other.
    """
    gc.freeze()
    gc.set_threshold(*_USUAL)
