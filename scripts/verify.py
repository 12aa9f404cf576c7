"""Prove a configuration, with your own loss, model or step in it: ways to compute the same must give the same.

python scripts/verify.py --cache_dir DIR [the flags of train.py] [--full] [--step pkg.fn]

It starts its own ranks, on a tiny copy: the same flags, family and tokenizer, a few of your rows, a shrunken model.
Exit codes: 0 all checks hold; 1 one does not, or cannot be made; 2 the command line is wrong.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_run_config, printable
from scripts.config import TrainConfig
from scripts.environment import use_cache_dir
from scripts.process import run_command
from trainer.errors import TrainError


@dataclass(frozen=True)
class VerifyConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and three more. --model pkg.fn is --model.function."""

    full: bool = False
    """Take the model itself and packed rows of the whole data.seq_len: one rank must hold all of it in fp32."""

    only: tuple[str, ...] = ()
    """Make only the checks with one of these words in their names, for example [packed, resume]."""

    step: str | None = None
    """Own step in place of the loop's, as package.function: a function of (model, optimizer, micro_batches, loss_fn) that returns the mean loss of the step (docs/verify.md)."""


def main(argv: list[str] | None = None) -> int:
    """Make all checks and print them; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # The group `model` has no value of its own, so the short form is free.
    short = {"--model": "--model.function"}
    argv = [
        "=".join([short.get(flag, flag), *value])
        for flag, *value in (a.split("=", 1) for a in argv)
    ]
    try:
        config = parse_run_config(VerifyConfig, "verify.py", argv)
        if "RANK" in os.environ:
            raise CommandLineError(
                "verify.py starts its own ranks: run it with python, not torchrun"
            )
        cache_dir = use_cache_dir(config.cache_dir)
        # Only now: these import libraries that read the cache variables when they are imported.
        from scripts.verifying.table import verify

        return verify(config, cache_dir, full=config.full, step=config.step, only=config.only)
    except (CommandLineError, DataError, ModelError, TrainError) as error:
        print(f"verify.py: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1
    except KeyboardInterrupt:
        print("verify.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
