"""Micro-batches of packed rows, in an order that no number of ranks can change.

Shapes: B micro_batch_size, S seq_len, M the most documents a micro-batch can hold.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.mixture import Mixture

IGNORE_INDEX = -100

Batch = dict[str, torch.Tensor]


class PackedBatches:
    """The micro-batches of one rank; iterate to get them from `start_sample` on.

    Each is a dict of CPU tensors; all shapes but that of label_positions are fixed:
        input_ids         int64 [B, S]
        labels            int64 [B, S]  at t the token at t + 1 of the same document, if the
                                        assistant wrote it; else IGNORE_INDEX
        position_ids      int64 [B, S]  restart with every document; padding counts as one
        document_offsets  int32 [M + 1] borders of the documents in the B * S flattened tokens,
                                        from 0; behind the last one B * S repeats
        label_positions   int64 [N]     where labels has one, in the flattened B * S
        row_tokens        int64 [B]     real tokens at the start of each row
        counts            int64 [4]     real tokens, padding tokens, labels, sum of the documents'
                                        squared lengths
        sample_index      int64 [B]     global sample of each row; -1 for a row of padding
        source            int64 [B]     which of the mixture's sources each row is of

    A global batch that starts at sample g gives row j of micro-batch m on rank r the sample
    g + (m * world_size + r) * micro_batch_size + j. Samples from `end_sample` on are rows of
    padding, so that all ranks take the same number of steps; without `end_sample` it never ends.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        micro_batch_size: int,
        pad_token_id: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        global_batch_size: int | None = None,
        start_sample: int = 0,
        end_sample: int | None = None,
        workers: int = 0,
    ) -> None:
        """Raises DataError if the batch sizes do not divide, or a global batch would repeat rows."""
        per_micro_step = micro_batch_size * world_size
        global_batch_size = global_batch_size or per_micro_step
        if global_batch_size % per_micro_step:
            below = global_batch_size // per_micro_step * per_micro_step
            nearest = " or ".join(str(n) for n in (below, below + per_micro_step) if n)
            raise DataError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
                f"{micro_batch_size} times {world_size} data-parallel ranks; the nearest are {nearest}"
            )
        repeats = end_sample is None or end_sample > len(mixture)
        if repeats and len(mixture) < global_batch_size:
            raise DataError(
                f"{len(mixture)} packed rows are fewer than global_batch_size={global_batch_size}, so "
                "a step would see some twice; lower it or data.seq_len, or give more data"
            )
        self.grad_accum_steps = global_batch_size // per_micro_step
        self.global_batch_size = global_batch_size
        self._steps = (
            None if end_sample is None else -(-(end_sample - start_sample) // global_batch_size)
        )
        self._workers = workers
        self._dataset = _MicroBatches(
            mixture,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            pad_token_id=pad_token_id,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            start_sample=start_sample,
            end_sample=end_sample,
        )

    def __len__(self) -> int:
        """Micro-batches in all; TypeError without an end_sample."""
        if self._steps is None:
            raise TypeError("without end_sample there is no end")
        return self._steps * self.grad_accum_steps

    def __iter__(self) -> Iterator[Batch]:
        numbers = itertools.count() if self._steps is None else range(len(self))
        loader = DataLoader(
            self._dataset,
            batch_size=None,  # each item is a micro-batch already
            sampler=numbers,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its draw must not move the global random state
        )
        # Worker processes read ahead by themselves.
        return iter(loader) if self._workers else read_ahead(loader, self.grad_accum_steps + 1)


def batch_digests(
    mixture: Mixture,
    *,
    seq_len: int,
    seed: int,
    start_sample: int,
    global_batch_size: int,
    count: int,
) -> list[str]:
    """SHA-256 over input_ids and labels of the `count` global batches from `start_sample` on.

    The same on any number of ranks: what a checkpoint says of the samples that come next.
    """
    batches = _MicroBatches(
        mixture,
        seq_len=seq_len,
        micro_batch_size=global_batch_size,
        pad_token_id=0,
        seed=seed,
        shuffle=True,
        rank=0,
        world_size=1,
        start_sample=start_sample,
        end_sample=None,
    )
    digests = []
    for number in range(count):
        batch = batches[number]
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes())
        digest.update(batch["labels"].numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def read_ahead(items: Iterable[Batch], depth: int) -> Iterator[Batch]:
    """The same items, of which a thread makes the next `depth` while one is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = deque(pool.submit(next, iterator, None) for _ in range(depth))
        while (item := upcoming.popleft().result()) is not None:
            upcoming.append(pool.submit(next, iterator, None))
            yield item


class _MicroBatches(Dataset[Batch]):
    """Micro-batch n of one rank, as a function of n."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        micro_batch_size: int,
        pad_token_id: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        start_sample: int,
        end_sample: int | None,
    ) -> None:
        self._mixture = mixture
        self._shape = micro_batch_size, seq_len
        self._pad_token_id = pad_token_id
        self._seed, self._shuffle = seed, shuffle
        self._first = start_sample + rank * micro_batch_size
        self._stride = micro_batch_size * world_size
        self._end = end_sample
        # One more per row than its documents: the padding behind them.
        self._max_documents = micro_batch_size * (mixture.max_documents + 1)

    def __getitem__(self, number: int) -> Batch:
        rows, seq_len = self._shape
        # Consecutive micro-batches of all ranks are consecutive samples, across steps as well.
        samples = self._first + number * self._stride + np.arange(rows)
        used = np.ones(rows, dtype=bool) if self._end is None else samples < self._end
        _, sources, places = self._mixture.locate(self._seed, samples, shuffle=self._shuffle)
        documents = []
        for source, place, real in zip(sources, places, used, strict=True):
            packed = self._mixture.sources[source]
            numbers = packed.packs.documents(place) if real else ()
            documents.append([packed.documents.example(number) for number in numbers])
        return assemble(
            documents,
            np.where(used, samples, -1),
            seq_len=seq_len,
            pad_token_id=self._pad_token_id,
            max_documents=self._max_documents,
            source=sources,
        )


