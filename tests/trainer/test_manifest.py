"""What a folder of checkpoints holds, and when a checkpoint bears its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.manifest import (
    MANIFEST,
    begin,
    checkpoints,
    complete_checkpoints,
    damage,
    describe,
    publish,
    remove,
    staging_of,
    step_of,
    superfluous,
)


def _staged(folder: Path, step: int, *names: str) -> Path:
    staging = begin(folder, step)
    assert staging is not None
    for name in names:
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_text(name)
    return staging


def test_a_checkpoint_has_its_name_when_all_of_it_is_there(tmp_path: Path) -> None:
    staging = _staged(tmp_path, 7, "state.json", "tensors/a")
    assert staging == staging_of(tmp_path, 7) and checkpoints(tmp_path) == []
    files = describe(staging, ["state.json", "tensors/a"])
    with pytest.raises(OSError, match=r"nobody has written state\.json"):
        publish(staging, {"tensors/a": files["tensors/a"]})
    elsewhere = {**files, "tensors/b": files["tensors/a"]}
    with pytest.raises(
        OSError, match=r"tensors/b written by other nodes cannot be seen .* --output_dir"
    ):
        publish(staging, elsewhere)
    assert not (staging / MANIFEST).exists()

    final = publish(staging, files)

    assert complete_checkpoints(tmp_path) == [final] == [tmp_path / "step-00000007"]
    assert damage(final) is None
    assert begin(tmp_path, 7) is None  # never written over
    manifest = json.loads((final / MANIFEST).read_text())
    (final / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert "its format is 1, this program writes 2" in (damage(final) or "")


def test_what_was_left_unfinished_is_cleared_away(tmp_path: Path) -> None:
    _staged(tmp_path, 3, "state.json")
    (tmp_path / ".step-00000001.removed" / "tensors").mkdir(parents=True)
    (tmp_path / "step-00000002.damaged").mkdir()
    _staged(tmp_path, 4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".step-00000004.partial", "step-00000002.damaged"]


def test_a_checkpoint_is_gone_before_its_first_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = _staged(tmp_path, 7, "state.json")
    final = publish(staging, describe(staging, ["state.json"]))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed here
        remove(final)
    assert checkpoints(tmp_path) == []
    assert (tmp_path / ".step-00000007.removed" / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(0, 0, []), (2, 0, [5, 10, 15]), (1, 10, [5, 15]), (9, 3, []), (1, 1, [])],
)
def test_what_is_kept(keep_last: int, keep_every: int, gone: list[int]) -> None:
    names = [f"step-{step:08d}" for step in (20, 5, 15, 10, 25)] + ["step-00000001.damaged"]
    found = superfluous(names, keep_last=keep_last, keep_every=keep_every)
    assert [step_of(name) for name in found] == gone


def test_steps_sort_by_number(tmp_path: Path) -> None:
    for name in ("step-100000000", "step-99999999", "step-7", "step-0000000x", "step-00000001.bad"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
