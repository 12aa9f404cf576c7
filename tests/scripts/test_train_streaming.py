"""Streaming through train.py: two ranks, a stop and a resume, and what a stream refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.job import EXACT, losses, train
from tests.support.tiny import write_chat

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path: Path, cache_dir: Path) -> None:
    file = write_chat(tmp_path / "chat.jsonl", count=90)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"messages": []}) + "\n")
    given = [
        f"--data.path={file}",
        "--data.streaming=true",
        "--data.stream_buffer_rows=16",
        "--data.seq_len=64",
        "--data.max_bad_rows_pct=5",
        "--global_batch_size=4",
        "--schedule.name=constant",
        "--evaluation.generate_rows=0",
        *EXACT,
    ]

    def run(name: str, steps: int, world_size: int = 2):
        return train(
            [*given, f"--steps={steps}"],
            world_size,
            cache_dir=cache_dir,
            output_dir=tmp_path / name,
        )

    # More steps than a pass has, so the stream begins anew on the way.
    whole = run("whole", 20)
    assert whole.returncode == 0, whole.output
    assert f"{file}, read while training" in whole.stdout
    assert "excluded: " in whole.stdout and "no messages" in whole.stdout
    for steps in (7, 13, 20):
        part = run("parts", steps)
        assert part.returncode == 0, part.output
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    exports = [tmp_path / name / "export" / "model.safetensors" for name in ("whole", "parts")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    (source,) = json.loads((tmp_path / "whole" / "run.json").read_text())["data"]["sources"]
    assert source["streaming"] is True
    assert source["ledger"]["excluded"]["no messages"]["rows"] >= 1
    assert not (cache_dir / "tokens").exists()

    refused = run("parts", 21, world_size=1)
    assert refused.returncode == 1
    assert "resumes only with the world_size it began with, 2, not 1" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
