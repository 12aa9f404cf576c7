"""Tokenised examples on disk: written once, memory-mapped by every rank.

A folder holds, for all examples one after the other,
    input_ids.bin   int32 [T]
    supervised.bin  uint8 [T]   1 where the token is trained on
    offsets.npy     int64 [examples + 1], example i is [offsets[i], offsets[i + 1])
    meta.json       the ledger: what became of every row and token
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.chat import Excluded
from data.config import DataConfig
from data.errors import DataError
from data.formats import encode_rows
from data.sources import Source, explain_os_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 4
_EXAMPLES_SHOWN = 5  # row numbers kept for each reason


@dataclass
class Ledger:
    """Where every row and token of a source went."""

    rows_read: int = 0
    """The sum of the rows excluded, dropped, without labels and used."""

    rows_used: int = 0
    """Rows that became an example, or several."""

    examples: int = 0
    excluded: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each reason: rows, and `first`, the indices of the first few of them."""

    overlong_dropped: int = 0
    without_labels: int = 0
    """Rows of which no supervised token is left to predict, after truncating or splitting."""

    overlong_truncated: int = 0
    """Rows used without their end."""

    overlong_split: int = 0
    """Rows used in pieces of seq_len tokens and a rest. A piece without labels is no example."""

    tokens_read: int = 0
    """Tokens of all rows that were encoded; the sum of the four below."""

    tokens: int = 0
    """Tokens of all examples."""

    tokens_dropped: int = 0
    tokens_truncated: int = 0
    tokens_without_labels: int = 0
    """Tokens of rows, and of pieces of split rows, that have no label."""

    supervised_tokens: int = 0
    """Labels of all examples: supervised tokens that have a token before them."""

    stripped_reasoning_turns: int = 0
    """Assistant turns trained without their reasoning, because the template leaves it out."""

    @property
    def excluded_rows(self) -> int:
        return sum(entry["rows"] for entry in self.excluded.values())

    def exclude(self, row: int, reason: str) -> None:
        entry = self.excluded.setdefault(reason, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < _EXAMPLES_SHOWN:
            entry["first"].append(row)

    def check(self, name: str, total_rows: int, max_bad_rows_pct: float) -> None:
        """Raise DataError if more than `max_bad_rows_pct` of `total_rows` are excluded."""
        if self.excluded_rows <= total_rows * max_bad_rows_pct / 100:
            return
        reasons = "; ".join(
            f"{entry['rows']} {reason} (rows {', '.join(map(str, entry['first']))})"
            for reason, entry in sorted(self.excluded.items(), key=lambda item: -item[1]["rows"])
        )
        raise DataError(
            f"{name}: {self.excluded_rows} of {total_rows} rows cannot be used so far, more than "
            f"data.max_bad_rows_pct={max_bad_rows_pct:g}: {reasons}; mend the rows or raise the limit"
        )


@dataclass(frozen=True)
class TokenStore:
    """Examples of a folder written by `prepare_tokens`, read where they are needed."""

    input_ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int32 [examples]: tokens of each example."""
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32, supervised bool) of one example, both [length]."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[place], self.supervised[place].view(bool)


def prepare_tokens(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    cache_dir: str | Path,
) -> Path:
    """The folder with the tokens and marks of all rows, tokenising them unless it exists already.

    The folder's name is a hash of everything that decides its bytes. It is written beside its
    place and renamed, so that it is whole whenever it exists. Raises DataError.
    """
    key = tokens_key(source, tokenizer, config)
    folder = Path(cache_dir) / "tokens" / hashlib.sha256(_json(key).encode()).hexdigest()[:32]
    if not folder.exists():
        unfinished = folder.with_name(
            f"{folder.name}.unfinished-{os.uname().nodename}-{os.getpid()}"
        )
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            ledger = _write(unfinished, source, tokenizer, config)
            meta = {"key": key, "source": source.name, "commit": source.commit}
            (unfinished / "meta.json").write_text(_json({**meta, "ledger": asdict(ledger)}))
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # else another run has finished the same folder first
                    raise
        except OSError as error:
            if line := explain_os_error(error, folder):
                raise DataError(line) from error
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    # The limit does not change the bytes, so it is not in the key: hold a warm folder to it too.
    ledger = Ledger(**open_tokens(folder).meta["ledger"])
    ledger.check(source.name, ledger.rows_read, config.max_bad_rows_pct)
    return folder


def open_tokens(folder: str | Path) -> TokenStore:
    """Memory-map a folder written by `prepare_tokens`; raises DataError if it is not whole."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        offsets = np.load(folder / "offsets.npy")
        input_ids = np.asarray(np.memmap(folder / "input_ids.bin", np.int32, "r"))
        supervised = np.asarray(np.memmap(folder / "supervised.bin", np.uint8, "r"))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder}: damaged ({error}); delete it and run again") from error
    if not len(input_ids) == len(supervised) == offsets[-1]:
        raise DataError(f"{folder}: damaged (sizes disagree); delete it and run again")
    return TokenStore(input_ids, supervised, offsets, meta)


