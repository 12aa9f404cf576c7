"""Two launchers on the loopback interface, as on two machines: what is fetched, and how often."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.command import CommandResult, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.job import TRAIN, losses
from tests.support.ranks import free_port
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed


def _train_on_two_nodes(
    tmp_path: Path,
    cache_dirs: tuple[Path, Path],
    hub: LoopbackHub,
    *args: str,
    output_dirs: tuple[str, str] = ("output", "output"),
) -> list[CommandResult]:
    """One rank on each node, which differ by their folders alone."""
    env = {**clean_environment(tmp_path / "private"), "HF_ENDPOINT": hub.url}
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]

    def run(node: int) -> CommandResult:
        options = [
            f"--cache_dir={cache_dirs[node]}",
            f"--output_dir={tmp_path / output_dirs[node]}",
            "--model.name=org/tiny",
            "--data.name=org/chat",
            "--data.seq_len=128",
            "--micro_batch_size=2",
            "--steps=1",
            "--log.every=1",
            "--log.tensorboard=false",
            "--checkpoint.export=false",
            *args,
        ]
        command = [*launch, *address, f"--node_rank={node}", TRAIN, *options]
        return run_command(command, timeout=120, env=env, cwd=tmp_path)

    with ThreadPoolExecutor() as launchers:
        return list(launchers.map(run, (0, 1)))


def _serve(tmp_path: Path) -> LoopbackHub:
    model = write_model(tmp_path / "served" / "tiny")
    rows = write_chat(tmp_path / "served" / "chat" / "train.jsonl", count=60)
    return LoopbackHub({"org/tiny": model}, {"org/chat": rows.parent})


def _downloads(hub: LoopbackHub) -> dict[str, int]:
    return {**hub.downloads("org/tiny"), **hub.downloads("org/chat")}


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_nodes_fetch_once_for_every_cache_they_have(tmp_path: Path, shared: bool) -> None:
    cache_dirs = (tmp_path / "cache", tmp_path / ("cache" if shared else "other"))
    with _serve(tmp_path) as hub:
        results = _train_on_two_nodes(tmp_path, cache_dirs, hub)
        downloads = _downloads(hub)
    assert [result.returncode for result in results] == [0, 0], (
        results[0].output + results[1].output
    )
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.jsonl"} <= set(downloads)
    assert set(downloads.values()) == {1 if shared else 2}, downloads
    assert ["fetching org/tiny" in result.stderr for result in results] == [True, not shared]
    assert len(losses(tmp_path / "output")) == 1
    assert list(tmp_path.glob("*/.probe-*")) == []


@pytest.mark.slow
def test_nodes_without_a_file_system_in_common_have_no_checkpoint_and_are_told(
    tmp_path: Path,
) -> None:
    cache_dirs = (tmp_path / "cache", tmp_path / "cache")
    with _serve(tmp_path) as hub:
        results = _train_on_two_nodes(
            tmp_path, cache_dirs, hub, output_dirs=("output", "elsewhere")
        )
    assert [result.returncode for result in results] == [1, 1]
    for result in results:
        told = [line for line in result.stderr.splitlines() if line.startswith("train.py: error")]
        assert len(told) == 1
        assert "tensors/__1_0.distcp written by other nodes cannot be seen by the first" in told[0]
        assert "all nodes need --output_dir on the same file system" in told[0]
    for name in ("output", "elsewhere"):
        assert list(tmp_path.glob(f"{name}/checkpoints/step-*")) == []
    assert len(losses(tmp_path / "output")) == 1  # what was trained is logged
