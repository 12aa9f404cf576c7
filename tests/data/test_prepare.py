"""Prepared tokens: every row accounted for, written once, whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data.prepare
from data import embedded
from data.chat import Encoded, encode_conversations
from data.config import DataConfig
from data.errors import DataError
from data.ledger import Ledger
from data.mixture import mix
from data.prepare import PART_ROWS, Task, new_task, prepare_tokens, write_parts
from data.sources import Source, load_rows, stream_rows
from data.store import open_tokens, pack_store

CONFIG = DataConfig(seq_len=64, max_bad_rows_pct=100)


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.build_tokenizer()


def _row(answer: Any, question: str = "q") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _source(rows: Sequence[dict[str, Any]], fingerprint: str = "rows") -> Source:
    return Source("memory", None, fingerprint, lambda: rows)


def _unfinished(cache_dir: Path) -> list[Path]:
    """Everything but locks, which stay, and the folders of finished things."""
    return [path for path in cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]


def _ledger(folder: Path) -> Ledger:
    return Ledger(**json.loads((folder / "meta.json").read_text())["ledger"])


LONG = "z " * 200
MIXED = [_row("fine"), _row(""), _row("good"), _row(LONG), _row(None), _row("a", LONG)]


def test_the_store_gives_back_what_was_encoded(tokenizer, cache_dir: Path) -> None:
    rows = [row for row in MIXED if row["messages"][1]["content"] in ("fine", "good")]
    store = open_tokens(prepare_tokens(_source(MIXED), tokenizer, CONFIG, cache_dir=cache_dir))
    encoded = list(encode_conversations(rows, tokenizer))
    assert len(store) == len(encoded) == 2
    for index, expected in enumerate(encoded):
        assert isinstance(expected, Encoded)
        ids, supervised = store.example(index)
        assert ids.tolist() == expected.input_ids.tolist()
        assert supervised.tolist() == expected.supervised.tolist()
        assert supervised.dtype == bool and ids.dtype == np.int32
    assert store.lengths.tolist() == [len(result.input_ids) for result in encoded]
    assert store.lengths.dtype == np.int32


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_the_ledger_accounts_for_every_row_and_token(tokenizer, cache_dir, overlong) -> None:
    config = replace(CONFIG, overlong=overlong)
    folder = prepare_tokens(_source(MIXED), tokenizer, config, cache_dir=cache_dir)
    ledger, store = _ledger(folder), open_tokens(folder)
    excluded = {
        "content is empty": {"rows": 1, "first": [1]},
        "content is missing": {"rows": 1, "first": [4]},
    }
    assert ledger.excluded == excluded
    assert ledger.rows_read == len(MIXED)
    assert ledger.rows_read == (
        ledger.excluded_rows + ledger.overlong_dropped + ledger.without_labels + ledger.rows_used
    )
    assert ledger.tokens_read == (
        ledger.tokens
        + ledger.tokens_dropped
        + ledger.tokens_truncated
        + ledger.tokens_without_labels
    )
    read = [r for r in encode_conversations(MIXED, tokenizer) if isinstance(r, Encoded)]
    assert ledger.tokens_read == sum(len(result.input_ids) for result in read)
    assert ledger.examples == len(store)
    assert ledger.tokens == store.lengths.sum()
    labels = sum(int(store.example(i)[1][1:].sum()) for i in range(len(store)))
    assert ledger.supervised_tokens == labels
    # The last row is cut before its answer: it has nothing to learn from, and is no example.
    counts = {
        "drop": ledger.overlong_dropped,
        "truncate": ledger.overlong_truncated,
        "split": ledger.overlong_split,
    }
    expected = {"drop": (2, 0, 2), "truncate": (1, 1, 3), "split": (2, 0, 4)}[overlong]
    assert (counts.pop(overlong), ledger.without_labels, ledger.rows_used) == expected
    assert set(counts.values()) == {0}
    assert store.lengths.max() <= config.seq_len


def test_only_the_last_turn_is_trained_on_where_asked(tokenizer, cache_dir: Path) -> None:
    silent = _row("never")
    silent["messages"][1]["train"] = False
    rows = [{"messages": _row("one")["messages"] + _row("two")["messages"]}, silent]
    config = replace(CONFIG, train_on="last")
    folder = prepare_tokens(_source(rows), tokenizer, config, cache_dir=cache_dir)
    (ids, supervised), ledger = open_tokens(folder).example(0), _ledger(folder)
    assert tokenizer.decode(ids[supervised].tolist()) == "two<|im_end|>"
    assert (ledger.examples, ledger.without_labels) == (1, 1)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(2, 9),
)
def test_splitting_loses_and_repeats_no_token(tokenizer, marks: list[list[bool]], seq_len) -> None:
    """Every label is kept but those of a piece's first token, and pieces without labels."""
    rows, expected, next_id, split_rows = [], [], 3, 0
    for row in marks:
        ids = list(range(next_id, next_id + len(row)))
        next_id += len(row)
        labels = [i if mark else -100 for i, mark in zip(ids, row, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
        examples_before = len(expected)
        for start in range(0, len(row), seq_len):
            piece = row[start : start + seq_len]
            if any(piece[1:]):
                expected.append((ids[start : start + seq_len], piece))
        split_rows += len(row) > seq_len and len(expected) > examples_before
    assume(expected)
    config = replace(CONFIG, seq_len=seq_len, overlong="split")
    with tempfile.TemporaryDirectory() as folder:
        store = open_tokens(prepare_tokens(_source(rows), tokenizer, config, cache_dir=folder))
        found = [store.example(index) for index in range(len(store))]
        assert [(ids.tolist(), marks.tolist()) for ids, marks in found] == expected
    ledger = Ledger(**store.meta["ledger"])
    assert ledger.tokens + ledger.tokens_without_labels == ledger.tokens_read == next_id - 3
    assert ledger.overlong_split == split_rows


def test_overlong_can_be_an_error(tokenizer, cache_dir: Path) -> None:
    config = replace(CONFIG, overlong="error")
    with pytest.raises(DataError, match=r"row 3 has \d+ tokens, more than data.seq_len=64"):
        prepare_tokens(_source(MIXED), tokenizer, config, cache_dir=cache_dir)
    assert _unfinished(cache_dir) == []


def test_too_many_bad_rows_stop_with_examples_also_when_prepared(tokenizer, cache_dir) -> None:
    rows = [_row("fine")] * 97 + [_row(""), _row(None), _row(3)]
    limit = replace(CONFIG, max_bad_rows_pct=2.0)
    message = r"3 of 100 rows .* 1 content is empty \(rows 97\).* 1 content is not a string"
    with pytest.raises(DataError, match=message):
        prepare_tokens(_source(rows), tokenizer, limit, cache_dir=cache_dir)
    allowed = replace(CONFIG, max_bad_rows_pct=3.0)
    prepare_tokens(_source(rows), tokenizer, allowed, cache_dir=cache_dir)
    with pytest.raises(DataError, match=message):
        prepare_tokens(_source(rows), tokenizer, limit, cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "memory: no rows"),
        ([{"body": "a", "id": 1}], "memory: the columns body, id fit no format"),
        ([_row("")] * 3, "none of 3 rows can be trained on .3 excluded"),
        ([_row(LONG)], "none of 1 rows .* 1 longer than data.seq_len=64"),
    ],
)
def test_nothing_to_train_on_is_an_error(tokenizer, cache_dir, rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_tokens(_source(rows), tokenizer, CONFIG, cache_dir=cache_dir)


def test_a_warm_folder_reads_no_rows(tokenizer, cache_dir: Path) -> None:
    folder = prepare_tokens(_source(MIXED), tokenizer, CONFIG, cache_dir=cache_dir)

    def refuse() -> Sequence[dict[str, Any]]:
        raise AssertionError("rows were read")

    warm = Source("memory", None, "rows", refuse)
    assert prepare_tokens(warm, tokenizer, CONFIG, cache_dir=cache_dir) == folder


def test_whatever_changes_the_bytes_changes_the_folder(tokenizer, cache_dir: Path) -> None:
    other_template = embedded.build_tokenizer()
    other_template.chat_template += " "
    other_tokens = embedded.build_tokenizer()
    other_tokens.add_tokens(["zz"])
    folders = [
        prepare_tokens(source, given, config, cache_dir=cache_dir)
        for source, given, config in [
            (_source(MIXED), tokenizer, CONFIG),
            (_source(MIXED, "other rows"), tokenizer, CONFIG),
            (_source(MIXED), other_template, CONFIG),
            (_source(MIXED), other_tokens, CONFIG),
            (_source(MIXED), tokenizer, replace(CONFIG, seq_len=63)),
            (_source(MIXED), tokenizer, replace(CONFIG, overlong="truncate")),
            (_source(MIXED), tokenizer, replace(CONFIG, overlong="split")),
            (_source(MIXED), tokenizer, replace(CONFIG, train_on="last")),
            (_source(MIXED), tokenizer, replace(CONFIG, control_tokens="plain")),
            (_source(MIXED), tokenizer, replace(CONFIG, format="messages")),
            (_source(MIXED), tokenizer, replace(CONFIG, expand_turns=True)),
            (_source(MIXED), tokenizer, replace(CONFIG, packing="fixed")),
        ]
    ]
    assert len(set(folders)) == len(folders)


def test_a_crash_leaves_nothing_behind(tokenizer, cache_dir: Path) -> None:
    class Breaks(list):
        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice) and index.start > 0:
                raise RuntimeError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare_tokens(_source(Breaks([_row("a")] * 600)), tokenizer, CONFIG, cache_dir=cache_dir)
    assert _unfinished(cache_dir) == []


