"""Several packed sources as one endless sequence of packed rows, a pure function of seed and sample.

An epoch holds a fixed number of packed rows of every source, in an order of its own. Each source is
gone through in shuffled passes of its own: a source that gives fewer rows to an epoch than it has
goes on in the next epoch where it stopped, one that gives more begins again; no row comes back before
all others of its source have been seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from data.errors import DataError
from data.packing import sample_to_pack
from data.store import PackedStore


@dataclass(frozen=True)
class Mixture:
    """Packed sources, and how many packed rows each gives to an epoch."""

    sources: tuple[PackedStore, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        """Packed rows of an epoch."""
        return sum(self.counts)

    @property
    def max_documents(self) -> int:
        """The most documents any packed row holds."""
        return max(source.packs.max_documents for source in self.sources)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    def locate(
        self, seed: int, samples: np.ndarray, *, shuffle: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, source, packed row of that source) of global sample indices, all int64."""
        epochs, places = sample_to_pack(seed, samples, len(self), shuffle=shuffle)
        if len(self.sources) == 1:
            return epochs, np.zeros_like(places), places
        sources = np.searchsorted(self._ends, places, side="right")
        rows = np.empty_like(places)
        for number, (source, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            here = sources == number
            visits = epochs[here] * count + places[here] - (self._ends[number] - count)
            _, rows[here] = sample_to_pack(
                seed + number + 1, visits, len(source.packs), shuffle=shuffle
            )
        return epochs, sources, rows


def mix(
    sources: Sequence[PackedStore],
    weights: Sequence[float | None] = (None,),
    *,
    by: Literal["tokens", "rows"] = "tokens",
) -> Mixture:
    """Without weights an epoch is every packed row of every source, once.

    With them it is as long, but shares of its tokens (or of its rows, the source's own and not the
    packed ones) are as the weights. What a packed row of a source holds on average turns those into
    numbers of packed rows. Raises DataError for a weight too small for a single row, and for sources of pairs
    beside others.
    """
    groups = [source.documents.group for source in sources]
    if len({*groups}) > 1:
        names = [source.documents.meta["source"] for source in sources]
        raise DataError(
            f"data.sources: {names[groups.index(2)]} has pairs of answers and {names[groups.index(1)]} has none; "
            "no loss fits both: leave one out"
        )
    sizes = [len(source.packs) for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return Mixture(tuple(sources), tuple(sizes))
    unit = "tokens" if by == "tokens" else "rows_used"
    shares = [
        weight * size / source.ledger[unit]
        for weight, size, source in zip(given, sizes, sources, strict=True)
    ]
    total = sum(sizes)
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(rows) for rows in exact]
    # The rows that rounding down has left over go to the largest remainders.
    for number in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[
        : total - sum(counts)
    ]:
        counts[number] += 1
    for number, count in enumerate(counts):
        if count == 0:
            raise DataError(
                f"data.sources[{number}] ({sources[number].documents.meta['source']}): its weight "
                f"{given[number]:g} gives it not one of {total} packed rows of an epoch; raise it, "
                "or leave the source out"
            )
    return Mixture(tuple(sources), tuple(counts))
