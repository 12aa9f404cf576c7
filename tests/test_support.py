"""The launchers of the tests themselves: results, failures, hangs and leaks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.command import clean_environment, run_command, torchrun
from tests.support.ranks import run_ranks


def _sum_over_ranks(offset: float) -> tuple[torch.Tensor, int, str]:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return value, torch.get_num_threads(), os.environ["HOME"]


def _environment(name: str) -> tuple[str, str, bool]:
    return os.environ[name], os.environ["LOCAL_RANK"], dist.is_initialized()


def _from_the_server() -> bool:
    from tests.support import preload

    return os.getppid() == preload.SERVER_PID


def _fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the reason")
    dist.barrier()


def _die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_0(folder: Path) -> None:
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        time.sleep(600)


def _abort_at_exit() -> str:
    import atexit

    atexit.register(os.abort)
    return "done"


@pytest.mark.distributed
def test_ranks_return_results_in_order_with_tensors() -> None:
    results = run_ranks(_sum_over_ranks, 2, 0.5)
    assert [value.item() for value, _, _ in results] == [2.0, 2.0]
    assert [threads for _, threads, _ in results] == [1, 1]
    home = results[0][2]
    assert home != os.environ["HOME"] and not Path(home).exists()


@pytest.mark.distributed
def test_ranks_get_the_environment_and_no_group_when_asked() -> None:
    results = run_ranks(_environment, 2, "MY_FLAG", env={"MY_FLAG": "7"}, init_group=False)
    assert results == [("7", "0", False), ("7", "1", False)]
    assert "MY_FLAG" not in os.environ


@pytest.mark.distributed
def test_ranks_import_nothing_again() -> None:
    assert run_ranks(_from_the_server, 2, init_group=False) == [True, True]


@pytest.mark.distributed
def test_a_failing_rank_ends_all_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*_fail_on_last_rank.*the reason"):
        run_ranks(_fail_on_last_rank, 2)
    assert time.monotonic() - start < 30


@pytest.mark.distributed
def test_a_dying_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(_die_on_rank_0, 2, init_group=True)


@pytest.mark.distributed
def test_a_hang_ends_within_the_timeout_and_shows_the_stack(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] of 2.*_hang_on_rank_0"):
        run_ranks(_hang_on_rank_0, 2, tmp_path, timeout=6)
    assert time.monotonic() - start < 30
    for rank in range(2):
        assert not Path("/proc", (tmp_path / f"pid-{rank}").read_text()).exists()


@pytest.mark.distributed
def test_an_abort_after_the_result_is_no_failure() -> None:
    assert run_ranks(_abort_at_exit, 2) == ["done", "done"]


def test_a_command_reports_how_it_ended(tmp_path: Path) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    env = clean_environment(tmp_path)
    result = run_command([sys.executable, "-c", program], timeout=30, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_hanging_command_is_killed_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with pytest.raises(TimeoutError) as error:
        run_command([sys.executable, "-c", program], timeout=1, env=clean_environment(tmp_path))
    child = next(line for line in str(error.value).splitlines() if line.isdigit())
    status = Path("/proc", child, "stat")
    for _ in range(50):  # killed at once; whoever inherited it may take a moment to reap it
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"child {child} is still running")


def test_a_clean_environment_leaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    env = clean_environment(tmp_path)
    assert not {"HF_TOKEN", "HTTPS_PROXY"} & set(env)
    assert all(env[name].startswith(str(tmp_path)) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"))


@pytest.mark.distributed
def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        "import os, pathlib\n"
        "pathlib.Path(__file__).with_name('rank-' + os.environ['RANK']).write_text('started')"
    )
    result = torchrun([str(script)], 2, timeout=60, env=clean_environment(tmp_path))
    assert result.returncode == 0, result.output
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
