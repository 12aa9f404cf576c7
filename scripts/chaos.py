"""Does a run end in the same weights, bit for bit, whatever happens to it on the way?

python scripts/chaos.py DIR --faults 6 --seed 0 -- --steps 300 --checkpoint.every 20 [more flags of train.py]
python scripts/chaos.py DIR --minutes 30 --goodput 85 -- --steps 4000 --checkpoint.every 25 [...]

Trains once under a schedule of faults drawn from the seed and once in peace, and compares the exported weights, the
last checkpoints and every logged step. With --minutes the faults come as often as in the pre-training of Llama 3
405B, 50 times compressed (one in 3.3 minutes), and its causes decide their kinds (docs/reliability.md).
Linux only. Exit codes: 0 equal, and the goodput that was asked for; 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# This repository's `trainer` must win over anything installed by that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.process import run_command
from trainer.goodput import FILE, goodput_table

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    "kill-rank": "SIGKILL of one rank",
    "kill-in-save": "SIGKILL of one rank while a checkpoint is being written",
    "exception": "an exception between any two instructions of one rank",
    "stop-rank": "SIGSTOP of one rank",
    "terminate": "SIGTERM of the launcher, started again",
    "kill-all": "SIGKILL of launcher and ranks, started again",
    "corrupt": "the same, with a bit of the newest checkpoint flipped",
}
# Interruptions in 54 days of pre-training Llama 3 405B (https://arxiv.org/abs/2407.21783, table 5), by what comes
# nearest to their causes here: of one GPU, processor or memory; HBM3, whose errors are put into a save, the worst
# moment for them; software and dependencies; network and watchdog; planned; host maintenance, power, chassis and
# expansion board; silent data corruption and SSD.
LLAMA_3 = {
    "kill-rank": 194,
    "kill-in-save": 72,
    "exception": 56,
    "stop-rank": 49,
    "terminate": 47,
    "kill-all": 39,
    "corrupt": 9,
}
MEAN_SECONDS = 54 * 24 * 3600 / sum(LLAMA_3.values()) / 50
# What a logged row says of its step and not of the machine.
SAME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "valid_tokens")
_POLL_SECONDS = 0.02
_LONGEST_SAVE_SECONDS = 0.1
# What the ranks import when they start; the trainer knows nothing of it.
_RAISES = """import signal
def fault(*_):
    raise RuntimeError("a fault of chaos.py")
signal.signal(signal.SIGUSR2, fault)
"""


@dataclass
class Fault:
    """One of the schedule, and what became of it."""

    kind: str
    due: float
    """Seconds after the first step, or steps after the first step that follows the fault before."""
    step: int = 0
    """The last logged one when it was caused."""
    committed: int = 0
    """The newest checkpoint that it left intact."""
    inside: bool = False
    """Whether a checkpoint was being written."""
    logged: list[dict[str, Any]] = field(default_factory=list)
    """The steps that may have to be done again."""


def main(argv: list[str] | None = None) -> int:
    """Run both, compare, and print what happened and where the time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets cache/, calm/, chaos/ and their logs")
    parser.add_argument("--faults", type=int, default=3, help="so many, of every kind alike")
    parser.add_argument("--within", type=int, default=30, help="steps from one to the next")
    parser.add_argument("--minutes", type=float, help="instead: as often as with Llama 3, so long")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until the next step")
    parser.add_argument("--goodput", type=float, default=0, help="fail below this percentage")
    argv = sys.argv[1:] if argv is None else argv
    border = argv.index("--") if "--" in argv else len(argv)
    given, flags = parser.parse_args(argv[:border]), argv[border + 1 :]
    folder, draw = given.folder.absolute(), random.Random(given.seed)
    faults = schedule(draw, given)
    (folder / "hook").mkdir(parents=True, exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(_RAISES, encoding="utf-8")

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [
            ROOT / "scripts" / "launch.py",
            f"--nproc_per_node={given.nproc}",
            f"--max-restarts={len(faults) + 1}",
            ROOT / "scripts" / "train.py",
            f"--cache_dir={folder / 'cache'}",
            f"--output_dir={folder / name}",
            *flags,
            "--log.every=1",
        ]
        with (folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(folder / "hook")},
            )

    chaos, began = folder / "chaos", time.monotonic()
    run = start("chaos")
    try:
        run, caused = cause_all(faults, run, draw, lambda: start("chaos"), chaos, given)
        code = run.wait()
    finally:
        end_all(run)
    seconds = time.monotonic() - began
    if code != 0:
        print(f"chaos.py: the run ended with exit code {code}; see {folder / 'chaos.log'}")
        return 1
    print("now the run in peace", flush=True)
    if start("calm").wait() != 0:
        print(f"chaos.py: error: the run in peace failed; see {folder / 'calm.log'}")
        return 1

    totals = json.loads((chaos / "run.json").read_text(encoding="utf-8"))["goodput"]
    goodput = 100 * totals["productive_seconds"] / seconds
    print(goodput_table(totals))
    print(f"{seconds:.0f} s by the clock, {goodput:.1f} % of them steps that were new")
    resumed = [step - 1 for step in starts(chaos)[1:]]
    again = sum(f.step - step for f, step in zip(caused, resumed, strict=False) if step < f.step)
    print(f"{len(caused)} faults of {len(faults)}; {again} steps were done again")
    wrong = differences(folder / "calm", chaos, caused)
    if goodput < given.goodput:
        wrong.append(f"goodput is below {given.goodput:g} %")
    print(
        "\n".join(wrong) or "weights equal, bit for bit; so are the last checkpoints and all steps"
    )
    return 1 if wrong else 0


