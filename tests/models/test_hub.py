"""fetch_model with the real client, in processes of their own, against a hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.hub import check_snapshot
from tests.support.command import ROOT, CommandResult, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.ranks import free_port

_PROGRAM = """
import json, sys
import models.hub
from huggingface_hub import constants
from models.errors import ModelError
from models.hub import fetch_model
models.hub._RETRY_AFTER_SECONDS = (0.1, 0.2)
constants.DOWNLOAD_CHUNK_SIZE = 50_000  # a download goes on from a whole number of them
for options in json.loads(sys.argv[1]):
    try:
        fetched = fetch_model(**options)
        print(json.dumps({"path": str(fetched.path), "commit": fetched.commit}))
    except ModelError as error:
        print(json.dumps({"error": str(error)}))
"""
_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
_FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b'{"do_sample": true}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": _SHARDS[0], "b": _SHARDS[1]}}
    ).encode(),
    _SHARDS[0]: b"1" * 100_000,
    _SHARDS[1]: b"2" * 200_000,
}
_REFUSED = {
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"import os",
    "onnx/config.json": b"{}",
    "README.md": b"words",
}

_PRIVATE_MOUNTS = ["unshare", "--map-root-user", "--mount"]  # gone with the process
_MOUNT = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
_TMPFS = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
_CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*_PRIVATE_MOUNTS, "sh", "-c", _MOUNT, tempfile.gettempdir(), "true"],
        capture_output=True,
        check=False,
    ).returncode
    == 0
)


_NO_MOUNTS = pytest.mark.skipif(not _CAN_MOUNT, reason="this machine lets nobody mount folders")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    folder = tmp_path / "served"
    for name, content in {**_FILES, **_REFUSED}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with LoopbackHub({"org/model": folder}) as served:
        yield served


def _run(
    tmp_path: Path,
    *calls: dict[str, object],
    read_only: Path | None = None,
    disk: str | None = None,
    **env: str,
) -> CommandResult:
    """Fetch in one new process; `disk` is the size of a file system of its own for the cache."""
    options = [
        {"name": "org/model", "revision": None, "cache_dir": str(tmp_path / "cache"), **call}
        for call in calls or ({},)
    ]
    environment = {
        **clean_environment(tmp_path / "user"),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",  # as the scripts do; it asks the hub something of its own
        "PYTHONPATH": str(ROOT),
        **env,
    }
    command = [sys.executable, "-c", _PROGRAM, json.dumps(options)]
    if read_only is not None:
        command = [*_PRIVATE_MOUNTS, "sh", "-c", _MOUNT, str(read_only), *command]
    if disk is not None:
        cache = tmp_path / "cache"
        cache.mkdir()
        command = [*_PRIVATE_MOUNTS, "sh", "-c", _TMPFS, disk, str(cache), *command]
    result = run_command(command, timeout=60, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.output
    return result


def _fetch(
    tmp_path: Path,
    *calls: dict[str, object],
    read_only: Path | None = None,
    disk: str | None = None,
    **env: str,
) -> list[dict[str, str]]:
    result = _run(tmp_path, *calls, read_only=read_only, disk=disk, **env)
    return [json.loads(line) for line in result.stdout.splitlines()]


def _unreachable() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_each_file_is_fetched_once_and_nothing_else(tmp_path: Path, hub: LoopbackHub) -> None:
    first, second = _fetch(tmp_path, {}, {}, HF_ENDPOINT=hub.url)
    assert first == second
    assert first["commit"] == hub.commit("org/model")
    path = Path(first["path"])
    assert path.is_relative_to(tmp_path / "cache" / "hub")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == _FILES
    assert hub.downloads("org/model") == dict.fromkeys(_FILES, 1)
    user_files = [file for file in (tmp_path / "user").rglob("*") if file.is_file()]
    assert user_files == []


def test_only_the_tokenizer_leaves_the_weights_out(tmp_path: Path, hub: LoopbackHub) -> None:
    (fetched,) = _fetch(tmp_path, {"only_tokenizer": True}, HF_ENDPOINT=hub.url)
    assert (Path(fetched["path"]) / "tokenizer.json").is_file()
    assert not any(name.endswith(".safetensors") for name in hub.downloads("org/model"))


def test_a_warm_cache_needs_no_hub(tmp_path: Path, hub: LoopbackHub) -> None:
    online = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    hub.requests.clear()
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == online
    assert not hub.requests
    assert _fetch(tmp_path, HF_ENDPOINT=_unreachable()) == online


def test_a_pinned_commit_is_kept_when_the_branch_moves(tmp_path: Path, hub: LoopbackHub) -> None:
    (before,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    config = hub.repositories["models", "org/model"]["main"] / "config.json"
    config.write_text('{"new": true}')
    pinned, moved = _fetch(tmp_path, {"revision": before["commit"]}, {}, HF_ENDPOINT=hub.url)
    assert pinned == before
    assert moved["commit"] == hub.commit("org/model") != before["commit"]


def test_a_pinned_commit_in_the_cache_asks_nothing(tmp_path: Path, hub: LoopbackHub) -> None:
    """Online and with no hub; the cache has met the commit only as the branch main."""
    (main,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    hub.requests.clear()
    pin = {"revision": main["commit"]}
    assert _fetch(tmp_path, pin, {**pin, "only_tokenizer": True}, HF_ENDPOINT=hub.url) == [main] * 2
    assert hub.requests.total() == 0
    refused = _run(tmp_path, pin, HF_ENDPOINT=_unreachable())
    assert json.loads(refused.stdout) == main
    assert _fetch(tmp_path, pin, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == [main]
    # An older client has left no listing: offline it is not missed.
    for listing in (tmp_path / "cache").rglob("trees/*.json"):
        listing.unlink()
    assert _fetch(tmp_path, pin, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == [main]
    assert hub.requests.total() == 0


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_cold_cache_without_hub_names_model_and_cache(tmp_path: Path, offline: str) -> None:
    result = _run(tmp_path, HF_ENDPOINT=_unreachable(), HF_HUB_OFFLINE=offline)
    error = json.loads(result.stdout)["error"]
    assert "org/model" in error
    assert str(tmp_path / "cache" / "hub") in error
    assert "network access" in error


@pytest.mark.parametrize("listing", [True, False])
def test_a_partial_snapshot_without_hub_lists_what_is_missing(
    tmp_path: Path, hub: LoopbackHub, listing: bool
) -> None:
    (fetched,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    path = Path(fetched["path"])
    for name in ("config.json", _SHARDS[1]):
        (path / name).unlink()
    if not listing:
        for file in (path.parents[1] / "trees").iterdir():
            file.unlink()
    (offline,) = _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert f"lacks config.json, {_SHARDS[1]}" in offline["error"]
    assert "network access" in offline["error"]
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url) == [fetched]  # online it is completed
    assert {file.name: file.read_bytes() for file in path.iterdir()} == _FILES


def test_a_repository_without_safetensors_is_refused(tmp_path: Path, hub: LoopbackHub) -> None:
    folder = hub.repositories["models", "org/model"]["main"]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert "lacks model.safetensors" in answer["error"]
    assert "published as safetensors" in answer["error"]


def test_a_refused_model_says_how_to_get_access(tmp_path: Path, hub: LoopbackHub) -> None:
    refusals = [
        ("org/licence", "/org/licence/resolve/", 403, "GatedRepo"),
        ("org/no-token", "/api/models/org/no-token", 401, "GatedRepo"),
        ("org/private", "/api/models/org/private", 401, ""),
        ("org/forbidden", "/org/forbidden/resolve/", 403, ""),
    ]
    for name, path_part, status, code in refusals:
        hub.repositories["models", name] = hub.repositories["models", "org/model"]
        hub.fail(path_part, status=status, error_code=code, times=100)
    calls: list[dict[str, object]] = [{"name": name} for name, *_ in refusals]
    answers = _fetch(tmp_path, *calls, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secretsecret")
    for (name, _, status, _), answer in zip(refusals, answers, strict=True):
        assert f"model {name}: the hub refuses access (status {status})" in answer["error"]
        assert "accept the model's licence" in answer["error"]
        assert "HF_TOKEN" in answer["error"]
        assert "hf_secretsecret" not in answer["error"]
        assert "\n" not in answer["error"]


def test_unknown_names_say_what_to_check(tmp_path: Path, hub: LoopbackHub) -> None:
    wrong_name, wrong_revision, no_name, traversal = _fetch(
        tmp_path,
        {"name": "org/modle"},
        {"revision": "v9"},
        {"name": "../folder/model"},
        {"revision": "../../x"},
        HF_ENDPOINT=hub.url,
    )
    assert "org/modle is not on the hub: check the spelling" in wrong_name["error"]
    assert "no revision 'v9'" in wrong_revision["error"]
    assert "model.path" in no_name["error"]
    assert "model.revision '../../x'" in traversal["error"]
    for answer in (wrong_name, wrong_revision, no_name, traversal):
        assert "\n" not in answer["error"]


def test_a_hub_that_fails_for_a_moment_is_tried_again(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.fail("/api/models/org/model/revision", status=503)
    hub.fail(_SHARDS[0], status=429)
    hub.fail(_SHARDS[1], cut_after=150_000)
    (fetched,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    path = Path(fetched["path"])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == _FILES


def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path, hub: LoopbackHub) -> None:
    """Closed half-way, the rest is asked for; reset, the file is fetched again."""
    asked: list[tuple[str, str | None]] = []

    class Recorder(hub._server.RequestHandlerClass):  # type: ignore[misc, name-defined]
        def do_GET(self) -> None:
            asked.append((Path(self.path).name, self.headers.get("Range")))
            if self.path.endswith(_SHARDS[0]) and asked.count((_SHARDS[0], None)) == 1:
                self.send_response(200)
                self.send_header("Content-Length", str(len(_FILES[_SHARDS[0]])))
                self.end_headers()
                linger_not = struct.pack("ii", 1, 0)  # closing then resets the connection
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
                self.connection.close()
                self.close_connection = True
            else:
                super().do_GET()

    hub._server.RequestHandlerClass = Recorder
    hub.fail(_SHARDS[1], cut_after=150_000)
    (fetched,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    path = Path(fetched["path"])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == _FILES
    assert [of_bytes for file, of_bytes in asked if file == _SHARDS[1]] == [None, "bytes=150000-"]
    assert [of_bytes for file, of_bytes in asked if file == _SHARDS[0]] == [None, None]
    assert list((tmp_path / "cache" / "hub").rglob("*.incomplete")) == []


def test_a_hub_that_keeps_failing_ends_with_its_status(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.fail("/api/models", status=500, times=100)
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].startswith("model org/model: the hub answers with status 500")
    assert hub.requests["GET", "/api/models/org/model/revision/main"] == 3


def test_a_failing_hub_with_a_partial_snapshot(tmp_path: Path, hub: LoopbackHub) -> None:
    """For a moment: it is completed. For good: what is missing, and that it is the hub's fault."""
    (fetched,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    (Path(fetched["path"]) / "config.json").unlink()
    hub.fail("/api/models", status=503, times=3)
    failed, completed = _fetch(tmp_path, {}, {}, HF_ENDPOINT=hub.url)
    assert (
        f"{fetched['path']} lacks config.json and the hub answers with status 503"
        in (failed["error"])
    )
    assert completed == fetched
    (Path(fetched["path"]) / "config.json").unlink()
    hub.fail("/api/models", status=503)
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url) == [fetched]


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, hub: LoopbackHub) -> None:
    (tmp_path / "cache").write_text("not a folder")
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert str(tmp_path / "cache" / "hub") in answer["error"]
    assert "choose another --cache_dir" in answer["error"]


