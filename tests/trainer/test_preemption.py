"""Signals, the watchdog, the output folder's lock and the record of crashes, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import ROOT
from trainer.crashes import CRASHES, Attempt
from trainer.errors import PeerLostError, RepeatedCrashError, TrainError
from trainer.output import clear_preempted, mark_preempted, sole_writer
from trainer.preemption import Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_raises_at_once_where_there_is_nothing_to_save(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process that does not end by then is ended, and this one goes on testing.
    monkeypatch.setattr("trainer.preemption.LATEST_SECONDS", 1e6)
    stop = StopRequest()
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name), stop.listening():
        os.kill(os.getpid(), number)
    assert stop.signal == number
    assert signal.getsignal(number) == before


class _Signalled:
    """Meets a signal in its finaliser, which swallows what is raised there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_within_a_finaliser_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.preemption.LATEST_SECONDS", 1e6)
    stop = StopRequest()
    with pytest.raises(Stopped, match="SIGTERM"), stop.listening():
        _Signalled()
        time.sleep(20)
    assert stop.signal == signal.SIGTERM
    assert capfd.readouterr().err == ""


_WORKER = """
import signal, sys, time
from data.prepare import ask_again
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
sys.unraisablehook = ask_again
class Signalled:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
Signalled()
time.sleep(20)
"""


def test_nor_in_a_process_that_tokenises() -> None:
    worker = _program(_WORKER)
    assert worker.communicate(timeout=60) == ("", "")
    assert worker.returncode == 3


def test_a_signal_after_an_error_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.preemption.LATEST_SECONDS", 1e6)
    stop = StopRequest()
    with stop.listening():
        with pytest.raises(KeyError), stop.deferred():
            raise KeyError("lost")
        os.kill(os.getpid(), signal.SIGTERM)  # of the launcher, whose other ranks have ended
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal is None


def _program(text: str, *args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_SAVING = """
import time
import trainer.preemption
trainer.preemption.ECHO_SECONDS = 0.3
stop = trainer.preemption.StopRequest()
with stop.listening(), stop.deferred():
    print("saving", flush=True)
    try:
        while True:
            time.sleep(0.01)
    finally:
        print("this is no ordinary end", flush=True)
"""


def test_T02_a_second_signal_ends_a_save_at_once_but_an_echo_does_not() -> None:
    saving = _program(_SAVING)
    assert saving.stdout is not None and saving.stdout.readline() == "saving\n"
    for pause in (0.05, 0.05, 0.4):  # the third comes after the echoes of the first
        saving.send_signal(signal.SIGTERM)
        time.sleep(pause)
        assert saving.poll() is None
    saving.send_signal(signal.SIGTERM)
    assert saving.communicate(timeout=10) == ("", "")
    assert saving.returncode == 128 + signal.SIGTERM


_LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
rank.wait()
"""
_RANK = """
import os, signal, time
from trainer.preemption import end_with_launcher
# Not by print, which may be interrupted in a print.
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"told to end\\n"), os._exit(0)))
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_T04_a_rank_is_told_when_its_launcher_is_killed() -> None:
    launcher = _program(_LAUNCHER, _RANK, env={"TORCHELASTIC_RUN_ID": "1"})
    assert launcher.stdout is not None and launcher.stderr is not None
    int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read() == "told to end\n"
    launcher.stdout.close()
    launcher.stderr.close()


_HANG = """
import sys, time
from pathlib import Path
from trainer.crashes import Attempt
from trainer.watchdog import Watchdog
folder, seconds, sleep = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
with Watchdog(seconds, folder, Attempt(folder, "", step=7)) as watchdog:
    def waits_for_ever():
        time.sleep(sleep)
    for _ in range(3):
        watchdog.arm()
        waits_for_ever()
        watchdog.disarm()
    print("done")
"""


def test_T11_a_step_that_hangs_ends_the_rank_and_leaves_its_stacks(tmp_path: Path) -> None:
    hangs = _program(_HANG, tmp_path / "hangs", 0.5, 60, env={"RANK": "3"})
    calm = _program(_HANG, tmp_path / "calm", 20, 0.1)
    _, error = hangs.communicate(timeout=50)
    assert hangs.returncode == 1
    stacks = tmp_path / "hangs" / "stacks-rank-3.txt"
    assert error == (
        "train.py: error: rank 3: step 7 has taken more than 0.5 s (guards.hang_seconds); "
        f"stacks of all threads in {stacks}\n"
    )
    assert "waits_for_ever" in stacks.read_text()
    (crash,) = map(json.loads, (tmp_path / "hangs" / CRASHES).read_text().splitlines())
    assert (crash["kind"], crash["step"], crash["final"]) == ("HangError", 7, False)
    # Three steps within their time: nothing is left.
    assert calm.communicate(timeout=30) == ("done\n", "")
    assert list((tmp_path / "calm").iterdir()) == []


