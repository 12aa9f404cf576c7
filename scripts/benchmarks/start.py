"""`benchmark.py start`: from the start of train.py's process to its first step, beside importing torch and transformers.

Every run is a new process, as a user starts it, of one rank on the CPU. A run is warm when its cache folder has been used
by the same job before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.common import (
    Result,
    machine,
    on_ranks,
    setting,
    take_turns,
    versions,
)
from scripts.benchmarks.workload import Shape, write_model, write_rows

HELP = "from the start of the process to the first step, cold and warm"
SHAPE = Shape(vocabulary=8192, width=256, layers=4, seq_len=512, micro_batch_size=2)
ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "train.py"
IMPORTS = "import torch, transformers\nfrom transformers import AutoTokenizer, Qwen3ForCausalLM"
JOBS = {"folder": "a model folder and a file", "embedded": "no flags: the embedded data"}
LONGEST_SECONDS = 600.0
_LOOK_AGAIN_SECONDS = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--job", choices=tuple(JOBS), help="only this job (both)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    jobs = [arguments.job] if arguments.job else list(JOBS)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        on_ranks(1, write_model, folder / "model", SHAPE)
        write_rows(folder, SHAPE, steps=8, ranks=1)
        for (
            job
        ) in jobs:  # the files of the libraries are in the page cache then, and a cache is warm
            until_first_step(job, folder)
        runs = take_turns({"imports": time_imports} | sides(jobs, folder), arguments.repeats)
        where = {job: where_it_goes(job, folder, arguments.repeats) for job in jobs}
    imports = runs.pop("imports")
    for side in runs.values():
        side["beyond_imports_seconds"] = side["seconds"] - imports["seconds"]
        side["beyond_imports_cpu_seconds"] = side["cpu_seconds"] - imports["cpu_seconds"]
    return {
        "machine": machine(),
        "versions": versions("torch", "transformers", "datasets"),
        "repeats": arguments.repeats,
        "imports": imports,
        "runs": runs,
        "where": where,
    }


def sides(jobs: list[str], folder: Path) -> dict[str, Callable[[], Result]]:
    """Of each job a run with an empty cache, and one with the cache that this has left."""
    caches: dict[str, Path] = {}

    def cold(job: str) -> Result:
        caches[job] = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))
        return until_first_step(job, folder, caches[job])

    def warm(job: str) -> Result:
        return until_first_step(job, folder, caches[job])

    return {f"{job}, {run.__name__}": partial(run, job) for job in jobs for run in (cold, warm)}


def time_imports() -> Result:
    """Seconds of a process that imports what every trainer of a Qwen3 imports, and nothing else."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], env=_environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"the imports ended with {process.returncode}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def until_first_step(job: str, folder: Path, cache_dir: Path | None = None) -> Result:
    """Seconds from the start of a process of train.py to the end of its first step. It is killed then."""
    output_dir = Path(tempfile.mkdtemp(prefix="output-", dir=folder))
    metrics, log = output_dir / "metrics.jsonl", output_dir / "log"
    command = [sys.executable, str(TRAIN), *train_arguments(job, folder, output_dir, cache_dir)]
    with log.open("w") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=_environment(), stdout=said, stderr=said)
        try:
            while True:
                if metrics.exists() and '"loss"' in metrics.read_text():
                    seconds = time.perf_counter() - began
                    return {"seconds": seconds, "cpu_seconds": cpu_seconds(process.pid)}
                if process.poll() is not None or time.perf_counter() - began > LONGEST_SECONDS:
                    raise RuntimeError(
                        f"train.py came to no first step: {log.read_text().strip()[-500:]}"
                    )
                time.sleep(_LOOK_AGAIN_SECONDS)
        finally:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """Of a running process and of those it has started and joined (on Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def train_arguments(
    job: str, folder: Path, output_dir: Path, cache_dir: Path | None = None
) -> list[str]:
    """The command line of train.py; where nothing is said it does what it does by default."""
    chosen = [
        f"--cache_dir={cache_dir or folder / 'cache'}",
        f"--output_dir={output_dir}",
        "--device=cpu",
        "--steps=2",
        "--log.every=1",
    ]
    if job == "folder":
        chosen += [
            f"--model.path={folder / 'model'}",
            "--model.check_first_loss=never",  # of random weights
            f"--data.path={folder / 'train.jsonl'}",
            f"--data.seq_len={SHAPE.seq_len}",
            f"--micro_batch_size={SHAPE.micro_batch_size}",
        ]
    return chosen


def _environment() -> dict[str, str]:
    """Ours, without what an enclosing launcher may have set."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in launched}


# ------------------------------------------------------------------------------------ where it goes

