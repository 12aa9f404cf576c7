"""Model and data from a hub: fetched once, into one folder, and never needed again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.support.command import clean_environment, run_command, torchrun
from tests.support.hub import LoopbackHub
from tests.support.job import TRAIN, load_export, read_rows
from tests.support.tiny import VOCABULARY, write_chat, write_model

pytestmark = pytest.mark.distributed

_TOOL = "<|tool|>"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _run_json(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "run.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_fetched_once_pinned_and_offline_afterwards(tmp_path: Path) -> None:
    """Two ranks and a hub; then no hub; then no hub, one process, and a token the model lacks."""
    served = tmp_path / "served"
    models = {
        revision: write_model(served / revision / "tiny", seed=seed)
        for seed, revision in enumerate(("main", "v1"))
    }
    datasets = {
        revision: write_chat(
            served / revision / "chat" / "train.jsonl", count=120, seed=seed
        ).parent
        for seed, revision in enumerate(("main", "v1"))
    }
    work = tmp_path / "work"
    work.mkdir()
    env = clean_environment(tmp_path / "private")
    cache_dir = tmp_path / "cache"

    def args(output_dir: str, *more: str) -> list[str]:
        return [
            TRAIN,
            f"--cache_dir={cache_dir}",
            f"--output_dir={tmp_path / output_dir}",
            "--model.name=org/tiny",
            "--model.revision=v1",
            "--data.name=org/chat",
            "--data.revision=v1",
            "--data.seq_len=128",
            "--micro_batch_size=2",
            "--model.dtype=float32",
            *(more or ("--steps=2",)),
        ]

    with LoopbackHub({"org/tiny": models}, {"org/chat": datasets}) as hub:
        commits = hub.commit("org/tiny", "v1"), hub.commit("org/chat", "v1", "datasets")
        assert commits[0] != hub.commit("org/tiny"), "two revisions of the same files prove nothing"
        env["HF_ENDPOINT"] = hub.url
        first = torchrun(args("online"), timeout=120, env=env, cwd=work)
        downloads = {**hub.downloads("org/tiny"), **hub.downloads("org/chat")}
        # The branch moves on; the run that is continued keeps to its commit.
        write_chat(datasets["v1"] / "train.jsonl", count=120, seed=7)
        assert hub.commit("org/chat", "v1", "datasets") != commits[1]
        longer = ("--steps=3", "--allow_changed=[steps]", "--global_batch_size=4")
        more = [sys.executable, *args("online", *longer)]
        resumed = run_command(more, timeout=120, env=env, cwd=work)
        assert {**hub.downloads("org/tiny"), **hub.downloads("org/chat")} == downloads

    assert resumed.returncode == 0, resumed.output
    assert "after step 2 of 3" in resumed.stdout
    assert first.returncode == 0, first.output
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.jsonl"} <= set(downloads)
    assert set(downloads.values()) == {1}, downloads
    _assert_recorded(tmp_path / "online", commits, steps=3)
    # One rank says what is fetched; where there is no terminal, bars would fill the log.
    assert first.stderr.splitlines() == [
        f"fetching {name} to {tmp_path / 'cache'}" for name in ("org/tiny", "org/chat")
    ]

    # The hub's address leads nowhere now; first found by trying, then said.
    second = torchrun(args("no-network"), timeout=120, env=env, cwd=work)
    assert second.returncode == 0, second.output
    _assert_recorded(tmp_path / "no-network", commits)

    offline = {**env, "HF_HUB_OFFLINE": "1"}
    token = [f'--model.add_special_tokens=["{_TOOL}"]', "--steps=2"]
    third = run_command(
        [sys.executable, *args("offline", *token)], timeout=120, env=offline, cwd=work
    )
    assert third.returncode == 0, third.output
    _assert_recorded(tmp_path / "offline", commits)

    # As shipped and with the added token: both reload, and the rows the model has to spare are used.
    export = tmp_path / "offline" / "export"
    for folder, expected in ((tmp_path / "online" / "export", False), (export, True)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (_TOOL in tokenizer.get_vocab()) is expected
        assert (tokenizer.encode(_TOOL) == [tokenizer.convert_tokens_to_ids(_TOOL)]) is expected
    weights = load_file(export / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == VOCABULARY
    assert load_export(tmp_path / "offline").config.vocab_size == VOCABULARY

    # Every byte is in the two folders that were named.
    private = tmp_path / "private"
    assert _files(private) == []
    assert list((private / "tmp").iterdir()) == []
    assert list((private / "home").iterdir()) == []
    assert list(work.iterdir()) == []


def _assert_recorded(output_dir: Path, commits: tuple[str, str], steps: int = 2) -> None:
    run = _run_json(output_dir)
    (data,) = run["data"]["sources"]
    assert (run["model"]["name"], data["name"]) == ("org/tiny", "org/chat")
    assert (run["model"]["revision"], data["revision"]) == ("v1", "v1")
    assert (run["model"]["commit"], data["commit"]) == commits
    assert [row["step"] for row in read_rows(output_dir) if "loss" in row][-1] == steps
