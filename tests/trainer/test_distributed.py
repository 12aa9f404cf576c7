"""Work done once per node, agreement of ranks, errors that reach all of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks
from trainer.distributed import (
    Ranks,
    claim_report,
    max_over_ranks,
    meet,
    once_per_node,
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

    results: dict[str, Any] = {"work": once_per_node(ranks, "work", work)}
    try:
        once_per_node(ranks, "fail", fail)
    except ValueError as error:
        results["error"] = type(error).__name__, str(error)
    results["none"] = once_per_node(ranks, "none", lambda: None)
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


def _failing_work(kind: str) -> tuple[str, str]:
    ranks = meet()

    def work() -> None:
        time.sleep(0.2)
        if kind == "exit":
            raise KeyboardInterrupt
        raise OSError("no space left on /data")

    try:
        once_per_node(ranks, kind, work)
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
    assert once_per_node(ranks, "work", lambda: [1, 2]) == [1, 2]
    assert claim_report(ranks)
    assert sum_over_ranks([1.5]) == max_over_ranks([1.5]) == [1.5]
    raise_together(None)
    with pytest.raises(TrainError, match="alone"):
        raise_together("alone")
    assert not dist.is_initialized()