def schedule(draw: random.Random, given: argparse.Namespace) -> list[Fault]:
    """The faults, in their order."""
    if given.minutes is None:
        return [
            Fault(draw.choice(given.kinds), draw.randint(1, given.within))
            for _ in range(given.faults)
        ]
    faults, due = [], draw.expovariate(1 / MEAN_SECONDS)
    while due < 60 * given.minutes:
        (kind,) = draw.choices(given.kinds, [LLAMA_3[kind] for kind in given.kinds])
        faults.append(Fault(kind, due))
        due += draw.expovariate(1 / MEAN_SECONDS)
    return faults


def cause_all(
    faults: list[Fault],
    run: subprocess.Popen[bytes],
    draw: random.Random,
    start: Callable[[], subprocess.Popen[bytes]],
    output_dir: Path,
    given: argparse.Namespace,
) -> tuple[subprocess.Popen[bytes], list[Fault]]:
    """Cause each when it is due; one that comes before a restarted run has made a step waits for that.

    Returns:
        The launcher that runs afterwards, and the faults there was time for.
    """
    first = last = 0.0
    for number, fault in enumerate(faults):
        began = partial(has_begun, output_dir, attempts=number + 1)
        if not wait_until(began, run, given.timeout, poll=0.1):
            return run, faults[:number]
        now, resumed = time.monotonic(), starts(output_dir)[-1] - 1
        if number:
            print(f"  goes on after step {resumed}, {now - last:.1f} s later", flush=True)
        first = first or now

        def is_due(step: float = resumed + fault.due, moment: float = first + fault.due) -> bool:
            if given.minutes is None:
                return newest_step(output_dir) >= step
            return time.monotonic() >= moment

        if not wait_until(is_due, run, given.timeout + fault.due):
            return run, faults[:number]
        if fault.kind == "kill-in-save" and not wait_until(
            partial(is_saving, output_dir), run, given.timeout, poll=0.001
        ):
            return run, faults[:number]
        last, fault.step = time.monotonic(), newest_step(output_dir)
        run = cause(fault, run, draw, start, output_dir)
        saving = " (inside a save)" if fault.inside else ""
        print(
            f"fault {number + 1}: {fault.kind} in step {fault.step + 1}{saving}, "
            f"{last - first:.0f} s after the first",
            flush=True,
        )
    return run, faults


