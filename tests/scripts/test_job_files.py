"""Job files start what exists: every flag in them is read as train.py, launch.py and doctor.py read theirs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from scripts.command_line import parse_run_config
from scripts.config import TrainConfig
from scripts.doctor import DoctorConfig
from tests.support.command import ROOT, clean_environment

FOLDERS = ("azureml", "slurm", "k8s", "sky")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / "scripts" / folder).iterdir())
SHELL = [file for file in FILES if file.suffix == ".sbatch"]
AZURE = sorted((ROOT / "scripts" / "azureml").glob("*.yaml"))


def _text(value: Any) -> list[str]:
    """Every command in a parsed YAML file: a string, or the lists `command` and `args` of a container."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        if isinstance(value.get("command"), list):
            return [shlex.join([*value["command"], *value.get("args", [])])]
        value = list(value.values())
    return [text for item in value for text in _text(item)] if isinstance(value, list) else []


def _commands(file: Path) -> list[list[str]]:
    """The words of each command that starts one of our scripts, with values for what is only known in the job."""
    text = file.read_text(encoding="utf-8")
    inputs: dict[str, Any] = {}
    if file.suffix == ".yaml":
        job = yaml.safe_load(text)
        inputs = job.get("inputs", {})
        texts = _text(job)
    else:
        texts = ["\n".join(line for line in text.splitlines() if not line.startswith("#"))]
    found = []
    for text in texts:
        text = re.sub(r"\$\{\{inputs\.(\w+)\}\}", lambda match: str(inputs[match[1]]), text)
        text = re.sub(r"\$\{\{.*?\}\}|\$\(.*?\)|\$\{.*?\}|\$\w+", "1", text.replace("\\\n", " "))
        for line in re.split(r"\n|&&|&|;", text):
            if re.search(r"scripts/\w+\.py", line):
                words = shlex.split(line.replace('"$@"', ""), comments=True)
                first = next(
                    i for i, word in enumerate(words) if re.match(r"scripts/\w+\.py$", word)
                )
                found.append(words[first:])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_flag_is_declared(file: Path) -> None:
    scripts = set()
    for script, *words in _commands(file):
        scripts.add(script)
        words = [word for word in words if word != "1"]  # "$@"
        if script == "scripts/launch.py":
            scripts.add("scripts/train.py")
            split = words.index("scripts/train.py")
            assert parse_args([*words[:split], "train.py"]).training_script == "train.py"
            script, words = "scripts/train.py", words[split + 1 :]
        config_class = DoctorConfig if script == "scripts/doctor.py" else TrainConfig
        config = parse_run_config(config_class, script, words)
        assert config.cache_dir != TrainConfig().cache_dir
    assert "scripts/train.py" in scripts, "no command was found in the file"


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_scripts_are_sound(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", "--shell=bash", str(file)], check=True)


@pytest.mark.parametrize("file", AZURE, ids=lambda file: file.name)
@pytest.mark.filterwarnings("ignore")  # of its own dependencies
def test_azure_reads_its_jobs(file: Path) -> None:
    from azure.ai.ml import load_job

    job = load_job(file)
    result = job._validate()
    assert result.passed, result.error_messages
    own_ranks = "launch.py" not in job.command
    assert own_ranks == (getattr(job.distribution, "process_count_per_instance", 1) > 1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("trained", [False, True])
def test_a_slurm_job_is_requeued_on_its_warning(tmp_path: Path, trained: bool) -> None:
    """Before its first step or after it. The batch script itself, with `srun` that runs one task here, and `scontrol` that writes down what it is told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    # As the real one, it passes signals on to its task.
    (commands / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (commands / "scontrol").write_text(
        f'#!/bin/bash\nif [[ $1 == show ]]; then echo localhost; else echo "$@" > {tmp_path}/told; fi\n'
    )
    for command in ("srun", "scontrol"):
        (commands / command).chmod(0o755)
    output_dir = tmp_path / "output"
    env = {
        **clean_environment(tmp_path / "private"),
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-0",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "CACHE_DIR": str(tmp_path / "cache"),
    }
    script = [str(ROOT / "scripts" / "slurm" / "train.sbatch"), str(output_dir)]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            ["bash", *script, "--steps=100000", "--log.every=1"],
            cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            rows = output_dir / "metrics.jsonl"
            while time.monotonic() < deadline and not (
                rows.exists() and '"loss"' in rows.read_text(encoding="utf-8")
                if trained
                else (tmp_path / "cache").exists()
            ):
                time.sleep(0.1 if trained else 0.01)
            job.send_signal(signal.SIGUSR1)  # to the batch shell alone
            code = job.wait(timeout=60)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    output = (tmp_path / "log").read_text()
    assert code == 128 + signal.SIGUSR1, output
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    assert bool(list((output_dir / "checkpoints").glob("step-*"))) == trained, output
