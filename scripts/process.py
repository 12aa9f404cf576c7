"""A command as a process of its own."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from typing import NoReturn


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end with its exit code, without collecting what lives to the end.

    Loading torch and transformers makes half a million objects: with Python's defaults the garbage collector goes through
    them about a hundred times while they load, and twice more when the process ends (together a third of the seconds of a
    process that only imports them).
    """
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)
    sys.exit(main())
