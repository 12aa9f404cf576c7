"""Copies of remote files, with the real fsspec stores: in memory, on disk, and S3 on the loopback."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants

import data.sources
from data.config import DataConfig
from data.errors import DataError
from data.remote import fetch, fetch_folder, upload_folder
from data.sources import load_rows, shown_url, stream_rows


class _Shaky(MemoryFileSystem):
    """A store in memory that counts what is asked of it, and fails when it is told to."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    calls: Counter[str] = Counter()  # noqa: RUF012
    failures: list[tuple[str, Exception]] = []  # noqa: RUF012
    short = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shaky://", "memory://"))

    def _count(self, call: str) -> None:
        self.calls[call] += 1
        for number, (name, error) in enumerate(self.failures):
            if name == call:
                del self.failures[number]
                raise error

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._count("info")
        return super().info(path, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        self._count("get_file")
        self._count(f"get {Path(rpath).name}")
        super().get_file(rpath, lpath, *args, **kwargs)
        if type(self).short:
            type(self).short -= 1
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:-1])


fsspec.register_implementation("shaky", _Shaky, clobber=True)


@pytest.fixture(autouse=True)
def empty_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sources, "RETRY_DELAYS_SECONDS", (0.0, 0.0))
    for kind in (MemoryFileSystem, _Shaky):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    _Shaky.calls.clear()
    _Shaky.failures.clear()
    _Shaky.short = 0


def _line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def _put(url: str, *texts: str) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(b"".join(map(_line, texts)))


def _texts(url: str, cache_dir: Path, split: str = "train") -> list[str]:
    rows = load_rows(DataConfig(path=url), split, cache_dir=cache_dir).rows
    return [rows[i]["text"] for i in range(len(rows))]


def test_a_file_and_a_folder_load_like_local_ones(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "store").mkdir()
    for store in ("memory://bucket/", f"file://{tmp_path}/store/"):
        for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
            _put(f"{store}{name}", name, "b")
        assert _texts(f"{store}train-1.jsonl", cache_dir) == ["train-1.jsonl", "b"]
        assert _texts(store, cache_dir) == ["train-0.jsonl", "b", "train-1.jsonl", "b"]
        assert _texts(store, cache_dir, "test") == ["test-0.jsonl", "b"]
        remote = load_rows(DataConfig(path=store), "test", cache_dir=cache_dir)
        streamed = stream_rows(DataConfig(path=store), "test", cache_dir=cache_dir)
        assert list(streamed) == list(remote.rows)
    local = load_rows(DataConfig(path=str(tmp_path / "store")), "test", cache_dir=cache_dir)
    assert local.fingerprint == remote.fingerprint


def test_a_copy_is_made_once_and_again_when_the_store_changes(cache_dir: Path) -> None:
    _put("shaky://b/a.jsonl", "one")
    before = load_rows(DataConfig(path="shaky://b"), "train", cache_dir=cache_dir)
    assert _texts("shaky://b", cache_dir) == ["one"]
    assert _Shaky.calls["get_file"] == 1
    _put("shaky://b/a.jsonl", "two")
    after = load_rows(DataConfig(path="shaky://b"), "train", cache_dir=cache_dir)
    assert [row["text"] for row in after.rows] == ["two"]
    assert after.fingerprint != before.fingerprint
    assert [row["text"] for row in before.rows] == ["one"], "a run's copy was written over"


def test_runs_at_the_same_time_fetch_a_file_once(cache_dir: Path) -> None:
    for name in "abc":
        _put(f"shaky://b/{name}.jsonl", name)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: fetch("shaky://b", cache_dir), range(4)))
    assert len(copies[0].sha256) == 3 and copies == [copies[0]] * 4
    assert _Shaky.calls["get_file"] == 3


