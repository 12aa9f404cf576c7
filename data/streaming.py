"""Micro-batches straight from a source that is too large to tokenise beforehand.

Rank r of n reads rows r, r + n, r + 2n, ... of the source in blocks. A block is encoded and packed as
a whole, its packed rows are shuffled, and the next block is prepared while they are trained on. At
the end of the source a new pass begins. Everything is a function of the rows, the seed and three
integers (pass, rows read before the block, packed rows of the block handed out), so a run resumes
exactly by reading one block again. Which rows share a step depends on the number of ranks: data that
can be tokenised beforehand is better served by `data.loader`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from data.chat import Excluded
from data.config import DataConfig
from data.errors import DataError
from data.formats import COLUMNS, DOCUMENTS_OF_A_ROW, choose_format, encode_rows
from data.ledger import Ledger
from data.loader import Batch, assemble
from data.packing import Packs, sample_to_pack
from data.prepare import examples_of_row
from data.sources import Row
from data.store import PackedStore, TokenStore, pack_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer rows than this do not tell how many bad ones a source has.
_ROWS_TO_JUDGE = 1000

OpenRows = Callable[[int], Iterator[Row]]
"""The rows of one rank, without so many at their beginning."""


def stream_format(rows: Iterator[Row], config: DataConfig, *, name: str, world_size: int) -> str:
    """The format of a whole stream, told by its first row; `rows` are those of all ranks.

    Raises DataError if no format fits, or there are fewer rows than ranks.
    """
    first = list(itertools.islice(rows, world_size))
    if len(first) < world_size:
        raise DataError(
            f"{name}: {len(first)} rows are fewer than {world_size} data-parallel ranks; "
            "give more rows, or start fewer ranks"
        )
    return choose_format(list(next(filter(None, first), {})), config.format, name=name)


class StreamedBatches:
    """The micro-batches of one rank, endlessly; they look like those of `data.loader.PackedBatches`.

    Two things differ: document_offsets has room for 1 + seq_len // 8 documents (or pairs of them) in a packed row (more
    are spread over several rows), and sample_index counts the packed rows of a block.

    Attributes:
        state: what continues behind the last micro-batch handed out: integers, another on each rank.
            The micro-batch size is not part of it and may change.
        ledger: what this object has read so far, whole blocks, on this rank; none before the first
            micro-batch. The rows of a pass are counted again in the next.
    """

    def __init__(
        self,
        open_rows: OpenRows,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        name: str,
        micro_batch_size: int,
        pad_token_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, int] | None = None,
    ) -> None:
        """`config.format` is one of FORMATS, see `stream_format`; `name` is what errors call the rows.

        With `config.workers` one process does the work, started anew: it gets `open_rows` pickled.
        Raises DataError if `state` is of another number of ranks or rows in a block. Iterating
        raises it if too many rows cannot be used, or this rank has none.
        """
        size = config.stream_buffer_rows
        if size < 1:
            raise DataError(f"data.stream_buffer_rows={size} must be at least 1")
        layout = {"world_size": world_size, "stream_buffer_rows": size}
        self.state = state or {**layout, "pass": 0, "rows": 0, "packs": 0}
        for key, value in layout.items():
            if self.state[key] != value:
                raise DataError(
                    f"{name}: a stream resumes only with the {key} it began with, "
                    f"{self.state[key]}, not {value}; set it back, or start anew"
                )
        self.ledger = Ledger()
        self._workers = min(config.workers, 1)  # a second one would have to read the same rows
        self._stream = _Stream(open_rows, tokenizer, config, name, seed, rank, world_size)
        self._batch_shape = micro_batch_size, pad_token_id

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _MicroBatches(self._stream, *self._batch_shape, self.state),
            batch_size=None,  # each item is a micro-batch already
            num_workers=self._workers,
            # Not forked: tokenizers and network clients have threads.
            multiprocessing_context="spawn" if self._workers else None,
            # Micro-batches in reserve: the worker pauses at the beginning of a block, when the
            # tokenizer is serialised under the interpreter lock.
            prefetch_factor=8 if self._workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its draw must not move the global random state
        )
        for item in loader:
            if isinstance(item, DataError):
                raise item
            batch, self.state, self.ledger = item
            yield batch


@dataclass(frozen=True)
class _Block:
    """Packed rows that are shuffled together."""

    packed: PackedStore
    order: np.ndarray
    """int64 [packed rows]: in which they are handed out."""
    state: dict[str, int]
    """The stream's before the first of them."""
    ledger: Ledger
    """What was read up to the block's end."""


class _Rows(list[Row]):
    """Rows of a format that is settled: a row that lacks its columns is a bad row."""

    column_names: tuple[str, ...]