@_NO_MOUNTS
def test_a_read_only_warm_cache_works(tmp_path: Path, hub: LoopbackHub) -> None:
    cache = tmp_path / "cache"
    online = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url, read_only=cache) == online
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", read_only=cache) == online


@_NO_MOUNTS
def test_a_read_only_cold_cache_is_named(tmp_path: Path, hub: LoopbackHub) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url, read_only=cache)
    assert f"cannot be kept in {cache / 'hub'}: Read-only file system" in answer["error"]


@_NO_MOUNTS
@pytest.mark.parametrize("disk", ["4k", "160k"])
def test_a_full_disk_is_told_in_numbers(tmp_path: Path, hub: LoopbackHub, disk: str) -> None:
    """With room for nothing, not even the listing; and with room for one of two shards."""
    result = _run(tmp_path, HF_ENDPOINT=hub.url, disk=disk, PYTHONWARNINGS="ignore")
    error = json.loads(result.stdout)["error"]
    cache = re.escape(str(tmp_path / "cache" / "hub"))
    numbers = re.search(rf"does not fit into {cache}: (\d+) bytes are needed and (\d+) are", error)
    assert numbers, error
    needed, free = map(int, numbers.groups())
    assert free < len(_FILES[_SHARDS[1]]) <= needed <= sum(map(len, _FILES.values()))
    assert "--cache_dir" in error


