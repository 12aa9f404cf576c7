"""What became of every row and token of a source: the numbers of run.json, and a table for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.packing import Packs
from data.store import TokenStore
from scripts.command_line import printable

_BAR = 30  # characters of the longest bar


def complete_ledger(tokens: TokenStore, packs: Packs, *, seq_len: int) -> dict[str, Any]:
    """The store's ledger, with what is known after packing.

    packed_rows       rows of `seq_len` tokens
    masked_tokens     tokens of examples that carry no label
    padding_tokens    what the packed rows hold besides `tokens`
    length_histogram  [{"from", "to", "examples"}]: examples of from..to tokens, both included;
                      each range ends at twice the end of the one before
    """
    ledger = tokens.meta["ledger"]
    return {
        **ledger,
        "packed_rows": len(packs),
        "masked_tokens": ledger["tokens"] - ledger["supervised_tokens"],
        "padding_tokens": len(packs) * seq_len - ledger["tokens"],
        "length_histogram": length_histogram(tokens.lengths),
    }


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Counts of `lengths` (each at least 1) in ranges that double, from the shortest to the longest."""
    # 1 | 2 | 3..4 | 5..8 | 9..16 | ...: range r ends at 2**r.
    ranges = np.ceil(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(ranges)
    return [
        {"from": 2**r // 2 + 1, "to": 2**r, "examples": int(counts[r])}
        for r in range(int(ranges.min()), len(counts))
    ]


def anything_left_out(ledger: dict[str, Any]) -> bool:
    """Whether a row, or a part of one, is not trained on."""
    return (
        ledger["rows_used"] < ledger["rows_read"]
        or ledger["overlong_truncated"] > 0
        or ledger["tokens_without_labels"] > 0
    )


def ledger_table(source: str, ledger: dict[str, Any], *, seq_len: int) -> str:
    """A `complete_ledger` as aligned text: rows, tokens, lengths. Each group adds up to its first line."""
    rows = [("rows", "read", ledger["rows_read"], f"from {source}")]
    for reason, entry in ledger["excluded"].items():
        first = ", ".join(map(str, entry["first"]))
        more = ", ..." if entry["rows"] > len(entry["first"]) else ""
        rows.append(("", "excluded", entry["rows"], f"{reason} (rows {first}{more})"))
    notes = []
    if ledger["overlong_split"]:
        notes.append(f"{ledger['overlong_split']:,} of them split, {ledger['examples']:,} in all")
    if ledger["overlong_truncated"]:
        notes.append(f"{ledger['overlong_truncated']:,} of them truncated")
    if ledger["stripped_reasoning_turns"]:
        turns = ledger["stripped_reasoning_turns"]
        notes.append(
            f"assistant turns without their reasoning, which the template strips: {turns:,}"
        )
    rows += [
        ("", "overlong", ledger["overlong_dropped"], f"longer than {seq_len} tokens, dropped"),
        ("", "without labels", ledger["without_labels"], "nothing to predict"),
        ("", "used", ledger["rows_used"], "; ".join(notes)),
        ("tokens", "read", ledger["tokens_read"], ""),
        ("", "truncated", ledger["tokens_truncated"], "ends of overlong rows"),
        ("", "dropped", ledger["tokens_dropped"], "overlong rows"),
        ("", "without labels", ledger["tokens_without_labels"], "rows with nothing to predict"),
        ("", "masked", ledger["masked_tokens"], "read by the model, not predicted"),
        ("", "supervised", ledger["supervised_tokens"], "predicted"),
        ("packed", "places", ledger["packed_rows"] * seq_len, _packed(ledger, seq_len)),
        ("", "tokens", ledger["tokens"], "masked and supervised"),
        ("", "padding", ledger["padding_tokens"], "carries nothing"),
    ]
    most = max(entry["examples"] for entry in ledger["length_histogram"])
    for number, entry in enumerate(ledger["length_histogram"]):
        bar = "█" * -(-entry["examples"] * _BAR // most)
        span = f"{entry['from']:,}-{entry['to']:,}"
        rows.append(("" if number else "lengths", span, entry["examples"], bar))
    name_width = max(len(name) for _, name, _, _ in rows)
    count_width = max(len(f"{count:,}") for _, _, count, _ in rows)
    lines = [
        f"{group:<7}  {name:<{name_width}}  {count:>{count_width},}  {note}"
        for group, name, count, note in rows
    ]
    return "\n".join(printable(line.rstrip()) for line in lines)


def _packed(ledger: dict[str, Any], seq_len: int) -> str:
    filled = 100 * ledger["tokens"] / (ledger["packed_rows"] * seq_len)
    return f"{ledger['packed_rows']:,} x {seq_len:,}, {filled:.1f} % full"
