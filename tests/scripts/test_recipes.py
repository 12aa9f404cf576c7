"""Every recipe is read, planned on the machine it names, and trains a step of a tiny model with all its other settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts.command_line import parse_train_config
from scripts.plan import main as plan
from tests.support.command import ROOT
from tests.support.job import losses, train
from tests.support.tiny import write_chat, write_model
from trainer.parallel import data_rank

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
# Presets for a model that flags name, or for the built-in one.
PRESETS = {"lora.yaml": ["--model.name=Qwen/Qwen3-8B"], "embedded.yaml": []}


def _machine(file: Path) -> tuple[int, str]:
    """GPUs and their kind, as its first line says; presets are for two."""
    found = re.match(r"# Machine: (\d+)x (\S+)", file.read_text(encoding="utf-8"))
    assert (found is None) == (file.name in PRESETS), file.name
    return (int(found[1]), found[2]) if found else (2, "h100-nvl")


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_machine_as_planned(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus, gpu = _machine(file)
    flags = [f"--config={file}", *PRESETS.get(file.name, [])]
    assert plan([*flags, f"--gpus={gpus}", f"--gpu={gpu}", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"], made
    assert (made["gpus"], made["gpu"]) == (gpus, gpu)
    assert made["tokens_per_second_per_gpu"] > 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_trains(file: Path, tmp_path: Path) -> None:
    config = parse_train_config([f"--config={file}", *PRESETS.get(file.name, [])])
    model = write_model(tmp_path / "model")
    rows = write_chat(tmp_path / "rows" / "train.jsonl", count=60)
    if config.data.format == "text":
        rows.write_text('{"text": "one two three four five six"}\n' * 200, encoding="utf-8")
    parallel = config.parallel
    size = data_rank(parallel, rank=0, world_size=2 if parallel.dp_replicate == 1 else 64).size
    flags = [
        f"--config={file}",
        "--model.name=null",
        f"--model.path={model}",
        f"--data.path={rows}",
        "--data.seq_len=64",
        "--steps=2",
        "--micro_batch_size=1",
        f"--global_batch_size={min(size, 2)}",
        "--log.every=1",
        "--log.tensorboard=false",
    ]
    if parallel.dp_replicate > 1:
        flags += ["--parallel.dp_replicate=2", "--parallel.dp_shard=1"]
    if config.model.router_aux_loss_coef is not None:
        flags.append("--model.router_aux_loss_coef=null")  # the tiny model has no experts
    output_dir = tmp_path / "output"
    result = train(flags, 2, cache_dir=tmp_path / "cache", output_dir=output_dir)
    assert result.returncode == 0, result.output
    assert len(losses(output_dir)) == 2