def test_a_cut_or_busy_store_is_asked_again_but_not_for_ever(cache_dir: Path) -> None:
    for name in "ab":
        _put(f"shaky://b/{name}.jsonl", name)
    busy = OSError(errno.EBUSY, "Please reduce your request rate")
    _Shaky.failures[:] = [("info", busy), ("get_file", ConnectionResetError("cut"))]
    _Shaky.short = 1
    assert _texts("shaky://b", cache_dir) == ["a", "b"]
    _put("shaky://c/a.jsonl", "a")
    _Shaky.failures[:] = [("get_file", ConnectionResetError("cut"))] * 9
    _Shaky.calls.clear()
    with pytest.raises(DataError, match=r"shaky://c: cannot read it \(.*cut\); try again later"):
        _texts("shaky://c", cache_dir)
    assert _Shaky.calls["get_file"] == 3
    assert not [file for file in cache_dir.rglob(".*") if file.is_file()], "half a file is left"


def test_files_that_arrived_are_not_fetched_again(cache_dir: Path) -> None:
    for name in "abc":
        _put(f"shaky://b/{name}.jsonl", name)
    _Shaky.failures[:] = [("get c.jsonl", ValueError("broken"))]
    with pytest.raises(DataError, match="broken"):
        _texts("shaky://b", cache_dir)
    assert not list(cache_dir.rglob("listing.json"))
    _Shaky.calls.clear()
    assert _texts("shaky://b", cache_dir) == ["a", "b", "c"]
    assert _Shaky.calls["get_file"] == 1


def test_offline_the_last_complete_copy_serves(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put("shaky://b/a.jsonl", "a")
    before = load_rows(DataConfig(path="shaky://b"), "train", cache_dir=cache_dir)
    _Shaky.failures[:] = [("info", ConnectionRefusedError("no one there"))]
    assert load_rows(DataConfig(path="shaky://b"), "train", cache_dir=cache_dir).rows[0] == {
        "text": "a"
    }
    assert not _Shaky.failures
    _Shaky.calls.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = DataConfig(path="shaky://b")
    warm = load_rows(config, "train", cache_dir=cache_dir)
    assert (warm.fingerprint, list(warm.rows)) == (before.fingerprint, list(before.rows))
    assert list(stream_rows(config, "train", cache_dir=cache_dir)) == list(before.rows)
    with pytest.raises(DataError, match=r"shaky://c: not in the cache \S+ and HF_HUB_OFFLINE"):
        _texts("shaky://c", cache_dir)
    assert not _Shaky.calls, "a connection was attempted"
    (copy,) = cache_dir.rglob("a.jsonl")
    copy.write_bytes(b"")
    with pytest.raises(DataError, match=r"lacks a\.jsonl and HF_HUB_OFFLINE is set"):
        _texts("shaky://b", cache_dir)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert _texts("shaky://b", cache_dir) == ["a"]
    _Shaky.failures[:] = [("info", ConnectionRefusedError("no one there"))]
    with pytest.raises(DataError, match=r"not in the cache \S+ and no one there; run once"):
        _texts("shaky://d", cache_dir)


def test_refusals_are_one_line_without_secrets(cache_dir: Path) -> None:
    url = "shaky://user:hunter2@b/a.jsonl?sig=hunter2"
    for error, message in [
        (FileNotFoundError("gone"), "not found; check the URL"),
        (PermissionError(errno.EACCES, f"denied {url}"), "refuses access .* AWS_ACCESS_KEY_ID"),
        (ValueError(f"odd\n{url}"), r"cannot read it \(ValueError: odd"),
    ]:
        _Shaky.failures[:] = [("info", error)]
        with pytest.raises(DataError, match=message) as caught:
            _texts(url, cache_dir)
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="pip install gcsfs"):
        _texts("gs://bucket/a.jsonl", cache_dir)
    with pytest.raises(DataError, match="fsspec knows no s9://"):
        _texts("s9://bucket/a.jsonl", cache_dir)
    assert shown_url("abfs://container@account/x") == "abfs://container@account/x"
    assert shown_url("https://token@host/x?sig=1") == "https://host/x"
    assert shown_url("a@b?c") == "a@b?c"