def _prepare(cache_dir: Path) -> str:
    source = _source(embedded.generate_conversations("train", count=400))
    return str(prepare_tokens(source, embedded.build_tokenizer(), CONFIG, cache_dir=cache_dir))


def test_runs_at_the_same_time_end_with_one_folder(cache_dir: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with context.Pool(2) as pool:
        folders = pool.map(_prepare, [cache_dir, cache_dir], chunksize=1)
    assert folders[0] == folders[1]
    assert [str(path) for path in (cache_dir / "tokens").iterdir()] == [folders[0]]
    assert _ledger(Path(folders[0])).rows_read == 400


@pytest.mark.parametrize("file", ["input_ids.bin", "supervised.bin", "offsets.npy", "meta.json"])
def test_a_damaged_folder_is_an_error(tokenizer, cache_dir: Path, file: str) -> None:
    folder = prepare_tokens(_source(MIXED), tokenizer, CONFIG, cache_dir=cache_dir)
    content = (folder / file).read_bytes()
    for damage in (content[: len(content) // 2], b""):
        (folder / file).write_bytes(damage)
        with pytest.raises(DataError, match=r"damaged .* delete it"):
            prepare_tokens(_source(MIXED), tokenizer, CONFIG, cache_dir=cache_dir)
    (folder / file).unlink()
    with pytest.raises(DataError, match="damaged"):
        open_tokens(folder)


def test_a_folder_that_cannot_be_written_is_an_error(tokenizer, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="file"):
        prepare_tokens(_source(MIXED), tokenizer, CONFIG, cache_dir=blocked)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_parts_processes_and_interruptions_give_the_same_bytes(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(row) for row in embedded.generate_conversations("train", count=700)]
    lines[5] = lines[690] = json.dumps(_row(""))
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(lines))
    config = replace(CONFIG, path=str(file), prepare_workers=1)

    def prepare(name: str, given: DataConfig = config) -> dict[str, bytes]:
        source = load_rows(given, "train", cache_dir=tmp_path / name)
        return _bytes(prepare_tokens(source, tokenizer, given, cache_dir=tmp_path / name))

    whole = prepare("whole")
    ledger = json.loads(whole["meta.json"])["ledger"]
    assert ledger["excluded"] == {"content is empty": {"rows": 2, "first": [5, 690]}}
    monkeypatch.setattr("data.prepare.PART_ROWS", 100)
    assert prepare("parts") == whole
    # A run that broke off left some parts; they are used, not made again.
    source = load_rows(config, "train", cache_dir=tmp_path / "resumed")
    task = new_task(source, tokenizer, config, cache_dir=tmp_path / "resumed")
    write_parts(task, [0, 4])
    stamps = {
        number: (task.part_folder(number) / "ledger.json").stat().st_mtime_ns for number in (0, 4)
    }
    join = data.prepare.join_parts

    def join_and_look(task: Task) -> None:
        assert {
            number: (task.part_folder(number) / "ledger.json").stat().st_mtime_ns
            for number in stamps
        } == stamps
        join(task)

    monkeypatch.setattr("data.prepare.join_parts", join_and_look)
    assert prepare("resumed") == whole
    assert not task.in_progress.exists()


def test_two_processes_tokenise_and_give_the_same_bytes(tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"{number} is a number"} for number in range(PART_ROWS + 50)]
    rows[PART_ROWS + 7] = {"text": ""}
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    results = []
    for workers in (1, 2):
        config = replace(CONFIG, path=str(file), prepare_workers=workers)
        cache = tmp_path / str(workers)
        source = load_rows(config, "train", cache_dir=cache)
        results.append(_bytes(prepare_tokens(source, tokenizer, config, cache_dir=cache)))
    assert results[0] == results[1]
    ledger = json.loads(results[0]["meta.json"])["ledger"]
    assert ledger["excluded"] == {"text is empty": {"rows": 1, "first": [PART_ROWS + 7]}}
    # What a worker raises is one line here as well.
    config = replace(config, overlong="error", seq_len=2)
    with pytest.raises(DataError, match=r"row (0|8192) has \d+ tokens, more than data.seq_len=2"):
        prepare_tokens(source, tokenizer, config, cache_dir=tmp_path / "error")


def test_one_row_can_give_several_examples(tokenizer, cache_dir: Path) -> None:
    messages = [*_row("one")["messages"], *_row("two")["messages"], *_row(LONG)["messages"]]
    rows = [{"messages": messages}, _row("three"), _row(LONG)]
    config = replace(CONFIG, expand_turns=True)
    folder = prepare_tokens(_source(rows), tokenizer, config, cache_dir=cache_dir)
    store, ledger = open_tokens(folder), _ledger(folder)
    answers = [tokenizer.decode(ids[marks].tolist()) for ids, marks in map(store.example, range(3))]
    assert answers == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    assert (ledger.rows_read, ledger.rows_used, ledger.examples) == (3, 2, 3)
    assert ledger.overlong_dropped == 1
    assert ledger.tokens_read == ledger.tokens + ledger.tokens_dropped


@pytest.mark.parametrize(
    "broken", ['{"messages": [', "[1, 2]", '"text"', '{"a": "\\ud800"}', "\udcff"]
)
def test_broken_lines_stop_unless_they_are_to_be_skipped(
    tokenizer, tmp_path: Path, broken: str
) -> None:
    file = tmp_path / "chat.jsonl"
    # A file that begins with a bracket would be one array.
    first = json.dumps(_row("one")) if broken.startswith("[") else broken
    lines = [first, broken, "", broken, json.dumps(_row("two"))]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    skip = replace(CONFIG, path=str(file), broken_lines="skip")
    # Skipped first: what is left in the cache must not serve a run that wants an error.
    source = load_rows(skip, "train", cache_dir=tmp_path)
    folder = prepare_tokens(source, tokenizer, skip, cache_dir=tmp_path)
    bad = [number for number, line in enumerate(lines[:2] + lines[3:]) if line == broken]
    excluded = {"the line is not a JSON object": {"rows": len(bad), "first": bad}}
    assert _ledger(folder).excluded == excluded
    assert _ledger(folder).rows_used == 4 - len(bad)
    error = replace(skip, broken_lines="error")
    place = rf"chat.jsonl:{bad[0] + 1}: "
    with pytest.raises(DataError, match=place):
        prepare_tokens(
            load_rows(error, "train", cache_dir=tmp_path), tokenizer, error, cache_dir=tmp_path
        )
    streamed = list(stream_rows(skip, "train", cache_dir=tmp_path))
    assert [number for number, row in enumerate(streamed) if not row] == bad
    with pytest.raises(DataError, match=place):
        list(stream_rows(error, "train", cache_dir=tmp_path))


def _pair(chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": "q", "chosen": chosen, "rejected": rejected}


def test_pairs_stay_together_or_are_left_out_together(tokenizer, cache_dir: Path) -> None:
    rows = [_pair("b" * n, "c" * (7 * n % 11 + 1)) for n in range(1, 30)]
    rows[3:3] = [_pair("fine", LONG), _pair(LONG, "fine"), _pair("fine", "")]
    folder = prepare_tokens(_source(rows), tokenizer, CONFIG, cache_dir=cache_dir)
    ledger, store = _ledger(folder), open_tokens(folder)
    assert (ledger.rows_read, ledger.rows_used, ledger.overlong_dropped) == (32, 29, 2)
    assert ledger.examples == len(store) == 58 and store.group == 2
    assert ledger.tokens_read == ledger.tokens + ledger.tokens_dropped
    assert len(store.first(5)) == 10
    for method in ("best_fit", "none"):
        packed = pack_store(store, method=method, seq_len=CONFIG.seq_len)
        rows_of = [packed.packs.documents(row).tolist() for row in range(len(packed.packs))]
        assert sorted(number for row in rows_of for number in row) == list(range(58))
        assert all(
            first % 2 == 0 and second == first + 1
            for row in rows_of
            for first, second in zip(row[::2], row[1::2], strict=True)
        )
        assert all(store.lengths[row].sum() <= CONFIG.seq_len for row in rows_of)
    assert len(rows_of) == 29
    # Each half would fit, but not the two of them.
    tight = replace(CONFIG, seq_len=20, overlong="error")
    with pytest.raises(DataError, match=r"row 0 has \d+ tokens in all its answers, more than"):
        prepare_tokens(_source(rows), tokenizer, tight, cache_dir=cache_dir)


def test_pairs_and_other_rows_do_not_mix(tokenizer, cache_dir: Path) -> None:
    stores = []
    for rows in ([_pair("a", "b")] * 3, [_row("a")] * 3):
        source = _source(rows, fingerprint=f"{rows[0].keys()}")
        tokens = open_tokens(prepare_tokens(source, tokenizer, CONFIG, cache_dir=cache_dir))
        stores.append(pack_store(tokens, method="best_fit", seq_len=CONFIG.seq_len))
    assert len(mix(stores[:1])) == 2
    with pytest.raises(DataError, match="has pairs of answers and memory has none"):
        mix(stores)