@dataclass(frozen=True)
class _Stream:
    """The blocks of one rank."""

    open_rows: OpenRows
    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    name: str
    seed: int
    rank: int
    world_size: int

    @property
    def max_documents(self) -> int:
        """Room for documents in a packed row: a number known before any row is."""
        group = DOCUMENTS_OF_A_ROW.get(self.config.format, 1)
        return group if self.config.packing == "none" else group * (1 + self.config.seq_len // 8)

    def blocks(self, state: dict[str, int]) -> Iterator[_Block]:
        """The blocks from that of `state` on; those without an example are passed over."""
        ledger = Ledger()
        for number in itertools.count(state["pass"]):
            start = first = state["rows"] if number == state["pass"] else 0
            rows = self.open_rows(start)
            while read := list(itertools.islice(rows, self.config.stream_buffer_rows)):
                if examples := self._encode(read, first, ledger):
                    here = {**state, "pass": number, "rows": first, "packs": 0}
                    yield self._pack(examples, here, copy.deepcopy(ledger))
                first += len(read)
            if first == start:
                remedy = (
                    "bring the data back as it was at the checkpoint"
                    if start
                    else "give more rows, or start fewer ranks"
                )
                raise DataError(
                    f"{self.name}: no row behind the first {start} of rank {self.rank} of "
                    f"{self.world_size}; {remedy}"
                )
            self._check_pass(ledger)

    def _encode(
        self, read: list[Row], first: int, ledger: Ledger
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The examples of a block as (input_ids, supervised)."""
        rows = _Rows(read)
        rows.column_names = COLUMNS[self.config.format][0]
        examples = []
        results = encode_rows(rows, self.tokenizer, self.config, name=self.name)
        for index, group in itertools.groupby(results, key=lambda result: result.row):
            in_source = (first + index) * self.world_size + self.rank
            row = [replace(result, row=in_source) for result in group]
            examples += examples_of_row(row, ledger, self.config, self.name)
            if isinstance(row[0], Excluded) and ledger.rows_read >= _ROWS_TO_JUDGE:
                ledger.check(self.name, ledger.rows_read, self.config.max_bad_rows_pct)
        return examples

    def _pack(
        self, examples: list[tuple[np.ndarray, np.ndarray]], state: dict[str, int], ledger: Ledger
    ) -> _Block:
        tokens = TokenStore(
            np.concatenate([ids for ids, _ in examples]),
            np.concatenate([supervised for _, supervised in examples]).view(np.uint8),
            np.cumsum([0, *(len(ids) for ids, _ in examples)]),
            {
                "ledger": asdict(ledger),
                "documents_of_a_row": DOCUMENTS_OF_A_ROW.get(self.config.format, 1),
            },
        )
        packed = pack_store(tokens, method=self.config.packing, seq_len=self.config.seq_len)
        packs = _spread(packed.packs, self.max_documents)
        key = np.random.SeedSequence(
            [self.seed % (1 << 64), state["pass"], state["rows"], self.rank]
        )
        seed = int(key.generate_state(1, np.uint64)[0])
        _, order = sample_to_pack(seed, np.arange(len(packs)), len(packs))
        return _Block(replace(packed, packs=packs), order, state, ledger)

    def _check_pass(self, ledger: Ledger) -> None:
        """Raise DataError where another pass is of no use."""
        ledger.check(self.name, ledger.rows_read, self.config.max_bad_rows_pct)
        if not ledger.examples:
            raise DataError(
                f"{self.name}: none of {ledger.rows_read} rows can be trained on "
                f"({ledger.excluded_rows} excluded, {ledger.overlong_dropped} longer than "
                f"data.seq_len={self.config.seq_len}, {ledger.without_labels} without labels)"
            )


@dataclass(frozen=True)
class _PackedRow:
    """A row to train on."""

    documents: list[tuple[np.ndarray, np.ndarray]]
    number: int
    """Its place among the packed rows of the block, before they were shuffled."""
    state: dict[str, int]
    """The stream's behind it."""
    ledger: Ledger


class _MicroBatches(IterableDataset[tuple[Batch, dict[str, int], Ledger] | DataError]):
    """Micro-batches with the state behind them and the ledger; what goes wrong is the last item.

    So an error comes out of a worker process as it is, without a traceback in its text.
    """

    def __init__(
        self, stream: _Stream, micro_batch_size: int, pad_token_id: int, state: dict[str, int]
    ) -> None:
        self._stream, self._state = stream, state
        self._micro_batch_size, self._pad_token_id = micro_batch_size, pad_token_id

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int], Ledger] | DataError]:
        rows = self._packed_rows()
        try:
            while True:
                taken = list(itertools.islice(rows, self._micro_batch_size))
                batch = assemble(
                    [row.documents for row in taken],
                    np.array([row.number for row in taken]),
                    seq_len=self._stream.config.seq_len,
                    pad_token_id=self._pad_token_id,
                    # One more per row than its documents: the padding behind them.
                    max_documents=len(taken) * (self._stream.max_documents + 1),
                )
                yield batch, taken[-1].state, taken[-1].ledger
        except DataError as error:
            yield error

    def _packed_rows(self) -> Iterator[_PackedRow]:
        blocks = self._stream.blocks(self._state)
        done = self._state["packs"]
        ahead = ThreadPoolExecutor(1)
        try:
            upcoming = ahead.submit(next, blocks)
            while True:
                block = upcoming.result()
                if done and (
                    {**block.state, "packs": done} != self._state or done > len(block.order)
                ):
                    raise DataError(
                        f"{self._stream.name}: the rows behind the first {self._state['rows']} of "
                        f"rank {self._stream.rank} are not those of the checkpoint; bring the data "
                        "back as it was, or start anew"
                    )
                upcoming = ahead.submit(next, blocks)
                packed = block.packed
                for place in range(done, len(block.order)):
                    number = int(block.order[place])
                    documents = packed.packs.documents(number)
                    yield _PackedRow(
                        [packed.documents.example(document) for document in documents],
                        number,
                        {**block.state, "packs": place + 1},
                        block.ledger,
                    )
                done = 0
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)


def _spread(packs: Packs, most: int) -> Packs:
    """The same documents in the same order, at most `most` of them in a row."""
    starts = [range(a, b, most) for a, b in itertools.pairwise(packs.offsets.tolist())]
    return Packs(packs.document_ids, np.array([*itertools.chain(*starts), len(packs.document_ids)]))
