"""The ledger of a source for people: its counts in groups, and as a table of text."""

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
    """`ledger_rows` as aligned text."""
    rows = ledger_rows(source, ledger, seq_len=seq_len)
    most = max((count for group, _, count, _ in rows if group == "lengths"), default=1)
    shown, before = [], ""
    for group, name, count, note in rows:
        bar = "█" * -(-count * _BAR // most) if group == "lengths" else note
        shown.append((group if group != before else "", name, count, bar))
        before = group
    name_width = max(len(name) for _, name, _, _ in shown)
    count_width = max(len(f"{count:,}") for _, _, count, _ in shown)
    lines = [
        f"{group:<7}  {name:<{name_width}}  {count:>{count_width},}  {note}"
        for group, name, count, note in shown
    ]
    return "\n".join(printable(line.rstrip()) for line in lines)


def ledger_rows(
    source: str, ledger: dict[str, Any], *, seq_len: int
) -> list[tuple[str, str, int, str]]:
    """(group, name, count, note) of all that a ledger counts: rows, tokens, and after packing (`data.store.pack_store`) places and lengths. Each group of the first three adds up to its first line."""
    rows = [("rows", "read", ledger["rows_read"], f"from {source}")]
    for reason, entry in ledger["excluded"].items():
        first = ", ".join(map(str, entry["first"]))
        more = ", ..." if entry["rows"] > len(entry["first"]) else ""
        rows.append(("rows", "excluded", entry["rows"], f"{reason} (rows {first}{more})"))
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
    masked = ledger["tokens"] - ledger["supervised_tokens"]
    rows += [
        ("rows", "overlong", ledger["overlong_dropped"], f"longer than {seq_len} tokens, dropped"),
        ("rows", "without labels", ledger["without_labels"], "nothing to predict"),
        ("rows", "used", ledger["rows_used"], "; ".join(notes)),
        ("tokens", "read", ledger["tokens_read"], ""),
        ("tokens", "truncated", ledger["tokens_truncated"], "ends of overlong rows"),
        ("tokens", "dropped", ledger["tokens_dropped"], "overlong rows"),
        (
            "tokens",
            "without labels",
            ledger["tokens_without_labels"],
            "rows with nothing to predict",
        ),
        ("tokens", "masked", masked, "read by the model, not predicted"),
        ("tokens", "supervised", ledger["supervised_tokens"], "predicted"),
    ]
    if "packed_rows" not in ledger:  # a stream
        return rows
    return [
        *rows,
        ("packed", "places", ledger["packed_rows"] * seq_len, _packed(ledger, seq_len)),
        ("packed", "tokens", ledger["tokens"], "masked and supervised"),
        ("packed", "padding", ledger["padding_tokens"], "carries nothing"),
        *(
            ("lengths", f"{entry['from']:,}-{entry['to']:,}", entry["examples"], "")
            for entry in ledger["length_histogram"]
        ),
    ]


def _packed(ledger: dict[str, Any], seq_len: int) -> str:
    filled = 100 * ledger["tokens"] / (ledger["packed_rows"] * seq_len)
    return f"{ledger['packed_rows']:,} x {seq_len:,}, {filled:.1f} % full"