def _check(tmp_path: Path, revision: str | None = None, only_tokenizer: bool = False) -> list[str]:
    return check_snapshot(
        "org/model", "model", revision, tmp_path / "cache", only_tokenizer=only_tokenizer
    )


def test_a_whole_snapshot_has_no_fault(tmp_path: Path, hub: LoopbackHub) -> None:
    (nothing,) = _check(tmp_path)
    assert nothing.startswith(f"model org/model is not in the cache {tmp_path / 'cache' / 'hub'}")
    (fetched,) = _fetch(tmp_path, {"only_tokenizer": True}, HF_ENDPOINT=hub.url)
    hub.requests.clear()
    assert _check(tmp_path, only_tokenizer=True) == []
    assert [line.split(": ")[1] for line in _check(tmp_path)] == [
        f"{fetched['path']}/{shard} is missing; fetch again with network access"
        for shard in _SHARDS
    ]
    assert len(_check(tmp_path, "v1")) == len(_check(tmp_path, "../main")) == 1
    assert hub.requests.total() == 0
    _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert _check(tmp_path) == _check(tmp_path, hub.commit("org/model")) == []


def test_every_fault_of_a_snapshot_has_its_line(tmp_path: Path, hub: LoopbackHub) -> None:
    (fetched,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    path = Path(fetched["path"])
    flipped, cut, changed = path / _SHARDS[0], path / _SHARDS[1], path / "config.json"
    flipped.write_bytes(b"1" * 99_999 + b"3")
    cut.write_bytes(b"2" * 1000)
    changed.write_bytes(_FILES["config.json"].replace(b"qwen3", b"qwen4"))
    (path / "merges.txt").resolve().unlink()  # the link stays
    lines = _check(tmp_path)
    expected = [
        f"{changed.resolve()} (config.json) has other content than the hub lists; delete it",
        f"{path / 'merges.txt'} is missing",
        f"{flipped.resolve()} ({_SHARDS[0]}) has other content than the hub lists; delete it",
        f"{cut.resolve()} ({_SHARDS[1]}) has 1000 bytes, the hub lists 200000; delete it",
    ]
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith(f"model org/model: {text}")

    # What the lines ask for mends it.
    for file in (flipped, cut, changed):
        file.resolve().unlink()
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url) == [fetched]
    assert _check(tmp_path) == []

    for listing in (tmp_path / "cache").rglob("trees/*.json"):
        listing.write_text("{")
    (no_listing,) = _check(tmp_path)
    assert "holds no listing of commit " + fetched["commit"] in no_listing


