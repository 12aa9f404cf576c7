"""What happens to a run on a bad day: signals at every phase, killed and stopped ranks, killed launchers."""

from __future__ import annotations

import http.server
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts import chaos
from tests.support.command import CommandResult, clean_environment, run_command
from tests.support.job import EXACT, TRAIN, checkpoint_steps, read_rows, start_and_signal, train
from tests.support.launch import launched
from tests.support.tiny import write_chat

pytestmark = pytest.mark.distributed

# A second or so of a step would make these slow; the built-in model and data need no preparation.
_QUICK = [
    *EXACT,
    "--data.seq_len=64",
    "--global_batch_size=4",
    "--evaluation.max_rows=4",
    "--evaluation.generate_rows=0",
]


def _signalled(
    folder: Path, number: signal.Signals, when: Callable[[Path, Path], bool], *args: str
) -> CommandResult:
    """train.py in one process, signalled when `when(cache_dir, output_dir)` holds."""
    cache_dir, output_dir = folder / "cache", folder / "out"
    return start_and_signal(
        [f"--cache_dir={cache_dir}", f"--output_dir={output_dir}", *_QUICK, *args],
        number,
        lambda: when(cache_dir, output_dir),
        timeout=180,
        env=clean_environment(folder / "private"),
    )


def _unfinished(cache_dir: Path) -> list[Path]:
    return [p for p in cache_dir.rglob("*") if "unfinished" in p.name or p.suffix == ".partial"]


@pytest.mark.slow
def test_T01_sigterm_while_tokenising_leaves_nothing_unfinished(tmp_path: Path) -> None:
    data = write_chat(tmp_path / "chat.jsonl", count=30_000)

    result = _signalled(
        tmp_path,
        signal.SIGTERM,
        lambda cache_dir, _: any(
            cache_dir.glob("tokens-in-progress/*/*.unfinished-*/input_ids.bin")
        ),
        f"--data.path={data}",
        "--data.prepare_workers=2",
        "--steps=1",
    )

    assert result.returncode == 128 + signal.SIGTERM
    assert result.output == "train.py: stopped by SIGTERM\n"
    assert _unfinished(tmp_path / "cache") == []
    assert not (tmp_path / "out" / "preempted").exists()  # nothing was saved


@contextmanager
def _stalling_server(content: bytes) -> Iterator[tuple[str, threading.Event]]:
    """An address whose file stops half way, and when it has."""
    stalled, ended = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"1"')
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            stalled.set()
            ended.wait(60)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/chat.jsonl", stalled
        finally:
            ended.set()
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_T01_a_signal_while_downloading_ends_at_once(tmp_path: Path) -> None:
    content = write_chat(tmp_path / "chat.jsonl", count=3000).read_bytes()
    with _stalling_server(content) as (url, stalled):
        result = _signalled(
            tmp_path,
            signal.SIGUSR1,
            lambda *_: stalled.is_set(),
            f"--data.path={url}",
            "--steps=1",
        )
    # The thread that reads is not waited for; what it has is fetched anew.
    assert result.returncode == 128 + signal.SIGUSR1
    assert "Traceback" not in result.output


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["compile", "evaluation", "save", "export"])
def test_T01_a_signal_saves_what_there_is_and_the_same_command_goes_on(
    tmp_path: Path, phase: str
) -> None:
    moments: dict[str, Callable[[Path, Path], bool]] = {
        "compile": lambda cache, _: any(cache.glob("compiled/inductor/*")),
        "evaluation": lambda _, out: (
            (out / "metrics.jsonl").exists() and '"step": 2,' in (out / "metrics.jsonl").read_text()
        ),
        "save": lambda _, out: any(out.glob("checkpoints/.step-*.partial/tensors")),
        "export": lambda _, out: (out / ".export.partial").exists(),
    }
    # The last step's evaluation, and the export, take a second or two.
    steps, more = {
        "compile": (3, ["--parallel.compile=true"]),
        "evaluation": (2, ["--evaluation.max_rows=512"]),
        "save": (200, ["--checkpoint.every=1"]),
        "export": (1, ['--model.overrides={"intermediate_size": 65536}']),
    }[phase]
    output_dir = tmp_path / "out"

    stopped = _signalled(tmp_path, signal.SIGTERM, moments[phase], *more, f"--steps={steps}")

    assert stopped.returncode == 128 + signal.SIGTERM, stopped.output
    assert stopped.stderr == ""
    step = checkpoint_steps(output_dir)[-1]
    assert f"stopped by SIGTERM after step {step}, everything saved" in stopped.stdout
    marker = json.loads((output_dir / "preempted").read_text())
    assert marker == {"signal": "SIGTERM", "step": step}
    assert list(output_dir.glob(".*.partial")) == []
    assert not (output_dir / "export").exists()
    assert step == read_rows(output_dir)[-1]["step"]

    end = step + 1 if phase == "save" else steps
    more = ["--allow_changed=[steps]"] if phase == "save" else more
    flags = [f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={output_dir}", *_QUICK, *more]
    again = run_command(
        [sys.executable, TRAIN, *flags, f"--steps={end}"],
        timeout=180,
        env=clean_environment(tmp_path / "private"),
    )
    assert again.returncode == 0, again.output
    assert not (output_dir / "preempted").exists()
    assert (output_dir / "export" / "model.safetensors").exists()
    rows = read_rows(output_dir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, end + 1))
    assert "eval_loss" in rows[-1] and rows[-1]["step"] == end


