"""Rows from files, and from a hub on the loopback through the real client libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.sources import Source, load_rows
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.ranks import free_port


def _rows(count: int, tag: str = "a") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{tag}{i}"},
                {"role": "assistant", "content": "é😀"},
            ]
        }
        for i in range(count)
    ]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _load(path: Path, cache_dir: Path, split: str = "train") -> Source:
    return load_rows(DataConfig(path=str(path)), split, cache_dir=cache_dir)


# ------------------------------------------------------------------------------------------- files


def test_jsonl_rows_are_what_the_lines_say(tmp_path: Path, cache_dir: Path) -> None:
    rows: list[dict[str, Any]] = _rows(3)
    rows[1]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": None}}}]
    rows[2]["messages"][0]["content"] = "2024-01-01"
    first, *others = _jsonl(rows).splitlines(keepends=True)
    file = _write(
        tmp_path / "a.jsonl", b"\xef\xbb\xbf" + first + b"\r\n \n" + b"".join(others)[:-1]
    )
    source = _load(file, cache_dir)
    assert list(source.rows) == rows
    assert source.rows[1:] == rows[1:]
    assert source.rows[-1] == rows[-1]
    assert source.commit is None and source.name == str(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [', r"a\.jsonl:4: broken JSON"),
        (b'{"messages": "\xff\xfe"}', r"a\.jsonl:4: not UTF-8"),
        (b'{"messages": "a\0b"}', r"a\.jsonl:4: NUL byte"),
        (b'{"messages": "\\ud83d alone"}', r"a\.jsonl:4: half of a surrogate pair"),
        (b"[1, 2]", r"a\.jsonl:4: not a JSON object"),
        (b"[" * 100_000, r"a\.jsonl:4: (JSON nested too deep|broken JSON)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, cache_dir: Path, line: bytes, message: str) -> None:
    good = _jsonl(_rows(2))
    file = _write(tmp_path / "a.jsonl", good + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=message):
        list(_load(file, cache_dir).rows)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_an_empty_file_is_named(tmp_path, cache_dir, content: bytes, suffix: str) -> None:
    file = _write(tmp_path / f"a.{suffix}", content)
    with pytest.raises(DataError, match=rf"a\.{suffix}: empty"):
        _ = _load(file, cache_dir).rows


def test_a_json_file_may_be_one_array(tmp_path: Path, cache_dir: Path) -> None:
    rows = _rows(3)
    file = _write(tmp_path / "a.json", b"\xef\xbb\xbf\n" + json.dumps(rows, indent=1).encode())
    assert list(_load(file, cache_dir).rows) == rows
    _write(file, b'[\n{"messages": []},\n{"messages" 3}\n]')
    with pytest.raises(DataError, match=r"a\.json:3: broken JSON"):
        _ = _load(file, cache_dir).rows
    _write(file, b'[{"messages": []}, 7]')
    with pytest.raises(DataError, match=r"a\.json: item 2 is not a JSON object"):
        _ = _load(file, cache_dir).rows
    _write(file, b"[]")
    with pytest.raises(DataError, match="no rows"):
        _ = _load(file, cache_dir).rows


def test_a_folder_is_split_by_the_names_in_it(tmp_path: Path, cache_dir: Path) -> None:
    folder = tmp_path / "chats"
    for name, tag in [
        ("train-00001.jsonl", "b"),
        ("train-00000.jsonl", "a"),
        ("test.jsonl", "t"),
        ("validation/part.jsonl", "v"),
        (".hidden/train.jsonl", "x"),
    ]:
        _write(folder / name, _jsonl(_rows(2, tag)))
    (folder / "README.md").write_text("words")
    assert list(_load(folder, cache_dir).rows) == _rows(2, "a") + _rows(2, "b")
    assert list(_load(folder, cache_dir, "test").rows) == _rows(2, "t")
    assert list(_load(folder, cache_dir, "validation").rows) == _rows(2, "v")
    with pytest.raises(DataError, match="no split 'dev2'; its files give test, train, validation"):
        _load(folder, cache_dir, "dev2")


def test_a_folder_without_such_names_is_all_train(tmp_path: Path, cache_dir: Path) -> None:
    # The folders above it say nothing about the files: this one is called test.
    folder = tmp_path / "test"
    _write(folder / "b.jsonl", _jsonl(_rows(1, "b")))
    _write(folder / "a.json", json.dumps(_rows(1, "a")).encode())
    _write(folder / "latest_training_notes" / "c.txt", b"words")
    (folder / "a.json").rename(folder / "a.jsonl")
    assert list(_load(folder, cache_dir).rows) == _rows(1, "a") + _rows(1, "b")
    with pytest.raises(DataError, match="no split 'test'; its files give train"):
        _load(folder, cache_dir, "test")


def test_paths_that_give_no_rows_are_errors(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        _load(tmp_path / "nowhere", cache_dir)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        _load(tmp_path / "none", cache_dir)
    with pytest.raises(DataError, match=r"a\.csv: not a \.jsonl"):
        _load(_write(tmp_path / "a.csv", b"x"), cache_dir)
    _write(tmp_path / "mixed" / "a.jsonl", _jsonl(_rows(1)))
    _parquet(tmp_path / "mixed" / "b.parquet", _rows(1))
    with pytest.raises(DataError, match=r"mixes \.jsonl and \.parquet"):
        _load(tmp_path / "mixed", cache_dir)
    with pytest.raises(DataError, match=r"data.name and data.path"):
        load_rows(DataConfig(path="a", name="org/a"), "train", cache_dir=cache_dir)


def test_the_fingerprint_follows_the_content(tmp_path: Path, cache_dir: Path) -> None:
    file = _write(tmp_path / "a.jsonl", _jsonl(_rows(2)))
    before = _load(file, cache_dir).fingerprint
    os.utime(file, (1, 1))
    moved = _write(tmp_path / "elsewhere" / "a.jsonl", file.read_bytes())
    assert before == _load(file, cache_dir).fingerprint == _load(moved, cache_dir).fingerprint
    status = file.stat()
    _write(file, _jsonl(_rows(2, "b")))
    os.utime(file, (status.st_atime, status.st_mtime))
    assert file.stat().st_size == status.st_size
    assert _load(file, cache_dir).fingerprint != before


def test_the_embedded_rows_need_no_file(cache_dir: Path) -> None:
    train, test = (
        load_rows(DataConfig(), split, cache_dir=cache_dir) for split in ("train", "test")
    )
    assert train.fingerprint != test.fingerprint
    assert len(train.rows) > len(test.rows) > 0
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_rows(DataConfig(), "dev", cache_dir=cache_dir)


def test_parquet_rows_have_their_arrow_files_in_the_cache(tmp_path: Path, cache_dir: Path) -> None:
    rows = _rows(3)
    _parquet(tmp_path / "p" / "train-0.parquet", rows[:2])
    _parquet(tmp_path / "p" / "train-1.parquet", rows[2:])
    assert list(_load(tmp_path / "p", cache_dir).rows) == _rows(3)
    assert list((cache_dir / "datasets").rglob("*.arrow"))
    assert list(Path.home().rglob("*")) == []


def test_damaged_parquet_is_named(tmp_path: Path, cache_dir: Path) -> None:
    good = _parquet(tmp_path / "p" / "a.parquet", _rows(1)).read_bytes()
    content = _parquet(tmp_path / "p" / "b.parquet", _rows(5000)).read_bytes()
    file = tmp_path / "p" / "b.parquet"
    in_a_page = content[:40] + bytes(200) + content[240:]
    for damage, message in [
        (content[: len(content) // 2], "damaged parquet file"),
        (in_a_page, "damaged parquet file"),
        (b"", "empty"),
        (_jsonl(_rows(1)), "damaged parquet file"),
    ]:
        file.write_bytes(damage)
        with pytest.raises(DataError, match=rf"b\.parquet: {message}"):
            _ = _load(tmp_path / "p", cache_dir).rows
    assert (tmp_path / "p" / "a.parquet").read_bytes() == good


# --------------------------------------------------------------------------------------------- hub

_PROGRAM = """
import json, sys, time, warnings
import data.sources
from data.config import DataConfig
from data.errors import DataError
from data.sources import load_rows, stream_rows
data.sources.RETRY_DELAYS_SECONDS = (0.01, 0.01, 0.01)
warnings.filterwarnings("ignore", "Not enough free disk space")  # the line says more
for options in json.loads(sys.argv[2]):
    split, share = options.pop("split", "train"), options.pop("stream", None)
    start = time.monotonic()
    try:
        if share is not None:
            rows = stream_rows(DataConfig(**options), split, cache_dir=sys.argv[1], **share)
            answer = {"rows": list(rows)}
        else:
            source = load_rows(DataConfig(**options), split, cache_dir=sys.argv[1])
            answer = {"rows": list(source.rows), "commit": source.commit, "key": source.fingerprint}
    except DataError as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "seconds": time.monotonic() - start}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    served = tmp_path / "served"
    _write(served / "chat" / "data" / "train-00000.jsonl", _jsonl(_rows(3)))
    _parquet(served / "chat-parquet" / "data" / "train-0.parquet", _rows(2, "p"))
    _parquet(served / "chat-parquet" / "data" / "test-0.parquet", _rows(1, "t"))
    _write(served / "broken" / "train.jsonl", _jsonl(_rows(2)) + b'{"messages": [\n')
    _write(served / "words" / "README.md", b"nothing but words")
    _write(served / "two" / "one.jsonl", _jsonl(_rows(1, "one")))
    _write(served / "two" / "two.jsonl", _jsonl(_rows(1, "two")))
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    _write(served / "two" / "README.md", card.encode())
    names = ("chat", "chat-parquet", "broken", "words", "two")
    with LoopbackHub(datasets={f"org/{name}": served / name for name in names}) as running:
        yield running


