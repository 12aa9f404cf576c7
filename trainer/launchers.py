"""Who started this process, and whether that can work: told from the environment, before anything is waited for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_NEEDED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How many processes srun and mpirun have started: neither says it in the variables that torch reads.
_COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}


def launch_fault() -> str | None:
    """One line about a launch that cannot work, for the rank that is started by it; None for any other."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return doubled(_environment_of_parent(), nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")))
    if "RANK" in os.environ:
        if missing := [name for name in _NEEDED if name not in os.environ]:
            return (
                f"RANK is set to {os.environ['RANK']}, but {', '.join(missing)} is not: start with torchrun, "
                "or unset RANK to run one process"
            )
        return None
    for name, launcher in _COUNTS.items():
        if int(os.environ.get(name, "1")) > 1:
            return (
                f"{launcher} has started {os.environ[name]} of these processes, and each would train by itself: "
                f"let {launcher} start one torchrun per node, and torchrun the ranks (docs/launch.md)"
            )
    return None


def doubled(environment: Mapping[str, str], *, nodes: int) -> str | None:
    """One line if torchrun for (at most) so many nodes, in this environment, was itself started as several ranks.

    A launcher that starts one torchrun per node is no fault: its world is not larger than the number of nodes, or it
    knows of no local ranks (Kubeflow's PyTorchJob).
    """
    if "RANK" not in environment or "LOCAL_RANK" not in environment:
        return None
    ranks = environment.get("WORLD_SIZE", "1")
    if int(ranks) <= nodes and environment["LOCAL_RANK"] == "0":
        return None
    return (
        f"two launchers at once: torchrun for {nodes} node{'s' * (nodes != 1)} was itself started as rank "
        f"{environment['RANK']} of {ranks}; start train.py with python and let the outer launcher (Azure ML: "
        "distribution) make the ranks, or leave them to torchrun (docs/launch.md)"
    )


def _environment_of_parent() -> dict[str, str]:
    """What the launcher was started with, where the system tells (Linux)."""
    try:
        text = Path(f"/proc/{os.getppid()}/environ").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