IMPORTING, OWN_IMPORTS, REST = "torch and transformers", "our own modules", "everything else"
# What is called on the way, and the name of its share. What is called inside another counts for itself alone.
PHASES = {
    ("scripts.train", "parse_train_config"): "command line",
    ("scripts.wiring", "prepare"): "tokenizer and rows, or finding them in the cache",
    ("scripts.wiring", "start"): "process group",
    ("scripts.wiring", "assemble"): "opening data, optimizer, checkpoints",
    ("scripts.wiring", "build_sharded_model"): "model: build, shard, load",
    ("scripts.wiring", "_announce"): "header, run.json, files of the model",
    ("scripts.wiring", "evaluate_model"): "evaluation before the first step",
    ("scripts.wiring", "MetricsWriter"): "metrics, TensorBoard's import included",
    ("scripts.wiring", "train"): "first step",
}


def where_it_goes(job: str, folder: Path, repeats: int) -> Result:
    """Median CPU seconds of each phase of a warm start, in processes of their own."""
    runs = []
    for _ in range(repeats):
        output_dir = Path(tempfile.mkdtemp(prefix="output-", dir=folder))
        file = output_dir / "phases.json"
        arguments = train_arguments(job, folder, output_dir)
        code = "from scripts.benchmarks.start import trace; trace()"
        subprocess.run(
            [sys.executable, "-c", code, str(file), *arguments],
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        runs.append(json.loads(file.read_text()))
    return {phase: median(run.get(phase, 0.0) for run in runs) for phase in runs[0]}


def trace() -> None:
    """In a new process: FILE and the arguments of train.py; writes the phases up to the first step to FILE."""
    file, *arguments = sys.argv[1:]
    phases = _Phases()
    with phases.measure(OWN_IMPORTS):
        import scripts.train

    def use_cache_dir(cache_dir: str) -> Path:
        path = original(cache_dir)
        with phases.measure(IMPORTING):
            exec(IMPORTS)
        with phases.measure(OWN_IMPORTS):
            import scripts.wiring  # noqa: F401
        phases.watch("scripts.wiring")
        return path

    original, scripts.train.use_cache_dir = scripts.train.use_cache_dir, use_cache_dir
    phases.watch("scripts.train")

    def end(*_: Any) -> None:
        Path(file).write_text(json.dumps(phases.finish()))
        os._exit(0)

    phases.at_first_step = end
    scripts.train.main(arguments)


class _Phases:
    """CPU seconds of this process by phase; a phase inside another counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = [REST]
        self._since = 0.0  # of the process: its interpreter has started before
        self.at_first_step: Callable[..., None] | None = None

    def _turn(self) -> None:
        now, phase = time.process_time(), self._open[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        self._turn()
        self._open.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, module: str) -> None:
        """Measure the functions of PHASES that `module` calls."""
        for (of, name), phase in PHASES.items():
            if of == module:
                setattr(
                    sys.modules[of], name, self._measured(phase, getattr(sys.modules[of], name))
                )

    def _measured(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if phase == PHASES["scripts.wiring", "train"]:
                options["advance"] = self.at_first_step
            with self.measure(phase):
                return function(*args, **options)

        return call

    def finish(self) -> dict[str, float]:
        self._turn()
        return self._seconds


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    imports = result["imports"]
    lines = [
        setting(result),
        f"one rank; medians of {result['repeats']} runs. Importing torch and transformers (with Qwen3 and AutoTokenizer) "
        f"takes {imports['seconds']:.2f} seconds, {imports['cpu_seconds']:.2f} CPU seconds.",
        "",
        "| job | cache | to the first step, seconds | beyond the imports | CPU seconds | beyond the imports |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in result["runs"].items():
        job, _, cache = name.partition(", ")
        lines.append(
            f"| {JOBS[job]} | {cache} | {side['seconds']:.2f} | {side['beyond_imports_seconds']:.2f} "
            f"| {side['cpu_seconds']:.2f} | {side['beyond_imports_cpu_seconds']:.2f} |"
        )
    jobs = list(result["where"])
    phases = dict.fromkeys(phase for job in jobs for phase in result["where"][job])
    lines += [
        "",
        f"| CPU seconds of a warm start | {' | '.join(JOBS[job] for job in jobs)} |",
        "|---" * (len(jobs) + 1) + "|",
    ]
    for phase in [name for name in phases if name != REST] + [REST]:
        cells = (result["where"][job].get(phase) for job in jobs)
        lines.append(
            f"| {phase} | {' | '.join('' if cell is None else f'{cell:.2f}' for cell in cells)} |"
        )
    return "\n".join(lines)
