"""generate.py answers from an exported folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT, clean_environment, run_command
from tests.support.tiny import write_model

pytestmark = pytest.mark.distributed

_GENERATE = str(ROOT / "scripts" / "generate.py")


def test_S10_every_prompt_is_answered_and_shown_without_its_control_characters(
    tmp_path: Path,
) -> None:
    env = clean_environment(tmp_path / "private")
    model = write_model(tmp_path / "model")

    result = run_command(
        [
            sys.executable,
            _GENERATE,
            str(model),
            "What is 1 + 1?",
            "Sort: 3 1 2 \x1b[2J",
            "--max_new_tokens=4",
        ],
        timeout=60,
        env=env,
    )

    assert result.returncode == 0, result.output
    assert "What is 1 + 1?" in result.stdout
    assert "Sort: 3 1 2 \\x1b[2J" in result.stdout
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    assert result.stderr == ""
    assert [path for path in (tmp_path / "private").rglob("*") if path.is_file()] == []


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    result = run_command(
        [sys.executable, _GENERATE, str(tmp_path), "Hello"],
        timeout=60,
        env=clean_environment(tmp_path / "private"),
    )

    assert result.returncode == 2
    assert result.stderr == (f"generate.py: error: {tmp_path} holds no model (no config.json)\n")
