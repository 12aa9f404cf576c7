"""The ways ranks are started, with the real commands: two launchers as on two machines, and Azure ML's own launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.command import ROOT, CommandResult, clean_environment, run_command
from tests.support.job import TRAIN, losses, train
from tests.support.launch import launched
from tests.support.ranks import free_port

pytestmark = pytest.mark.distributed

LAUNCH = str(ROOT / "scripts" / "launch.py")
FLAGS = [
    "--steps=2",
    "--data.seq_len=128",
    "--micro_batch_size=2",
    "--global_batch_size=4",
    "--log.every=1",
    "--log.tensorboard=false",
    "--checkpoint.export=false",
    "--evaluation.max_rows=2",
    "--evaluation.generate_rows=0",
]


def _run_together(
    commands: Sequence[list[str]], environments: Sequence[dict[str, str]], folder: Path
) -> list[CommandResult]:
    """All at the same time, each to its end."""

    def run(command: list[str], env: dict[str, str]) -> CommandResult:
        return run_command(command, timeout=200, env=env, cwd=folder)

    with ThreadPoolExecutor(len(commands)) as started:
        return list(started.map(run, commands, environments))


def _flags(folder: Path, *more: str) -> list[str]:
    return [f"--cache_dir={folder / 'cache'}", f"--output_dir={folder / 'output'}", *FLAGS, *more]


def _losses_of(results: list[CommandResult], folder: Path) -> list[float]:
    assert [result.returncode for result in results] == [0] * len(results), "".join(
        result.output for result in results
    )
    # One of them is the first rank, and it alone has something to say.
    assert sum("2 steps" in result.stdout for result in results) == 1
    return losses(folder / "output")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks, whoever starts them."""
    folder = tmp_path_factory.mktemp("expected")
    result = train(FLAGS, 2, cache_dir=folder / "cache", output_dir=folder / "output")
    assert result.returncode == 0, result.output
    return losses(folder / "output")


def _agent(endpoint: str, *more: str) -> list[str]:
    """The command of docs/launch.md, which is the same on every node."""
    return [
        *(sys.executable, LAUNCH, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"),
        *("--rdzv_id=run1", f"--rdzv_endpoint={endpoint}", *more, TRAIN),
    ]


@pytest.mark.slow
def test_two_agents_meet_by_c10d_on_the_loopback_interface(
    tmp_path: Path, expected: list[float]
) -> None:
    agent = _agent(f"127.0.0.1:{free_port()}", "--local_addr=127.0.0.1")
    command = [*agent, *_flags(tmp_path, "--parallel.dp_replicate=2")]
    env = clean_environment(tmp_path / "private")
    assert _losses_of(_run_together([command] * 2, [env] * 2, tmp_path), tmp_path) == expected


@pytest.fixture
def two_machines() -> Iterator[list[list[str]]]:
    """The beginnings of commands that run on node-0 and node-1: namespaces with a cable, an address and a name each."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("needs root, ip and unshare")
    names = [f"shardloop-{os.getpid()}-{node}" for node in (0, 1)]
    hosts = [Path("/etc/netns", name, "hosts") for name in names]
    addresses = "127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name, file in zip(names, hosts, strict=True):
                ip("netns", "add", name)
                file.parent.mkdir(parents=True)  # what `ip netns exec` shows as /etc/hosts
                file.write_text(addresses)
            end = ["veth", "peer", "name", "node", "netns", names[1]]
            ip("-n", names[0], "link", "add", "node", "type", *end)
            for node, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "node")
                for device in ("node", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield [
            [
                *("ip", "netns", "exec", name, "unshare", "--uts"),
                *("bash", "-c", f'hostname node-{node} && exec "$@"', "bash"),
            ]
            for node, name in enumerate(names)
        ]
    finally:
        for name, file in zip(names, hosts, strict=True):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(file.parent, ignore_errors=True)
        for folder in (hosts[0].parent.parent,):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@pytest.mark.slow
def test_two_machines_meet_over_their_network(
    tmp_path: Path, two_machines: list[list[str]], expected: list[float]
) -> None:
    """Each has its own loopback interface and its own cache, so whatever is said goes over the cable."""
    env = clean_environment(tmp_path / "private")
    commands = [
        [*machine, *_agent("node-0:29500"), *_flags(tmp_path, f"--cache_dir={tmp_path / machine[3]}")]
        for machine in two_machines
    ]  # fmt: skip
    assert _losses_of(_run_together(commands, [env] * 2, tmp_path), tmp_path) == expected
    assert len(list(tmp_path.glob("*/tokens"))) == 2
    (checkpoint,) = (tmp_path / "output" / "checkpoints").glob("step-*")
    assert {file.name for file in (checkpoint / "tensors").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }


def _azure(folder: Path, *, nodes: int, processes: int) -> list[dict[str, str]]:
    """What Azure ML's `distribution: pytorch` sets for each of the processes that it starts."""
    port = str(free_port())
    return [
        {
            **clean_environment(folder / f"private-{node}"),
            "AZUREML_RUN_ID": "calm_bean_7",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "NODE_RANK": str(node),
            "WORLD_SIZE": str(nodes * processes),
            "RANK": str(node * processes + local),
            "LOCAL_RANK": str(local),
        }
        for node in range(nodes)
        for local in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 2)])
def test_plain_processes_of_azure_ml_train(
    tmp_path: Path, expected: list[float], nodes: int, processes: int
) -> None:
    environments = _azure(tmp_path, nodes=nodes, processes=processes)
    more = ["--micro_batch_size=1", "--parallel.dp_replicate=2"] if nodes == 2 else []
    command = [sys.executable, TRAIN, *_flags(tmp_path, *more)]
    results = _run_together([command] * len(environments), environments, tmp_path)
    assert _losses_of(results, tmp_path) == pytest.approx(expected, abs=2e-5)


def test_torchrun_as_the_command_of_two_processes_of_azure_ml_is_explained(tmp_path: Path) -> None:
    environments = _azure(tmp_path, nodes=1, processes=2)
    # The port of the launcher in the environment is not for torchrun; --standalone takes a free one.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [*launch, TRAIN, *_flags(tmp_path)]
    for result in _run_together([command] * 2, environments, tmp_path):
        assert result.returncode != 0
        assert result.stderr.count("train.py: error: two launchers at once") == 1
        assert "start train.py with python" in result.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_the_rank_that_failed_is_named_though_the_launcher_tries_again(tmp_path: Path) -> None:
    """An error that no restart mends, of the second rank alone: the next attempts end at once, and like the first."""
    (tmp_path / "own.py").write_text(
        "import os\nfrom trainer.errors import TrainError\n"
        "def loss(model, batch):\n"
        "    if os.environ['RANK'] == '1':\n        raise TrainError('nothing is right')\n"
        "    return model(batch, lambda hidden, weight: (hidden @ weight.T).sum()), {}\n"
    )
    output_dir = tmp_path / "output"
    env = {**clean_environment(tmp_path / "private"), "PYTHONPATH": str(tmp_path)}
    flags = [f"--cache_dir={tmp_path / 'cache'}", *FLAGS, "--loss=own.loss"]
    with launched(flags, output_dir, env=env) as launch:
        code, log = launch.end(seconds=200)
    assert code == 1
    assert log.count("train.py: error: nothing is right") == 1
    assert log.splitlines()[-1] == "launch.py: rank 1 ended with exit code 1", log
