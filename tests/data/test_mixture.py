"""Several sources as one order: exact shares, nothing left out, the same for every number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import Mixture, mix
from data.packing import Packs
from data.store import PackedStore, TokenStore


def _source(rows: int, *, tokens: int = 100, examples: int | None = None, name: str = "s"):
    """A packed source of `rows` packed rows that hold `tokens` tokens each, on average."""
    examples = examples or rows
    offsets = np.linspace(0, rows * tokens, examples + 1).astype(np.int64)
    store = TokenStore(np.zeros(0, np.int32), np.zeros(0, np.uint8), offsets, {"source": name})
    borders = np.linspace(0, examples, rows + 1).astype(np.int64)
    ledger = {"tokens": rows * tokens, "rows_used": examples}
    return PackedStore(store, store, Packs(np.arange(examples), borders), ledger)


def _visits(mixture: Mixture, samples: int, seed: int = 3) -> list[tuple[int, int]]:
    _, sources, rows = mixture.locate(seed, np.arange(samples))
    return list(zip(sources.tolist(), rows.tolist(), strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**62))
def test_without_weights_an_epoch_is_every_row_once(sizes: list[int], seed: int) -> None:
    mixture = mix([_source(size) for size in sizes])
    every = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    visits = _visits(mixture, 3 * len(mixture), seed)
    for epoch in range(3):
        assert sorted(visits[epoch * len(every) : (epoch + 1) * len(every)]) == every
    epochs, _, _ = mixture.locate(seed, np.arange(3 * len(mixture)))
    assert epochs.tolist() == sorted([0, 1, 2] * len(every))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(5, 40), st.floats(0.1, 10)), min_size=2, max_size=4),
    st.integers(0, 2**62),
)
def test_no_row_comes_back_before_its_source_is_through(given_sources, seed: int) -> None:
    sizes, weights = zip(*given_sources, strict=True)
    try:
        mixture = mix([_source(size) for size in sizes], weights)
    except DataError:
        return
    assert len(mixture) == sum(sizes)
    visits = _visits(mixture, 5 * len(mixture), seed)
    for number, size in enumerate(sizes):
        # Within an epoch the rows of several passes stand in any order; over epochs all are even.
        seen = Counter(row for source, row in visits if source == number)
        counts = [seen[row] for row in range(size)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == 5 * mixture.counts[number]


def test_shares_are_of_tokens_or_of_rows() -> None:
    # Both have 100 packed rows; a packed row of the second holds half the tokens and 10 rows.
    sources = [_source(100, tokens=100), _source(100, tokens=50, examples=1000)]
    mixture = mix(sources, [1, 1], by="tokens")
    tokens = [count * size for count, size in zip(mixture.counts, (100, 50), strict=True)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)
    mixture = mix(sources, [1, 1], by="rows")
    rows = [count * size for count, size in zip(mixture.counts, (1, 10), strict=True)]
    assert rows[0] == pytest.approx(rows[1], rel=0.1)
    assert sum(mixture.counts) == 200


def test_weights_are_relative_and_rounding_is_even() -> None:
    sources = [_source(10), _source(10), _source(10)]
    assert mix(sources, [1, 1, 1]).counts == mix(sources, [7, 7, 7]).counts == (10, 10, 10)
    assert mix(sources, [2, 1, 1]).counts == (15, 8, 7)
    assert mix(sources, [3, 2, 1]).counts == (15, 10, 5)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    mixture = mix([_source(20), _source(30)], [1, 2])
    whole = _visits(mixture, 150)
    assert whole == _visits(mixture, 150)
    assert whole != _visits(mixture, 150, seed=4)
    assert whole[:50] != whole[50:100]
    # Asked for one by one, as ranks do, and all at once.
    one_by_one = [mixture.locate(3, np.array([g])) for g in range(60)]
    assert [(int(s[0]), int(r[0])) for _, s, r in one_by_one] == whole[:60]


def test_a_source_that_gets_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.sources\[1\] \(tiny\): its weight 0.001"):
        mix([_source(10), _source(5, name="tiny")], [1, 0.001])


def test_sources_are_mixed_within_an_epoch() -> None:
    sources = [source for source, _ in _visits(mix([_source(50), _source(50)]), 100)]
    changes = sum(a != b for a, b in itertools.pairwise(sources))
    assert 25 < changes < 75
