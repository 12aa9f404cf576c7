"""Conversations into rows of fixed length, and the order in which the rows are visited.

Both are pure functions of numbers (lengths; seed and sample index), so every rank computes the same
without talking to another, and a run resumes from a single integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.errors import DataError

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Packs:
    """Which documents share a row: row p holds document_ids[offsets[p]:offsets[p + 1]]."""

    document_ids: np.ndarray
    """int64 [documents]: each document once, ascending within a row."""

    offsets: np.ndarray
    """int64 [rows + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def documents(self, pack: int) -> np.ndarray:
        """The documents of one row."""
        return self.document_ids[self.offsets[pack] : self.offsets[pack + 1]]

    def of(self, group: int) -> Packs:
        """The packs of documents of which each one here stands for a `group` of neighbours."""
        ids = self.document_ids[:, None] * group + np.arange(group)
        return Packs(ids.ravel(), self.offsets * group)

    @property
    def max_documents(self) -> int:
        """The most documents any row holds."""
        return int(np.diff(self.offsets).max())


def pack(
    lengths: np.ndarray,
    *,
    seq_len: int,
    method: Literal["best_fit", "none"] = "best_fit",
    window: int = 1 << 20,
) -> Packs:
    """Assign whole documents of `lengths` tokens to rows of `seq_len` tokens.

    best_fit is best-fit decreasing within every `window` documents: the longest first, each into
    the fullest row that still has room. none gives each document a row of its own. Raises DataError
    for a length outside 1..seq_len, or if there is nothing to pack.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        raise DataError("there are no examples to pack")
    if lengths.min() < 1 or lengths.max() > seq_len:
        bad = int(np.flatnonzero((lengths < 1) | (lengths > seq_len))[0])
        raise DataError(
            f"example {bad} has {lengths[bad]} tokens, outside 1..{seq_len}; raise data.seq_len"
        )
    if method == "none":
        return Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    for first in range(0, len(lengths), window):
        part = slice(first, first + window)
        row_of[part], used = _best_fit_decreasing(lengths[part], seq_len)
        row_of[part] += rows
        rows += used
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Packs(np.argsort(row_of, kind="stable"), offsets)


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """(row of every document, number of rows).

    Documents of one length are placed together. The fullest row with room for one of them stays the
    fullest until it has no room left, so each row takes room // length of them at a stroke, and the
    work depends on the number of distinct lengths and rooms, not on the number of documents.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows, by tokens still free
    free = 0  # bit r is set if by_room[r] holds a row: finds the next room in one operation
    rows = done = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = free >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                each = room // size
                candidates = by_room[room]
                taken = candidates[: -(-count // each)]
                del candidates[: len(taken)]
                if not candidates:
                    free &= ~(1 << room)
            else:
                room = seq_len
                each = room // size
                taken = list(range(rows, rows + -(-count // each)))
                rows += len(taken)
            placed = min(count, each * len(taken))
            row_of[order[done : done + placed]] = np.repeat(taken, each)[:placed]
            # The last row may have got fewer than the others.
            last = placed - each * (len(taken) - 1)
            for left, group in (room - size * each, taken[:-1]), (room - size * last, taken[-1:]):
                if left and group:
                    by_room[left].extend(group)
                    free |= 1 << left
            done += placed
            count -= placed
    return row_of, rows


def sample_to_pack(
    seed: int, samples: np.ndarray, num_packs: int, *, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, row) of global sample indices, both int64, elementwise.

    Sample g belongs to epoch g // num_packs, and every epoch visits each row once, in an order of
    its own. The order is a keyed permutation computed per element (a Feistel network walked until
    it lands inside the range), so no list of rows is ever shuffled or stored.
    """
    epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), num_packs)
    if not shuffle:
        return epochs, places
    half_bits = np.uint64(max(1, -(-(num_packs - 1).bit_length() // 2)))
    low = np.uint64((1 << int(half_bits)) - 1)
    keys = _mix(
        _mix(np.full(epochs.shape, seed & int(_MASK), np.uint64)) ^ epochs.astype(np.uint64)
    )
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & low
        for number in range(_FEISTEL_ROUNDS):
            # right has at most 32 bits, so every round adds to it from a range of its own.
            key = keys[outside] + np.uint64(number << 32)
            left, right = right, left ^ (_mix(right + key) & low)
        values[outside] = (left << half_bits) | right
        outside = values >= np.uint64(num_packs)
    return epochs, values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which each output bit depends on all input bits (SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap, as wanted
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
