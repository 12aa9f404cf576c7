"""The lock says who holds it, and a killed holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError
from data.lock import locked
from tests.support.command import ROOT

HOLD = """
import sys, time
from pathlib import Path
from data.lock import locked
with locked(Path(sys.argv[1]), "tokenising chat"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_waits_is_told_for_whom_and_a_killed_holder_holds_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "key.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiter = os.fork()
    if waiter == 0:
        with locked(path, "waiting in the test"):
            os._exit(0)
    time.sleep(0.3)
    assert os.waitpid(waiter, os.WNOHANG) == (0, 0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(waiter, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ended == (waiter, 0)
    line = capfd.readouterr().err
    assert line.startswith(f"waiting for process {holder.pid} on {os.uname().nodename}, tokenising")
    assert line.count("\n") == 1


def test_a_free_lock_says_nothing_and_can_be_taken_again(tmp_path: Path, capfd) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock", "working"):
            text = (tmp_path / "lock").read_text()
            assert text.startswith(f"process {os.getpid()} ") and text.count("\n") == 1
    assert capfd.readouterr().err == ""


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"), locked(tmp_path / "file" / "lock", "working"):
        pass
