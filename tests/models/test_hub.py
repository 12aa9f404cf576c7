"""fetch_model with the real client, in processes of their own, against a hub on the loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import ROOT, CommandResult, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.ranks import free_port

_PROGRAM = """
import json, sys
from models.errors import ModelError
from models.hub import fetch_model
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
_CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*_PRIVATE_MOUNTS, "sh", "-c", _MOUNT, tempfile.gettempdir(), "true"],
        capture_output=True,
        check=False,
    ).returncode
    == 0
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    folder = tmp_path / "served"
    for name, content in {**_FILES, **_REFUSED}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with LoopbackHub({"org/model": folder}) as served:
        yield served


def _run(
    tmp_path: Path, *calls: dict[str, object], read_only: Path | None = None, **env: str
) -> CommandResult:
    options = [
        {"name": "org/model", "revision": None, "cache_dir": str(tmp_path / "cache"), **call}
        for call in calls or ({},)
    ]
    environment = {
        **clean_environment(tmp_path / "user"),
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        **env,
    }
    command = [sys.executable, "-c", _PROGRAM, json.dumps(options)]
    if read_only is not None:
        command = [*_PRIVATE_MOUNTS, "sh", "-c", _MOUNT, str(read_only), *command]
    result = run_command(command, timeout=60, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.output
    return result


def _fetch(
    tmp_path: Path, *calls: dict[str, object], read_only: Path | None = None, **env: str
) -> list[dict[str, str]]:
    result = _run(tmp_path, *calls, read_only=read_only, **env)
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


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_cold_cache_without_hub_names_model_and_cache(tmp_path: Path, offline: str) -> None:
    result = _run(tmp_path, HF_ENDPOINT=_unreachable(), HF_HUB_OFFLINE=offline)
    error = json.loads(result.stdout)["error"]
    assert "org/model" in error
    assert str(tmp_path / "cache" / "hub") in error
    assert "network access" in error
    assert result.seconds < 5


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


def test_a_hub_that_keeps_failing_ends_with_its_status(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.fail("/api/models", status=500, times=100)
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].startswith("model org/model: the hub answers with status 500")
    assert hub.requests["GET", "/api/models/org/model/revision/main"] == 3


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, hub: LoopbackHub) -> None:
    (tmp_path / "cache").write_text("not a folder")
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert str(tmp_path / "cache" / "hub") in answer["error"]
    assert "choose another --cache_dir" in answer["error"]


@pytest.mark.skipif(not _CAN_MOUNT, reason="this machine lets nobody mount a folder read-only")
def test_a_read_only_warm_cache_works(tmp_path: Path, hub: LoopbackHub) -> None:
    cache = tmp_path / "cache"
    online = _fetch(tmp_path, HF_ENDPOINT=hub.url)
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url, read_only=cache) == online
    assert _fetch(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", read_only=cache) == online


@pytest.mark.skipif(not _CAN_MOUNT, reason="this machine lets nobody mount a folder read-only")
def test_a_read_only_cold_cache_is_named(tmp_path: Path, hub: LoopbackHub) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (answer,) = _fetch(tmp_path, HF_ENDPOINT=hub.url, read_only=cache)
    assert f"cannot be kept in {cache / 'hub'}: Read-only file system" in answer["error"]
