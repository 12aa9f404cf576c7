"""chaos.py: the schedule is that of the report, and what is wrong with a run is found."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos import FAULTS, LLAMA_3, SAME, Fault, differences, is_saving, schedule, starts


def _given(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"minutes": None, "faults": 5, "within": 7, "kinds": list(FAULTS), **changes}
    )


def test_54_days_compressed_have_the_faults_of_the_report() -> None:
    minutes = 54 * 24 * 60 / 50
    faults = [
        f for seed in range(20) for f in schedule(random.Random(seed), _given(minutes=minutes))
    ]
    assert len(faults) / 20 == pytest.approx(466, rel=0.05)
    assert max(fault.due for fault in faults) < minutes * 60
    counts = Counter(fault.kind for fault in faults)
    for kind, share in LLAMA_3.items():
        assert counts[kind] / 20 == pytest.approx(share, rel=0.15, abs=3)
    assert sum(LLAMA_3.values()) == 466 and set(LLAMA_3) == set(FAULTS)


def test_a_seed_decides_the_schedule() -> None:
    first, again, other = (schedule(random.Random(seed), _given()) for seed in (3, 3, 4))
    assert first == again != other
    assert len(first) == 5 and all(1 <= fault.due <= 7 for fault in first)
    (only,) = {f.kind for f in schedule(random.Random(0), _given(kinds=["terminate"]))}
    assert only == "terminate"


def _row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {**dict.fromkeys(SAME, 0), "step": step, "loss": loss, "step_seconds": 0.1 * step}


def _run(folder: Path, *, firsts: tuple[int, ...] = (1,), loss_at: dict[int, float] | None = None):
    """The files of a finished run of 6 steps, whose attempts began with the steps `firsts`."""
    for name, content in {
        "export/model.safetensors": "weights",
        "checkpoints/step-00000006/manifest.json": "hashes",
        "metrics.jsonl": "".join(
            json.dumps(_row(step, (loss_at or {}).get(step, 1.0))) + "\n" for step in range(1, 7)
        )
        + '{"step": 6, "eval_loss": 1.0}\n',
        "goodput.jsonl": "".join(
            json.dumps({"attempt": number, "step": step + later}) + "\n"
            for number, step in enumerate(firsts)
            for later in (0, 1)
        ),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_runs_that_end_alike_have_no_differences(tmp_path: Path) -> None:
    calm, chaos = _run(tmp_path / "calm"), _run(tmp_path / "chaos", firsts=(1, 3))
    caused = [Fault("kill-rank", 1, step=4, committed=2, logged=[_same(_row(3)), _same(_row(4))])]
    assert differences(calm, chaos, caused) == []
    assert starts(chaos) == [1, 3] and not is_saving(chaos)


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in SAME}


def test_each_difference_is_found(tmp_path: Path) -> None:
    calm = _run(tmp_path / "calm")

    def found(name: str, *faults: Fault, **options: Any) -> list[str]:
        chaos = _run(tmp_path / name, **options)
        if name in ("weights", "manifest", "metrics"):
            (file,) = chaos.rglob(f"{name}.*") if name != "weights" else chaos.rglob("model.*")
            text = file.read_text()
            file.write_text(
                text.replace("s", "z", 1) if name != "metrics" else text.split("\n", 1)[1]
            )
        return differences(calm, chaos, list(faults))

    assert found("weights") == ["the weights differ"]
    assert found("manifest") == ["the last checkpoints differ"]
    assert found("metrics") == ["a step is missing from the log, or there twice"]
    (line,) = found("loss", loss_at={4: 1.0000001})
    assert line == "1 steps had other samples or another loss, the first is step 4"
    # Of a step that was done again, the first time.
    other = Fault("kill-all", 1, step=5, committed=4, logged=[_same(_row(5, 2.0))])
    (line,) = found("again", other, firsts=(1, 5))
    assert line.endswith("the first is step 5")
    lost = Fault("corrupt", 1, step=5, committed=4)
    (line,) = found("lost", lost, firsts=(1, 3))
    assert line == "step 4 was saved, but after corrupt in step 6 the run went on with step 3"