def cause(
    fault: Fault,
    run: subprocess.Popen[bytes],
    draw: random.Random,
    start: Callable[[], subprocess.Popen[bytes]],
    output_dir: Path,
) -> subprocess.Popen[bytes]:
    """Do it, note what it left, and return the launcher that runs afterwards."""
    signals = {"exception": signal.SIGUSR2, "stop-rank": signal.SIGSTOP}
    launcher_lives = fault.kind in ("kill-rank", "kill-in-save", *signals)
    if launcher_lives:
        if fault.kind == "kill-in-save":
            time.sleep(draw.uniform(0, _LONGEST_SAVE_SECONDS))
        ranks = ranks_of(run.pid)
        if ranks:
            with suppress(ProcessLookupError):
                os.kill(ranks[draw.choice(sorted(ranks))], signals.get(fault.kind, signal.SIGKILL))
        fault.inside = is_saving(output_dir)
    elif fault.kind == "terminate":
        run.terminate()
        run.wait()
    else:
        end_all(run)
        fault.inside = is_saving(output_dir)
    intact = [path for path in saved(output_dir) if (path / "manifest.json").is_file()]
    if fault.kind == "corrupt" and len(intact) > 1:  # with none before it nothing is left
        newest = intact.pop()
        file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    fault.committed = step_of(intact[-1]) if intact else 0
    fault.logged = [row for row in rows(output_dir) if row["step"] > fault.committed]
    return run if launcher_lives else start()


def differences(calm: Path, chaos: Path, caused: list[Fault]) -> list[str]:
    """What is not as it should be, a line each."""
    wrong = []
    file = Path("export") / "model.safetensors"
    if (calm / file).read_bytes() != (chaos / file).read_bytes():
        wrong.append("the weights differ")
    # Parameters, optimizer state, random numbers, sample cursor, and the hashes of the batches that would come next.
    last = [(saved(run)[-1] / "manifest.json").read_bytes() for run in (calm, chaos)]
    if last[0] != last[1]:
        wrong.append("the last checkpoints differ")
    expected = {row["step"]: row for row in rows(calm)}
    if [row["step"] for row in rows(chaos)] != list(expected):
        wrong.append("a step is missing from the log, or there twice")
    # A step's loss is that of its samples: the same loss, and number of tokens, of the same weights.
    seen = [*rows(chaos), *(row for fault in caused for row in fault.logged)]
    if odd := sorted({row["step"] for row in seen if row != expected.get(row["step"])}):
        wrong.append(
            f"{len(odd)} steps had other samples or another loss, the first is step {odd[0]}"
        )
    # The first is the run's own start.
    for fault, first_step in zip(caused, starts(chaos)[1:], strict=False):
        if first_step <= fault.committed:
            wrong.append(
                f"step {fault.committed} was saved, but after {fault.kind} in step "
                f"{fault.step + 1} the run went on with step {first_step}"
            )
    return wrong


def rows(output_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, the rows of steps, without what depends on the machine."""
    found = []
    with suppress(OSError):
        for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # one that is being written
                row = json.loads(line)
                if "loss" in row:
                    found.append({key: row[key] for key in SAME})
    return found


def newest_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    with suppress(OSError, ValueError, IndexError):
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"]
    return 0


def starts(output_dir: Path) -> list[int]:
    """The first step of every attempt that has made one."""
    first: dict[int, int] = {}
    with suppress(OSError):
        for line in (output_dir / FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # one that was cut off
                written = json.loads(line)
                if written["step"]:
                    first.setdefault(written["attempt"], written["step"])
    return list(first.values())


def has_begun(output_dir: Path, *, attempts: int) -> bool:
    """Whether so many attempts have made a step."""
    return len(starts(output_dir)) >= attempts


def saved(output_dir: Path) -> list[Path]:
    """What bears a checkpoint's name, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-????????"))


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def is_saving(output_dir: Path) -> bool:
    """Whether a checkpoint is there that has no name yet."""
    return any((output_dir / "checkpoints").glob(".step-*.partial"))


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of the ranks of a launcher, by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            # The name before the last bracket may hold anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = (stat.parent / "environ").read_bytes().split(b"\0")
                (rank,) = (int(v[5:]) for v in variables if v.startswith(b"RANK="))
                found[rank] = int(stat.parent.name)
    return found


def end_all(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL a launcher and its ranks, and wait until they are gone: they hold the output folder."""
    ranks = ranks_of(run.pid).values()
    for process in (run.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    run.wait()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(_POLL_SECONDS)


def wait_until(
    condition: Callable[[], bool],
    run: subprocess.Popen[bytes],
    seconds: float,
    *,
    poll: float = _POLL_SECONDS,
) -> bool:
    """True when `condition` holds; False when the run has ended.

    Raises:
        TimeoutError: neither, after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if run.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"no progress within {seconds:g} s; see the log")
        time.sleep(poll)
    return True


if __name__ == "__main__":
    run_command(main)
