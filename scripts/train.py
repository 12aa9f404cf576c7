"""Fine-tune a Qwen model under FSDP2.

torchrun --nproc_per_node=2 scripts/train.py --cache_dir DIR [--model.name ... --data.name ...]
python scripts/train.py --cache_dir DIR     (one process)
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import (
    CommandLineError,
    parse_train_config,
    print_traceback,
    printable,
    to_yaml,
)
from scripts.config import TrainConfig, output_folder
from scripts.environment import remove_launcher_folders, use_cache_dir
from scripts.process import collect_as_usual, run_command
from trainer.crashes import Attempt
from trainer.errors import PeerLostError, TrainError, TransientError
from trainer.launchers import launch_fault
from trainer.preemption import Stopped, StopRequest, end_with_launcher

# In which a launcher has surely ended the siblings of a rank that failed.
_LAUNCHER_SECONDS = 30.0


def main(argv: list[str] | None = None) -> int:
    """Run one training job; returns the process's exit code.

    0: finished. 1: the job cannot go on. 2: the command line, or how ranks are started, is wrong. 128 + n: stopped by signal n, state saved.
    """
    if fault := launch_fault():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: error: {fault}", file=sys.stderr, flush=True)
        return 2
    stop = StopRequest()
    try:
        with stop.listening():
            end_with_launcher()
            return _main(argv, stop)
    except (
        Stopped,
        KeyboardInterrupt,
    ):  # before the first step, or ctrl-C while the state is saved
        number = stop.signal or signal.SIGINT
        if os.environ.get("RANK", "0") == "0" and not _is_hopeless(argv):
            how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
            print(f"train.py: {how}", file=sys.stderr, flush=True)
        return 128 + number
    finally:
        remove_launcher_folders()


def _main(argv: list[str] | None, stop: StopRequest) -> int:
    ranks = attempt = None
    try:
        config = parse_train_config(argv)
        attempt = _attempt(config)
        if (crash := attempt.hopeless()) is not None:
            return _end_again(crash)
        attempt.refuse_repetition()
        cache_dir = use_cache_dir(config.cache_dir)
        # Only now: what follows imports libraries that read the cache variables when they are imported.
        from scripts.wiring import run
        from trainer.distributed import meet

        collect_as_usual()
        ranks = meet()
        return run(config, cache_dir, ranks, stop, attempt)
    except (CommandLineError, DataError, ModelError, TrainError) as error:
        from trainer.distributed import claim_report, leave, meet

        lost = isinstance(error, PeerLostError)
        # A launcher ends the ranks that have lost one; otherwise what follows a signal follows from it.
        if stop.signal is not None and not (lost and attempt is not None and attempt.step):
            raise Stopped(stop.signal) from None
        if attempt is not None and stop.signal is None:
            attempt.record(error, final=not isinstance(error, TransientError))
        if attempt is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            return 2  # a command line that is wrong stays wrong, and the first attempt has said how
        with stop.deferred():  # the launcher may end this rank while it reports
            ranks = ranks or meet()
            if claim_report(ranks):
                print(f"train.py: error: {printable(str(error))}", file=sys.stderr, flush=True)
            if not lost:  # then nobody is there to wait for
                leave(ranks)
        return 2 if isinstance(error, CommandLineError) else 1
    except Exception as error:
        if stop.signal is not None:
            raise Stopped(stop.signal) from None
        if attempt is not None:
            attempt.record(error, final=False)
        raise


def _end_again(crash: dict[str, Any]) -> int:
    """End as the attempt did that has said why no restart helps: the same rank first, with the same exit code.

    A launcher names the first rank that ended; the others wait to be ended by it.
    """
    if crash["rank"] != int(os.environ.get("RANK", "0")):
        time.sleep(_LAUNCHER_SECONDS)
    return 2 if crash["kind"] == CommandLineError.__name__ else 1


def _is_hopeless(argv: list[str] | None) -> bool:
    """Whether the launcher ends this rank because its siblings have just ended, with nothing left to say."""
    with suppress(Exception):
        return _attempt(parse_train_config(argv)).hopeless() is not None
    return False


def _attempt(config: TrainConfig) -> Attempt:
    text = to_yaml(config)
    return Attempt(
        output_dir=None if config.dry_run else output_folder(config),
        config=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


if __name__ == "__main__":
    sys.excepthook = print_traceback
    run_command(main)
