"""The user's own functions of a run, by the names that its flags give (docs/extend.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from data.config import DataConfig, source_configs
from data.errors import DataError
from data.transform import Transform
from models.config import ModelConfig
from scripts.config import TrainConfig
from trainer.errors import TrainError
from trainer.functions import CALLABLE, import_function, import_object, source_digest
from trainer.loop import LossFunction


def own_loss(config: TrainConfig) -> LossFunction | None:
    """The function of `--loss` with its options; raises TrainError, as all here, if there is none or its arguments do not fit.

    Where `--loss` names a class that is made of the job and the model, a function of these two that makes it.
    """
    if config.loss is None:
        return None
    takes, options = "job, model" if loss_is_class(config) else "model, batch", config.loss_options
    if options:
        takes += ", *, " + ", ".join(options)
    function: Any = import_function(config.loss, flag="--loss", takes=takes)
    if not options:
        return function
    with_options: Any = partial(function, **options)
    if hasattr(function, "units"):
        with_options.units = function.units
    return with_options


def loss_is_class(config: TrainConfig) -> bool:
    return config.loss is not None and inspect.isclass(import_object(config.loss, flag="--loss"))


def own_change(config: ModelConfig) -> Callable[[Any], None] | None:
    """The function of `--model.function`."""
    if config.function is None:
        return None
    return import_function(config.function, flag="--model.function", takes="model")


def own_evaluations(config: TrainConfig) -> dict[str, Callable[..., dict[str, float]]]:
    """The functions of `--evaluation.functions`, by their names."""
    return {
        path: import_function(path, flag="--evaluation.functions", takes="job, model, tokenizer")
        for path in config.evaluation.functions
    }


def row_transform(config: DataConfig) -> Transform | None:
    """The function of `--data.transform`. Raises DataError."""
    path = config.transform
    if path is None:
        return None
    try:
        function = import_function(path, flag="--data.transform", takes="row")
    except TrainError as error:
        raise DataError(str(error)) from error
    return Transform(path, function, source_digest(path))


def check_extensions(config: TrainConfig) -> None:
    """Find all of them, before anything is downloaded.

    Raises:
        TrainError, DataError: one is not there, or its arguments do not fit.
    """
    own_loss(config)
    own_change(config.model)
    own_evaluations(config)
    for source in source_configs(config.data):
        row_transform(source.data)
    # Called by the trainer, which checks what they take.
    for flag, name in (
        ("--optimizer.name", config.optimizer.name),
        ("--schedule.name", config.schedule.name),
        ("--parallel.wrap_policy", config.parallel.wrap_policy),
    ):
        if name.startswith(CALLABLE):
            import_object(name.removeprefix(CALLABLE), flag=flag)


def source_of(path: str | None) -> str | None:
    """A function's name and what changes with its file; None for none. It has been imported."""
    return None if path is None else f"{path} {source_digest(path)}"
