"""Who started the ranks: torchrun, another launcher, or two at once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from scripts.launch import main as launch
from tests.support.command import clean_environment, torchrun
from tests.support.job import TRAIN
from tests.support.ranks import free_port, run_ranks
from trainer.distributed import leave, meet
from trainer.launchers import doubled, launch_fault

# What Azure ML's `distribution: pytorch` sets in each of the processes it starts.
AZURE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "NODE_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "nodes", "is_fault"),
    [
        ({}, 2, False),
        (AZURE, 2, False),  # one torchrun per node
        (AZURE, 1, True),  # two on one node
        ({**AZURE, "RANK": "1", "LOCAL_RANK": "1"}, 2, True),
        ({**AZURE, "WORLD_SIZE": "1"}, 1, False),
        ({"RANK": "1", "WORLD_SIZE": "16"}, 2, False),  # Kubeflow's PyTorchJob: rank of the pod
    ],
)
def test_torchrun_inside_another_launcher_is_told_from_one_torchrun_per_node(
    environment: dict[str, str], nodes: int, is_fault: bool
) -> None:
    assert (doubled(environment, nodes=nodes) is not None) == is_fault


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, None),
        ({**AZURE, "MASTER_ADDR": "node-0", "MASTER_PORT": "6105"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 of these processes"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2"),
    ],
)
def test_processes_that_cannot_be_told_apart_are_a_fault(
    environment: dict[str, str], part: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*AZURE, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"} - set(environment):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fault = launch_fault()
    assert fault is None if part is None else part in str(fault)


@pytest.mark.distributed
def test_two_launchers_at_once_are_one_line_of_the_ranks(tmp_path: Path) -> None:
    """torchrun does not look at what it was started with; its ranks do."""
    env = {**clean_environment(tmp_path), **AZURE}
    result = torchrun([TRAIN, "--cache_dir", str(tmp_path / "cache")], timeout=120, env=env)
    assert result.stderr.count("train.py: error: two launchers at once") == 1
    assert not (tmp_path / "cache").exists()


def test_launch_py_refuses_to_be_the_second_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What the launcher changes in its own process, given back at the end.
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    monkeypatch.setattr(logger, "level", logger.level)
    for name, value in {**AZURE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch(["--nproc_per_node=2", TRAIN]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.py: error: two launchers at once")
    assert error.count("\n") == 1


def _places() -> tuple[int, int, int, int]:
    rank = int(os.environ["RANK"])
    del os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_RANK"] = str(rank if rank < 2 else rank - 2)
    ranks = meet()
    leave(ranks)  # the first one is the host of the store
    return ranks.node, ranks.local_rank, ranks.local_world_size, ranks.nodes


@pytest.mark.distributed
def test_nodes_are_found_where_the_launcher_tells_local_ranks_alone() -> None:
    """As Azure ML's does; two ranks on the first node and three on the second."""
    env = {"MASTER_PORT": str(free_port())}
    found = run_ranks(_places, 5, init_group=False, env=env)
    assert found == [(0, 0, 2, 2), (0, 1, 2, 2), (1, 0, 3, 2), (1, 1, 3, 2), (1, 2, 3, 2)]
