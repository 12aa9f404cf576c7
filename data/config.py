"""What a user can say about data. Plain dataclasses only: no import here may cost a `--help` any time."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

from data.errors import DataError

FORMATS = (
    "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenised", "preference"
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Where the training rows come from and how they become packed rows of tokens."""

    name: str | None = None
    """Dataset on the Hugging Face hub, as org/name. With neither name nor path the embedded chat data is used."""

    path: str | None = None
    """File (.jsonl, .json, .parquet, .arrow), a folder of them, or a folder of save_to_disk; local or a URL such as s3://bucket/chat.jsonl."""

    prepared: str | None = None
    """Folder or URL of tokens made by scripts/prepare_data.py --output, instead of rows."""

    sources: tuple[dict[str, Any], ...] = ()
    """Several sources instead of one: a list of {name, path or prepared, and weight, subset, split, revision, format, transform, train_on or expand_turns}."""

    mix_by: Literal["tokens", "rows"] = "tokens"
    """What the weights of sources are shares of. Without weights every row is seen once per epoch."""

    subset: str | None = None
    """Named configuration of the hub dataset, where it has several."""

    split: str = "train"
    """Split to train on."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset; it is resolved to a commit once and recorded in run.json."""

    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "text",
        "tokenised",
        "preference",
    ] = "auto"
    """What the columns mean (docs/data.md): messages, sharegpt, alpaca, prompt_completion, text, tokenised or preference; auto tells it by their names."""

    transform: str | None = None
    """Own change of every row, as package.function: a function of (row) that returns the row to use, or None to leave it out (docs/extend.md)."""

    train_on: Literal["all", "last"] = "all"
    """Assistant turns that are trained on: all, or the last of each conversation; never one whose message has "train": false."""

    expand_turns: bool = False
    """Make an example of every assistant turn, with the turns before it as context: so reasoning that the template strips from earlier turns is trained on."""

    control_tokens: Literal["exclude", "plain"] = "exclude"
    """A row whose text spells a control token such as <|im_end|>: leave it out, or take the token for plain text."""

    broken_lines: Literal["error", "skip"] = "error"
    """A line of a jsonl file that is no JSON object: stop and name it, or leave it out and count it."""

    seq_len: int = 4096
    """Tokens per packed row."""

    packing: Literal["best_fit", "fixed", "none"] = "best_fit"
    """best_fit fills each row with whole conversations; fixed cuts one long stream of all rows every seq_len tokens, for pretraining; none puts one conversation in a row."""

    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    """What to do with an example longer than seq_len tokens: split makes several of seq_len tokens of it; every case is counted."""

    max_bad_rows_pct: float = 1.0
    """Stop when more than this percentage of the rows cannot be used (malformed, or a mask that cannot be proven)."""

    streaming: bool = False
    """Read rows while training, for sources too large to tokenise beforehand; needs steps, and the order depends on the number of ranks."""

    stream_buffer_rows: int = 10000
    """Rows per rank that are packed and shuffled together when streaming."""

    prepare_workers: int = 0
    """Processes that tokenise; 0 takes as many as the machine has cores, and rows to keep them busy."""

    workers: int = 0
    """Worker processes per rank that assemble batches ahead; 0 assembles them in the training process."""


SOURCE_KEYS = (
    "name", "path", "prepared", "subset", "split", "revision", "format", "transform",
    "train_on", "expand_turns"
)  # fmt: skip
"""What an entry of `sources` may set for itself, beside its weight."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of several, or the only one."""

    data: DataConfig
    """The configuration as if this were the only source."""

    weight: float | None
    """Its share, relative to the other sources' weights; None if no source has one."""


def source_configs(config: DataConfig) -> tuple[SourceConfig, ...]:
    """The entries of `data.sources`, each with the options it does not set taken from `data`.

    Raises DataError for an entry that is not understood.
    """
    if not config.sources:
        return (SourceConfig(config, None),)
    if given := [key for key in ("name", "path", "prepared") if getattr(config, key) is not None]:
        raise DataError(f"data.sources and data.{given[0]} are both given: keep one")
    found = []
    for number, entry in enumerate(config.sources):
        place = f"data.sources[{number}]"
        if not isinstance(entry, dict):
            raise DataError(f"{place} must be a mapping such as {{path: chat.jsonl, weight: 1}}")
        for key in entry:
            if key not in (*SOURCE_KEYS, "weight"):
                near = difflib.get_close_matches(str(key), (*SOURCE_KEYS, "weight"), n=1)
                meant = f"did you mean {near[0]}" if near else f"it takes {', '.join(SOURCE_KEYS)}"
                raise DataError(f"{place} has the unknown key {key}: {meant}?")
        if sum(entry.get(key) is not None for key in ("name", "path", "prepared")) != 1:
            raise DataError(f"{place} needs one of name, path and prepared")
        _check_types(entry, place)
        options = {key: value for key, value in entry.items() if key != "weight"}
        weight = entry.get("weight")
        found.append(SourceConfig(replace(config, sources=(), **options), weight))
    if len({source.weight is None for source in found}) > 1:
        raise DataError("data.sources: give every source a weight, or none of them")
    return tuple(found)


def _check_types(entry: dict[str, Any], place: str) -> None:
    choices = {
        "format": ("auto", *FORMATS),
        "train_on": ("all", "last"),
        "expand_turns": (True, False),
    }
    for key, value in entry.items():
        if key == "weight":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise DataError(f"{place}: weight must be a number above 0, got {value!r}")
        elif key in choices:
            if value not in choices[key]:
                known = ", ".join(map(str, choices[key]))
                raise DataError(f"{place}: {key} must be one of {known}, got {value!r}")
        elif not isinstance(value, str) or not value:
            raise DataError(f"{place}: {key} must be text, got {value!r}")
