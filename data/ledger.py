"""What became of every row and token of a source."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from data.errors import DataError

FILTERED = "left out by data.transform"  # as a reason; not a fault of the row
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
    """Rows left out because they, or all examples of them that have labels, are too long."""

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

    stripped_reasoning_tokens: int = 0
    """The tokens of that reasoning."""

    @property
    def excluded_rows(self) -> int:
        return sum(entry["rows"] for entry in self.excluded.values())

    def exclude(self, row: int, reason: str) -> None:
        entry = self.excluded.setdefault(reason, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < _EXAMPLES_SHOWN:
            entry["first"].append(row)

    def add(self, other: Ledger) -> None:
        """Count in what became of later rows of the same source."""
        for item in fields(self):
            if item.name != "excluded":
                total = getattr(self, item.name) + getattr(other, item.name)
                setattr(self, item.name, total)
        for reason, entry in other.excluded.items():
            mine = self.excluded.setdefault(reason, {"rows": 0, "first": []})
            mine["rows"] += entry["rows"]
            mine["first"] = (mine["first"] + entry["first"])[:_EXAMPLES_SHOWN]

    def check(self, name: str, total_rows: int, max_bad_rows_pct: float) -> None:
        """Raise DataError if more than `max_bad_rows_pct` of `total_rows` are excluded, but for what a transform leaves out."""
        bad = {reason: entry for reason, entry in self.excluded.items() if reason != FILTERED}
        bad_rows = sum(entry["rows"] for entry in bad.values())
        if bad_rows <= total_rows * max_bad_rows_pct / 100:
            return
        reasons = "; ".join(
            f"{entry['rows']} {reason} (rows {', '.join(map(str, entry['first']))})"
            for reason, entry in sorted(bad.items(), key=lambda item: -item[1]["rows"])
        )
        raise DataError(
            f"{name}: {bad_rows} of {total_rows} rows cannot be used so far, more than "
            f"data.max_bad_rows_pct={max_bad_rows_pct:g}: {reasons}; mend the rows or raise the limit"
        )


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Counts of `lengths` (each at least 1) in ranges that double, from the shortest to the longest.

    Each is {"from", "to", "examples"}: examples of from..to tokens, both included.
    """
    # 1 | 2 | 3..4 | 5..8 | 9..16 | ...: range r ends at 2**r.
    ranges = np.ceil(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(ranges)
    return [
        {"from": 2**r // 2 + 1, "to": 2**r, "examples": int(counts[r])}
        for r in range(int(ranges.min()), len(counts))
    ]
