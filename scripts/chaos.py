"""Does a run end in the same weights, bit for bit, whatever happens to it on the way?

python scripts/chaos.py DIR --faults 6 --seed 0 -- --steps 300 --checkpoint.every 20 [more flags of train.py]

Trains once in peace and once under a schedule of faults drawn from the seed, and compares the exported weights.
Linux only. Exit codes: 0 equal; 1 not.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    "kill-rank": "SIGKILL of one rank",
    "stop-rank": "SIGSTOP of one rank",
    "terminate": "SIGTERM of the launcher, started again",
    "kill-all": "SIGKILL of launcher and ranks, started again",
    "corrupt": "the same, with a bit of the newest checkpoint flipped",
}
_POLL_SECONDS = 0.02


def main(argv: list[str] | None = None) -> int:
    """Run both, compare, and print what happened and where the time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets cache/, calm/, chaos/ and their logs")
    parser.add_argument("--faults", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--within", type=int, default=30, help="steps from one fault to the next")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until the next step")
    argv = sys.argv[1:] if argv is None else argv
    border = argv.index("--") if "--" in argv else len(argv)
    given, flags = parser.parse_args(argv[:border]), argv[border + 1 :]
    folder, draw = given.folder.absolute(), random.Random(given.seed)
    folder.mkdir(parents=True, exist_ok=True)

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [
            ROOT / "scripts" / "launch.py",
            f"--nproc_per_node={given.nproc}",
            f"--max-restarts={given.faults + 1}",
            ROOT / "scripts" / "train.py",
            f"--cache_dir={folder / 'cache'}",
            f"--output_dir={folder / name}",
            *flags,
        ]
        with (folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    if start("calm").wait() != 0:
        print(f"chaos.py: error: the run in peace failed; see {folder / 'calm.log'}")
        return 1

    chaos = folder / "chaos"
    run = start("chaos")
    try:
        for number in range(given.faults):
            step = newest_step(chaos) + draw.randint(1, given.within)
            if not wait_until(lambda step=step: newest_step(chaos) >= step, run, given.timeout):
                break
            kind = draw.choice(given.kinds)
            print(f"fault {number + 1}: {kind} in step {newest_step(chaos) + 1}", flush=True)
            run = cause(kind, run, draw, lambda: start("chaos"), chaos)
        code = run.wait()
    finally:
        end_all(run)
    if code != 0:
        print(f"chaos.py: the run ended with exit code {code}; see {folder / 'chaos.log'}")
        return 1
    weights = [folder / name / "export" / "model.safetensors" for name in ("calm", "chaos")]
    equal = weights[0].read_bytes() == weights[1].read_bytes()
    totals = json.loads((chaos / "run.json").read_text(encoding="utf-8"))["goodput"]
    print(json.dumps(totals, indent=1))
    print("weights equal, bit for bit" if equal else "the weights differ", flush=True)
    return 0 if equal else 1


def cause(
    kind: str,
    run: subprocess.Popen[bytes],
    draw: random.Random,
    start: Callable[[], subprocess.Popen[bytes]],
    output_dir: Path,
) -> subprocess.Popen[bytes]:
    """Do it, and return the launcher that runs afterwards."""
    if kind in ("kill-rank", "stop-rank"):
        ranks = ranks_of(run.pid)
        if ranks:
            number = signal.SIGKILL if kind == "kill-rank" else signal.SIGSTOP
            with suppress(ProcessLookupError):
                os.kill(ranks[draw.choice(sorted(ranks))], number)
        return run
    if kind == "terminate":
        run.terminate()
        run.wait()
        return start()
    end_all(run)
    if kind == "corrupt":
        newest = sorted((output_dir / "checkpoints").glob("step-????????"))
        if len(newest) > 1:  # with none before it there would be nothing to fall back to
            file = max(
                (p for p in newest[-1].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
            )
            content = bytearray(file.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
    return start()


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


def newest_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    with suppress(OSError, ValueError, IndexError):
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"]
    return 0


def wait_until(condition: Callable[[], bool], run: subprocess.Popen[bytes], seconds: float) -> bool:
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
        time.sleep(_POLL_SECONDS)
    return True


if __name__ == "__main__":
    sys.exit(main())
