"""The ledger: every row and token is somewhere, and the table says where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.embedded import build_tokenizer
from data.ledger import length_histogram
from data.prepare import prepare_tokens
from data.sources import load_rows
from data.store import open_tokens, pack_store
from scripts.command_line import printable
from scripts.ledger import anything_left_out, ledger_table
from tests.support.job import train
from tests.support.tiny import write_chat

SEQ_LEN = 40


def _ledger(file: Path, overlong: str) -> dict:
    config = DataConfig(path=str(file), seq_len=SEQ_LEN, overlong=overlong, max_bad_rows_pct=100)
    source = load_rows(config, "train", cache_dir=file.parent)
    tokens = open_tokens(prepare_tokens(source, build_tokenizer(), config, cache_dir=file.parent))
    return pack_store(tokens, method="best_fit", seq_len=SEQ_LEN).ledger


@pytest.fixture
def untidy(tmp_path: Path) -> Path:
    """40 good rows, some of them long; two bad ones; one whose question alone fills a row."""
    file = write_chat(tmp_path / "untidy.jsonl", count=40)
    question = {"role": "user", "content": "What is 40 + 4? " * 20}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "44"}]},
        {"messages": []},
        {"messages": [question, {"role": "assistant", "content": "<|im_end|>"}]},
    ]
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_rows_and_tokens_add_up(untidy: Path, overlong: str) -> None:
    ledger = _ledger(untidy, overlong)
    excluded = sum(entry["rows"] for entry in ledger["excluded"].values())
    assert (ledger["rows_read"], excluded) == (43, 2)
    assert ledger["without_labels"] == (overlong == "truncate")
    kept = ledger["rows_used"] + ledger["overlong_dropped"] + ledger["without_labels"]
    assert kept + excluded == ledger["rows_read"]
    used = ledger["masked_tokens"] + ledger["supervised_tokens"]
    left = ["tokens_truncated", "tokens_dropped", "tokens_without_labels"]
    assert used + sum(ledger[name] for name in left) == ledger["tokens_read"]
    assert used + ledger["padding_tokens"] == ledger["packed_rows"] * SEQ_LEN
    assert sum(entry["examples"] for entry in ledger["length_histogram"]) == ledger["examples"]
    assert json.loads(json.dumps(ledger)) == ledger


def test_the_table_shows_each_number_beside_its_reason(untidy: Path) -> None:
    ledger = _ledger(untidy, "drop")
    lines = ledger_table("untidy.jsonl", ledger, seq_len=SEQ_LEN).splitlines()
    assert lines[0].split() == ["rows", "read", "43", "from", "untidy.jsonl"]
    (control,) = [line for line in lines if "control token in text" in line]
    assert control.split()[:2] == ["excluded", "1"]
    assert control.endswith("(rows 42)")
    (dropped,) = [line for line in lines if line.endswith("tokens, dropped")]
    assert dropped.split()[:2] == ["overlong", str(ledger["overlong_dropped"])]
    (supervised,) = [line for line in lines if line.split()[0] == "supervised"]
    assert supervised.split()[1] == str(ledger["supervised_tokens"])
    assert max(line.count("█") for line in lines) == 30


@pytest.mark.distributed
def test_a_run_that_leaves_rows_out_shows_the_table_and_records_the_numbers(
    untidy: Path, cache_dir: Path, tmp_path: Path
) -> None:
    given = [f"--data.path={untidy}", f"--data.seq_len={SEQ_LEN}", "--data.max_bad_rows_pct=10"]
    quick = ["--steps=1", "--global_batch_size=2", "--checkpoint.export=false"]
    run = tmp_path / "run"
    result = train([*given, *quick], 1, cache_dir=cache_dir, output_dir=run)
    assert result.returncode == 0, result.output
    ledger = _ledger(untidy, "drop")
    assert ledger_table(str(untidy), ledger, seq_len=SEQ_LEN) in result.stdout
    (source,) = json.loads((run / "run.json").read_text())["data"]["sources"]
    assert source["ledger"] == ledger


def test_control_characters_of_a_reason_are_escaped() -> None:
    ledger = _ledger_of_one_row() | {"excluded": {"it says \x1b[2J": {"rows": 1, "first": [0]}}}
    table = ledger_table("a\nfile", ledger, seq_len=8)
    assert "\x1b" not in table and "\\x1b[2J" in table and "a\\nfile" in table
    assert printable("é ​") == "é \\u200b"


def _ledger_of_one_row() -> dict:
    return {
        "rows_read": 1,
        "rows_used": 1,
        "excluded": {},
        "overlong_split": 0,
        "overlong_dropped": 0,
        "overlong_truncated": 0,
        "without_labels": 0,
        "examples": 1,
        "stripped_reasoning_turns": 0,
        "tokens_read": 5,
        "tokens": 5,
        "tokens_truncated": 0,
        "tokens_dropped": 0,
        "tokens_without_labels": 0,
        "masked_tokens": 3,
        "supervised_tokens": 2,
        "packed_rows": 1,
        "padding_tokens": 3,
        "length_histogram": [{"from": 5, "to": 8, "examples": 1}],
    }


def test_only_what_is_not_trained_on_counts_as_left_out() -> None:
    ledger = _ledger_of_one_row()
    assert not anything_left_out(ledger)
    assert anything_left_out(ledger | {"rows_read": 2})
    assert anything_left_out(ledger | {"overlong_truncated": 1})
    assert anything_left_out(ledger | {"tokens_without_labels": 1})
    assert not anything_left_out(ledger | {"overlong_split": 1, "examples": 2})


def test_the_ranges_of_the_histogram_double() -> None:
    lengths = np.array([4, 5, 8, 9, 33], dtype=np.int32)
    assert length_histogram(lengths) == [
        {"from": 3, "to": 4, "examples": 1},
        {"from": 5, "to": 8, "examples": 2},
        {"from": 9, "to": 16, "examples": 1},
        {"from": 17, "to": 32, "examples": 0},
        {"from": 33, "to": 64, "examples": 1},
    ]
    assert length_histogram(np.array([1, 1], dtype=np.int32)) == [
        {"from": 1, "to": 1, "examples": 2}
    ]
