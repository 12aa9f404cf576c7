"""A rehearsal shows the plan, proves a checkpoint, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.dry_run import prove_checkpoint
from tests.support.job import EXACT, train
from tests.support.models import packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from tests.support.tiny import write_chat, write_model
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig
from trainer.errors import TrainError
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer

pytestmark = pytest.mark.distributed


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = [
        f"--model.path={write_model(tmp_path / 'model')}",
        f"--data.path={write_chat(tmp_path / 'chat.jsonl', count=60)}",
        "--data.seq_len=128",
        "--micro_batch_size=2",
        "--steps=2",
        *EXACT,
    ]
    folders: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    work = tmp_path / "work"
    dry = train([*arguments, "--dry_run=true"], output_dir=work / "run", **folders)

    assert dry.returncode == 0, dry.output
    lines = dry.stdout.splitlines()
    assert any("2 steps of 4 rows" in line for line in lines)
    table = [line.split() for line in lines if "hf.model.layers.*" in line]
    assert len(table) == 1 and table[0][1] == "x"
    (total,) = [line.split() for line in lines if line.startswith("all ")]
    assert int(total[1].replace(",", "")) > 1000
    assert "dry run: one step with loss" in lines[-1] and "equal in every bit" in lines[-1]
    assert list(work.iterdir()) == []

    # Beside a real run it touches nothing, and starts anew.
    assert train(arguments, output_dir=work / "run", **folders).returncode == 0
    before = _files(work)
    again = train([*arguments, "--dry_run=true"], output_dir=work / "run", **folders)
    assert again.returncode == 0, again.output
    assert again.stdout.splitlines()[-1].split(" in ")[0] == lines[-1].split(" in ")[0]
    assert _files(work) == before
    assert [path.name for path in work.iterdir()] == ["run"]


def _prove(folder: str, spoil: bool) -> str | None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    causal_lm_loss(model, packed_batch([random_documents([24])], 24))[0].backward()
    optimizer.step()
    at_once = CheckpointConfig(asynchronous=False)
    checkpointer = Checkpointer(Path(folder), model, optimizer, at_once)
    if spoil:  # what is saved is not what will be compared
        with torch.no_grad():
            weight = model.hf.base_model.norm.weight
            weight += 1e-3
            checkpointer.save(1, {})
            weight -= 1e-3
    else:
        checkpointer.save(1, {})
    assert dist.get_world_size() == 1
    before = {name: p.clone() for name, p in model.named_parameters()}
    try:
        prove_checkpoint(checkpointer, model, optimizer)
    except TrainError as error:
        return str(error)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    return None


def test_a_checkpoint_that_lacks_a_bit_is_found(tmp_path: Path) -> None:
    assert run_ranks(_prove, 1, str(tmp_path / "right"), False) == [None]
    (line,) = run_ranks(_prove, 1, str(tmp_path / "wrong"), True)
    assert "1 tensors differ, the first is hf.model.norm.weight" in line
