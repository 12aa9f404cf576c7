"""Measure this project beside the tools it competes with, on this machine.

python scripts/benchmark.py data [--rows N] [--repeats N] [--tokenizer DIR] [--json FILE]
python scripts/benchmark.py load [--megabytes N] [--repeats N] [--json FILE]
python scripts/benchmark.py checkpoint [--megabytes N] [--folder DIR] [--repeats N] [--json FILE]
python scripts/benchmark.py loss [--tokens N] [--width N] [--vocabulary N] [--repeats N] [--json FILE]
python scripts/benchmark.py memory [--seq_len N] [--layers N] [--width N] [--repeats N] [--json FILE]
python scripts/benchmark.py step [--shape S] [--dtype D] [--packing P] [--steps N] [--repeats N] [--json FILE]
python scripts/benchmark.py limit [--shape S] [--dtype D] [--micro_batches N] [--flags F] [--steps N] [--repeats N] [--json FILE]
python scripts/benchmark.py optimizer [--steps N] [--repeats N] [--json FILE]
python scripts/benchmark.py overhead [--steps N] [--blocks N] [--repeats N] [--json FILE]
python scripts/benchmark.py scaling [--steps N] [--repeats N] [--json FILE]
python scripts/benchmark.py start [--job J] [--repeats N] [--json FILE]
python scripts/benchmark.py gpu [--gpus N] [--steps N] [--minutes N] [--calibration FILE] [--json FILE]

Each command is a module of scripts/benchmarks and prints Markdown tables. Only `gpu` needs one.
docs/benchmarks.md says what each side does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Read when the libraries are imported: no progress bars, and no word of torch's profiler, between the tables.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from data.errors import DataError
from models.errors import ModelError
from scripts.benchmarks import (
    checkpoint,
    data,
    gpu,
    limit,
    load,
    loss,
    memory,
    optimizer,
    overhead,
    scaling,
    start,
    step,
)
from scripts.process import run_command

COMMANDS = {
    "checkpoint": checkpoint,
    "data": data,
    "gpu": gpu,
    "limit": limit,
    "load": load,
    "loss": loss,
    "memory": memory,
    "optimizer": optimizer,
    "overhead": overhead,
    "scaling": scaling,
    "start": start,
    "step": step,
}


def main(argv: list[str] | None = None) -> int:
    """Run a comparison; returns the exit code: 0, 1 for an unusable input, 2 for wrong flags."""
    parser = argparse.ArgumentParser(description="Measure this project beside others.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.add_argument(
            "--repeats", type=int, default=3, help="runs of each side (%(default)s)"
        )
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="also write the numbers here"
        )
    arguments = parser.parse_args(argv)
    for flag, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{flag} must be at least 1")
    module = COMMANDS[arguments.command]
    try:
        result = module.run(arguments)
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(module.as_markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
