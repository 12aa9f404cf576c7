"""Rows into a folder of tokens: in parts, so that processes, machines and interrupted runs can share the work.

Part i of n holds a fixed range of the rows. Whoever has time writes a part, under a name of its own;
when all are there they are joined. The bytes do not depend on who wrote what, nor on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.chat import Encoded, Excluded
from data.config import DataConfig
from data.errors import DataError
from data.formats import DOCUMENTS_OF_A_ROW, choose_format, encode_rows
from data.ledger import Ledger
from data.lock import locked
from data.sources import Row, Source
from data.store import TOKEN_FILES, open_tokens, to_json, write_meta, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 6
PART_ROWS = 8192


@dataclass(frozen=True)
class Task:
    """All that is needed to tokenise a source, in this process or another."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    folder: Path
    """Where the tokens will be."""

    part_rows: int
    """Rows of a part, but for the last."""

    @property
    def columns(self) -> list[str]:
        rows = self.source.rows
        # A broken line has no columns.
        return getattr(rows, "column_names", None) or next((list(row) for row in rows if row), [])

    @property
    def format(self) -> str:
        """Told by the columns, unless the user has; raises DataError."""
        return choose_format(self.columns, self.config.format, name=self.source.name)

    @property
    def parts(self) -> int:
        return -(-len(self.source.rows) // self.part_rows)

    @property
    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are still to be written; none once all have been joined."""
        missing = [n for n in range(self.parts) if not self.part_folder(n).exists()]
        # In this order: whoever joins makes the folder first, then removes the parts.
        return [] if self.folder.exists() else missing

    def part_folder(self, number: int) -> Path:
        return self.in_progress / f"{number:05d}-of-{self.parts:05d}"

    @property
    def in_progress(self) -> Path:
        """Where the parts are until they are joined."""
        return self.folder.parents[1] / "tokens-in-progress" / self.folder.name


def prepare_tokens(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    cache_dir: str | Path,
    write: Callable[[Task, Sequence[int]], None] | None = None,
) -> Path:
    """The folder with the tokens and marks of all rows, tokenising them unless it exists already.

    The folder's name is a hash of everything that decides its bytes. Of several processes that want
    it one works, and the others wait for it. `write` is called in place of `write_parts`. Raises
    DataError.
    """
    task = new_task(source, tokenizer, config, cache_dir=cache_dir)
    if not task.folder.exists():
        with locked(task.in_progress.with_suffix(".lock"), f"tokenising {source.name}"):
            if not task.folder.exists():
                (write or write_parts)(task, range(task.parts))
                join_parts(task)
    # The limit does not change the bytes, so it is not in the key: hold a warm folder to it too.
    ledger = Ledger(**open_tokens(task.folder).meta["ledger"])
    ledger.check(source.name, ledger.rows_read, config.max_bad_rows_pct)
    return task.folder


def new_task(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    cache_dir: str | Path,
) -> Task:
    key = hashlib.sha256(to_json(tokens_key(source, tokenizer, config)).encode()).hexdigest()[:32]
    return Task(source, tokenizer, config, Path(cache_dir) / "tokens" / key, PART_ROWS)


def tokens_key(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, Any]:
    """Everything that decides the bytes of the prepared tokens."""
    import transformers

    stream = config.packing == "fixed"  # cut when it is packed: no example is too long for it
    return {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        **tokenizer_key(tokenizer),
        "data_format": config.format,
        "train_on": config.train_on,
        "expand_turns": config.expand_turns,
        "control_tokens": config.control_tokens,
        "broken_lines": config.broken_lines,
        "seq_len": None if stream else config.seq_len,
        "overlong": None if stream else config.overlong,
        "transformers": transformers.__version__,
    }


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What of a tokenizer decides the ids of a text."""
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "chat_template": _hash(to_json(tokenizer.chat_template)),
        "tokenizer": _hash(
            (backend.to_str() if backend else "") + to_json(tokenizer.special_tokens_map)
        ),
        "tokenizers": tokenizers.__version__,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------- parts


def write_parts(task: Task, numbers: Sequence[int]) -> None:
    """Write those of the parts `numbers` that are not there yet; raises DataError."""
    from tqdm import tqdm

    missing = [number for number in numbers if not task.part_folder(number).exists()]
    if not missing:
        return
    processes = min(task.config.prepare_workers or os.cpu_count() or 1, len(missing))
    rows = sum(len(_part(task, number)) for number in missing)
    # disable=None: no bar where the output is not a terminal.
    with tqdm(total=rows, desc="tokenise", unit="row", disable=None) as bar:
        if processes == 1:
            for number in missing:
                write_part(task, number, bar.update)
        else:
            _write_in_processes(task, missing, processes, bar.update)


def write_part(task: Task, number: int, advance: Callable[[int], Any]) -> None:
    """Tokenise the rows of one part; `advance` is told how many rows were done. Raises DataError."""
    name, config, total = task.source.name, task.config, len(task.source.rows)
    part = _part(task, number)
    config = replace(config, format=task.format)
    ledger, lengths = Ledger(), []
    with (
        written_whole(task.part_folder(number)) as folder,
        open(folder / "input_ids.bin", "wb") as ids_file,
        open(folder / "supervised.bin", "wb") as supervised_file,
    ):
        results = encode_rows(part, task.tokenizer, config, name=name)
        for _, group in groupby(results, key=lambda result: result.row):
            row = list(group)
            for ids, supervised in examples_of_row(row, ledger, config, name, part.start):
                ids_file.write(ids.data)
                supervised_file.write(supervised.data)
                lengths.append(len(ids))
            if isinstance(row[0], Excluded):
                ledger.check(name, total, config.max_bad_rows_pct)
            advance(1)
        np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int64))
        (folder / "ledger.json").write_text(to_json(asdict(ledger)))


