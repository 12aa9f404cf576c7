"""A checkpoint is complete or not there, gives back every bit, and damage is never silent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.support.models import full
from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.manifest import MANIFEST, complete_checkpoints, damage
from trainer.config import CheckpointConfig, OptimizerConfig
from trainer.errors import TrainError
from trainer.optimizer import build_optimizer

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
def test_every_bit_comes_back(tmp_path: Path, world_size: int, asynchronous: bool) -> None:
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
def test_another_number_of_ranks_gets_the_same_tensors(
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


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path: Path) -> None:
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


def test_when_all_are_damaged_the_run_stops_each_time_it_is_started(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, [1, 2])
    for folder in complete_checkpoints(tmp_path):
        _flip(folder)
    for results in run_ranks(_try_damages, 2, [tmp_path, tmp_path]):
        for name, _tensors, error in results:
            assert name is None and error is not None
            assert "every checkpoint in" in error and "SHA-256" in error and "--output_dir" in error


def test_no_checkpoint_is_a_new_run_and_another_model_is_refused(tmp_path: Path) -> None:
    for result in run_ranks(_restore, 2, tmp_path / "nothing"):
        assert result == (None, [], None)
    run_ranks(_save, 2, tmp_path, [1])
    for _name, _tensors, error in run_ranks(_restore, 2, tmp_path, 9):
        assert error is not None and "does not fit this model" in error and "\n" not in error


def _fail_to_write(folder: Path, asynchronous: bool) -> list[str]:
    """Errors of a save whose folder is a file, and of one whose writing is cut off under way."""
    errors = []
    (blocked := folder / "file").touch()
    run = _Run(blocked / "checkpoints", asynchronous=asynchronous)
    run.step()
    for checkpoints, step in ((blocked / "checkpoints", 1), (folder / "good", 2)):
        run.checkpointer.folder = checkpoints
        if step == 2:
            run.checkpointer.save(1, {})
            run.checkpointer.wait()
            import torch.distributed.checkpoint.filesystem as filesystem

            if dist.get_rank() == dist.get_world_size() - 1:  # its disk is full
                filesystem._write_item = _no_space
        try:
            run.checkpointer.save(step, {})
            run.checkpointer.wait()
        except TrainError as error:
            errors.append(str(error))
        run.step()  # training may go on
    return errors


def _no_space(*_args: Any, **_options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failing_save_is_known_to_all_and_harms_no_other(
    tmp_path: Path, asynchronous: bool
) -> None:
    for errors in run_ranks(_fail_to_write, 2, tmp_path, asynchronous):
        assert len(errors) == 2
        for error in errors:
            assert "could not be written" in error and "\n" not in error
        assert "file/checkpoints/step-00000001" in errors[0]
        assert "good/step-00000002" in errors[1]
        assert "No space left on device" in errors[1]
    (checkpoint,) = complete_checkpoints(tmp_path / "good")
    assert checkpoint.name == "step-00000001" and damage(checkpoint) is None
