"""Pretrained weights that know nothing of the data stop a run before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.job import EXACT, losses, train
from tests.support.tiny import VOCABULARY, write_chat, write_model

pytestmark = pytest.mark.distributed


def _flags(model: Path, chat: Path) -> list[str]:
    return [
        f"--model.path={model}",
        f"--data.path={chat}",
        "--data.seq_len=128",
        "--micro_batch_size=1",
        "--global_batch_size=4",
        "--steps=2",
        "--checkpoint.export=false",
        *EXACT,
    ]


def _shuffle_tokens(model: Path) -> None:
    """Each token gets the row of another, as under another tokenizer of the same size."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][order].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_that_know_nothing_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    """Random ones and those of another tokenizer; unless the check is off, the model small, or random wanted."""
    chat = write_chat(tmp_path / "chat.jsonl", count=60)
    unloaded = write_model(tmp_path / "unloaded", trained=False)
    shuffled = write_model(tmp_path / "shuffled")
    _shuffle_tokens(shuffled)

    for model in (unloaded, shuffled):
        output_dir = tmp_path / f"{model.name}-out"
        flags = [*_flags(model, chat), "--model.check_first_loss=always"]
        result = train(flags, 2, cache_dir=cache_dir, output_dir=output_dir)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("train.py: error: the loss of the first batch is ")
        assert "costs 6.36" in line  # ln(576)
        assert line.endswith("--model.check_first_loss never")
        assert not (output_dir / "checkpoints").exists()
        assert not (output_dir / "metrics.jsonl").exists()

    for flag in ("--model.check_first_loss=never", "--model.init=random", "--seed=0"):
        output_dir = tmp_path / f"out{flag}"
        result = train(
            [*_flags(unloaded, chat), flag], 2, cache_dir=cache_dir, output_dir=output_dir
        )
        assert result.returncode == 0, result.output
        assert "first loss" not in result.stdout
        assert losses(output_dir)[0] > 5.86


@pytest.mark.parametrize("streaming", [False, True])
def test_trained_weights_pass_and_see_the_same_batches(
    tmp_path: Path, cache_dir: Path, streaming: bool
) -> None:
    chat = write_chat(tmp_path / "chat.jsonl", count=60)
    flags = _flags(write_model(tmp_path / "model"), chat)
    flags += ["--data.streaming=true", "--data.stream_buffer_rows=10"] if streaming else []
    states = []
    for check in ("always", "never"):
        output_dir = tmp_path / check
        result = train(
            [*flags, f"--model.check_first_loss={check}"],
            2,
            cache_dir=cache_dir,
            output_dir=output_dir,
        )
        assert result.returncode == 0, result.output
        first = losses(output_dir)[0]
        said = f"first loss {first:.2f}; a guess costs 6.36" in result.stdout.splitlines()
        assert said == (check == "always")
        (state,) = output_dir.glob("checkpoints/step-*/state.json")
        states.append(json.loads(state.read_text()))

    assert losses(tmp_path / "always") == losses(tmp_path / "never")
    assert states[0] == states[1]
    assert first < 5.86
