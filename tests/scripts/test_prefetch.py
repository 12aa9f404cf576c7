"""prefetch.py fills a cache that needs no network afterwards, and names whatever is missing or damaged in one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.prepare import new_task, write_parts
from data.sources import load_rows
from scripts.environment import cache_settings
from scripts.prefetch import main
from tests.support.command import ROOT, CommandResult, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.tiny import write_chat, write_model

_PREFETCH = str(ROOT / "scripts" / "prefetch.py")

Prefetch = Callable[..., tuple[int, list[str], list[str]]]


def tree(folder: Path) -> dict[str, Any]:
    """Everything there is: size and time of change of each file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(file: Path) -> None:
    """Change one bit in the middle; size and time stay."""
    content, status = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def prefetch(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Prefetch]:
    """The exit code of `main` and the lines it printed; the environment it changes is put back."""
    # The libraries are imported already, so their folders have to be set from outside.
    for name, value in cache_settings(cache_dir).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)

    def run(*argv: str) -> tuple[int, list[str], list[str]]:
        code = main([f"--cache_dir={cache_dir}", *argv])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_a_filled_cache_serves_without_the_hub_and_its_damage_is_named(tmp_path: Path) -> None:
    """Fill from a hub; then, without it, check the whole cache, and one whose files have changed."""
    cache, env = tmp_path / "cache", clean_environment(tmp_path)
    model, chat = write_model(tmp_path / "model"), tmp_path / "chat"
    write_chat(chat / "train.parquet", count=60)
    write_chat(chat / "test.parquet", count=20, split="test")

    def run(*more: str) -> CommandResult:
        flags = [
            f"--cache_dir={cache}",
            "--model.name=org/tiny",
            "--data.name=org/chat",
            "--data.seq_len=128",
            "--data.prepare_workers=1",
            "--evaluation.split=test",
        ]
        return run_command([sys.executable, _PREFETCH, *flags, *more], timeout=120, env=env)

    with LoopbackHub({"org/tiny": model}, {"org/chat": chat}) as hub:
        env["HF_ENDPOINT"] = hub.url
        filled = run()
        assert filled.returncode == 0, filled.output
        lines = filled.stdout.splitlines()
        commit = hub.commit("org/tiny")
        assert [line.partition(":")[0] for line in lines] == [
            "model",
            "org/chat (train)",
            "org/chat (test)",
        ]
        assert lines[0].endswith(f"{cache}/hub/models--org--tiny/snapshots/{commit}")
        before, asked = tree(cache), hub.requests.copy()
        checked = run("--check")
        assert (checked.returncode, checked.stderr) == (0, "")
        assert checked.stdout == f"{cache} holds all that this run needs, whole\n"
        assert hub.requests == asked, "a check must not ask the network"
    assert tree(cache) == before, "a check must not write"

    flip((cache / "hub/models--org--tiny/snapshots" / commit / "model.safetensors").resolve())
    (parquet,) = (cache / "hub/datasets--org--chat/snapshots").glob("*/train.parquet")
    parquet.unlink()
    before = tree(cache)
    faulty = run("--check")
    lines = faulty.stdout.splitlines()
    assert (faulty.returncode, faulty.stderr, len(lines)) == (1, "", 2), faulty.output
    assert "model org/tiny" in lines[0] and "model.safetensors" in lines[0]
    assert "dataset org/chat" in lines[1] and "train.parquet" in lines[1]
    assert tree(cache) == before


def test_every_kind_of_damage_is_one_line(
    prefetch: Prefetch, cache_dir: Path, tmp_path: Path
) -> None:
    file = write_chat(tmp_path / "chat.jsonl", count=60)
    flags = [f"--data.path={file}", "--data.seq_len=128", "--data.prepare_workers=1"]

    def check(*more: str) -> list[str]:
        before = tree(cache_dir)
        code, out, err = prefetch(*flags, "--check", *more)
        assert err == [] and tree(cache_dir) == before
        if code == 0:
            assert out == [f"{cache_dir} holds all that this run needs, whole"]
            return []
        assert code == 1 and out
        return out

    (fault,) = check()
    assert "the embedded tokenizer is missing; run prefetch.py" in fault
    assert prefetch(*flags)[0] == 0
    assert check() == []

    (tokens,) = (cache_dir / "tokens").iterdir()
    spare = tmp_path / "spare"
    shutil.copytree(tokens, spare)

    def after(damage: Callable[[], Any]) -> list[str]:
        damage()
        faults = check()
        shutil.rmtree(tokens, ignore_errors=True)
        shutil.copytree(spare, tokens)
        return faults

    def truncate() -> None:
        with open(tokens / "supervised.bin", "r+b") as stream:
            stream.truncate(7)

    for damage, expected in [
        (lambda: flip(tokens / "input_ids.bin"), "input_ids.bin: content changed (SHA-256)"),
        (truncate, "supervised.bin: 7 bytes, must be "),
        (lambda: (tokens / "offsets.npy").unlink(), "offsets.npy: No such file"),
        (lambda: flip(tokens / "best_fit-128" / "document_ids.npy"), "document_ids.npy: content"),
        (lambda: (tokens / "meta.json").write_text("{"), "meta.json: cannot be read"),
        (lambda: shutil.rmtree(tokens / "best_fit-128"), "best_fit-128 is missing; run prefetch"),
        (lambda: shutil.rmtree(tokens), "not tokenised for these flags; run prefetch.py"),
    ]:
        faults = after(damage)
        assert len(faults) == 1 and expected in faults[0], faults
        assert faults[0].startswith(f"{file} (train): ") and "run prefetch.py" in faults[0]
    assert check() == []

    (fault,) = check("--data.train_on=last")
    assert "not tokenised for these flags" in fault
    (fault,) = check("--data.packing=none")
    assert "none-128 is missing" in fault
    write_chat(file, count=61)
    (fault,) = check()
    assert "not tokenised for these flags" in fault
    file.unlink()
    (fault,) = check()
    assert f"{file} does not exist" in fault


