"""The plan of a run that is under way: made beside it by plan.py, and compared with what was measured at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from data.mixture import Mixture
from scripts.planner.facts import find_gpu

# A run of a few seconds may end before its plan is made.
_PATIENCE_SECONDS = 30.0


def begin_plan(
    output_dir: Path, *, gpu: str | None, gpus: int, rows: list[str]
) -> Callable[[], dict[str, Any] | None]:
    """Start planning the run of OUTPUT_DIR/config.yaml in another process, into OUTPUT_DIR/plan.json.

    Args:
        output_dir: of the run.
        gpu: the device's name; None where there is none.
        gpus: ranks.
        rows: see `flags_of_rows`.

    Returns:
        A function that returns the plan, or None where there is none, and leaves no process behind.
    """
    try:
        known = find_gpu(gpu or "")
    except KeyError:
        return lambda: None
    command = [
        *(sys.executable, str(Path(__file__).with_name("plan.py")), "--json"),
        *("--config", str(output_dir / "config.yaml"), "--gpu", known.name),
        *("--gpus", str(gpus), *rows),
    ]
    # Not one of the launcher's ranks; and the network is for the run.
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    with (output_dir / "plan.json").open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def take() -> dict[str, Any] | None:
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return read_plan(output_dir)

    return take


def flags_of_rows(mixture: Mixture | None, *, seq_len: int) -> list[str]:
    """The flags of plan.py that say what rows are made of; none where rows are streamed."""
    if mixture is None:
        return []
    tokens = sum(len(source.packs) for source in mixture.sources) * seq_len
    labels = sum(source.ledger["supervised_tokens"] for source in mixture.sources)
    squares = sum(
        float((source.documents.lengths.astype(float) ** 2).sum()) for source in mixture.sources
    )
    return [
        *("--labels_pct", f"{100 * labels / tokens:.4g}"),
        *("--document_length", f"{max(1.0, squares / tokens):.5g}"),
    ]


def read_plan(output_dir: Path) -> dict[str, Any] | None:
    """What plan.py wrote there; None where it has not, or could not."""
    try:
        return json.loads((output_dir / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def planned_memory(output_dir: Path) -> str:
    """For the error of a run whose memory ran out: what its plan says, or nothing."""
    plan = read_plan(output_dir)
    if plan is None:
        return ""
    parts = ", ".join(
        f"{part} {size:.1f}" for part, size in plan["memory_parts_gib"].items() if size
    )
    return f" (plan.py: {plan['memory_allocated_gib']:.1f} GiB at the peak, of {plan['memory_gpu_gib']:.1f}: {parts})"


def compare_plan(output_dir: Path, plan: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """See `compare`, of the run there; {} where there is no plan."""
    if plan is None:
        return {}
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return compare(plan, [json.loads(line) for line in lines])


def compare(plan: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Planned and measured numbers of a run.

    Args:
        plan: as plan.py prints it.
        rows: of metrics.jsonl. The first one has the warm-up in it, and does not count where there are more.
    """
    steps = [row for row in rows if "step_seconds" in row]
    steps = steps[1:] or steps
    if not steps:
        return {}
    measured = {
        "memory_allocated_gib": max(row["memory_peak_gib"] for row in steps),
        # Padding costs as much as tokens: the plan counts both.
        "tokens_per_second_per_gpu": median(
            row["tokens_per_second_per_gpu"]
            * (row["tokens"] + row["padding_tokens"])
            / max(row["tokens"], 1)
            for row in steps
        ),
        "step_seconds": median(row["step_seconds"] for row in steps),
    }
    return {
        name: {
            "planned": plan[name],
            "measured": value,
            "error_pct": 100 * (plan[name] / value - 1),
        }
        for name, value in measured.items()
    }


def comparison_table(compared: dict[str, dict[str, float]]) -> str:
    names = {
        "memory_allocated_gib": "memory, GiB",
        "tokens_per_second_per_gpu": "tokens/s/GPU",
        "step_seconds": "step, s",
    }
    lines = [f"{'':<16}{'planned':>10}{'measured':>10}"]
    for key, name in names.items():
        planned, measured = compared[key]["planned"], compared[key]["measured"]
        digits = 0 if measured >= 1000 else 2
        lines.append(f"{name:<16}{planned:>10,.{digits}f}{measured:>10,.{digits}f}")
    return "\n".join(lines)
