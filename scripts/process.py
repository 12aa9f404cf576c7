"""A command as a process of its own."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from typing import NoReturn

_USUAL = gc.get_threshold()


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end with its exit code, without collecting what lives to the end.

    Loading torch and transformers makes half a million objects: with Python's defaults the garbage collector goes through
    them about a hundred times while they load, and twice more when the process ends (together a third of the seconds of a
    process that only imports them).
    """
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)
    sys.exit(main())


def collect_as_usual() -> None:
    """Once everything is loaded: the garbage collector's usual rhythm, without what exists by now.

    A step must not wait long for the memory of tensors that refer to each other.
    """
    gc.freeze()
    gc.set_threshold(*_USUAL)
