"""The whole training state, saved beside the loop and restored; `trainer.manifest` says what that is on disk."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from trainer.config import CheckpointConfig
from trainer.distributed import gather
from trainer.errors import TrainError
from trainer.manifest import (
    MANIFEST,
    STATE,
    TENSORS,
    begin,
    checkpoints,
    complete_checkpoints,
    damage,
    describe,
    name_of,
    publish,
    read_manifest,
    remove,
    rename,
    set_aside,
    staging_of,
    step_of,
    superfluous,
    sync,
    write_json,
)
from trainer.unpickle import SafeReader, read_metadata, tensor_entries

T = TypeVar("T")


class Store(Protocol):
    """A folder of a remote store. Names are relative to it, with /; what goes wrong is raised as one line."""

    url: str

    def names(self) -> list[str]:
        """All files in it, at any depth."""
        ...

    def put(self, file: Path, name: str) -> None: ...

    def get(self, name: str, file: Path) -> None: ...

    def remove(self, name: str) -> None: ...


class Checkpointer:
    """Saves and restores one model and optimizer under one folder. Every method is called by every rank.

    Args:
        folder: of the checkpoints; all ranks see the same one.
        model: sharded or plain.
        optimizer: over its parameters.
        config: what is kept, and how.
        store: holds a copy of every checkpoint.
        save_frozen: also what is not trained; else that comes from where it came from before.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        *,
        store: Store | None = None,
        save_frozen: bool = False,
    ) -> None:
        self.folder = folder
        self._model = model
        self._optimizer = optimizer
        self._config = config
        # `_misfit` refuses a checkpoint that lacks something else than what is frozen.
        self._options = StateDictOptions(ignore_frozen_params=not save_frozen, strict=False)
        self._store = store
        self._url = store.url if store else None
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # Its own group: a background save must not interleave its collectives with those of training.
        self._group: Any = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None
        self._failure: str | None = None
        self._copies: dict[str, Tensor] = {}
        self._verified: Path | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the state after `step`; returns when it is durable, or, if asynchronous, when it has been copied.

        Asynchronous saves wait for the one before, so that host memory holds one copy of the state at most.

        Args:
            step: names the checkpoint; one that is there already is left as it is.
            state: what JSON can hold; that of rank 0 is kept, and `restore` gives it back.

        Raises:
            TrainError: on every rank, when this save, or the one before in the background, failed. Earlier
                checkpoints are untouched, training may go on, and this save is under way nevertheless.
        """
        earlier = self._settle()
        _, _, tensors, scalars = self._state()
        write = partial(self._write, step, {**state, "step": step, "scalars": scalars}, _random())
        if self._config.asynchronous:
            # Staged here, before the loop changes the tensors. The copies are reused from save to save.
            staged = copy_to_host(tensors, self._copies)
            self._under_way = self._writer.submit(write, staged)
            failure = earlier
        else:
            failure = self._failure = write(tensors)
        if failure is not None:
            raise TrainError(failure)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            TrainError: on every rank, when the last save, in the background or not, failed.
        """
        self._settle()
        if self._failure is not None:
            raise TrainError(self._failure)

    def close(self) -> None:
        """Let a save in the background end, also when the loop has failed; no save can follow."""
        self._writer.shutdown()
        self._copies.clear()

    def _settle(self) -> str | None:
        """Wait for a save in the background; returns what went wrong with it, the same on every rank."""
        if self._under_way is None:
            return None
        self._failure = self._under_way.result()
        self._under_way = None
        return self._failure

    def _write(
        self, step: int, state: Mapping[str, Any], rng: dict[str, Any], tensors: dict[str, Tensor]
    ) -> str | None:
        """Write, hash, publish, copy and prune; in the background's thread, where no default group may be used.

        Returns:
            What went wrong, the same on every rank.
        """
        final = self.folder / name_of(step)
        staging = staging_of(self.folder, step)

        def start() -> tuple[bool, dict[str, Any]]:
            return self._rank == 0 and begin(self.folder, step) is None, rng

        def write() -> dict[str, Any]:
            writer = _Writer(staging / TENSORS)  # syncs each file
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            # Each rank reads what it wrote, while that is in the memory of its machine.
            mine = [file.name for file in (staging / TENSORS).glob(f"__{self._rank}_*")]
            names = [f"{TENSORS}/{name}" for name in mine]
            if self._rank == 0:
                write_json(staging / STATE, {**state, "rng_states": rng_states})
                names += [STATE, f"{TENSORS}/.metadata"]
            return describe(staging, names)

        try:
            started = self._together(start)
            if any(there for there, _ in started):
                return None
            rng_states = [states for _, states in started]
            described = self._together(write)
            files = {name: facts for part in described for name, facts in part.items()}
            self._on_first(lambda: publish(staging, files))
        except Exception as reason:  # also of a group that has lost a rank
            return (
                f"checkpoint {final} could not be written ({_first_line(reason)}); "
                "earlier checkpoints are untouched"
            )
        if self._rank == 0:
            for name in self._superfluous(path.name for path in complete_checkpoints(self.folder)):
                remove(self.folder / name)
        if self._store is None:
            return None
        try:
            self._copy_out(self._store, final, list(described[self._rank]))
        except Exception as reason:
            why = _first_line(reason)
            return f"checkpoint {final} is complete, but not its copy in {self._url} ({why})"
        return None

    def _copy_out(self, store: Store, final: Path, names: list[str]) -> None:
        """Copy a complete checkpoint to the store, each rank its own files, the manifest last; then prune there."""

        def put() -> None:
            for name in names:
                store.put(final / name, f"{final.name}/{name}")

        self._together(put)
        self._on_first(lambda: store.put(final / MANIFEST, f"{final.name}/{MANIFEST}"))
        if self._rank == 0:
            with suppress(Exception):  # what stays now is pruned after the next save
                present = store.names()
                complete = _complete(present)
                gone = set(self._superfluous(complete))
                # The manifest first: without it what is left is no checkpoint.
                for name in sorted(present, key=lambda name: not name.endswith(f"/{MANIFEST}")):
                    folder = name.partition("/")[0]
                    if step_of(folder) is not None and (folder in gone or folder not in complete):
                        store.remove(name)

    def _superfluous(self, names: Any) -> list[str]:
        config = self._config
        return superfluous(list(names), keep_last=config.keep_last, keep_every=config.keep_every)

    def held(self) -> list[str]:
        """The names of the complete checkpoints here and in the store, oldest first, agreed by all ranks."""
        here = self._on_first(lambda: [path.name for path in complete_checkpoints(self.folder)])
        return sorted({*here, *self._in_store()}, key=lambda name: step_of(name) or 0)

    def newest(self) -> Path | None:
        """The newest intact checkpoint, agreed by all ranks; damaged newer ones are set aside by renaming them.

        Where the store has a newer one than the folder, or an intact one for a damaged one, it is copied here.

        Raises:
            TrainError: there are checkpoints, and all are damaged. Starting over silently would be worse.
        """
        here = self._on_first(lambda: [path.name for path in checkpoints(self.folder)])
        away = self._in_store()
        problems: list[tuple[str, str]] = []  # where, what
        damaged: list[Path] = []
        for name in sorted({*here, *away}, key=lambda name: step_of(name) or 0, reverse=True):
            path = self.folder / name
            problem = self._damage(path) if name in here else "it is not here"
            if name in here and problem is not None:
                damaged.append(path)
                problems.append((str(path), problem))
            fetched = name in away and problem is not None
            if fetched:
                problem = self._copy_in(name)
                if problem is not None:
                    problems.append((f"{self._url}/{name}", problem))
            if problem is None:
                self._on_first(partial(self._fall_back, damaged, problems, name, fetched))
                self._verified = path
                return path
        if problems:
            # They keep their names: the next attempt must not take this for a new run.
            raise TrainError(
                f"every checkpoint in {self.folder} is damaged (newest: {problems[0][1]}); "
                "restore one, or start anew with another --output_dir"
            )
        return None

    def _fall_back(
        self, damaged: list[Path], problems: list[tuple[str, str]], name: str, fetched: bool
    ) -> None:
        """Make `name` the newest of the folder, with a word about each that is not used."""
        for place, problem in problems:
            print(f"checkpoint {place} is damaged ({problem}); falling back to {name}", flush=True)
        for path in damaged:
            set_aside(path)
        if fetched:
            rename(staging_of(self.folder, step_of(name) or 0))

    def _damage(self, checkpoint: Path, *, hashes: bool | None = None) -> str | None:
        """What is wrong with a checkpoint, agreed; the ranks share the hashing."""
        found = self._together(
            lambda: damage(
                checkpoint,
                hashes=self._config.verify == "full" if hashes is None else hashes,
                share=self._rank,
                shares=self._world_size,
            )
        )
        return next((problem for problem in found if problem is not None), None)

    def _in_store(self) -> list[str]:
        store = self._store
        return self._on_first(lambda: _complete(store.names()) if store else [])

    def _copy_in(self, name: str) -> str | None:
        """Copy a checkpoint from the store to its hidden folder; returns what is wrong with it."""
        store = self._store
        assert store is not None
        staging = staging_of(self.folder, step_of(name) or 0)

        def manifest() -> dict[str, Any]:
            staging.mkdir(parents=True, exist_ok=True)
            store.get(f"{name}/{MANIFEST}", staging / MANIFEST)
            sync(staging / MANIFEST)
            return read_manifest(staging)

        def get() -> None:
            for file in sorted(files)[self._rank :: self._world_size]:
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                store.get(f"{name}/{file}", staging / file)
                sync(staging / file)

        try:
            files = self._on_first(manifest)
            self._together(get)
        except TrainError as reason:
            return str(reason)
        return self._damage(staging, hashes=True)

    def read_state(self, checkpoint: Path) -> dict[str, Any]:
        """The JSON state of a checkpoint, which is verified first unless `newest` has just done so.

        Raises:
            TrainError: the folder is no intact checkpoint.
        """
        if checkpoint != self._verified:
            problem = self._damage(checkpoint)
            if problem is not None:
                raise TrainError(f"{checkpoint} is not an intact checkpoint: {problem}")
            self._verified = checkpoint
        return self._together(lambda: json.loads((checkpoint / STATE).read_bytes()))[self._rank]

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Load parameters, optimizer state and random-number state; returns the JSON state that was saved.

        Random-number states come back at the same number of ranks.

        Raises:
            TrainError: the folder is no intact checkpoint of this model and optimizer.
        """
        state = self.read_state(checkpoint)
        model_state, optimizer_state, tensors, _ = self._state()

        def load() -> None:
            if problem := _misfit(read_metadata(checkpoint / TENSORS), tensors):
                raise TrainError(problem)
            reader = SafeReader(checkpoint / TENSORS)
            dcp.load(tensors, storage_reader=reader, process_group=self._group)

        try:
            self._together(load)
        except TrainError as reason:
            raise TrainError(
                f"{checkpoint} does not fit this model and optimizer ({reason})"
            ) from None
        for name, value in state["scalars"].items():
            parameter, _, key = name.rpartition(".")
            optimizer_state["state"][parameter][key] = value
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
            options=self._options,
        )
        if len(state["rng_states"]) == self._world_size:
            _set_random(state["rng_states"][self._rank])
        return state

    def _state(self) -> tuple[dict[str, Any], Any, dict[str, Tensor], dict[str, Any]]:
        """The state dicts of model and optimizer; their tensors by one name each; what is no tensor.

        Hyperparameters are not among them: they are the command line's.

        Raises:
            TrainError: something is neither a tensor nor what JSON can hold.
        """
        states: tuple[Any, Any] = get_state_dict(
            self._model, self._optimizer, options=self._options
        )
        model_state, optimizer_state = states
        # A tied parameter has several names and is stored under the first.
        named = list(self._model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in reversed(named)}
        aliases = {name for name, parameter in named if first[id(parameter)] != name}
        values = {f"model.{name}": v for name, v in model_state.items() if name not in aliases}
        scalars: dict[str, Any] = {}
        for parameter, state in optimizer_state["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    values[f"optimizer.state.{parameter}.{key}"] = value
                else:
                    scalars[f"{parameter}.{key}"] = value
        odd = [name for name, value in values.items() if not isinstance(value, Tensor)]
        odd += [n for n, v in scalars.items() if not isinstance(v, (int, float, str, type(None)))]
        if odd:
            raise TrainError(
                f"the state holds {odd[0]}, which is neither a tensor nor a number; checkpoints hold "
                "no pickled objects: keep it as a tensor"
            )
        return model_state, optimizer_state, values, scalars

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; returns the results of all.

        Raises:
            TrainError: on every rank, with the reason of the first that failed.
        """
        result, error = None, None
        try:
            result = work()
        except (CheckpointException, Exception) as reason:  # the first is no Exception
            error = _first_line(reason)
        results = gather((result, error), self._group)
        for rank, (_, error) in enumerate(results):
            if error is not None:
                where = "" if rank == 0 or error.startswith("rank ") else f"rank {rank}: "
                raise TrainError(where + error)
        return [result for result, _ in results]

    def _on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; returns its result on every rank. Raises TrainError as `_together`."""
        return self._together(lambda: work() if self._rank == 0 else None)[0]  # type: ignore[return-value]


@torch.no_grad()
def copy_to_host(tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of `tensors` in host memory, sharded as before; from a GPU through pinned memory.

    (torch's DefaultStager copies the description of each DTensor and its mesh as well, which for hundreds of small
    shards takes as long as the data.)

    Args:
        tensors: by name, sharded or not.
        copies: where they are copied to, by name; what is missing or does not fit is made, and reused the next time.
    """
    staged: dict[str, Tensor] = {}
    on_gpu = False
    for name, tensor in tensors.items():
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        copy = copies.get(name)
        if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
            copy = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            copies[name] = copy
        copy.copy_(local, non_blocking=local.is_cuda)
        on_gpu |= local.is_cuda
        if isinstance(tensor, DTensor):
            # Not from_local, which would bring the copy back to the device of the mesh.
            staged[name] = DTensor(copy, tensor._spec, requires_grad=False)
        else:
            staged[name] = copy
    if on_gpu:
        torch.cuda.synchronize()
    return staged


