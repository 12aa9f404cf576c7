"""What comes before training and needs no process group: model and data on this machine, rows turned into tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.config import DataConfig, source_configs
from data.embedded import build_tokenizer, tokenizer_recipe
from data.errors import DataError
from data.limits import TEMPLATE_GIB, bounded
from data.mixture import Mixture, mix
from data.prepare import Task, prepare_tokens, tokenizer_key
from data.sources import Row, Source, hub_commit, load_rows, shown_url, stream_rows
from data.store import open_packed, open_tokens, prepare_packs
from data.streaming import stream_format
from data.transform import transform_stream, transformed
from models.build import (
    build_model,
    check_compiling,
    check_fits,
    check_packing,
    read_model_config,
)
from models.errors import ModelError
from models.hub import check_snapshot, fetch_model
from models.tokenizer import load_tokenizer
from scripts.command_line import printable
from scripts.config import TrainConfig
from scripts.extensions import row_transform
from scripts.partial import added_tokens, freeze_rest, trains_part


def prepare(
    config: TrainConfig,
    cache_dir: Path,
    *,
    to_train: bool = True,
    world_size: int = 1,
    device_type: str | None = None,
) -> dict[str, Any]:
    """Bring model and data to this machine, turn rows into tokens and pack them; one process of a node does it.

    `device_type` is where this machine will train, if it will: packing that the model cannot be trained
    on there is refused before a row is read.

    Without `to_train` it brings what decides the training tokens: no held-out rows, and no weights
    (unless the tokenizer is another model's: then the model's own folder may hold none).

    Returns:
        Absolute folders and commits, as JSON can hold them: of the model, the tokenizer, the training
        sources and the held-out ones. When streaming there are no training sources, but a stream:
        its name, commit and format; `world_size` ranks will read it.

    Raises:
        DataError, ModelError: what the user can mend.
    """
    prepared = prepare_model(
        config, cache_dir, only_tokenizer=not to_train, device_type=device_type
    )
    tokenizer = read_tokenizer(config, cache_dir, prepared["tokenizer"])
    sources = source_configs(config.data)
    if config.data.streaming:
        prepared["stream"] = open_stream(config.data, cache_dir, world_size)
    else:
        prepared["sources"] = [
            prepare_source(source.data, source.data.split, tokenizer, cache_dir)
            for source in sources
        ]
    split = held_out_split(config)
    if to_train and split is not None:
        prepared["evaluation"] = [
            prepare_source(source.data, split, tokenizer, cache_dir) for source in sources
        ]
    return prepared


def prepare_model(
    config: TrainConfig,
    cache_dir: Path,
    *,
    only_tokenizer: bool = False,
    device_type: str | None = None,
) -> dict[str, Any]:
    """The model's and the tokenizer's part of `prepare`."""
    chosen, model_folder, model_commit = config.model, None, None
    if chosen.verify_hash and chosen.name is None:
        raise ModelError(
            "model.verify_hash compares with what the hub listed, and for a local folder or the "
            "built-in model there is no such list; use --model.name, or leave it out"
        )
    if chosen.name is not None:
        say_fetching(chosen.name, cache_dir)
        without_weights = (only_tokenizer or chosen.init == "random") and chosen.tokenizer is None
        fetched = fetch_model(
            chosen.name,
            revision=chosen.revision,
            cache_dir=cache_dir,
            only_tokenizer=without_weights,
        )
        if chosen.verify_hash and (
            faults := check_snapshot(
                chosen.name, "model", fetched.commit, cache_dir, only_tokenizer=without_weights
            )
        ):
            raise ModelError("; ".join(faults))
        model_folder, model_commit = fetched.path, fetched.commit
    elif chosen.path is not None:
        model_folder = Path(chosen.path).absolute()
    if chosen.tokenizer is None:
        tokenizer_folder = model_folder or embedded_tokenizer(cache_dir)
    elif Path(chosen.tokenizer).is_dir():
        tokenizer_folder = Path(chosen.tokenizer).absolute()
    else:
        tokenizer_folder = fetch_model(
            chosen.tokenizer, revision=None, cache_dir=cache_dir, only_tokenizer=True
        ).path
    tokenizer = read_tokenizer(config, cache_dir, str(tokenizer_folder))
    hf_config = read_model_config(chosen, model_folder, tokenizer)
    check_fits(hf_config, tokenizer, seq_len=config.data.seq_len)
    check_compiling(hf_config, compiles=config.parallel.compile)
    if device_type is not None:
        check_packing(hf_config, packing=config.data.packing, device_type=device_type)
    if trains_part(config):
        # On a model without weights: what it lacks is said before anything is tokenised.
        model = build_model(hf_config, attention="sdpa", seed=None)
        freeze_rest(model, config, added_tokens(config, tokenizer), torch.bfloat16)
    return {
        "model": str(model_folder) if model_folder else None,
        "model_commit": model_commit,
        "tokenizer": str(tokenizer_folder),
        "sources": [],
        "evaluation": [],
    }


def held_out_split(config: TrainConfig) -> str | None:
    """The split that is evaluated on; None where there is none."""
    return config.evaluation.split or ("test" if uses_embedded_data(config) else None)


def prepare_source(
    config: DataConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    write: Callable[[Task, Sequence[int]], None] | None = None,
) -> dict[str, Any]:
    """One source fetched, tokenised and packed: its name, commit, and the folder to give `open_packed`.

    `write` is called in place of `data.prepare.write_parts`.
    """
    if config.prepared is not None:
        tokens = fetch_prepared(prepared_place(config.prepared, split), tokenizer, cache_dir)
    else:
        if config.name is not None or (config.path is not None and "://" in config.path):
            say_fetching(str(config.name or config.path), cache_dir)
        source = load_source(config, split, cache_dir)
        tokens = prepare_tokens(source, tokenizer, config, cache_dir=cache_dir, write=write)
    meta = open_tokens(tokens).meta
    packs = prepare_packs(tokens, method=config.packing, seq_len=config.seq_len)
    return {"name": meta["source"], "commit": meta["commit"], "packs": str(packs)}


def load_source(config: DataConfig, split: str, cache_dir: str | Path) -> Source:
    """`load_rows`, with every row changed by `data.transform`."""
    source, transform = load_rows(config, split, cache_dir=cache_dir), row_transform(config)
    return source if transform is None else transformed(source, transform)


def open_stream(config: DataConfig, cache_dir: Path, world_size: int) -> dict[str, Any]:
    """Name, commit and format of what is read while training."""
    name, commit = shown_url(config.path or "embedded"), None
    if config.name is not None:
        say_fetching(config.name, cache_dir)
        name, commit = config.name, hub_commit(config.name, config.revision, cache_dir)
    pinned = replace(config, revision=commit)
    rows = stream_rows_of_rank(pinned, cache_dir, 1, 0, 0)
    transform = row_transform(config)
    if transform is not None:  # the format is told by a row that is used
        rows = filter(None, rows)
    kind = stream_format(rows, config, name=name, world_size=world_size)
    # Part of what a cursor into the stream depends on.
    changed = {} if transform is None else {"transform": f"{transform.name} {transform.digest}"}
    return {"name": name, "commit": commit, "format": kind, **changed}


def stream_rows_of_rank(
    config: DataConfig, cache_dir: Path, world_size: int, rank: int, skip: int
) -> Iterator[Row]:
    """Every `world_size`-th row from row `rank` on, without the first `skip` of them, changed by `data.transform`."""
    rows = stream_rows(
        config, config.split, cache_dir=cache_dir, skip=skip, every=world_size, offset=rank
    )
    transform = row_transform(config)
    if transform is None:
        return rows
    name = config.name or shown_url(config.path or "embedded")
    numbers = count(rank + skip * world_size, world_size)
    return transform_stream(rows, transform, name=name, numbers=numbers)


def prepared_place(output: str, split: str) -> str:
    """Where prepare_data.py puts the tokens of a split within its --output, a folder or URL."""
    # Of dots alone a split's name would be the folder itself, or the one above.
    return f"{output.rstrip('/')}/{re.sub(r'[^A-Za-z0-9._-]|^[.]+$', '_', split)}"


def fetch_prepared(place: str, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Path:
    """The folder of tokens that prepare_data.py wrote to `place`, in the cache.

    Raises:
        DataError: it is not there or not whole, or was made with another tokenizer or template.
    """
    from data.remote import fetch_folder  # and with it fsspec, which few runs need

    if "://" in place:
        say_fetching(place, cache_dir)
    folder = fetch_folder(place, cache_dir)
    key = open_tokens(folder).meta["key"]
    for part, value in tokenizer_key(tokenizer).items():
        if key[part] != value:
            raise DataError(
                f"{place} was prepared with another {part.replace('_', ' ')} than this run's; "
                "prepare it again with the same --model flags"
            )
    return folder


def open_mixture(config: DataConfig, prepared: dict[str, Any]) -> Mixture:
    """The training rows of what `prepare` returned."""
    sources = [open_packed(source["packs"]) for source in prepared["sources"]]
    weights = [source.weight for source in source_configs(config)]
    return mix(sources, weights, by=config.mix_by)


def say_fetching(name: str, cache_dir: Path) -> None:
    from huggingface_hub import constants

    # A download may take an hour, and its bar is only seen on a terminal.
    if not constants.HF_HUB_OFFLINE:
        print(printable(f"fetching {name} to {cache_dir}"), file=sys.stderr, flush=True)


def embedded_tokenizer_folder(cache_dir: Path) -> Path:
    """Where the embedded tokenizer is, or will be: named by the digest of how it is built."""
    return cache_dir / "embedded-tokenizer" / tokenizer_recipe()


def embedded_tokenizer(cache_dir: Path) -> Path:
    """Folder of the embedded tokenizer, built and written once and never half."""
    folder = embedded_tokenizer_folder(cache_dir)
    if not folder.exists():
        staging = folder.with_name(f".{folder.name}-{os.uname().nodename}-{os.getpid()}")
        build_tokenizer(staging)
        try:
            staging.rename(folder)
        except OSError:  # another run was first
            shutil.rmtree(staging)
    return folder


def uses_embedded_data(config: TrainConfig) -> bool:
    data = config.data
    return data.name is None and data.path is None and data.prepared is None and not data.sources


def read_tokenizer(config: TrainConfig, cache_dir: Path, folder: str) -> PreTrainedTokenizerBase:
    # It asks the chat template what ends a turn.
    with bounded("the chat template", gib=TEMPLATE_GIB):
        return load_tokenizer(
            Path(folder),
            cache_dir=cache_dir,
            add_special_tokens=config.model.add_special_tokens,
            chat_template=config.model.chat_template,
        )


def pin_revisions(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """With the commits that the run in `output_dir` was started with, in place of the same branches or tags.

    A branch moves on; the run that is continued must not.
    """
    try:
        run = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        model, sources = run["model"], run["data"]["sources"]
    except (OSError, ValueError, KeyError):
        return config
    if config.resume == "never" or not any(output_dir.glob("checkpoints/step-*")):
        return config
    chosen, data = config.model, config.data
    if (model["name"], model["revision"]) == (chosen.name, chosen.revision) and chosen.name:
        chosen = replace(chosen, revision=model["commit"])
    if data.sources and len(sources) == len(data.sources):
        entries = [
            {**entry, "revision": was["commit"]}
            if entry.get("name") == was["name"] and entry.get("revision") == was["revision"]
            else entry
            for entry, was in zip(data.sources, sources, strict=True)
        ]
        data = replace(data, sources=entries)
    elif data.name and sources:
        was = sources[0]
        if (was["name"], was["revision"]) == (data.name, data.revision):
            data = replace(data, revision=was["commit"])
    return replace(config, model=chosen, data=data)
