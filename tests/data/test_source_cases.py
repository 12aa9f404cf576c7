"""Arrow files and saved datasets, fingerprints that are remembered, pickled sources, rows as a stream."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import data.sources
from data.config import DataConfig
from data.errors import DataError
from data.sources import Source, load_rows, stream_rows

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def _watching() -> Iterator[list[str]]:
    """The paths of all files that this process opens, through Python."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def _rows(count: int, tag: str = "a") -> list[dict[str, Any]]:
    return [{"text": f"{tag}{i} é😀", "extra": {"n": [i]}} for i in range(count)]


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the suffix names; in several batches where it has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".jsonl", ".json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if file.suffix == ".jsonl" else f"[{','.join(lines)}]"
        file.write_text("\ufeff" + text)
        return file
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=3)
        return file
    new = pa.ipc.new_file if "ipcfile" in file.name else pa.ipc.new_stream
    with new(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file


def _load(path: Path, cache_dir: Path, split: str = "train") -> Source:
    return load_rows(DataConfig(path=str(path)), split, cache_dir=cache_dir)


def _stream(path: Path, cache_dir: Path, split: str = "train", **share: int) -> list[Any]:
    return list(stream_rows(DataConfig(path=str(path)), split, cache_dir=cache_dir, **share))


# ---------------------------------------------------------------------------------- Arrow, saved sets


def test_arrow_files_are_mapped_where_they_lie(tmp_path: Path, cache_dir: Path) -> None:
    rows = _rows(7)
    for name in ("stream.arrow", "ipcfile.arrow"):
        file = _write(tmp_path / name, rows)
        assert list(_load(file, cache_dir).rows) == rows
        assert _stream(file, cache_dir) == rows
    _write(tmp_path / "f" / "train-0.arrow", rows[:4])
    _write(tmp_path / "f" / "train-1-ipcfile.arrow", rows[4:])
    assert list(_load(tmp_path / "f", cache_dir).rows) == rows
    assert not list(cache_dir.rglob("*.arrow"))


def test_saved_datasets_give_their_splits(tmp_path: Path, cache_dir: Path) -> None:
    train, test = Dataset.from_list(_rows(5)), Dataset.from_list(_rows(2, "t"))
    train.select([4, 0, 1]).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": train, "test": test}).save_to_disk(
        str(tmp_path / "two"), num_shards={"train": 2, "test": 1}
    )
    chosen = [_rows(5)[i] for i in (4, 0, 1)]
    assert list(_load(tmp_path / "one", cache_dir).rows) == chosen
    for split, rows in (("train", _rows(5)), ("test", _rows(2, "t"))):
        assert list(_load(tmp_path / "two", cache_dir, split).rows) == rows
        assert _stream(tmp_path / "two", cache_dir, split) == rows
    with pytest.raises(DataError, match=r"two: no split 'dev'; its files give test, train"):
        _load(tmp_path / "two", cache_dir, "dev")
    with pytest.raises(DataError, match=r"one: no split 'test'; its files give train"):
        _load(tmp_path / "one", cache_dir, "test")


