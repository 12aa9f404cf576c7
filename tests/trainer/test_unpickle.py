"""Nothing in a checkpoint is run: what was changed by someone else is refused before it acts."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
)

from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig
from trainer.errors import TrainError
from trainer.manifest import MANIFEST, damage, describe, read_manifest, write_json
from trainer.stored import StoredTensors
from trainer.unpickle import read_metadata

pytestmark = pytest.mark.distributed


class _Evil:
    """Makes the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def _checkpointer(folder: Path) -> Checkpointer:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    return Checkpointer(folder, model, optimizer, CheckpointConfig(asynchronous=False))


def _save(folder: Path) -> None:
    _checkpointer(folder).save(1, {})


def _restore(checkpoints: list[Path]) -> list[str]:
    errors = []
    for checkpoint in checkpoints:
        try:
            _checkpointer(checkpoint.parent).restore(checkpoint)
            errors.append("")
        except TrainError as error:
            errors.append(str(error))
    return errors


def _renew_manifest(checkpoint: Path) -> None:
    """As whoever changes a checkpoint on purpose would."""
    files = describe(checkpoint, read_manifest(checkpoint))
    write_json(checkpoint / MANIFEST, {"format": 2, "files": files})
    assert damage(checkpoint) is None


def _plain(metadata: Metadata, canary: Path) -> Any:
    return _Evil(canary)


def _inside(metadata: Metadata, canary: Path) -> Any:
    return replace(metadata, planner_data=_Evil(canary))


def _bytes_entry(metadata: Metadata, canary: Path) -> Any:
    """torch would read it with a pickle of its own."""
    entries = {**metadata.state_dict_metadata, "model.weight": BytesStorageMetadata()}
    return replace(metadata, state_dict_metadata=entries)


def _elsewhere(metadata: Metadata, canary: Path) -> Any:
    places = {
        index: replace(place, relative_path="../../secret")
        for index, place in metadata.storage_data.items()
    }
    return replace(metadata, storage_data=places)


def _no_metadata(metadata: Metadata, canary: Path) -> Any:
    return torch.Size([1])


CHANGES: dict[Callable[[Metadata, Path], Any], str] = {
    _plain: "it names posix.mkdir, which no checkpoint has",
    _inside: "it names posix.mkdir, which no checkpoint has",
    _bytes_entry: "it names torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    _elsewhere: "it wants to read '../../secret'",
    _no_metadata: "it holds Size",
}


def test_S01_an_evil_pickle_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    run_ranks(_save, 1, tmp_path / "good")
    good = tmp_path / "good" / "step-00000001"
    metadata = read_metadata(good / "tensors")
    assert torch.equal(
        StoredTensors(good).read("bias", torch.float32).isfinite(), torch.ones(2) > 0
    )

    checkpoints = []
    for number, (change, said) in enumerate(CHANGES.items()):
        bad = tmp_path / str(number) / "step-00000001"
        for name in read_manifest(good):
            (bad / name).parent.mkdir(parents=True, exist_ok=True)
            (bad / name).write_bytes((good / name).read_bytes())
        (bad / MANIFEST).write_bytes((good / MANIFEST).read_bytes())
        (bad / "tensors" / ".metadata").write_bytes(pickle.dumps(change(metadata, canary)))
        _renew_manifest(bad)
        with pytest.raises(TrainError, match="is refused: ") as caught:
            StoredTensors(bad)
        assert said in str(caught.value)
        checkpoints.append(bad)

    # A shard that is a pickle of something else than a tensor.
    shard = tmp_path / "shard" / "step-00000001"
    shard.parent.mkdir()
    os.rename(checkpoints.pop(), shard)
    (shard / "tensors" / ".metadata").write_bytes((good / "tensors" / ".metadata").read_bytes())
    evil = tmp_path / "evil.pt"
    torch.save(_Evil(canary), evil)
    (places,) = {place.relative_path for place in metadata.storage_data.values()}
    parts = {
        index: replace(p, offset=0, length=evil.stat().st_size)
        for index, p in metadata.storage_data.items()
    }
    (shard / "tensors" / places).write_bytes(evil.read_bytes())
    (shard / "tensors" / ".metadata").write_bytes(
        pickle.dumps(replace(metadata, storage_data=parts))
    )
    _renew_manifest(shard)
    with pytest.raises(TrainError, match="cannot be read"):
        StoredTensors(shard).read("bias", torch.float32)

    (errors,) = run_ranks(_restore, 1, [good, shard, *checkpoints])
    assert errors[0] == ""
    for error in errors[1:]:
        assert "does not fit this model and optimizer (" in error and "\n" not in error
    assert not canary.exists()
    # The canary would have sung.
    pickle.loads(pickle.dumps(_Evil(canary)))
    assert canary.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "tensors/../../x"])
def test_S08_a_manifest_may_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2, "files": {name: entry}}))
    with pytest.raises(ValueError, match="is no file's"):
        read_manifest(tmp_path)
    assert "cannot be read" in (damage(tmp_path) or "")


@pytest.mark.parametrize(
    "asked", [("text", "join"), (Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")]
)
def test_S01_only_members_of_an_enumeration_are_looked_up(
    tmp_path: Path, asked: tuple[Any, str]
) -> None:
    class Lookup:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return getattr, asked

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Lookup()))
    with pytest.raises(TrainError, match=r"\.metadata is refused: it (asks for|names)"):
        read_metadata(tmp_path)