_HOLD = """
import sys, time
from pathlib import Path
from trainer.output import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_T18_a_second_run_in_one_output_folder_is_refused(tmp_path: Path) -> None:
    holder = _program(_HOLD, tmp_path / "out")
    assert holder.stdout is not None and holder.stderr is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(
            TrainError, match=f"out is in use by process {holder.pid} on .*, training since"
        ),
        sole_writer(tmp_path / "out"),
    ):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stderr.close()
    with sole_writer(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / ".lock").read_text()
    assert (tmp_path / "out" / ".lock").read_text() == ""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainError, match=r"--output_dir .*file cannot be written"),
        sole_writer(tmp_path / "file"),
    ):
        pass


def test_the_mark_of_a_preempted_run_is_removed_once(tmp_path: Path) -> None:
    mark_preempted(tmp_path, signal.SIGUSR1, 12)
    assert json.loads((tmp_path / "preempted").read_text()) == {"signal": "SIGUSR1", "step": 12}
    assert clear_preempted(tmp_path) and not clear_preempted(tmp_path)


class _Launcher:
    """What torchrun tells its ranks; each call of `crash` is a restart of them all."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, run: str = "a") -> None:
        self._folder, self._monkeypatch, self._run, self._count = folder, monkeypatch, run, 0

    def attempt(self, config: str = "same", rank: int = 0, step: int = 0) -> Attempt:
        for name, value in (
            ("TORCHELASTIC_RUN_ID", self._run),
            ("TORCHELASTIC_RESTART_COUNT", str(self._count)),
            ("TORCHELASTIC_MAX_RESTARTS", "3"),
            ("RANK", str(rank)),
        ):
            self._monkeypatch.setenv(name, value)
        return Attempt(self._folder, config, step=step)

    def crash(self, step: int, *errors: Exception, final: bool = False) -> None:
        for rank, error in enumerate(errors):
            self.attempt(rank=rank, step=step).record(error, final=final)
        self._count += 1


def test_T19_the_same_crash_twice_in_one_step_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = _Launcher(tmp_path, monkeypatch)
    lost = PeerLostError("rank 0 lost the others")
    launcher.attempt().refuse_repetition()  # nothing has happened
    launcher.crash(5, lost, RuntimeError("index 9 is out of bounds"))
    launcher.attempt().refuse_repetition()
    launcher.crash(9, lost, RuntimeError("index 9 is out of bounds"))  # another step
    launcher.attempt().refuse_repetition()
    launcher.crash(9, lost, KeyError("another"))  # another error in that step
    launcher.attempt().refuse_repetition()
    launcher.crash(9, lost, KeyError("another"))
    with pytest.raises(
        RepeatedCrashError, match=r"in step 9 .*rank 1, KeyError: 'another'"
    ) as stop:
        launcher.attempt().refuse_repetition()
    # The next attempts of this launcher need not be told; nor is the refusal a crash of its own.
    launcher.crash(0, stop.value, final=True)
    assert launcher.attempt().hopeless()
    another = _Launcher(tmp_path, monkeypatch, run="b")
    assert not another.attempt().hopeless()
    with pytest.raises(RepeatedCrashError):
        another.attempt().refuse_repetition()
    another.attempt(config="changed").refuse_repetition()
    with (tmp_path / CRASHES).open("a") as file:
        file.write('{"step": 1, "ki')  # killed while it wrote
    with pytest.raises(RepeatedCrashError):
        another.attempt().refuse_repetition()
    (tmp_path / CRASHES).unlink()
    another.attempt().refuse_repetition()


def test_what_a_user_must_mend_is_not_tried_again_but_never_refused_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = _Launcher(tmp_path, monkeypatch)
    for _ in range(2):
        assert not launcher.attempt().hopeless()
        launcher.attempt(rank=1).record(TrainError("no such file"), final=True)
        launcher.crash(0, TrainError("no such file"), final=True)
        crash = launcher.attempt().hopeless()
        assert crash is not None and (crash["rank"], crash["kind"]) == (1, "TrainError")
        launcher.attempt().refuse_repetition()
        launcher = _Launcher(tmp_path, monkeypatch, run="b")


def test_no_run_is_longer_or_shorter_because_a_clock_is_set() -> None:
    """The calendar's clock is asked for the time between two processes, the age of files, and for what trackers are told; never by a timer."""
    users = [
        file.name
        for package in ("trainer", "data", "models", "scripts")
        for file in (ROOT / package).rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if "time.time(" in line or "datetime.now(" in line or "utcnow(" in line
    ]
    assert sorted(users) == ["goodput.py", "sources.py", "trackers.py"]
