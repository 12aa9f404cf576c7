"""Packing loses nothing and repeats itself; the order is a permutation of every epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.packing import Packs, pack, sample_to_pack

lengths_and_seq_len = st.integers(1, 64).flatmap(
    lambda seq_len: st.tuples(
        st.lists(st.integers(1, seq_len), min_size=1, max_size=200), st.just(seq_len)
    )
)


def _row_lengths(lengths: np.ndarray, packs: Packs) -> np.ndarray:
    return np.add.reduceat(lengths[packs.document_ids], packs.offsets[:-1])


@given(lengths_and_seq_len, st.sampled_from([1, 7, 1000]), st.sampled_from(["best_fit", "none"]))
def test_each_document_is_in_exactly_one_row_and_no_row_is_too_long(case, window, method) -> None:
    lengths, seq_len = np.array(case[0]), case[1]
    packs = pack(lengths, seq_len=seq_len, method=method, window=window)
    assert sorted(packs.document_ids.tolist()) == list(range(len(lengths)))
    assert packs.offsets[0] == 0 and packs.offsets[-1] == len(lengths)
    assert np.diff(packs.offsets).min() >= 1
    assert _row_lengths(lengths, packs).max() <= seq_len
    assert packs.max_documents == max(len(packs.documents(row)) for row in range(len(packs)))
    again = pack(lengths.copy(), seq_len=seq_len, method=method, window=window)
    assert np.array_equal(packs.document_ids, again.document_ids)
    assert np.array_equal(packs.offsets, again.offsets)


@given(lengths_and_seq_len)
def test_it_is_best_fit_decreasing(case) -> None:
    """As many rows, filled alike, as the textbook's one document after the other."""
    lengths, seq_len = case
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(seq_len - length)
    packed = _row_lengths(np.array(lengths), pack(np.array(lengths), seq_len=seq_len))
    assert sorted(seq_len - packed) == sorted(rooms)


def test_a_heavy_tailed_chat_set_fills_its_rows_in_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.1, 200_000).astype(int)
    lengths = lengths.clip(8, 4096)
    start = time.perf_counter()
    packs = pack(lengths, seq_len=4096)
    assert time.perf_counter() - start < 5
    assert lengths.sum() / (len(packs) * 4096) >= 0.98


@pytest.mark.parametrize(("lengths", "message"), [([], "no examples"), ([3, 9], "example 1 has 9")])
def test_what_cannot_be_packed_is_an_error(lengths: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(np.array(lengths, dtype=int), seq_len=8)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(1, 300), st.integers(0, 10**6))
def test_every_epoch_visits_each_row_once(seed: int, rows: int, epoch: int) -> None:
    samples = np.arange(epoch * rows, (epoch + 1) * rows)
    epochs, packs = sample_to_pack(seed, samples, rows)
    assert (epochs == epoch).all()
    assert sorted(packs.tolist()) == list(range(rows))
    one_by_one = [int(sample_to_pack(seed, np.array([g]), rows)[1][0]) for g in samples[:20]]
    assert one_by_one == packs[:20].tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    _, packs = sample_to_pack(0, np.arange(3000), 1000)
    first, second, third = packs.reshape(3, 1000)
    _, other = sample_to_pack(1, np.arange(1000), 1000)
    orders = [np.arange(1000), first, second, third, other]
    for i, one in enumerate(orders):
        for another in orders[:i]:
            # Two independent orders of 1,000 rows agree in one place on average.
            assert (one == another).sum() < 12
            assert abs(np.corrcoef(one, another)[0, 1]) < 0.15
    assert not np.array_equal(np.diff(first), np.diff(second))


def test_without_shuffling_the_order_is_that_of_the_rows() -> None:
    epochs, packs = sample_to_pack(5, np.arange(6), 4, shuffle=False)
    assert epochs.tolist() == [0, 0, 0, 0, 1, 1]
    assert packs.tolist() == [0, 1, 2, 3, 0, 1]