@pytest.mark.slow
def test_T14_memory_that_runs_out_is_told_and_not_tried_again(
    tmp_path: Path, cache_dir: Path
) -> None:
    args = [*_QUICK, "--steps=1", f'--model.overrides={{"intermediate_size": {1 << 40}}}']
    output_dir = tmp_path / "out"
    begun = {
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }

    first = train(args, 2, cache_dir=cache_dir, output_dir=output_dir, env=begun)
    begun["TORCHELASTIC_RESTART_COUNT"] = "1"
    second = train(args, 2, cache_dir=cache_dir, output_dir=output_dir, env=begun)

    assert first.returncode == second.returncode == 1
    (line,) = first.stderr.splitlines()
    assert line.startswith("train.py: error: out of memory on rank ")
    assert "lower --micro_batch_size (now 2;" in line
    assert second.output == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_T14_a_rank_that_may_have_no_more_memory_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """Its limit is lowered while it trains, to what it has: its activations find no place any more."""
    args = [
        *_flags(tmp_path, "--steps=5000", "--data.seq_len=256"),
        # Activations so large that the C library asks the kernel for each of them.
        '--model.overrides={"intermediate_size": 16384}',
    ]
    with launched(args, tmp_path / "out") as run:
        run.wait_for(lambda: run.steps() >= 2, seconds=180)
        rank = run.ranks()[1]
        sizes = []
        for _ in range(100):
            sizes.append(int(Path(f"/proc/{rank}/statm").read_text().split()[0]))
            time.sleep(0.01)
        limit = min(sizes) * resource.getpagesize() + (8 << 20)
        resource.prlimit(rank, resource.RLIMIT_AS, (limit, limit))
        code, log = run.end(seconds=120)
    assert code == 1
    errors = [line for line in log.splitlines() if "error" in line or "stopped by" in line]
    (line,) = [line for line in errors if "lost the others" not in line]
    assert "out of memory on rank 1 in step " in line and "tried to allocate 0.0" in line
    assert f"(ulimit -v: {limit / 2**30:.1f}); lower --micro_batch_size (now 2;" in line
    assert "Traceback" not in log and log.count("model ") == 1  # no other attempt
    assert re.fullmatch(r"launch.py: rank [01] ended with exit code 1", log.splitlines()[-1])