def _fetch(tmp_path: Path, *calls: dict[str, Any], **env: str) -> list[dict[str, Any]]:
    cache = tmp_path / "cache"
    environment = {
        **clean_environment(tmp_path / "user"),
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_XET_CACHE": str(cache / "xet"),
        "PYTHONPATH": str(ROOT),
        **env,
    }
    command = [sys.executable, "-W", "error", "-c", _PROGRAM, str(cache), json.dumps(calls)]
    result = run_command(command, timeout=90, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.output
    left = [file for file in (tmp_path / "user").rglob("*") if file.is_file()]
    assert left == [], "written outside the cache"
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_dataset_is_fetched_once_and_then_needs_no_hub(tmp_path: Path, hub: LoopbackHub) -> None:
    calls = (
        {"name": "org/chat"},
        {"name": "org/chat"},
        {"name": "org/chat-parquet", "split": "test"},
        {"name": "org/two", "subset": "two"},
    )
    expected = [_rows(3), _rows(3), _rows(1, "t"), _rows(1, "two")]
    online = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    assert [answer["rows"] for answer in online] == expected
    assert online[0]["commit"] == hub.commit("org/chat", kind="datasets")
    for name in ("org/chat", "org/chat-parquet", "org/two"):
        assert set(hub.downloads(name).values()) == {1}
    hub.requests.clear()
    for env in (
        {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"},
    ):
        offline = _fetch(tmp_path, *calls, **env)
        assert [(a["rows"], a["commit"], a["key"]) for a in offline] == [
            (a["rows"], a["commit"], a["key"]) for a in online
        ]
    assert not hub.requests


def test_a_pinned_commit_stays_when_the_branch_moves(tmp_path: Path, hub: LoopbackHub) -> None:
    (before,) = _fetch(tmp_path, {"name": "org/chat"}, HF_ENDPOINT=hub.url)
    served = tmp_path / "served" / "chat" / "data" / "train-00000.jsonl"
    served.write_bytes(_jsonl(_rows(4, "new")))
    calls = {"name": "org/chat", "revision": before["commit"]}, {"name": "org/chat"}
    pinned, moved = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    assert (pinned["rows"], pinned["key"]) == (before["rows"], before["key"])
    assert moved["rows"] == _rows(4, "new") and moved["key"] != before["key"]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_hub_and_cache_it_says_so_at_once(tmp_path: Path, offline: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    calls = {"name": "org/chat"}
    (answer,) = _fetch(tmp_path, calls, HF_ENDPOINT=nowhere, HF_HUB_OFFLINE=offline)
    assert "dataset org/chat" in answer["error"] and str(tmp_path / "cache") in answer["error"]
    assert ("HF_HUB_OFFLINE" in answer["error"]) == (offline == "1")
    assert answer["seconds"] < 5


def test_S08_a_hub_cannot_have_a_file_written_outside_of_the_cache(
    tmp_path: Path, hub: LoopbackHub
) -> None:
    find, outside = hub.find, "../../../../../escaped.jsonl"

    def evil(kind: str, name: str, revision: str) -> Any:
        found = find(kind, name, revision)
        return found and (found[0], {**found[1], outside: _jsonl(_rows(1))})

    hub.find = evil  # type: ignore[method-assign]
    # It serves the file to whoever asks for it.
    commit, files = evil("datasets", "org/chat", "main")
    assert outside in files and commit == hub.commit("org/chat", kind="datasets")
    (answer,) = _fetch(tmp_path, {"name": "org/chat"}, HF_ENDPOINT=hub.url)
    assert "\n" not in answer["error"] and "org/chat" in answer["error"]
    assert list(tmp_path.rglob("escaped*")) == []


def test_refusals_say_what_to_do(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.fail("org/gated", status=403, error_code="GatedRepo", times=99)
    hub.fail("org/private", status=401, error_code="RepoNotFound", times=99)
    hub.fail("org/token", status=401, times=99)
    hub.fail("org/forbidden", status=403, times=99)
    cases = {
        "accept its terms": {"name": "org/gated"},
        "HF_TOKEN if it is private": {"name": "org/private"},
        "the hub refuses access (HTTP 401); set HF_TOKEN": {"name": "org/token"},
        "the hub refuses access (HTTP 403); set HF_TOKEN": {"name": "org/forbidden"},
        "check the spelling": {"name": "org/missing"},
        "write it as org/name": {"name": "../served/chat"},
        "check data.revision": {"name": "org/chat", "revision": "v9"},
        "is not the name of a branch": {"name": "org/chat", "revision": "../../v9"},
        "train.jsonl:3: broken JSON": {"name": "org/broken"},
        "org/words: ": {"name": "org/words"},
        "Unknown split": {"name": "org/chat", "split": "dev"},
        "available configs: ['one', 'two']": {"name": "org/two"},
        "BuilderConfig 'three' not found": {"name": "org/two", "subset": "three"},
    }
    answers = _fetch(tmp_path, *cases.values(), HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    for part, answer in zip(cases, answers, strict=True):
        assert part in answer["error"], answer
        assert "\n" not in answer["error"] and "hf_secret" not in answer["error"]
        assert answer["seconds"] < 15


def _note_ranges(hub: LoopbackHub) -> list[tuple[str, str]]:
    """What is asked for in parts from now on: path and Range."""
    ranges: list[tuple[str, str]] = []

    class Handler(hub._server.RequestHandlerClass):  # type: ignore[name-defined]
        def do_GET(self) -> None:
            if asked := self.headers.get("Range"):
                ranges.append((self.path, asked))
            super().do_GET()

    hub._server.RequestHandlerClass = Handler
    return ranges


def test_passing_failures_are_tried_again(tmp_path: Path, hub: LoopbackHub) -> None:
    """429, 5xx and cut connections pass; what arrived before the cut is not fetched again."""
    large = tmp_path / "served" / "large" / "train.jsonl"
    _write(large, _jsonl([{"text": "x" * 1_000_000} for _ in range(12)]))
    hub.repositories["datasets", "org/large"] = {"main": large.parent}
    ranges = _note_ranges(hub)
    hub.fail("large/resolve", cut_after=11_000_000)
    hub.fail("/api/datasets/org/chat", status=503)
    hub.fail("/api/datasets/org/chat", status=429)
    hub.fail("/api/datasets/org/two", status=503, times=99)
    calls = {"name": "org/chat"}, {"name": "org/two"}, {"name": "org/large"}
    passed, forever, resumed = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    assert passed["rows"] == _rows(3)
    assert "HTTP 503; try again later" in forever["error"]
    assert len(resumed["rows"]) == 12
    (start,) = [int(asked[6:].split("-")[0]) for path, asked in ranges if "large" in path]
    assert 0 < start <= 11_000_000


def _mounted(*arguments: str | Path) -> None:
    """Mount, or skip the test where that is not allowed."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


def test_a_warm_cache_may_be_read_only(tmp_path: Path, hub: LoopbackHub) -> None:
    cache = tmp_path / "cache"
    parquet = _parquet(tmp_path / "local.parquet", _rows(2, "l"))
    calls = {"name": "org/chat"}, {"name": "org/chat-parquet"}, {"path": str(parquet)}
    warm = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount")
    _mounted("--bind", cache, cache)
    try:
        _mounted("-o", "remount,ro,bind", cache)
        assert not os.access(cache, os.W_OK)
        answers = _fetch(tmp_path, *calls, {"name": "org/two"}, HF_ENDPOINT=hub.url)
        for answer, before in zip(answers, warm, strict=False):
            assert answer["rows"] == before["rows"]
        assert "Read-only file system; give a --cache_dir" in answers[-1]["error"]
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_full_disk_names_path_needed_and_free_bytes(tmp_path: Path, hub: LoopbackHub) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount")
    cache = tmp_path / "cache"
    cache.mkdir()
    large = tmp_path / "served" / "large" / "train.jsonl"
    _write(large, _jsonl(_rows(20000)))
    hub.repositories["datasets", "org/large"] = {"main": large.parent}
    texts = [{"text": os.urandom(500).hex()} for _ in range(2000)]
    parquet = _parquet(tmp_path / "local.parquet", texts)
    far = f"file://{tmp_path}/served/large"
    _mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", cache)
    try:
        calls = {"path": str(parquet)}, {"path": far}, {"name": "org/large"}
        answers = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    finally:
        subprocess.run(["umount", cache], check=True)
    for answer, needed in zip(answers, (parquet, large, large), strict=True):
        assert str(cache) in answer["error"] and "bytes free" in answer["error"], answer
        assert f"{needed.stat().st_size:,} bytes needed" in answer["error"], answer


def test_a_partial_snapshot_is_noticed_and_completed(tmp_path: Path, hub: LoopbackHub) -> None:
    _fetch(tmp_path, {"name": "org/two"}, HF_ENDPOINT=hub.url)
    (file,) = (tmp_path / "cache" / "hub").glob("datasets--org--two/snapshots/*/two.jsonl")
    file.resolve().unlink()
    file.unlink()
    calls = {"name": "org/two", "subset": "two"}, {"name": "org/cold"}
    partial, cold = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert "only partly downloaded" in partial["error"] and "two.jsonl" in partial["error"]
    assert "org/cold" in cold["error"] and cold["seconds"] < 5
    (answer,) = _fetch(tmp_path, calls[0], HF_ENDPOINT=hub.url)
    assert answer["rows"] == _rows(1, "two")
    assert hub.downloads("org/two")["one.jsonl"] == 1


def test_rows_stream_from_the_hub(tmp_path: Path, hub: LoopbackHub) -> None:
    share = {"every": 2, "offset": 1}
    calls = (
        {"name": "org/chat", "stream": {}},
        {"name": "org/chat", "stream": share},
        {"name": "org/chat-parquet", "split": "test", "stream": {}},
        {"name": "org/chat", "stream": {"every": 4, "offset": 3}},
        {"name": "org/missing", "stream": {}},
        {"name": "org/chat", "split": "dev", "stream": {}},
    )
    *rows, few, missing, split = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url)
    assert [answer["rows"] for answer in rows] == [_rows(3), _rows(3)[1::2], _rows(1, "t")]
    assert "org/chat: 3 rows for 4 readers" in few["error"]
    assert "check the spelling" in missing["error"]
    assert "org/chat: check data.split" in split["error"] and "\n" not in split["error"]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