def test_unfinished_work_is_named(
    prefetch: Prefetch,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from data.config import DataConfig
    from models.tokenizer import load_tokenizer

    monkeypatch.setattr("data.prepare.PART_ROWS", 10)
    file, model = write_chat(tmp_path / "chat.jsonl", count=60), write_model(tmp_path / "model")
    config = DataConfig(path=str(file), seq_len=128, prepare_workers=1)
    tokenizer = load_tokenizer(model, cache_dir=cache_dir)
    source = load_rows(config, "train", cache_dir=cache_dir)
    task = new_task(source, tokenizer, config, cache_dir=cache_dir)
    write_parts(task, [0, 3])
    (task.in_progress / "00001-of-00006.unfinished-node-1").mkdir()
    killed = cache_dir / "tokens" / "1234.unfinished-node-1"
    killed.mkdir(parents=True)
    capsys.readouterr()  # transformers shows a bar when a model is written
    flags = [f"--model.path={model}", f"--data.path={file}", "--data.seq_len=128"]
    code, out, err = prefetch(*flags, "--check")
    assert code == 1 and len(out) == 1
    assert "not tokenised for these flags (2 of 6 parts are finished)" in out[0]
    assert err == [
        f"note: {task.in_progress} is unfinished: 2 of 6 parts are finished",
        f"note: {killed} is being written, or was left by a process that was killed: delete it then",
    ]
    # What another run has not finished is no fault of this one.
    killed.rmdir()
    assert prefetch(*flags, "--data.train_on=last", "--data.prepare_workers=1")[0] == 0
    code, out, err = prefetch(*flags, "--data.train_on=last", "--check")
    assert code == 0 and len(err) == 1 and "2 of 6 parts" in err[0]


def test_prepared_tokens_are_checked_where_they_are(
    prefetch: Prefetch, cache_dir: Path, tmp_path: Path
) -> None:
    from scripts import prepare_data

    file, model = write_chat(tmp_path / "chat.jsonl", count=60), write_model(tmp_path / "model")
    common = [f"--model.path={model}", "--data.seq_len=128"]
    argv = [f"--cache_dir={cache_dir}", *common, f"--data.path={file}"]
    there = tmp_path / "there"
    assert prepare_data.main([*argv, "--data.prepare_workers=1", f"--output={there}"]) == 0
    flags = [*common, f"--data.prepared={there}"]
    assert prefetch(*flags, "--check")[0] == 0
    flip(there / "train" / "input_ids.bin")
    code, out, _ = prefetch(*flags, "--check")
    assert code == 1 and len(out) == 1
    assert "content changed" in out[0] and out[0].endswith("and copy it again")
    shutil.rmtree(there / "train")
    code, out, _ = prefetch(*flags, "--check")
    assert code == 1 and out == [f"{there}/train: no prepared tokens here (no meta.json)"]


def test_a_copy_of_remote_files_is_checked(
    prefetch: Prefetch, cache_dir: Path, tmp_path: Path
) -> None:
    file, model = write_chat(tmp_path / "chat.jsonl", count=60), write_model(tmp_path / "model")
    flags = [f"--model.path={model}", f"--data.path=file://{file}", "--data.seq_len=128"]
    assert prefetch(*flags, "--data.prepare_workers=1")[0] == 0
    assert prefetch(*flags, "--check")[0] == 0
    (copy,) = (cache_dir / "files").glob("*/*/chat.jsonl")
    flip(copy)
    code, out, _ = prefetch(*flags, "--check")
    assert code == 1 and len(out) == 1 and f"{copy}: content changed (SHA-256)" in out[0]


def test_a_wrong_command_line_is_one_line(prefetch: Prefetch, cache_dir: Path) -> None:
    code, out, err = prefetch("--chek")
    assert (code, out) == (2, []) and len(err) == 1 and "did you mean --check" in err[0]
    cache_dir.rmdir()
    code, out, err = prefetch("--check")
    assert (code, out) == (2, []) and len(err) == 1 and "is not there: nothing to check" in err[0]
    assert not cache_dir.exists()
