"""Run a command of the project as a user would, in an environment that leaks nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
_LEAKING = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TORCHINDUCTOR_", "TRITON_", "WANDB_")
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy"}


@dataclass(frozen=True)
class CommandResult:
    """How a command ended; `seconds` is wall time."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Standard output and standard error, one after the other."""
        return self.stdout + self.stderr


def clean_environment(folder: Path) -> dict[str, str]:
    """This environment with home, cache and temporary folders inside `folder`.

    Variables of the Hugging Face libraries, compile caches and proxies are left out; one thread per
    process, because the cores are shared.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LEAKING) and name.lower() not in _PROXIES
    }
    places = {"HOME": folder / "home", "XDG_CACHE_HOME": folder / "xdg", "TMPDIR": folder / "tmp"}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    return {**kept, **{name: str(place) for name, place in places.items()}, "OMP_NUM_THREADS": "1"}


def run_command(
    args: list[str],
    *,
    timeout: float,
    env: dict[str, str],
    cwd: Path = ROOT,
) -> CommandResult:
    """Run `args` and wait; raises TimeoutError with its output after `timeout` seconds.

    The command has its own process group, and whatever is left of the group is killed at the end.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        args,
        cwd=cwd,
        env=env,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process.pid)
        stdout, stderr = process.communicate()
        raise TimeoutError(
            f"{args} did not end within {timeout:g} seconds\n{stdout[-4000:]}\n{stderr[-4000:]}"
        ) from None
    finally:
        _kill_group(process.pid)
    return CommandResult(process.returncode, stdout, stderr, time.monotonic() - start)


def torchrun(
    script_args: list[str],
    nproc: int = 2,
    *,
    timeout: float,
    env: dict[str, str],
    cwd: Path = ROOT,
) -> CommandResult:
    """Run `torchrun --nproc_per_node=nproc SCRIPT ARGS` on the loopback interface; see run_command."""
    launch = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={nproc}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    return run_command([sys.executable, *launch, *script_args], timeout=timeout, env=env, cwd=cwd)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