def _flags(folder: Path, *more: str) -> list[str]:
    return [f"--cache_dir={folder / 'cache'}", *_QUICK, "--checkpoint.every=10", *more]


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of two ranks
def test_T03_T11_killed_and_stopped_ranks_cost_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    """One rank is killed, another stopped; the weights are those of a run to which nothing happened."""
    timeout, steps = 8, 60
    args = _flags(tmp_path, f"--steps={steps}", f"--guards.collective_timeout_seconds={timeout}")
    with launched(args, tmp_path / "calm") as run:
        start = run.wait_for(lambda: run.steps() >= 2, seconds=180)
        assert run.end(seconds=180)[0] == 0
    with launched(args, tmp_path / "out") as run:
        run.wait_for(lambda: run.steps() >= 15, seconds=180)
        os.kill(run.ranks()[1], signal.SIGKILL)
        killed = run.wait_for(lambda: run.attempts() == 2, seconds=180)
        run.wait_for(lambda: run.steps() >= 35, seconds=180)
        os.kill(run.ranks()[0], signal.SIGSTOP)
        stopped = run.wait_for(lambda: run.attempts() == 3, seconds=180)
        code, log = run.end(seconds=180)
    print(
        f"\nfirst step of a run after {start:.1f} s; training again {killed:.1f} s after SIGKILL, "
        f"{stopped:.1f} s after SIGSTOP with a timeout of {timeout} s"
    )
    assert code == 0, log
    # Beside what a start takes, which depends on the machine.
    assert killed < start + 6
    assert stopped < start + timeout + 6
    assert log.count("lost the others in step") == 2, log
    assert "Traceback" not in log
    weights = Path("export", "model.safetensors")
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "calm" / weights).read_bytes()
    goodput = json.loads((tmp_path / "out" / "run.json").read_text())["goodput"]
    assert goodput["restarts"] == 2
    assert goodput["restart_seconds"] == pytest.approx(killed + stopped, abs=4)
    # Steps of milliseconds are done again in less than the second after which the count is written.
    assert [row["step"] for row in read_rows(tmp_path / "out") if "loss" in row] == list(
        range(1, steps + 1)
    )


@pytest.mark.slow
def test_T02_T04_a_killed_launcher_leaves_no_rank_and_signals_end_by_their_number(
    tmp_path: Path,
) -> None:
    args = _flags(tmp_path, "--steps=5000")
    with launched(args, tmp_path / "out") as run:
        run.wait_for(lambda: run.steps() >= 3, seconds=180)
        ranks = run.ranks()
        assert sorted(ranks) == [0, 1]
        run.process.kill()
        begin = time.monotonic()
        while any(_runs(rank) for rank in ranks.values()):
            assert time.monotonic() - begin < 15
            time.sleep(0.05)
        saved = checkpoint_steps(tmp_path / "out")[-1]
        assert json.loads((tmp_path / "out" / "preempted").read_text())["step"] == saved
    # The next launcher goes on from there; told to end, it says so in its exit code.
    with launched(args, tmp_path / "out") as run:
        run.wait_for(lambda: run.steps() >= saved + 3, seconds=180)
        run.process.send_signal(signal.SIGUSR1)
        code, log = run.end(seconds=60)
    assert code == 128 + signal.SIGUSR1, log
    assert log.count("stopped by SIGUSR1 after step ") == 1
    assert "Traceback" not in log
    assert f"after step {saved} of 5000" in log


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_T03_T05_T07_a_run_under_a_schedule_of_faults_ends_in_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*_QUICK, "--steps=40", "--checkpoint.every=2"]
    # Killed and stopped ranks are the test above. With this seed each comes once.
    kinds = ["terminate", "corrupt", "kill-in-save", "exception"]
    given = ["--faults=4", "--seed=17", "--within=8", "--kinds", *kinds]

    assert chaos.main([str(tmp_path), *given, "--", *flags]) == 0

    said = capsys.readouterr().out
    assert said.count("fault ") == 4 and "weights equal, bit for bit" in said
    assert all(said.count(f": {kind} in step") == 1 for kind in kinds)
    log = (tmp_path / "chaos.log").read_text()
    assert log.count("is damaged (") == said.count(": corrupt in step")
