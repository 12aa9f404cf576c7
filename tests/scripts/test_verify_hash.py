"""--model.verify_hash: weights that are not the hub's are found before they are loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models.config import ModelConfig
from models.errors import ModelError
from scripts.config import TrainConfig
from scripts.preparation import prepare_model
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.tiny import write_chat, write_model


@pytest.mark.distributed
def test_a_flipped_bit_is_found(tmp_path: Path, cache_dir: Path) -> None:
    model = write_model(tmp_path / "served" / "tiny", trained=False)
    chat = write_chat(tmp_path / "chat.jsonl", count=60)
    with LoopbackHub({"org/tiny": model}) as hub:
        fetched = run_command(
            [
                sys.executable,
                str(ROOT / "scripts" / "prefetch.py"),
                f"--cache_dir={cache_dir}",
                "--model.name=org/tiny",
                f"--data.path={chat}",
                "--data.seq_len=128",
                "--model.verify_hash=true",
            ],
            timeout=60,
            env={**clean_environment(tmp_path / "private"), "HF_ENDPOINT": hub.url},
        )
        commit = hub.commit("org/tiny")
    assert fetched.returncode == 0, fetched.output

    chosen = ModelConfig(name="org/tiny", revision=commit, verify_hash=True)
    config = TrainConfig(model=chosen)
    config = replace(config, data=replace(config.data, seq_len=128))
    assert prepare_model(config, cache_dir)["model_commit"] == commit
    snapshot = cache_dir / "hub" / "models--org--tiny" / "snapshots" / commit
    weights = (snapshot / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="other content than the hub lists") as error:
        prepare_model(config, cache_dir)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)
    unverified = replace(config, model=replace(chosen, verify_hash=False))
    assert prepare_model(unverified, cache_dir)["model_commit"] == commit


@pytest.mark.parametrize("path", [None, "folder"])
def test_without_a_list_there_is_nothing_to_compare(path: str | None, cache_dir: Path) -> None:
    config = TrainConfig(model=ModelConfig(path=path, verify_hash=True))
    with pytest.raises(ModelError, match=r"no such list; use --model\.name"):
        prepare_model(config, cache_dir)
