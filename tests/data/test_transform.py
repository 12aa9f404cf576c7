"""A user's function of a row: what comes of it, where it is counted, and what identifies it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.embedded import build_tokenizer
from data.errors import DataError
from data.prepare import prepare_tokens, tokens_key
from data.sources import Source, load_rows
from data.store import open_tokens
from data.transform import Transform, transformed
from scripts.ledger import anything_left_out

_CONFIG = DataConfig(max_bad_rows_pct=0, seq_len=64)
_COUNT = 20


def to_messages(row: dict[str, Any]) -> dict[str, Any] | None:
    """Every fourth row is left out; it may change what it is given."""
    number = row.pop("number")
    if number % 4 == 0:
        return None
    turns = [("user", f"{number}?"), ("assistant", "yes" * number)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def fails(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["question"]}


def returns_text(row: dict[str, Any]) -> Any:
    return str(row)


def _numbers(tmp_path: Path) -> Source:
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(f'{{"number": {n}}}\n' for n in range(_COUNT)))
    return load_rows(DataConfig(path=str(file)), "train", cache_dir=tmp_path)


def test_rows_are_changed_before_their_columns_are_looked_at(tmp_path: Path) -> None:
    source = transformed(_numbers(tmp_path), Transform("own.fn", to_messages, "1"))
    folder = prepare_tokens(source, build_tokenizer(), _CONFIG, cache_dir=tmp_path)

    store = open_tokens(folder)
    ledger = store.meta["ledger"]
    assert len(store) == ledger["rows_used"] == _COUNT * 3 // 4
    # Left out on purpose: counted, and none of the bad rows, of which not one was allowed.
    left_out = {"left out by data.transform": {"rows": 5, "first": [0, 4, 8, 12, 16]}}
    assert ledger["excluded"] == left_out
    assert anything_left_out(ledger)
    text = build_tokenizer().decode(store.example(0)[0])
    assert "1?" in text and "yes" in text


def test_the_tokens_are_those_of_the_function_and_its_source(tmp_path: Path) -> None:
    plain, tokenizer = _numbers(tmp_path), build_tokenizer()
    transform = Transform("own.fn", to_messages, "1")
    sources = [
        plain,
        transformed(plain, transform),
        transformed(plain, replace(transform, digest="2")),
        transformed(plain, replace(transform, name="own.other")),
    ]
    keys = {str(tokens_key(source, tokenizer, _CONFIG)) for source in sources}
    assert len(keys) == len(sources)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (fails, r"numbers.jsonl: row 3: data.transform own.fn failed \(KeyError: 'question'\)"),
        (returns_text, r"row 3: data.transform own.fn returned a str; it must return a dict or No"),
        (lambda row: row, "cannot be sent to the processes that tokenise; define it with def"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(
    tmp_path: Path, function: Any, line: str
) -> None:
    with pytest.raises(DataError, match=line):
        transformed(_numbers(tmp_path), Transform("own.fn", function, "1")).rows[3]