def tokens_key(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, Any]:
    """Everything that decides the bytes of the prepared tokens."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "chat_template": _hash(_json(tokenizer.chat_template)),
        "tokenizer": _hash(
            (backend.to_str() if backend else "") + _json(tokenizer.special_tokens_map)
        ),
        "data_format": config.format,
        "train_on": config.train_on,
        "control_tokens": config.control_tokens,
        "seq_len": config.seq_len,
        "overlong": config.overlong,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _write(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Ledger:
    from tqdm import tqdm

    rows, ledger, lengths = source.rows, Ledger(), []
    with (
        open(folder / "input_ids.bin", "wb") as ids_file,
        open(folder / "supervised.bin", "wb") as supervised_file,
    ):
        results = encode_rows(rows, tokenizer, config, name=source.name)
        # disable=None: no bar where the output is not a terminal.
        for result in tqdm(results, "tokenise", len(rows), unit="row", disable=None):
            ledger.rows_read += 1
            if isinstance(result, Excluded):
                ledger.exclude(result.row, result.reason)
                ledger.check(source.name, len(rows), config.max_bad_rows_pct)
                continue
            ids, supervised, length = result.input_ids, result.supervised, len(result.input_ids)
            ledger.tokens_read += length
            if length > config.seq_len:
                if config.overlong == "error":
                    raise DataError(
                        f"{source.name}: row {result.row} has {length} tokens, more than "
                        f"data.seq_len={config.seq_len}; raise it or set data.overlong"
                    )
                if config.overlong == "drop":
                    ledger.overlong_dropped += 1
                    ledger.tokens_dropped += length
                    continue
                if config.overlong == "truncate":
                    ids, supervised = ids[: config.seq_len], supervised[: config.seq_len]
                    ledger.tokens_truncated += length - len(ids)
            starts = range(0, len(ids), config.seq_len)  # one, unless a long example is split
            examples_before = ledger.examples
            for start in starts:
                piece = ids[start : start + config.seq_len]
                marks = supervised[start : start + config.seq_len]
                labels = int(np.count_nonzero(marks[1:]))
                if labels == 0:
                    ledger.tokens_without_labels += len(piece)
                    continue
                ledger.examples += 1
                ledger.tokens += len(piece)
                ledger.supervised_tokens += labels
                piece.tofile(ids_file)
                marks.view(np.uint8).tofile(supervised_file)
                lengths.append(len(piece))
            if ledger.examples == examples_before:
                ledger.without_labels += 1
                continue
            ledger.rows_used += 1
            ledger.overlong_truncated += length > len(ids)
            ledger.overlong_split += len(starts) > 1
            ledger.stripped_reasoning_turns += result.stripped_reasoning_turns
    if not lengths:
        raise DataError(
            f"{source.name}: none of {ledger.rows_read} rows can be trained on "
            f"({ledger.excluded_rows} excluded, {ledger.overlong_dropped} longer than "
            f"data.seq_len={config.seq_len}, {ledger.without_labels} without labels)"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    np.save(folder / "offsets.npy", offsets)
    return ledger


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