def _prepared(folder: Path, content: bytes = b"ids") -> Path:
    (folder / "none-8").mkdir(parents=True)
    (folder / "input_ids.bin").write_bytes(content)
    (folder / "none-8" / "meta.json").write_text("{}")
    sha256 = hashlib.sha256(content).hexdigest()
    files = {"input_ids.bin": {"bytes": len(content), "sha256": sha256}}
    (folder / "meta.json").write_text(json.dumps({"files": files}))
    return folder


def _exchange(folder: Path, url: str, cache_dir: Path) -> None:
    upload_folder(folder, url)
    copy = fetch_folder(url, cache_dir)
    for file in folder.rglob("*.*"):
        assert (copy / file.relative_to(folder)).read_bytes() == file.read_bytes()
    store, root = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{root}/input_ids.bin", b"idz")
    with pytest.raises(DataError, match=r"/input_ids\.bin: missing, or other content"):
        fetch_folder(url, cache_dir)
    store.rm_file(f"{root}/meta.json")
    with pytest.raises(DataError, match=r"no whole meta\.json"):
        fetch_folder(url, cache_dir)


def test_prepared_folders_go_out_and_come_back(tmp_path: Path, cache_dir: Path) -> None:
    folder = _prepared(tmp_path / "tokens")
    assert fetch_folder(str(folder), cache_dir) == folder
    with pytest.raises(DataError, match="no prepared tokens here"):
        fetch_folder(str(tmp_path), cache_dir)
    _exchange(folder, "memory://bucket/deep/tokens", cache_dir)
    _exchange(folder, f"file://{tmp_path}/made/on/the/way", cache_dir)


def test_an_upload_that_fails_leaves_no_meta(tmp_path: Path, cache_dir: Path) -> None:
    upload_folder(_prepared(tmp_path / "old"), "memory://bucket/tokens")
    new = _prepared(tmp_path / "new", b"new")
    put_file = MemoryFileSystem.put_file

    def refuse(self: Any, lpath: str, rpath: str, **kwargs: Any) -> None:
        if rpath.endswith("input_ids.bin"):
            raise PermissionError(errno.EACCES, "denied")
        put_file(self, lpath, rpath, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", refuse)
        with pytest.raises(DataError, match=r"memory://bucket/tokens: the store refuses access"):
            upload_folder(new, "memory://bucket/tokens")
    with pytest.raises(DataError, match=r"no whole meta\.json"):
        fetch_folder("memory://bucket/tokens", cache_dir)


def test_S08_names_that_lead_out_of_the_folder_are_refused(cache_dir: Path) -> None:
    _put("memory://b/ok.jsonl", "a")
    MemoryFileSystem.store["/b/../../x.jsonl"] = MemoryFileSystem.store["/b/ok.jsonl"]
    with pytest.raises(DataError, match="leads out of it"):
        fetch("memory://b", cache_dir)


# ---------------------------------------------------------------------------------------------- S3


def test_s3_with_the_real_client(
    bucket: str, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(f"{bucket}/chat/train-0.jsonl", "a", "b")
    _put(f"{bucket}/chat/sub/train-1.jsonl", "c")
    assert _texts(f"{bucket}/chat", cache_dir) == ["c", "a", "b"]
    assert _texts(f"{bucket}/chat/train-0.jsonl", cache_dir) == ["a", "b"]
    config = DataConfig(path=f"{bucket}/chat")
    second = stream_rows(config, "train", cache_dir=cache_dir, every=2, offset=1)
    assert [row["text"] for row in second] == ["a"]
    _exchange(_prepared(tmp_path / "tokens"), f"{bucket}/tokens", cache_dir)
    for url in ("s3://nowhere/a.jsonl", f"{bucket}/nothing"):
        with pytest.raises(DataError, match=f"{url}: not found"):
            fetch(url, cache_dir)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _texts(f"{bucket}/chat", cache_dir) == ["c", "a", "b"]
