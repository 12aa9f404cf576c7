"""A checkpoint is complete or not there, gives back every bit, and damage is never silent."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from data.remote import RemoteFolder
from tests.support.models import full
from tests.support.ranks import run_ranks, start_server
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig
from trainer.errors import TrainError
from trainer.manifest import (
    MANIFEST,
    checkpoints,
    complete_checkpoints,
    damage,
    step_of,
)
from trainer.optimizer import build_optimizer
from trainer.stored import StoredTensors
from trainer.unpickle import read_metadata

pytestmark = pytest.mark.distributed


class _Run:
    """A tiny sharded model in training; the gradient of a step depends on the random-number state."""

    def __init__(self, folder: Path, *, width: int = 7, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3))
        for module in (*self.model, self.model):
            fully_shard(module)
        torch.manual_seed(100 + dist.get_rank())
        self.optimizer = build_optimizer(self.model, OptimizerConfig(learning_rate=0.01))
        self.checkpointer = Checkpointer(
            folder, self.model, self.optimizer, CheckpointConfig(**config)
        )

    def step(self) -> None:
        self.model(torch.randn(4, 5)).pow(2).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """Whole parameters and moments, and this rank's random-number state."""
        state = [
            full(value)
            for parameter in self.model.parameters()
            for _, value in sorted(self.optimizer.state[parameter].items())
        ]
        assert len(state) == 4 * 3
        return [*(full(p) for p in self.model.parameters()), *state, torch.get_rng_state()]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _save_go_on_restore(folder: Path, asynchronous: bool) -> dict[str, Any]:
    run = _Run(folder, asynchronous=asynchronous, keep_last=2)
    for _ in range(3):
        run.step()
    saved = run.tensors()
    run.checkpointer.save(3, {"samples": 12, "order": {"seed": 1}})
    run.step()  # while the writer may still be busy
    run.step()
    after = run.tensors()
    run.checkpointer.wait()
    durable = [path.name for path in complete_checkpoints(folder)]

    again = _Run(folder, asynchronous=asynchronous)
    newest = again.checkpointer.newest()
    assert newest is not None
    state = again.checkpointer.restore(newest)
    restored = _equal(again.tensors(), saved)
    again.step()
    again.step()
    names = []
    for step in (4, 5, 6):
        again.checkpointer.save(step, {"samples": step})
    again.checkpointer.save(6, {"samples": 0})  # is there already: not overwritten
    again.checkpointer.wait()
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    return {
        "durable": durable,
        "state": {key: state[key] for key in ("step", "samples", "order")},
        "restored": restored,
        "continued": _equal(again.tensors(), after),
        "moved": not _equal(saved, after),
        "names": names,
        "damage": damage(folder / "step-00000006"),
        "tensors": saved[:-1],
    }


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_W06_every_bit_comes_back(tmp_path: Path, world_size: int, asynchronous: bool) -> None:
    for result in run_ranks(_save_go_on_restore, world_size, tmp_path / "c", asynchronous):
        assert result["durable"] == ["step-00000003"]
        assert result["state"] == {"step": 3, "samples": 12, "order": {"seed": 1}}
        assert result["restored"] and result["moved"] and result["continued"]
        # Only the last two, and nothing half-done.
        assert result["names"] == ["step-00000005", "step-00000006"]
        assert result["damage"] is None
    state = (tmp_path / "c/step-00000006/state.json").read_text()
    assert '"samples": 6' in state


def _save(folder: Path, steps: list[int]) -> list[Tensor]:
    run = _Run(folder, keep_last=0)
    for step in steps:
        run.step()
        run.checkpointer.save(step, {"samples": step})
    run.checkpointer.wait()
    return run.tensors()[:-1]


def _restore(folder: Path, width: int = 7) -> tuple[str | None, list[Tensor], str | None]:
    """Name of the checkpoint, tensors after restoring it, error."""
    run = _Run(folder, width=width)
    try:
        newest = run.checkpointer.newest()
        if newest is None:
            return None, [], None
        run.checkpointer.restore(newest)
    except TrainError as error:
        return None, [], str(error)
    return newest.name, run.tensors()[:-1], None


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_T16_another_number_of_ranks_gets_the_same_tensors(
    tmp_path: Path, before: int, after: int
) -> None:
    saved = run_ranks(_save, before, tmp_path, [1, 2])[0]
    for name, tensors, error in run_ranks(_restore, after, tmp_path):
        assert (name, error) == ("step-00000002", None)
        assert _equal(tensors, saved)


