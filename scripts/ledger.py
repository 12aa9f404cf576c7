"""The ledger of a source as a table for people."""

from __future__ import annotations

from typing import Any

from scripts.command_line import printable

_BAR = 30  # characters of the longest bar


def anything_left_out(ledger: dict[str, Any]) -> bool:
    """Whether a row, or a part of one, is not trained on."""
    return (
        ledger["rows_used"] < ledger["rows_read"]
        or ledger["overlong_truncated"] > 0
        or ledger["tokens_without_labels"] > 0
    )


def ledger_table(source: str, ledger: dict[str, Any], *, seq_len: int) -> str:
    """A ledger after packing (`data.store.pack_store`) as aligned text: rows, tokens, lengths. Each group adds up to its first line."""
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
        notes.append(
            f"assistant turns without their reasoning, which the template strips: "
            f"{ledger['stripped_reasoning_turns']:,} ({ledger['stripped_reasoning_tokens']:,} tokens; "
            "data.expand_turns trains on them)"
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
