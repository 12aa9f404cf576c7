"""A user's own functions, named on the command line as `package.module.function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import TrainError

CALLABLE = "callable:"
"""Stands before such a name where a flag also has names of its own."""


def import_object(path: str, *, flag: str) -> Any:
    """The object at the dotted path `package.module.name`.

    It is looked for where Python looks, and then in the current folder.

    Raises:
        TrainError: naming the flag and what could not be found.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise TrainError(f"{flag} {path}: give package.module.function")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A parent of the module, or something that it imports itself?
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise TrainError(
                f"{flag} {path}: there is no module {error.name}; give package.module.function, and run in the "
                "folder of the package or name that in PYTHONPATH"
            ) from None
        raise _broken(flag, path, module_name, error) from error
    except Exception as error:  # whatever a user's file does when it is imported
        raise _broken(flag, path, module_name, error) from error
    try:
        return getattr(module, name)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(module), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise TrainError(f"{flag} {path}: {module_name} has no {name}{meant}") from None


def import_function(path: str, *, flag: str, takes: str) -> Callable[..., Any]:
    """The function at the dotted path.

    Args:
        path: package.module.function, maybe behind `callable:`.
        flag: for errors.
        takes: its arguments as in its definition, those behind `*` by keyword: "step, *, steps".

    Raises:
        TrainError: there is none, it is no function, or it cannot be called with these arguments.
    """
    path = path.removeprefix(CALLABLE)
    function = import_object(path, flag=flag)
    if not callable(function):
        raise TrainError(f"{flag} {path} is a {type(function).__name__}, not a function")
    positional, _, keywords = takes.partition("*")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return function
    try:
        signature.bind(*_names(positional), **dict.fromkeys(_names(keywords)))
    except TypeError as error:
        raise TrainError(
            f"{flag} {path} has the arguments {signature}, and is called with ({takes}): {error}"
        ) from None
    return function


def source_digest(path: str) -> str:
    """What changes when the file of a function that can be imported does: 16 digits of its SHA-256."""
    module = importlib.import_module(path.removeprefix(CALLABLE).rpartition(".")[0])
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:16]


def _names(arguments: str) -> list[str]:
    return [name.strip() for name in arguments.split(",") if name.strip()]


def _broken(flag: str, path: str, module: str, error: Exception) -> TrainError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return TrainError(f"{flag} {path}: importing {module} failed ({reason}); mend it")