def examples_of_row(
    results: Sequence[Encoded | Excluded],
    ledger: Ledger,
    config: DataConfig,
    name: str,
    first_row: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What is trained on of one row, as (input_ids int32, supervised bool); `ledger` counts it.

    `results` are all that encode_rows gave for the row, whose index there is without `first_row`.
    Raises DataError for an overlong row with data.overlong=error.
    """
    if config.format in DOCUMENTS_OF_A_ROW and not isinstance(results[0], Excluded):
        yield from _whole_row(results, ledger, config, name, first_row)
        return
    ledger.rows_read += 1
    examples_before, overlong, truncated, split = ledger.examples, False, False, False
    limit = None if config.packing == "fixed" else config.seq_len
    for result in results:
        if isinstance(result, Excluded):
            ledger.exclude(first_row + result.row, result.reason)
            return
        ids, supervised, length = result.input_ids, result.supervised, len(result.input_ids)
        ledger.tokens_read += length
        if limit is not None and length > limit:
            if config.overlong == "error":
                raise DataError(
                    f"{name}: row {first_row + result.row} has {length} tokens, more than "
                    f"data.seq_len={limit}; raise it or set data.overlong"
                )
            if config.overlong == "drop":
                ledger.tokens_dropped += length
                overlong = True
                continue
            if config.overlong == "truncate":
                ids, supervised = ids[:limit], supervised[:limit]
                ledger.tokens_truncated += length - limit
        starts = range(0, len(ids), limit or len(ids))  # one, unless a long example is split
        for start in starts:
            piece = slice(start, start + (limit or length))
            labels = int(np.count_nonzero(supervised[piece][1:]))
            if labels == 0:
                ledger.tokens_without_labels += len(ids[piece])
                continue
            ledger.examples += 1
            ledger.tokens += len(ids[piece])
            ledger.supervised_tokens += labels
            truncated, split = truncated or length > len(ids), split or len(starts) > 1
            yield ids[piece], supervised[piece]
        ledger.stripped_reasoning_turns += result.stripped_reasoning_turns
        ledger.stripped_reasoning_tokens += result.stripped_reasoning_tokens
    if ledger.examples == examples_before:
        ledger.overlong_dropped += overlong
        ledger.without_labels += not overlong
        return
    ledger.rows_used += 1
    ledger.overlong_truncated += truncated
    ledger.overlong_split += split


def _whole_row(
    results: Sequence[Encoded | Excluded],
    ledger: Ledger,
    config: DataConfig,
    name: str,
    first_row: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`examples_of_row` of a row whose documents stay together: all of them, or none."""
    documents = [(r.input_ids, r.supervised) for r in results if isinstance(r, Encoded)]
    labels = [int(np.count_nonzero(supervised[1:])) for _, supervised in documents]
    length = sum(len(ids) for ids, _ in documents)
    ledger.rows_read += 1
    ledger.tokens_read += length
    if length > config.seq_len:
        if config.overlong == "error":
            raise DataError(
                f"{name}: row {first_row + results[0].row} has {length} tokens in all its answers, more than "
                f"data.seq_len={config.seq_len}; raise it or set data.overlong drop"
            )
        ledger.tokens_dropped += length
        ledger.overlong_dropped += 1
    elif not all(labels):
        ledger.tokens_without_labels += length
        ledger.without_labels += 1
    else:
        ledger.rows_used += 1
        ledger.examples += len(documents)
        ledger.tokens += length
        ledger.supervised_tokens += sum(labels)
        yield from documents


def join_parts(task: Task) -> None:
    """Make the folder of tokens of its parts, and remove them; raises DataError."""
    name, parts = task.source.name, [task.part_folder(number) for number in range(task.parts)]
    ledger = Ledger()
    for part in parts:
        ledger.add(Ledger(**json.loads((part / "ledger.json").read_text())))
    ledger.check(name, ledger.rows_read, task.config.max_bad_rows_pct)
    if not ledger.examples:
        raise DataError(
            f"{name}: none of {ledger.rows_read} rows can be trained on "
            f"({ledger.excluded_rows} excluded, {ledger.overlong_dropped} longer than "
            f"data.seq_len={task.config.seq_len}, {ledger.without_labels} without labels)"
        )
    with written_whole(task.folder) as folder:
        for file_name in ("input_ids.bin", "supervised.bin"):
            with open(folder / file_name, "wb") as whole:
                for part in parts:
                    with open(part / file_name, "rb") as piece:
                        shutil.copyfileobj(piece, whole, 1 << 24)
        lengths = np.concatenate([np.load(part / "lengths.npy") for part in parts])
        np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths)))
        meta = {
            "key": tokens_key(task.source, task.tokenizer, task.config),
            "source": name,
            "commit": task.source.commit,
            "ledger": asdict(ledger),
            "documents_of_a_row": DOCUMENTS_OF_A_ROW.get(task.format, 1),
        }
        write_meta(folder, meta, list(TOKEN_FILES))
    # What another process is still writing there is not needed: it may stay.
    shutil.rmtree(task.in_progress, ignore_errors=True)


