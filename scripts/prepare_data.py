"""Tokenise and pack data ahead, on machines without a GPU; train.py with the same flags finds it in --cache_dir.

python scripts/prepare_data.py [the flags of train.py] [--shard I/N] [--engine processes|ray] [--output PLACE]

No model weights and no process group. Parts of the work that are finished are never done again.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.config import DataConfig, source_configs
from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_run_config, printable
from scripts.config import TrainConfig
from scripts.environment import use_cache_dir
from scripts.process import run_command
from trainer.preemption import Stopped, StopRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data.prepare import Task

    Write = Callable[[Task, Sequence[int]], None]


@dataclass(frozen=True)
class PrepareConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and three more."""

    shard: str | None = None
    """I/N does the I-th of N shares (1/N to N/N) and ends, for array jobs that share --cache_dir; the
    last to end joins all."""

    engine: Literal["processes", "ray"] = "processes"
    """Who tokenises: processes of this machine, or Ray (RAY_ADDRESS names a cluster)."""

    output: str | None = None
    """Folder or URL to copy the tokens to when they are ready, for --data.prepared."""


def main(argv: list[str] | None = None) -> int:
    """Prepare the data; returns the exit code: 0, 1 for unusable data, 2 for a wrong command line, 128 + n after signal n."""
    stop = StopRequest()
    try:
        with stop.listening():
            return _main(argv)
    except (Stopped, KeyboardInterrupt):
        number = stop.signal or signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        print(f"prepare_data.py: {how}; finished parts are kept", file=sys.stderr)
        return 128 + number


def _main(argv: list[str] | None) -> int:
    try:
        config = parse_run_config(PrepareConfig, "prepare_data.py", argv)
        shard = parse_shard(config.shard)
        if config.data.streaming:
            raise CommandLineError("--data.streaming reads rows while training: nothing to prepare")
        cache_dir = use_cache_dir(config.cache_dir)
        _prepare(config, shard, cache_dir)
        return 0
    except (CommandLineError, DataError, ModelError) as error:
        print(f"prepare_data.py: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1


def parse_shard(text: str | None) -> tuple[int, int]:
    """(I, N) of "I/N", with 1 <= I <= N; (1, 1) of None. Raises CommandLineError."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard, shards = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= shard <= shards:
        raise CommandLineError(f"--shard must be I/N with I from 1 to N, such as 3/8, got {text!r}")
    return shard, shards


def _prepare(config: PrepareConfig, shard: tuple[int, int], cache_dir: Path) -> None:
    # Only now: these import libraries that read the cache variables when they are imported.
    from scripts.preparation import (
        held_out_split,
        prepare_model,
        prepare_source,
        prepared_place,
        read_tokenizer,
    )

    model = prepare_model(config, cache_dir, only_tokenizer=True)
    tokenizer = read_tokenizer(config, cache_dir, model["tokenizer"])
    sources = [source.data for source in source_configs(config.data)]
    held_out = held_out_split(config)
    wanted = [
        (number, source, split)
        for number, source in enumerate(sources)
        for split in dict.fromkeys(filter(None, (source.split, held_out)))
    ]
    with ExitStack() as stack:
        write = _engine(config, cache_dir, stack)
        if config.shard is not None:
            missing = sum(
                _write_share(source, split, shard, tokenizer, cache_dir, write)
                for _, source, split in wanted
            )
            if missing:
                left = f"{missing} {'part is' if missing == 1 else 'parts are'} still missing"
                print(f"shard {config.shard} is done; {left}")
                return
        for number, source, split in wanted:
            found = prepare_source(source, split, tokenizer, cache_dir, write=write)
            print(summary(found, split), flush=True)
            if config.output is not None:
                from data.remote import upload_folder  # and with it fsspec, which few runs need
                from data.sources import shown_url

                output = config.output.rstrip("/") + (f"/{number}" if config.data.sources else "")
                place = prepared_place(output, split)
                upload_folder(Path(found["packs"]).parent, place)
                print(printable(f"copied to {shown_url(place)}"), flush=True)


def summary(found: dict[str, Any], split: str) -> str:
    """One line about what `prepare_source` returned."""
    from data.store import open_packed

    packed, folder = open_packed(found["packs"]), Path(found["packs"]).parent
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return printable(
        f"{found['name']} ({split}): {packed.ledger['rows_read']:,} rows, "
        f"{packed.ledger['tokens']:,} tokens in {len(packed.packs):,} packed rows, "
        f"{size:,} bytes in {folder}"
    )


def _engine(config: PrepareConfig, cache_dir: Path, stack: ExitStack) -> Write | None:
    if config.engine == "processes":
        return None
    from scripts.ray_engine import ray_running, write_parts_on_ray

    workers = config.data.prepare_workers or os.cpu_count() or 1
    stack.enter_context(ray_running(cache_dir, workers))
    return write_parts_on_ray


def _write_share(
    config: DataConfig,
    split: str,
    shard: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    write: Write | None,
) -> int:
    """Write every N-th part of a source from the I-th on; returns how many parts are then missing."""
    from data.prepare import new_task, write_parts
    from scripts.preparation import load_source

    if config.prepared is not None:
        return 0
    source = load_source(config, split, cache_dir)
    task = new_task(source, tokenizer, config, cache_dir=cache_dir)
    if task.folder.exists():
        return 0
    first, shards = shard
    try:
        (write or write_parts)(task, range(first - 1, task.parts, shards))
    except (DataError, OSError):
        # Another process, which had no share given, may have done all and removed the parts.
        if not task.folder.exists():
            raise
    return len(task.missing_parts)


if __name__ == "__main__":
    run_command(main)