def _flip(folder: Path) -> None:
    file = max((folder / "tensors").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(folder: Path) -> None:
    file = next((folder / "tensors").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": _flip,
    "truncated file": _truncate,
    "missing file": lambda folder: (folder / "tensors/.metadata").unlink(),
    "left-over file": lambda folder: (folder / "tensors/more").write_text(""),
    "missing state": lambda folder: (folder / "state.json").unlink(),
    "unmarked": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "no file list": lambda folder: (folder / MANIFEST).write_text("{}"),
}


def _try_damages(folders: list[Path]) -> list[Any]:
    return [_restore(folder) for folder in folders]


def test_T07_a_damaged_newest_checkpoint_is_set_aside(tmp_path: Path) -> None:
    saved = run_ranks(_save, 2, tmp_path / "good", [1, 2])[0]
    folders = []
    for index, break_it in enumerate(DAMAGES.values()):
        folders.append(tmp_path / str(index))
        shutil.copytree(tmp_path / "good", folders[-1])
        break_it(folders[-1] / "step-00000002")
    shutil.copytree(folders[0] / "step-00000002", folders[0] / "step-00000002.damaged")
    for results in run_ranks(_try_damages, 2, folders):
        for (name, tensors, error), damaged in zip(results, DAMAGES, strict=True):
            assert (name, error) == ("step-00000001", None), damaged
            assert not _equal(tensors, saved)
    for folder in folders[1:]:
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["step-00000001", "step-00000002.damaged"]
    assert (folders[0] / "step-00000002.damaged-2").is_dir()


def _try_twice_and_by_size(folder: Path) -> list[Any]:
    by_size = _Run(folder, verify="sizes").checkpointer.newest()
    return [*_try_damages([folder, folder]), by_size and by_size.name]


def test_T08_when_all_are_damaged_the_run_stops_each_time_it_is_started(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, [1, 2])
    for folder in complete_checkpoints(tmp_path):
        _flip(folder)
    for *results, by_size in run_ranks(_try_twice_and_by_size, 2, tmp_path):
        for name, _tensors, error in results:
            assert name is None and error is not None
            assert "every checkpoint in" in error and "SHA-256" in error and "--output_dir" in error
        assert by_size == "step-00000002"  # does not look at bits


def test_no_checkpoint_is_a_new_run_and_another_model_is_refused(tmp_path: Path) -> None:
    for result in run_ranks(_restore, 2, tmp_path / "nothing"):
        assert result == (None, [], None)
    run_ranks(_save, 2, tmp_path, [1])
    for _name, _tensors, error in run_ranks(_restore, 2, tmp_path, 9):
        assert error is not None and "does not fit this model" in error and "\n" not in error


def _fail_to_write(folder: Path, asynchronous: bool) -> dict[str, Any]:
    """What is said of a save whose folder is a file, and of one for which the last rank has no space left."""
    said = []
    run = _Run(folder, asynchronous=asynchronous, keep_last=1)

    def save(step: int) -> None:
        try:
            run.step()
            run.checkpointer.save(step, {})
            run.checkpointer.wait()
            said.append(None)
        except TrainError as error:
            said.append(str(error))

    save(1)
    run.checkpointer.folder = Path(__file__)
    save(2)
    run.checkpointer.folder = folder
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a disk with so many bytes
    save(3)
    held = [path.name for path in complete_checkpoints(folder)]
    problem = damage(folder / "step-00000001")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(4)
    return {"said": said, "held": held, "problem": problem}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_T06_T20_a_full_disk_is_told_to_all_and_training_goes_on(
    tmp_path: Path, asynchronous: bool
) -> None:
    for result in run_ranks(_fail_to_write, 2, tmp_path / "c", asynchronous):
        first, blocked, full_disk, last = result["said"]
        assert first is None and last is None
        for error, step in ((blocked, 2), (full_disk, 3)):
            assert f"step-0000000{step} could not be written (" in error and "\n" not in error
        assert "rank 1: " in full_disk and "File too large" in full_disk
        # Nothing was pruned for what did not become durable.
        assert result["held"] == ["step-00000001"] and result["problem"] is None
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000004"]


def _in_the_background(folder: Path) -> dict[str, Any]:
    run = _Run(folder, keep_last=1)
    run.step()
    run.checkpointer.save(1, {})
    run.checkpointer.wait()
    hold = threading.Event()
    if dist.get_rank() == 1:  # its disk is slow
        run.checkpointer._writer.submit(hold.wait)
    run.step()
    saved = run.tensors()[:-1]
    run.checkpointer.save(2, {})
    run.step()  # the loop goes on
    meanwhile = [path.name for path in complete_checkpoints(folder)]
    dist.barrier()  # the save is held back until all have looked
    hold.set()
    run.checkpointer.wait()
    durable = [path.name for path in complete_checkpoints(folder)]
    run.checkpointer.folder = Path(__file__)
    run.checkpointer.save(3, {})  # fails, and nobody knows yet
    while run.checkpointer._under_way and not run.checkpointer._under_way.done():
        time.sleep(0.01)
    run.checkpointer.folder = folder
    error = ""
    try:
        run.checkpointer.save(4, {})
    except TrainError as reason:
        error = str(reason)
    run.checkpointer.wait()  # the last one is well
    run.checkpointer.close()
    return {"meanwhile": meanwhile, "durable": durable, "error": error, "saved": saved}


def test_T20_a_save_in_the_background_counts_when_it_is_durable(tmp_path: Path) -> None:
    for result in run_ranks(_in_the_background, 2, tmp_path):
        assert result["meanwhile"] == ["step-00000001"]
        assert "step-00000002" in result["durable"]
        assert "step-00000003 could not be written" in result["error"]
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert checkpoint.name == "step-00000004" and damage(checkpoint) is None


def _generators(folder: Path) -> list[bool]:
    """Whether what torch, numpy and python draw comes again; whether cursors and options do what they say."""

    def draw() -> list[float]:
        return [float(torch.rand(())), np.random.standard_normal(), random.gauss(0.0, 1.0)]

    torch.manual_seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    random.seed(dist.get_rank())
    run = _Run(folder, asynchronous=False, keep_last=2, keep_every=3)
    run.step()
    draw()  # both normal generators hold back a second number
    for step in range(1, 9):
        run.checkpointer.save(step, {})
    drawn = [draw() for _ in range(3)]
    run.checkpointer.restore(folder / "step-00000008")
    return [drawn == [draw() for _ in range(3)], len({str(row) for row in drawn}) == 3]


def test_random_numbers_come_back_and_every_third_checkpoint_stays(tmp_path: Path) -> None:
    assert run_ranks(_generators, 2, tmp_path) == [[True, True]] * 2
    steps = [int(path.name[5:]) for path in complete_checkpoints(tmp_path)]
    assert steps == [3, 6, 7, 8]


class _Tied(nn.Module):
    """An embedding whose weight is the head's, and a layer that keeps a count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class _Counting(torch.optim.SGD):
    """Keeps a number that is no tensor, as some optimizers keep their step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1


def _tied(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Tied()
    fully_shard(model)
    optimizer = _Counting(model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = Checkpointer(folder, model, optimizer, CheckpointConfig(asynchronous=False))
    for _ in range(2):
        model(torch.arange(11)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = full(model.embedding.weight)
    checkpointer.save(2, {})
    optimizer.state[model.embedding.weight]["count"] = 7
    with torch.no_grad():
        model.head.weight.zero_()
    checkpointer.restore(folder / "step-00000002")
    optimizer.state[model.embedding.weight]["odd"] = {1: object()}
    try:
        checkpointer.save(3, {})
        error = ""
    except TrainError as reason:
        error = str(reason)
    return {
        "equal": torch.equal(full(model.head.weight), before),
        "tied": model.head.weight is model.embedding.weight,
        "count": optimizer.state[model.embedding.weight]["count"],
        "error": error,
    }


def test_W02_a_tied_weight_is_stored_once_and_nothing_is_pickled(tmp_path: Path) -> None:
    for result in run_ranks(_tied, 2, tmp_path):
        assert result["equal"] and result["tied"] and result["count"] == 2
        assert "neither a tensor nor a number" in result["error"]
    metadata = read_metadata(tmp_path / "step-00000002" / "tensors")
    assert set(metadata.state_dict_metadata) == {
        "model.embedding.weight",
        "optimizer.state.embedding.weight.momentum_buffer",
    }


# --------------------------------------------------------------------------------- killed inside a save


def _save_until_killed(folder: Path, first: int) -> None:
    """Save step after step; every weight is the number of its step."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters())
    config = CheckpointConfig(asynchronous=first % 2 == 0, keep_last=2)
    checkpointer = Checkpointer(folder, model, optimizer, config)
    for step in itertools.count(first):
        with torch.no_grad():
            model.weight.fill_(step)
        checkpointer.save(step, {"samples": step})


def _kill_inside_saves(folder: Path, kills: int, seed: int) -> int:
    """Kill as many savers, one after the other in one folder; returns how many left a save unfinished."""
    context, moments = start_server(), random.Random(seed)
    newest = inside = 0
    for _ in range(kills):
        process = context.Process(target=_save_until_killed, args=(folder, newest + 1))
        process.start()
        begun = folder / f"step-{newest + 1:08d}"
        deadline = time.monotonic() + 60
        while not begun.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        assert process.is_alive() and process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        inside += any(folder.glob(".step-*"))
        found = checkpoints(folder)
        assert found == complete_checkpoints(folder)
        last = step_of(found[-1].name)
        assert last is not None and last > newest
        newest = last
        for checkpoint in found:
            assert damage(checkpoint) is None
            weight = StoredTensors(checkpoint).read("weight", torch.float32)
            assert torch.equal(weight, torch.full((8, 8), float(step_of(checkpoint.name) or 0)))
    return inside


def test_T05_killed_inside_a_save_the_newest_complete_checkpoint_loads(tmp_path: Path) -> None:
    assert _kill_inside_saves(tmp_path, 12, seed=0) >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_T05_two_hundred_kills_inside_saves_leave_none_unloadable(tmp_path: Path) -> None:
    inside = kills = 0
    while inside < 200:
        inside += _kill_inside_saves(tmp_path / str(kills), 50, seed=kills)
        kills += 50
    print(f"{kills} kills, {inside} of them inside a save, 0 checkpoints unloadable")


def test_T07_a_thousand_flipped_bits_are_all_found(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, [1])
    (checkpoint,) = complete_checkpoints(tmp_path)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 5 and damage(checkpoint) is None
    moments = random.Random(0)
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        assert damage(checkpoint) is not None, path
        path.write_bytes(content)
    assert damage(checkpoint) is None


# ------------------------------------------------------------------------------------ copies in a store


def _mirrored(jobs: list[tuple[Path, str, list[int]]]) -> list[tuple[str | None, Any, str]]:
    """In each folder continue from its newest checkpoint or the store's, then save some steps."""
    results: list[tuple[str | None, Any, str]] = []
    for folder, url, steps in jobs:
        run = _Run(folder / "none")
        config, store = CheckpointConfig(keep_last=2), RemoteFolder(url)
        checkpointer = Checkpointer(folder, run.model, run.optimizer, config, store=store)
        newest = checkpointer.newest()
        if newest is not None:
            checkpointer.restore(newest)
        error = ""
        try:
            for step in steps:
                run.step()
                checkpointer.save(step, {})
            checkpointer.wait()
        except TrainError as reason:
            error = str(reason)
        results.append(
            (newest and newest.name, steps or (run.optimizer.state and run.tensors()[:-1]), error)
        )
    return results


def test_copies_in_a_store_are_pruned_and_continued_from(tmp_path: Path) -> None:
    here, away, fresh, third = (tmp_path / name for name in ("here", "away", "fresh", "third"))
    url = f"file://{away}"
    run_ranks(_mirrored, 2, [(here, url, [1, 2, 3])])
    assert [path.name for path in complete_checkpoints(away)] == ["step-00000002", "step-00000003"]
    assert not [damage(path) for path in complete_checkpoints(away) if damage(path)]
    assert not [path for path in away.glob("step-00000001/**/*") if path.is_file()]

    # A machine that has nothing takes the newest complete copy; one whose own is damaged takes that step's.
    (away / "step-00000009").mkdir()
    (away / "step-00000009" / "state.json").write_text("{}")  # an upload that was cut off
    _flip(here / "step-00000003")
    for results in run_ranks(_mirrored, 2, [(fresh, url, []), (here, url, [])]):
        assert [name for name, _, _ in results] == ["step-00000003"] * 2
        assert _equal(results[0][1], results[1][1])
    for folder in (fresh, here):
        assert damage(folder / "step-00000003") is None
    assert (here / "step-00000003.damaged").is_dir()

    _flip(away / "step-00000003")
    (blocked := tmp_path / "blocked").write_text("no folder")
    for results in run_ranks(_mirrored, 2, [(third, url, []), (here, f"file://{blocked}", [4])]):
        assert results[0][0] == "step-00000002"
        assert "step-00000004 is complete, but not its copy in file://" in results[1][2]
    assert damage(here / "step-00000004") is None