class _Part(Sequence[Row]):
    """Rows start..stop of a source, with the columns of the whole."""

    def __init__(self, rows: Sequence[Row], columns: list[str], start: int, stop: int) -> None:
        self._rows, self.column_names, self.start, self._stop = rows, columns, start, stop

    def __len__(self) -> int:
        return self._stop - self.start

    def __getitem__(self, index: Any) -> Any:
        """A row; or of a slice what the source gives for one."""
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            return self._rows[self.start + first : self.start + last]
        return self._rows[self.start + index]

    def select_columns(self, names: list[str]) -> _Part:
        select = getattr(self._rows, "select_columns", None)
        return _Part(select(names), names, self.start, self._stop) if select is not None else self


def _part(task: Task, number: int) -> _Part:
    rows, start = task.source.rows, number * task.part_rows
    return _Part(rows, task.columns, start, min(start + task.part_rows, len(rows)))


# --------------------------------------------------------------------------------------- processes


def _write_in_processes(
    task: Task, numbers: Sequence[int], processes: int, advance: Callable[[int], Any]
) -> None:
    """Process k of n writes every n-th of the parts `numbers`, from the k-th on."""
    # Not forked: this process has threads. A worker reads the rows again, from the cache.
    context = multiprocessing.get_context("spawn")
    workers = {}
    for first in range(processes):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(task, numbers[first::processes], there), daemon=True
        )
        worker.start()
        there.close()
        workers[here] = worker
    try:
        while workers:
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    worker = workers.pop(pipe)
                    worker.join()
                    if worker.exitcode:
                        raise DataError(
                            f"{task.source.name}: a process that tokenises ended with exit code "
                            f"{worker.exitcode}; is memory short? lower data.prepare_workers and "
                            "run again, finished parts are kept"
                        ) from None
                else:
                    if isinstance(message, Exception):
                        raise message
                    advance(message)
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(task: Task, numbers: Sequence[int], pipe: Connection) -> None:
    # Ctrl-C is answered by the parent, which ends this one: by an exception, so that no unfinished part stays.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.unraisablehook = ask_again
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for number in numbers:
            write_part(task, number, lambda rows: None)
            pipe.send(len(_part(task, number)))
    except Exception as error:
        pipe.send(error)
    finally:
        pipe.close()


def ask_again(lost: sys.UnraisableHookArgs) -> None:
    """A finaliser swallows what is raised while it runs, also the end of this process."""
    if isinstance(lost.exc_value, SystemExit):
        threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGTERM]).start()
    else:
        sys.__unraisablehook__(lost)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