def test_damaged_saved_datasets_are_named(tmp_path: Path, cache_dir: Path) -> None:
    folder = tmp_path / "d"
    Dataset.from_list(_rows(2000)).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    for damage, message in [
        (content[: len(content) // 2], "damaged Arrow file"),
        (b"words, no Arrow", "damaged Arrow file"),
        (b"", "empty"),
    ]:
        file.write_bytes(damage)
        with pytest.raises(DataError, match=rf"{file.name}: {message}"):
            _ = _load(folder, cache_dir).rows
    file.unlink()
    with pytest.raises(DataError, match=rf"d: lacks {file.name}; save or copy"):
        _load(folder, cache_dir)
    state = json.loads((folder / "state.json").read_text())
    (tmp_path / "outside.arrow").write_bytes(content)
    state["_data_files"] = [{"filename": "../outside.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"lacks \.\./outside\.arrow"):
        _load(folder, cache_dir)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json:1: broken JSON"):
        _load(folder, cache_dir)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a-ipcfile.arrow", "a.json"])
def test_a_file_of_no_rows_is_an_error(tmp_path: Path, cache_dir: Path, name: str) -> None:
    file = _write(tmp_path / name, _rows(1))
    if file.suffix == ".json":
        file.write_text("[]")
    elif file.suffix == ".parquet":
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    else:
        new = pa.ipc.new_file if "ipcfile" in name else pa.ipc.new_stream
        new(str(file), pa.schema({"text": pa.string()})).close()
    with pytest.raises(DataError, match="no rows"):
        _ = _load(file, cache_dir).rows
    with pytest.raises(DataError, match=r": 0 rows for 1 readers"):
        _stream(file, cache_dir)


# ------------------------------------------------------------------------- fingerprints, other processes


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_a_warm_start_opens_no_data_file(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "d"
    if kind == "saved":
        Dataset.from_list(_rows(3)).save_to_disk(str(folder))
    else:
        for name in "ab":
            _write(folder / f"{name}.jsonl", _rows(3, name))
    files = [file for file in folder.iterdir() if file.suffix in (".jsonl", ".arrow")]
    _load(folder, cache_dir)
    with _watching() as opened:
        _load(folder, cache_dir)
    assert {str(file) for file in files} <= set(opened), "just written: must be hashed again"
    monkeypatch.setattr(data.sources, "CLOCK_GRANULARITY_SECONDS", -3600)
    cold = _load(folder, cache_dir)
    with _watching() as opened:
        assert _load(folder, cache_dir).fingerprint == cold.fingerprint
    assert not {str(file) for file in files} & set(opened)


def test_a_changed_file_is_noticed(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.sources, "CLOCK_GRANULARITY_SECONDS", 0)
    file = _write(tmp_path / "a.jsonl", _rows(2))
    before, status = _load(file, cache_dir).fingerprint, file.stat()
    _write(file, _rows(2, "b"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (status.st_size, status.st_ino)
    assert _load(file, cache_dir).fingerprint != before
    _write(file, _rows(2))
    assert _load(file, cache_dir).fingerprint == before
    for record in (cache_dir / "fingerprints").iterdir():
        record.write_text('{"broken')
    assert _load(file, cache_dir).fingerprint == before


def test_fingerprints_need_no_writable_cache(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _rows(2))
    (tmp_path / "no-folder").write_text("")
    assert list(_load(file, tmp_path / "no-folder").rows) == _rows(2)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".bin", ".npy", ".py"])
def test_S06_pickles_and_programs_are_no_data(tmp_path: Path, cache_dir: Path, suffix: str) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / "data" / f"train{suffix}"
    file.parent.mkdir()
    file.write_text(f"open({str(canary)!r}, 'w').close()")
    for path in (file, file.parent):
        with pytest.raises(DataError, match=r"not a \.jsonl, |holds no \.jsonl, "):
            load_rows(DataConfig(path=str(path)), "train", cache_dir=cache_dir)
    assert not canary.exists()
    runpy.run_path(str(file))
    assert canary.exists()


def test_a_pickled_source_carries_no_rows_and_reads_them_again(
    tmp_path: Path, cache_dir: Path
) -> None:
    files = [
        _write(tmp_path / name, _rows(500))
        for name in ("a.jsonl", "b.parquet", "c.arrow", "d.json")
    ]
    for source in [*(_load(file, cache_dir) for file in files), _load_embedded(cache_dir)]:
        rows = list(source.rows)
        pickled = pickle.dumps(source)
        assert len(pickled) < 2000
        copy = pickle.loads(pickled)
        assert list(copy.rows) == rows
        assert (copy.name, copy.commit, copy.fingerprint) == (
            source.name,
            source.commit,
            source.fingerprint,
        )
    with _watching() as opened:
        _ = pickle.loads(pickle.dumps(_load(files[1], cache_dir))).rows
    assert not [path for path in opened if path.endswith(".lock")], "datasets built it anew"


def _load_embedded(cache_dir: Path) -> Source:
    return load_rows(DataConfig(), "test", cache_dir=cache_dir)


# ----------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_a_stream_gives_every_reader_its_rows(tmp_path: Path, cache_dir: Path, suffix: str) -> None:
    rows = _rows(11)
    _write(tmp_path / "d" / f"0.{suffix}", rows[:4])
    _write(tmp_path / "d" / f"1.{suffix}", rows[4:])
    assert _stream(tmp_path / "d", cache_dir) == rows
    for every, offset, skip in [(3, 0, 0), (3, 1, 0), (3, 2, 2), (2, 1, 3), (1, 0, 9), (11, 10, 0)]:
        share = {"every": every, "offset": offset, "skip": skip}
        assert _stream(tmp_path / "d", cache_dir, **share) == rows[offset::every][skip:]
    assert _stream(tmp_path / "d", cache_dir, skip=11) == []
    with pytest.raises(DataError, match=r"d: 11 rows for 12 readers; use fewer ranks"):
        _stream(tmp_path / "d", cache_dir, every=12, offset=11)
    assert not list(cache_dir.iterdir())


def test_a_stream_reads_no_further_than_asked(tmp_path: Path, cache_dir: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _rows(3))
    with file.open("a") as stream:
        stream.write("\nbroken\n")
    rows = stream_rows(DataConfig(path=str(file)), "train", cache_dir=cache_dir)
    assert [next(rows), next(rows), next(rows)] == _rows(3)
    with pytest.raises(DataError, match=r"a\.jsonl:4: broken JSON"):
        next(rows)
    assert _stream(file, cache_dir, every=4) == _rows(1), "another reader's row"
    parquet = _write(tmp_path / "p.parquet", _rows(9))
    second = pq.ParquetFile(parquet).metadata.row_group(1).column(0)
    start = second.dictionary_page_offset or second.data_page_offset
    content = bytearray(parquet.read_bytes())
    content[start : start + 20] = bytes(20)
    parquet.write_bytes(content)
    assert _stream(parquet, cache_dir, skip=6) == _rows(9)[6:]
    with pytest.raises(DataError, match=r"p\.parquet: damaged parquet file"):
        _stream(parquet, cache_dir)


def test_the_embedded_rows_stream_too(cache_dir: Path) -> None:
    rows = list(_load_embedded(cache_dir).rows)
    share = stream_rows(DataConfig(), "test", cache_dir=cache_dir, every=2, offset=1, skip=1)
    assert list(share) == rows[1::2][1:]
