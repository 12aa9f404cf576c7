"""Packings on disk: what is written is what is opened, `fixed` loses no token, damage is found."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.embedded import build_tokenizer, generate_conversations
from data.errors import DataError
from data.packing import pack
from data.prepare import prepare_tokens
from data.sources import Source
from data.store import (
    TokenStore,
    find_faults,
    open_packed,
    open_tokens,
    pack_store,
    prepare_packs,
    written_whole,
)


def _store(lengths: list[int], marks: list[bool] | None = None) -> TokenStore:
    total = sum(lengths)
    supervised = np.ones(total, np.uint8) if marks is None else np.array(marks, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ledger = {"examples": len(lengths), "tokens": total, "supervised_tokens": -1}
    return TokenStore(np.arange(total, dtype=np.int32), supervised, offsets, {"ledger": ledger})


@pytest.fixture
def folder(cache_dir: Path) -> Path:
    rows = generate_conversations("train", count=50)
    source = Source("memory", None, "fifty", lambda: rows)
    return prepare_tokens(source, build_tokenizer(), DataConfig(seq_len=64), cache_dir=cache_dir)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 16), st.randoms())
def test_fixed_cuts_the_stream_and_loses_nothing(lengths, seq_len: int, random) -> None:
    marks = [random.random() < 0.5 for _ in range(sum(lengths))]
    store = _store(lengths, marks)
    packed = pack_store(store, method="fixed", seq_len=seq_len)
    rows = [
        [packed.documents.example(number) for number in packed.packs.documents(row)]
        for row in range(len(packed.packs))
    ]
    tokens = [np.concatenate([ids for ids, _ in row]) for row in rows]
    assert np.concatenate(tokens).tolist() == list(range(sum(lengths)))
    assert {len(row) for row in tokens[:-1]} <= {seq_len}
    assert 1 <= len(tokens[-1]) <= seq_len
    # No piece holds tokens of two examples, and each starts where an example or a row does.
    borders = {0, *np.cumsum(lengths).tolist()}
    for row in rows:
        for ids, _ in row:
            assert ids[0] in borders or ids[0] % seq_len == 0
            assert not borders & set(ids[1:].tolist())
    ledger = packed.ledger
    assert ledger["supervised_tokens"] == sum(int(m[1:].sum()) for row in rows for _, m in row)
    assert ledger["masked_tokens"] + ledger["supervised_tokens"] == sum(lengths)
    assert ledger["packed_rows"] * seq_len == sum(lengths) + ledger["padding_tokens"]


@pytest.mark.parametrize("method", ["best_fit", "fixed", "none"])
def test_a_packing_is_kept_and_opened_as_it_was_made(folder: Path, method) -> None:
    made = pack_store(open_tokens(folder), method=method, seq_len=64)
    place = prepare_packs(folder, method=method, seq_len=64)
    opened = open_packed(place)
    assert opened.packs.document_ids.tolist() == made.packs.document_ids.tolist()
    assert opened.packs.offsets.tolist() == made.packs.offsets.tolist()
    assert opened.documents.offsets.tolist() == made.documents.offsets.tolist()
    assert opened.ledger == made.ledger
    for array in (opened.packs.document_ids, opened.packs.offsets, opened.documents.offsets):
        assert isinstance(array, np.memmap)
    before = (place / "meta.json").stat().st_mtime_ns
    assert prepare_packs(folder, method=method, seq_len=64) == place
    assert (place / "meta.json").stat().st_mtime_ns == before
    assert find_faults(folder) == []


def test_rows_longer_than_the_packing_are_an_error_but_in_fixed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"outside 1\.\.8; raise data\.seq_len"):
        prepare_packs(folder, method="best_fit", seq_len=8)
    assert len(open_packed(prepare_packs(folder, method="fixed", seq_len=8)).packs) > 50


def test_every_damaged_file_is_found(folder: Path) -> None:
    packing = prepare_packs(folder, method="fixed", seq_len=16)
    files = [path for path in folder.rglob("*") if path.suffix in (".bin", ".npy")]
    assert len(files) == 6
    for path in (*files, folder / "meta.json"):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damage in (flipped, whole[:-1], b"", None):
            if path.name == "meta.json" and damage == flipped:
                continue  # it may hit text that says nothing about the files
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            (fault,) = find_faults(folder)
            assert str(path) in fault
            path.write_bytes(whole)
    assert find_faults(folder) == []
    (packing / "meta.json").write_text("{}")
    assert len(find_faults(folder)) == 1


def test_S06_pickled_arrays_are_refused(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(canary), "w")

    packing = prepare_packs(folder, method="best_fit", seq_len=64)
    evil = np.array([Evil()], dtype=object)
    for file, read in (
        (folder / "offsets.npy", lambda: open_tokens(folder)),
        (packing / "document_ids.npy", lambda: open_packed(packing)),
    ):
        whole = file.read_bytes()
        np.save(file, evil, allow_pickle=True)
        with pytest.raises(DataError, match="damaged"):
            read()
        pickled = pickle.dumps(Evil())
        file.write_bytes(pickled)  # numpy would take it for a pickled array
        with pytest.raises(DataError, match="damaged"):
            read()
        assert not canary.exists()
        file.write_bytes(whole)
    pickle.loads(pickled).close()
    assert canary.exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    dead, alive, elsewhere = (
        tmp_path / f"key.unfinished-{who}"
        for who in (f"{host}-{ended.pid}", f"{host}-1", f"not-{host}-{ended.pid}")
    )
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
    with written_whole(tmp_path / "key") as staging:
        (staging / "file").write_text("whole")
    assert (tmp_path / "key" / "file").read_text() == "whole"
    assert (dead.exists(), alive.exists(), elsewhere.exists()) == (False, True, True)


def test_the_first_examples_alone() -> None:
    store = _store([3, 4, 5])
    assert store.first(2).lengths.tolist() == [3, 4]
    assert store.first(None) is store
    assert store.first(9).lengths.tolist() == [3, 4, 5]


def test_packings_of_the_same_tokens_hold_the_same_documents() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    for method in ("best_fit", "none"):
        packs = pack(lengths, seq_len=64, method=method)
        assert sorted(packs.document_ids.tolist()) == list(range(500))
