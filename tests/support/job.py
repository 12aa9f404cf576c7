"""Run scripts/train.py in tests: its `main` on forked ranks, or the real command with signals."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from scripts.environment import cache_settings
from tests.support.command import ROOT, CommandResult
from tests.support.ranks import free_port, run_ranks

TRAIN = str(ROOT / "scripts" / "train.py")
# For quick and quiet runs that are compared with each other.
EXACT = [
    "--parallel.param_dtype=float32",
    "--model.dtype=float32",
    "--optimizer.learning_rate=1e-3",
    "--log.every=1",
    "--log.tensorboard=false",
]


def train(
    args: list[str],
    world_size: int = 2,
    *,
    cache_dir: Path,
    output_dir: Path,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> CommandResult:
    """`train.py ARGS` on forked ranks, as by torchrun; one rank runs as without a launcher.

    The output is that of all ranks, one after the other, and the exit code the largest of theirs.
    """
    argv = [f"--cache_dir={cache_dir}", f"--output_dir={output_dir}", *args]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = output_dir.parent / f".{output_dir.name}.log"
    return run_script(
        "train.py", argv, world_size, cache_dir=cache_dir, log=log, timeout=timeout, env=env
    )


def run_script(
    script: str,
    argv: list[str],
    world_size: int = 1,
    *,
    cache_dir: Path,
    log: Path,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> CommandResult:
    """`python scripts/SCRIPT ARGV` on forked ranks, in the folder of this process; see `train`.

    `log` is the beginning of the names of files that take the output meanwhile.
    """
    start = time.monotonic()
    # The forked libraries are imported already, so their folders have to be set from outside.
    env = {**cache_settings(cache_dir.absolute()), **(env or {})}
    results = run_ranks(
        _run_script,
        world_size,
        script,
        argv,
        str(log),
        timeout=timeout,
        env=env,
        init_group=False,
    )
    codes, outputs, errors = zip(*results, strict=True)
    return CommandResult(max(codes), "".join(outputs), "".join(errors), time.monotonic() - start)


def _run_script(script: str, argv: list[str], log: str) -> tuple[int, str, str]:
    """In a rank: the exit code of a script, and what file descriptors 1 and 2 got."""
    rank = os.environ["RANK"]
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    _read_environment_again()
    paths = [Path(f"{log}.{kind}.{rank}") for kind in ("out", "err")]
    for descriptor, path in zip((1, 2), paths, strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    for path in paths:
        path.unlink()
    return code, *texts


def _read_environment_again() -> None:
    """What the client of the hub reads when it is imported, which it is already."""
    from huggingface_hub import constants

    if endpoint := os.environ.get("HF_ENDPOINT"):
        constants.ENDPOINT = endpoint
        constants.HUGGINGFACE_CO_URL_TEMPLATE = (
            f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(output_dir: Path) -> list[float]:
    """The training loss of every logged step, in the order of the steps."""
    rows = [row for row in read_rows(output_dir) if "loss" in row]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return [row["loss"] for row in rows]


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder."""
    return sorted(int(path.name[5:]) for path in (output_dir / "checkpoints").glob("step-????????"))


def start_and_signal(
    args: list[str],
    number: signal.Signals,
    when: Callable[[], bool],
    *,
    nproc: int = 1,
    whole_group: bool = False,
    timeout: float,
    env: dict[str, str],
) -> CommandResult:
    """Run the real train.py with `args` and send it signal `number` as soon as `when()` holds.

    With `nproc` above 1 torchrun starts it and gets the signal. `whole_group` signals every process
    of the foreground group, which is what ctrl-C in a terminal does.
    """
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={nproc}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    command = [sys.executable, *(launcher if nproc > 1 else []), TRAIN, *args]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while not when() and process.poll() is None:
            if time.monotonic() - start > timeout:
                raise TimeoutError(f"{args}: the moment for {number.name} did not come")
            time.sleep(0.02)
        if process.poll() is None:
            (os.killpg if whole_group else os.kill)(process.pid, number)
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return CommandResult(process.returncode, stdout, stderr, time.monotonic() - start)


def load_export(output_dir: Path) -> torch.nn.Module:
    """The exported model through transformers, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(output_dir / "export").eval()
