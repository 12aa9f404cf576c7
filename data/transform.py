"""A user's own function of a row, applied before the row is tokenised."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data.errors import DataError
from data.files import BrokenRow, Row
from data.ledger import FILTERED
from data.sources import Source


class FilteredRow(BrokenRow):
    """What stands for a row that a transform leaves out."""

    reason = FILTERED


@dataclass(frozen=True)
class Transform:
    """A function that returns what a row becomes, or None to leave it out; the same for the same row."""

    name: str
    function: Callable[[Row], Row | None]
    digest: str
    """Changes when what the function does may have."""

    def apply(self, row: Row, place: str) -> Row:
        """What the row at `place` becomes; raises DataError if the function fails."""
        if isinstance(row, BrokenRow):
            return row
        try:
            # A copy: the function may change what it is given, and be called again.
            result = self.function(dict(row))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{place}: data.transform {self.name} failed ({reason}); return None to leave a row out"
            ) from error
        if result is None:
            return FilteredRow()
        if not isinstance(result, dict):
            raise DataError(
                f"{place}: data.transform {self.name} returned a {type(result).__name__}; it must return a dict or None"
            )
        return result


class TransformedRows(Sequence[Row]):
    """Rows changed when they are asked for: no column of theirs is known beforehand."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self._rows, self._name, self._transform = source.rows, source.name, transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._transform.apply(self._rows[index], f"{self._name}: row {index}")


def transformed(source: Source, transform: Transform) -> Source:
    """The same source with every row changed.

    Raises DataError for a function that no other process can be sent: one that is not at the top of a module.
    """
    try:
        pickle.dumps(transform)
    except Exception as error:
        raise DataError(
            f"data.transform {transform.name} cannot be sent to the processes that tokenise; "
            "define it with def at the top of its module"
        ) from error
    return replace(
        source,
        fingerprint=f"{source.fingerprint}/transform/{transform.name}/{transform.digest}",
        load=partial(TransformedRows, source, transform),
    )


def transform_stream(
    rows: Iterator[Row], transform: Transform, *, name: str, numbers: Iterator[int]
) -> Iterator[Row]:
    """The same for rows that are read while training; `numbers` are theirs in the source."""
    for row, number in zip(rows, numbers, strict=False):
        yield transform.apply(row, f"{name}: row {number}")
