"""Fill --cache_dir ahead of a run, for machines without a network, or check that nothing in it is missing.

python scripts/prefetch.py [the flags of train.py] [--check]

One process, no process group. It brings what train.py with the same flags needs: model, tokenizer,
data, tokens and their packing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.config import DataConfig, source_configs
from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_run_config, printable
from scripts.config import TrainConfig
from scripts.environment import use_cache_dir
from scripts.process import run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PrefetchConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and one more."""

    check: bool = False
    """Verify what the run needs, without a network and without writing: sizes, hashes, index. Needs
    no value."""


def main(argv: list[str] | None = None) -> int:
    """Fill or check the cache; returns the exit code: 0, 1 for a fault, 2 for a wrong command line."""
    try:
        config = parse_run_config(PrefetchConfig, "prefetch.py", argv)
        if not config.check:
            _fill(config, use_cache_dir(config.cache_dir))
            return 0
        # Before the import of the libraries that read it; a cache that can only be read is accepted.
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not Path(config.cache_dir).expanduser().is_dir():
            raise CommandLineError(f"--cache_dir {config.cache_dir} is not there: nothing to check")
        return _check(config, use_cache_dir(config.cache_dir))
    except (CommandLineError, DataError, ModelError) as error:
        print(f"prefetch.py: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1
    except KeyboardInterrupt:
        print("prefetch.py: interrupted; what is finished is kept", file=sys.stderr)
        return 130


def _fill(config: PrefetchConfig, cache_dir: Path) -> None:
    # Only now: these import libraries that read the cache variables when they are imported.
    from scripts.preparation import held_out_split, prepare
    from scripts.prepare_data import summary

    prepared = prepare(config, cache_dir)
    folders = dict.fromkeys(filter(None, (prepared["model"], prepared["tokenizer"])))
    for folder in folders:
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        what = "model" if folder == prepared["model"] else "tokenizer"
        print(printable(f"{what}: {size:,} bytes in {folder}"))
    sources = [source.data for source in source_configs(config.data)]
    for source, found in zip(sources, prepared["sources"], strict=False):  # none when streaming
        print(summary(found, source.split))
    for found in prepared["evaluation"]:
        print(summary(found, held_out_split(config) or ""))
    if config.data.streaming:
        print(printable(f"{prepared['stream']['name']}: read while training, not fetched"))


def _check(config: PrefetchConfig, cache_dir: Path) -> int:
    for note in unfinished(cache_dir):
        print(printable(f"note: {note}"), file=sys.stderr)
    faults = find_faults_of_run(config, cache_dir)
    for fault in faults:
        print(printable(fault))
    if not faults:
        print(f"{cache_dir} holds all that this run needs, whole")
    return 1 if faults else 0


def find_faults_of_run(config: TrainConfig, cache_dir: Path) -> list[str]:
    """One line for everything a run needs that `cache_dir` lacks, or holds damaged; nothing is written."""
    faults = [*_model_faults(config, cache_dir), *_dataset_faults(config.data, cache_dir)]
    if faults or config.data.streaming:
        # Tokens are named after the tokenizer and the dataset's commit: neither is certain now.
        return faults
    from scripts.preparation import held_out_split, prepare_model, read_tokenizer

    try:
        tokenizer = read_tokenizer(config, cache_dir, prepare_model(config, cache_dir)["tokenizer"])
    except (DataError, ModelError) as error:
        return [str(error)]
    for source in source_configs(config.data):
        for split in dict.fromkeys(filter(None, (source.data.split, held_out_split(config)))):
            faults += _token_faults(source.data, split, tokenizer, cache_dir)
    return faults


def _model_faults(config: TrainConfig, cache_dir: Path) -> list[str]:
    from models.hub import check_snapshot
    from scripts.preparation import embedded_tokenizer_folder

    chosen, faults = config.model, []
    if chosen.name is not None:
        faults += check_snapshot(
            chosen.name,
            "model",
            chosen.revision,
            cache_dir,
            only_tokenizer=chosen.init == "random" and chosen.tokenizer is None,
        )
    if chosen.tokenizer is not None and not Path(chosen.tokenizer).is_dir():
        faults += check_snapshot(chosen.tokenizer, "model", None, cache_dir, only_tokenizer=True)
    if chosen.name is None and chosen.path is None and chosen.tokenizer is None:
        folder = embedded_tokenizer_folder(cache_dir)
        if not (folder / "tokenizer.json").is_file():
            faults.append(f"{folder}: the embedded tokenizer is missing; run prefetch.py")
    return faults


def _dataset_faults(config: DataConfig, cache_dir: Path) -> list[str]:
    from models.hub import check_snapshot

    repositories = dict.fromkeys(
        (source.data.name, source.data.revision)
        for source in source_configs(config)
        if source.data.name is not None and not config.streaming
    )
    return [
        fault
        for name, revision in repositories
        for fault in check_snapshot(str(name), "dataset", revision, cache_dir)
    ]


def _token_faults(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> list[str]:
    """Of one split of a source: its folder of tokens, and the packing that the run will read."""
    from data.ledger import Ledger
    from data.prepare import new_task
    from data.sources import shown_url
    from data.store import find_faults, open_tokens
    from scripts.preparation import fetch_prepared, load_source, prepared_place

    what = f"{shown_url(config.name or config.path or config.prepared or 'embedded')} ({split})"
    try:
        if config.prepared is not None:
            place = prepared_place(config.prepared, split)
            folder = fetch_prepared(place, tokenizer, cache_dir)
        else:
            # Local files are hashed anew: the record of their hashes in the cache would be written.
            is_local = config.path is not None and "://" not in config.path
            source = load_source(config, split, os.devnull if is_local else cache_dir)
            if (
                config.path is not None
                and not is_local
                and (faults := _copy_faults(config.path, cache_dir))
            ):
                return [f"{what}: {fault}" for fault in faults]
            task = new_task(source, tokenizer, config, cache_dir=cache_dir)
            folder = task.folder
            if not folder.is_dir():
                done = ", ".join(_finished_parts(task.in_progress))
                return [
                    f"{what}: not tokenised for these flags"
                    + (f" ({done})" if done else "")
                    + "; run prefetch.py or prepare_data.py"
                ]
        if faults := find_faults(folder):
            remedy = f"delete {folder} and " + ("copy it" if config.prepared else "run prefetch.py")
            return [f"{what}: {fault}; {remedy} again" for fault in faults]
        packing = folder / f"{config.packing}-{config.seq_len}"
        if not packing.is_dir():
            return [f"{what}: {packing} is missing; run prefetch.py or prepare_data.py"]
        ledger = Ledger(**open_tokens(folder).meta["ledger"])
        ledger.check(what, ledger.rows_read, config.max_bad_rows_pct)
    except (DataError, ModelError) as error:
        return [str(error)]
    return []


def _copy_faults(url: str, cache_dir: Path) -> list[str]:
    """Of the copy of remote files: each that has not the content that was copied."""
    from data.remote import fetch

    copy, faults = fetch(url, cache_dir), []
    for name, sha256 in copy.sha256.items():
        file = copy.path if copy.path.is_file() else copy.path / name
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                faults.append(f"{file}: content changed (SHA-256); delete it and fetch again")
    return faults


def unfinished(cache_dir: Path) -> Iterator[str]:
    """One line for every preparation that was begun and is neither finished nor removed."""
    for folder in sorted((cache_dir / "tokens-in-progress").glob("*/")):
        if not (cache_dir / "tokens" / folder.name).is_dir():
            parts = ", ".join(_finished_parts(folder)) or "no part is finished"
            yield f"{folder} is unfinished: {parts}"
    for folder in sorted((cache_dir / "tokens").rglob("*.unfinished-*/")):
        yield f"{folder} is being written, or was left by a process that was killed: delete it then"


def _finished_parts(folder: Path) -> Iterator[str]:
    """Such as "3 of 8 parts are finished"."""
    names = [path.name for path in folder.glob("*-of-*") if path.suffix == ""]
    for total in sorted({name.rpartition("-")[2] for name in names}):
        done = sum(name.endswith(f"-of-{total}") for name in names)
        yield f"{done} of {int(total)} parts are finished"


if __name__ == "__main__":
    run_command(main)