class _Writer(dcp.FileSystemWriter):
    """torch's, without the path and the random name that it would write into `.metadata`."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _complete(names: list[str]) -> list[str]:
    """The complete checkpoints among the files of a store."""
    folders = (name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}"))
    return [folder for folder in folders if step_of(folder) is not None]


def _misfit(metadata: Metadata, tensors: Mapping[str, Tensor]) -> str | None:
    """How what is stored differs from what is wanted; DCP would skip and cast without a word."""
    stored = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in tensor_entries(metadata).items()
    }
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    differing = [
        f"{name} is {_shown(*stored[name])} there, {_shown(*wanted[name])} here"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    differing += [f"{name} is not in it" for name in wanted if name not in stored]
    differing += [f"{name} is in it and not here" for name in stored if name not in wanted]
    if not differing:
        return None
    more = f"; {len(differing)} tensors differ" if len(differing) > 1 else ""
    return f"{differing[0]}{more}"


def _shown(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _random() -> dict[str, Any]:
    """The states of this process's random-number generators, as JSON can hold them."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"]
    states = {
        "torch": _text(torch.get_rng_state().numpy()),
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": _text(key)}},
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return states


def _set_random(states: Mapping[str, Any]) -> None:
    """What `_random` has taken; a GPU's state is left out where there is none."""
    torch.set_rng_state(torch.from_numpy(_array(states["torch"], np.uint8)))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(_array(words, np.uint32).tolist()), gauss))
    state = states["numpy"]["state"]
    key = _array(state["key"], np.uint32)
    np.random.set_state({**states["numpy"], "state": {**state, "key": key}})
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(states["cuda"], np.uint8)))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()


def _first_line(reason: BaseException) -> str:
    """What went wrong; torch's own exception only counts the ranks and hides the reason in a traceback."""
    if isinstance(reason, CheckpointException) and reason.failures:
        rank, (cause, _trace) = next(iter(sorted(reason.failures.items())))
        return f"rank {rank}: {_first_line(cause)}"
    return (str(reason).strip() or type(reason).__name__).split("\n")[0]