def test_an_index_that_names_other_shards_is_a_fault(tmp_path: Path, hub: LoopbackHub) -> None:
    folder = hub.repositories["models", "org/model"]["main"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": _SHARDS[0], "c": "model-3.safetensors"}}))
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert "lacks model-3.safetensors" in answer["error"]
    (line,) = _check(tmp_path)
    assert "model-3.safetensors is not in the repository either" in line
    index.write_text("[]")
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert "is no index of weights; delete it" in answer["error"]
    assert "\n" not in answer["error"]


def test_a_dataset_is_checked_too(tmp_path: Path) -> None:
    """The layout of a cache, written by hand: large files by SHA-256, small ones by git's SHA-1."""
    commit, rows, words = "c" * 40, b"PAR1 rows", b"words"
    repository = tmp_path / "cache" / "hub" / "datasets--org--chat"
    snapshot = repository / "snapshots" / commit
    for name, content in {"data/train.parquet": rows, "README.md": words}.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    files = {
        "README.md": {"size": 5, "blob_id": hashlib.sha1(b"blob 5\0" + words).hexdigest()},
        "data/train.parquet": {
            "size": len(rows),
            "blob_id": "0" * 40,
            "lfs_sha256": hashlib.sha256(rows).hexdigest(),
            "lfs_size": len(rows),
        },
    }
    (repository / "trees").mkdir()
    (repository / "trees" / f"{commit}.json").write_text(
        json.dumps({"format_version": 1, "files": files})
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert check_snapshot("org/chat", "dataset", None, tmp_path / "cache") == []
    (snapshot / "data/train.parquet").unlink()
    (line,) = check_snapshot("org/chat", "dataset", commit, tmp_path / "cache")
    assert line.startswith(f"dataset org/chat at revision {commit}: {snapshot}/data/train.parquet")
