"""Work done once per node or folder, agreement of ranks, errors that reach all of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.command import ROOT, clean_environment
from tests.support.ranks import free_port, run_ranks
from trainer.distributed import (
    Ranks,
    claim_report,
    max_over_ranks,
    meet,
    once,
    raise_together,
    start,
    sum_over_ranks,
)
from trainer.errors import TrainError


def _as_nodes(node_of: dict[int, tuple[int, int]]) -> Ranks:
    """Meet as if rank r were (node, local rank) `node_of[r]`."""
    node, local_rank = node_of[int(os.environ["RANK"])]
    os.environ |= {"GROUP_RANK": str(node), "LOCAL_RANK": str(local_rank)}
    return meet()


def _node_work(folder: Path, node_of: dict[int, tuple[int, int]]) -> dict[str, Any]:
    ranks = _as_nodes(node_of)

    def work() -> dict[str, Any]:
        time.sleep(0.3)  # the others have to wait for it
        (folder / f"rank-{ranks.rank}").write_text("")
        return {"node": ranks.node, "path": "p"}

    def fail() -> None:
        if ranks.node == 1:
            raise ValueError(f"row 7 of node {ranks.node} is bad")

    results: dict[str, Any] = {"work": once(ranks, "work", work)}
    try:
        once(ranks, "fail", fail)
    except ValueError as error:
        results["error"] = type(error).__name__, str(error)
    results["none"] = once(ranks, "none", lambda: None)
    results["claims"] = claim_report(ranks), claim_report(ranks)

    # From here on as one group, from the same store.
    results["device"] = str(start(ranks, "cpu"))
    results["sum"] = sum_over_ranks([ranks.rank, 0.1])
    results["max"] = max_over_ranks([ranks.rank, -ranks.rank])
    raise_together(None)
    try:
        raise_together(f"rank {ranks.rank} has no disk" if ranks.rank else None)
    except TrainError as error:
        results["together"] = str(error)
    return results


@pytest.mark.distributed
def test_three_ranks_on_two_nodes(tmp_path: Path) -> None:
    nodes = {0: (0, 0), 1: (0, 1), 2: (1, 0)}
    results = run_ranks(_node_work, 3, tmp_path, nodes, init_group=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0", "rank-2"]
    assert [r["work"]["node"] for r in results] == [0, 0, 1]
    assert [r.get("error") for r in results] == [
        None,
        None,
        ("ValueError", "row 7 of node 1 is bad"),
    ]
    assert [r["none"] for r in results] == [None] * 3
    assert sum(r["claims"][0] for r in results[:2]) == 1 and results[2]["claims"][0]
    assert not any(r["claims"][1] for r in results)
    assert [r["device"] for r in results] == ["cpu"] * 3
    for r in results:
        assert r["sum"] == pytest.approx([3.0, 0.3], rel=1e-15)  # in float64
        assert r["max"] == [2.0, 0.0]
        assert r["together"] == "rank 1 has no disk"


def _mount(folder: Path, flags: int = 0) -> bool:
    """Mount an empty file system on `folder` that this process alone sees; False where that is not allowed."""
    private, recursive, new_namespace = 0x40000, 0x4000, 0x20000
    libc = ctypes.CDLL(None)
    return (
        libc.unshare(new_namespace) == 0
        and libc.mount(None, b"/", None, private | recursive, None) == 0
        and libc.mount(b"none", bytes(folder), b"tmpfs", flags, None) == 0
    )


def _shared_work(folder: Path, node_of: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """Node 2 has a disk of its own under the same path; nobody can write to the third folder."""
    os.environ["GROUP_WORLD_SIZE"] = "3"
    ranks = _as_nodes(node_of)
    same_path, own_path, read_only = (folder / name for name in ("same", "own", "read-only"))
    results: dict[str, Any] = {"mounted": _mount(read_only, flags=1)}
    if ranks.node == 2 and results["mounted"]:
        _mount(same_path)
    elif ranks.node == 2:
        same_path = folder
    own_path = own_path if ranks.node == 2 else folder
    read_only = read_only if results["mounted"] else folder / "missing"
    worked = results["worked"] = []

    def work(name: str, error: type[Exception] | None = None) -> int:
        time.sleep(0.2)
        worked.append(name)
        if error and ranks.is_first:
            raise error(f"no space left for {name}")
        return ranks.rank

    # A node with the same path looks several times, one with another path not at all.
    for name, shared in (("same", same_path), ("own", own_path), ("read-only", read_only)):
        results[name] = once(ranks, name, lambda name=name: work(name), shared_folder=shared)
        results[f"{name} files"] = os.listdir(shared) if shared.exists() else []
    try:
        once(ranks, "error", lambda: work("error", OSError), shared_folder=own_path)
    except (OSError, TrainError) as error:
        results["error"] = type(error).__name__, str(error)
    start(ranks, "cpu")
    sum_over_ranks([0.0])  # the store lives in the first rank: leave together
    return results


@pytest.mark.distributed
def test_nodes_that_share_a_folder_work_once(tmp_path: Path) -> None:
    nodes = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (2, 0)}
    for name in ("same", "own", "read-only"):
        (tmp_path / name).mkdir()
    results = run_ranks(_shared_work, 4, tmp_path, nodes, init_group=False)
    assert [r["worked"] for r in results] == [
        ["same", "own", "read-only", "error"],
        ["read-only"],
        [],
        ["same", "own", "read-only", "error"],
    ]
    assert [r["same"] for r in results] == [0, 0, 0, 3]
    assert [r["own"] for r in results] == [0, 0, 0, 3]
    assert [r["read-only"] for r in results] == [0, 1, 1, 3]
    line = "no space left for error"
    failures = [("OSError", line), ("TrainError", line), ("TrainError", line), None]
    assert [r.get("error") for r in results] == failures
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # no probe is left
    assert len({r["mounted"] for r in results}) == 1
    assert all(r["same files"] == r["read-only files"] == [] for r in results)


_KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.distributed import meet, once
from trainer.errors import TrainError
ranks = meet()
try:
    once(ranks, "work", lambda: os.kill(os.getpid(), signal.SIGKILL), shared_folder=Path(sys.argv[1]))
except TrainError as error:
    print(error, ranks.node, ranks.nodes)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_nobody_waits_for_a_killed_worker(tmp_path: Path) -> None:
    """Two launchers, as on two machines: the first one's rank is killed at work."""
    program = tmp_path / "killed.py"
    program.write_text(_KILLED)
    env = {**clean_environment(tmp_path / "private"), "PYTHONPATH": str(ROOT)}
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--nproc_per_node=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *address]
    launchers = [
        subprocess.Popen(
            [*launch, f"--node_rank={node}", str(program), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # ends its rank too
            launcher.wait()
    assert launchers[0].returncode == 1 and "SIGKILL" in outputs[0], outputs
    (line,) = [line for line in outputs[1].splitlines() if "store of the launcher is gone" in line]
    assert line.endswith(" 1 2"), outputs  # this node's number, and how many there are


def test_a_lost_store_ends_the_waiting() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    del server
    with pytest.raises(TrainError, match="store of the launcher is gone"):
        once(Ranks(1, 1, 2, 2, 0, client), "work", lambda: None)


def _failing_work(kind: str) -> tuple[str, str]:
    ranks = meet()

    def work() -> None:
        time.sleep(0.2)
        if kind == "exit":
            raise KeyboardInterrupt
        raise OSError("no space left on /data")

    try:
        once(ranks, kind, work)
    except BaseException as error:
        if ranks.is_first:  # the store lives in this process: stay until the other has read it
            time.sleep(0.5)
        return type(error).__name__, str(error)
    raise AssertionError("nobody was told")


@pytest.mark.distributed
def test_the_reason_of_a_failure_reaches_the_waiting_ranks() -> None:
    results = run_ranks(_failing_work, 2, "error", init_group=False)
    assert results == [
        ("OSError", "no space left on /data"),
        ("TrainError", "no space left on /data"),
    ]
    assert run_ranks(_failing_work, 2, "exit", init_group=False) == [
        ("KeyboardInterrupt", ""),
        ("TrainError", "KeyboardInterrupt"),
    ]


def test_one_process_without_a_launcher_needs_no_store() -> None:
    ranks = meet()
    assert ranks == Ranks(0, 0, 1, 1, 0, None) and ranks.is_first
    assert once(ranks, "work", lambda: [1, 2]) == [1, 2]
    assert claim_report(ranks)
    assert sum_over_ranks([1.5]) == max_over_ranks([1.5]) == [1.5]
    raise_together(None)
    with pytest.raises(TrainError, match="alone"):
        raise_together("alone")
    assert not dist.is_initialized()
