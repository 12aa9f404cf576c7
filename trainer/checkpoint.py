"""The whole training state on disk: complete or not there, never overwritten.

    checkpoints/step-00000020/
        tensors/        parameters and optimizer state, torch.distributed.checkpoint
        state.json      step, sample cursor, random-number states, what the data was
        manifest.json   size and SHA-256 of every other file; written last

A checkpoint is staged in a hidden folder and renamed when everything in it is on the disk.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from trainer.config import CheckpointConfig
from trainer.distributed import raise_together
from trainer.errors import TrainError

MANIFEST = "manifest.json"
# What is frozen is not saved; `dcp.load` has already refused a checkpoint that lacks something else.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Checkpointer:
    """Saves and restores one model and optimizer under one folder. Every method is called by every rank."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
    ) -> None:
        self.folder = folder
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._is_first = dist.get_rank() == 0
        # Its own group: a background save must not interleave its collectives with those of training.
        self._group: Any = dist.new_group(backend="gloo") if config.asynchronous else None
        self._written: threading.Event | None = None
        self._failure: str | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the state after `step`; returns when it is durable, or, if asynchronous, when it has been copied.

        Args:
            step: names the checkpoint; one that is there already is left as it is.
            state: what JSON can hold, the same on every rank; `restore` gives it back.

        Raises:
            TrainError: on every rank, when a rank could not write. Earlier checkpoints are untouched.
        """
        self.wait()
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            return
        staging = self.folder / f".{final.name}.partial"
        rng_states: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(
            rng_states, base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()
        )
        error = None
        if self._is_first:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                _write_json(
                    staging / "state.json", {**state, "step": step, "rng_states": rng_states}
                )
            except OSError as reason:
                error = _cannot_save(final, reason)
        raise_together(error)
        model_state, optimizer_state = get_state_dict(
            self._model, self._optimizer, options=_TRAINED
        )
        tensors = {"model": model_state, "optimizer": optimizer_state}

        if self._group is not None:
            future = dcp.async_save(
                tensors, checkpoint_id=staging / "tensors", process_group=self._group
            )
            assert isinstance(future, Future)
            # A future wakes those who wait for it before it runs its callbacks, so the callback says when it is done.
            written = self._written = threading.Event()

            def finish(done: Future[Any]) -> None:
                try:
                    self._finish(staging, final, done.exception())
                finally:
                    written.set()

            # Runs in the writer's thread as soon as all ranks have written: durable without waiting for the loop.
            future.add_done_callback(finish)
            return
        try:
            dcp.save(tensors, checkpoint_id=staging / "tensors")
            failure = None
        except (CheckpointException, OSError, RuntimeError) as reason:  # the first is no Exception
            failure = reason
        self._finish(staging, final, failure)
        self._raise_failure()

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            TrainError: on every rank, when that save failed.
        """
        if self._written is not None:
            self._written.wait()
            self._written = None
            self._raise_failure()

    def _finish(self, staging: Path, final: Path, failure: BaseException | None) -> None:
        """Make a written checkpoint durable and visible, then prune. No collectives: this may run in a thread."""
        if failure is not None:
            self._failure = _cannot_save(final, failure)
        elif self._is_first:
            try:
                _publish(staging, final)
                self._prune()
            except OSError as reason:
                self._failure = _cannot_save(final, reason)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        raise_together(failure)

    def _prune(self) -> None:
        if self._config.keep_last > 0:
            for old in complete_checkpoints(self.folder)[: -self._config.keep_last]:
                shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest intact checkpoint, agreed by all ranks; damaged newer ones are set aside by renaming them.

        Raises:
            TrainError: there are checkpoints, and all are damaged. Starting over silently would be worse.
        """
        found: list[str | None] = [None, None]  # path, error
        if self._is_first:
            problems: dict[Path, str] = {}
            for candidate in reversed(_checkpoints(self.folder)):
                problem = damage(candidate)
                if problem is None:
                    found[0] = str(candidate)
                    break
                problems[candidate] = problem
            if found[0] is not None:
                try:
                    for candidate, problem in problems.items():
                        print(
                            f"checkpoint {candidate} is damaged ({problem}); falling back to the one before",
                            flush=True,
                        )
                        _set_aside(candidate)
                except OSError as reason:
                    found[1] = f"a damaged checkpoint cannot be renamed ({reason})"
            elif problems:
                # They keep their names: the next attempt must not take this for a new run.
                found[1] = (
                    f"every checkpoint in {self.folder} is damaged (newest: {next(iter(problems.values()))}); "
                    "restore one, or start anew with another --output_dir"
                )
        dist.broadcast_object_list(found, src=0)
        raise_together(found[1])
        return Path(found[0]) if found[0] else None

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load parameters, optimizer state and random-number state; returns the JSON state that was saved.

        Raises:
            TrainError: the folder is no intact checkpoint of this model.
        """
        problem = damage(checkpoint) if self._is_first else None
        raise_together(f"{checkpoint} is not an intact checkpoint: {problem}" if problem else None)
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        model_state, optimizer_state = get_state_dict(
            self._model, self._optimizer, options=_TRAINED
        )
        tensors = {"model": model_state, "optimizer": optimizer_state}
        try:
            dcp.load(tensors, checkpoint_id=checkpoint / "tensors")
        except (CheckpointException, OSError, RuntimeError, ValueError) as reason:
            raise TrainError(
                f"{checkpoint} does not fit this model and optimizer ({_first_line(reason)})"
            ) from None
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
            options=_TRAINED,
        )
        if len(state["rng_states"]) == dist.get_world_size():
            rng = base64.b64decode(state["rng_states"][dist.get_rank()])
            torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))
        return state


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return [path for path in _checkpoints(folder) if (path / MANIFEST).is_file()]


def _checkpoints(folder: Path) -> list[Path]:
    """Everything that bears a checkpoint's name, oldest first; what was set aside does not."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "")


def _set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that its step can be saved again and nothing is lost."""
    names = itertools.chain([".damaged"], (f".damaged-{n}" for n in itertools.count(2)))
    free = (checkpoint.with_name(checkpoint.name + name) for name in names)
    checkpoint.rename(next(path for path in free if not path.exists()))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint compared with its manifest; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    present = {str(path.relative_to(checkpoint)) for path in _files(checkpoint)}
    if present != set(expected):
        return f"files missing or left over: {', '.join(sorted(present ^ set(expected)))}"
    for name, facts in expected.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
            if _sha256(path) != facts["sha256"]:
                return f"{name} does not have the SHA-256 it was written with"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def _publish(staging: Path, final: Path) -> None:
    files = _files(staging)
    manifest = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    for path in [*files, *(path for path in staging.rglob("*") if path.is_dir())]:
        _sync(path)
    _write_json(staging / MANIFEST, {"format": 1, "files": manifest})
    _sync(staging)
    os.rename(staging, final)
    _sync(final.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_save(final: Path, reason: BaseException) -> str:
    return f"checkpoint {final} could not be written ({_first_line(reason)}); earlier checkpoints are untouched"


def _first_line(reason: BaseException) -> str:
    """What went wrong; torch's own exception only counts the ranks and hides the reason in a traceback."""
    if isinstance(reason, CheckpointException) and reason.failures:
        rank, (cause, _trace) = next(iter(sorted(reason.failures.items())))
        return f"rank {rank}: {_first_line(cause)}"
    return (str(reason).strip() or type(reason).__name__).split("\n")[0]