def assemble(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    sample_index: np.ndarray,
    *,
    seq_len: int,
    pad_token_id: int,
    max_documents: int,
    source: np.ndarray | None = None,
) -> Batch:
    """The micro-batch of `rows`, each a list of documents as (input_ids, supervised).

    `max_documents` bounds the documents of the whole micro-batch, the padding behind each row
    counted as one. `source` is that of each row; without it all are of the first.
    """
    shape = len(rows), seq_len
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    row_tokens = np.zeros(len(rows), dtype=np.int64)
    borders = [0]
    squared_lengths = 0
    for row, documents in enumerate(rows):
        begin = 0
        for ids, supervised in documents:
            end = begin + len(ids)
            input_ids[row, begin:end] = ids
            labels[row, begin : end - 1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
            position_ids[row, begin:end] = np.arange(len(ids))
            borders.append(row * seq_len + end)
            begin = end
            squared_lengths += len(ids) ** 2
        row_tokens[row] = begin
        if begin < seq_len:
            position_ids[row, begin:] = np.arange(seq_len - begin)
            borders.append((row + 1) * seq_len)
    offsets = np.full(max_documents + 1, labels.size, dtype=np.int32)
    offsets[: len(borders)] = borders
    # Found here, where it costs no GPU a synchronisation.
    label_positions = np.flatnonzero(labels != IGNORE_INDEX)
    real_tokens = int(row_tokens.sum())
    counts = [real_tokens, labels.size - real_tokens, len(label_positions), squared_lengths]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "document_offsets": torch.from_numpy(offsets),
        "label_positions": torch.from_numpy(label_positions),
        "row_tokens": torch.from_numpy(row_tokens),
        "counts": torch.tensor(counts),
        "sample_index": torch.from_numpy(sample_index),
        "source": torch.from_numpy(np.zeros_like(sample_index) if source is None else source),
    }


def trim(batch: Batch, *, multiple: int = 64) -> Batch:
    """A micro-batch without the columns behind its longest row: for rows of one document, most of which are short.

    Rows [B, S] become [B, L], with L the longest row's tokens, rounded up to a `multiple` and at most S. What is cut is
    padding, so every token keeps its label and what it attends to.
    """
    rows, seq_len = batch["input_ids"].shape
    length = min(seq_len, max(1, -(-int(batch["row_tokens"].max()) // multiple)) * multiple)
    if length == seq_len:
        return batch
    part = {
        name: tensor[:, :length].contiguous() if tensor.shape == (rows, seq_len) else tensor
        for name, tensor in batch.items()
    }
    part["label_positions"] = (part["labels"].flatten() != IGNORE_INDEX).nonzero().flatten()
    offsets = batch["document_offsets"]
    row = (offsets - 1).clamp(min=0) // seq_len  # a border between two rows ends the first
    part["document_offsets"] = row * length + (offsets - row * seq_len).clamp(max=length)
    tokens, padding, *others = batch["counts"].tolist()
    part["counts"] = torch.tensor([tokens, padding - rows * (seq_len - length), *others])
    return _pinned_like(part, batch)


def slice_sequence(batch: Batch, rank: int, size: int) -> Batch:
    """What rank `rank` of `size` ranks that share every row (context parallelism) holds of a micro-batch.

    That is S / size consecutive tokens of each row: input_ids, labels and position_ids [B, S / size],
    and label_positions in these. Labels are shifted already, so no token needs its neighbour in another
    slice. The rest stays that of the whole rows. `size` divides S.
    """
    shape = batch["input_ids"].shape
    part = {
        name: tensor.chunk(size, dim=1)[rank].contiguous() if tensor.shape == shape else tensor
        for name, tensor in batch.items()
    }
    part["label_positions"] = (part["labels"].flatten() != IGNORE_INDEX).nonzero().flatten()
    return _pinned_like(part, batch)


def _pinned_like(part: Batch, batch: Batch) -> Batch:
    """A part of pinned memory need not be pinned itself, and the host waits where a copy to a GPU begins in other."""
    pinned = batch["input_ids"].is_pinned()
    return {name: tensor.pin_memory() if pinned else tensor for name, tensor in part.items()}
