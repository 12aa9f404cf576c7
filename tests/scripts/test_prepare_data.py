"""prepare_data.py: whoever does which part, killed or not, the bytes are those of the plain path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import data.prepare
from data.config import DataConfig
from data.embedded import build_tokenizer
from data.prepare import Task, new_task
from data.sources import load_rows
from scripts.environment import cache_settings
from scripts.prepare_data import main
from scripts.ray_engine import _write_part
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.job import EXACT, losses, train
from tests.support.tiny import write_chat, write_model

PART_ROWS = 50
ROWS = 330
PARTS = 7
SEQ_LEN = 128
# The real command, with parts small enough for a test.
_PROGRAM = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data.prepare; "
    f"data.prepare.PART_ROWS = {PART_ROWS}; from scripts.prepare_data import main; "
)

Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Prepare]:
    """The exit code of `main` on a cache and what it printed; parts are small, the environment is put back."""
    monkeypatch.setattr("data.prepare.PART_ROWS", PART_ROWS)
    before = dict(os.environ)

    def run(cache: Path, *argv: str) -> tuple[int, str, str]:
        # The libraries are imported already, so their folders have to be set from outside.
        os.environ.update(cache_settings(cache))
        code = main([f"--cache_dir={cache}", *argv])
        return code, *capsys.readouterr()

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, a file of rows, and options."""
    folder = tmp_path_factory.mktemp("flags")
    return [
        f"--model.path={write_model(folder / 'model')}",
        f"--data.seq_len={SEQ_LEN}",
        f"--data.path={write_chat(folder / 'chat.jsonl', count=ROWS)}",
        "--data.prepare_workers=1",
    ]


def tokens(place: Path) -> dict[str, str]:
    """SHA-256 of every file of the finished tokens in a cache, or in a folder elsewhere."""
    folder = place / "tokens" if (place / "tokens").is_dir() else place
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def finished_parts(cache: Path) -> dict[str, int]:
    """Name and time of the parts that are there."""
    parts = (cache / "tokens-in-progress").glob("*/*-of-*/ledger.json")
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in parts
        if "unfinished" not in path.parent.name
    }


@pytest.fixture
def parts_when_joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What `finished_parts` was each time before the parts were joined."""
    seen, join = [], data.prepare.join_parts

    def look(task: Task) -> None:
        seen.append(finished_parts(task.folder.parents[1]))
        join(task)

    monkeypatch.setattr("data.prepare.join_parts", look)
    return seen


def test_shares_in_any_order_make_the_bytes_of_the_plain_path(
    prepare: Prepare, flags: list[str], tmp_path: Path, parts_when_joined: list[dict[str, int]]
) -> None:
    plain, shared, merged = (tmp_path / name for name in ("plain", "shared", "merged"))
    code, out, err = prepare(plain, *flags)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and f"(train): {ROWS} rows" in out
    expected = tokens(plain)
    assert {name.count("/") for name in expected} == {1, 2}, "tokens and their packing"

    ends = []
    for shard in ("3/3", "1/3", "2/3"):
        code, out, err = prepare(shared, *flags, f"--shard={shard}")
        assert (code, err) == (0, "")
        ends.append(out)
        if not (shared / "tokens").exists():
            before = finished_parts(shared)
    assert ends[:2] == [
        "shard 3/3 is done; 5 parts are still missing\n",
        "shard 1/3 is done; 2 parts are still missing\n",
    ]
    assert f"(train): {ROWS} rows" in ends[2]
    assert tokens(shared) == expected
    assert len(before) == 5 and before.items() <= parts_when_joined[-1].items()
    assert prepare(shared, *flags, "--shard=1/3")[:2] == (0, ends[2]), "nothing is left to do"

    # The command without a share does what is missing, and joins. More shares than parts are fine.
    assert "6 parts are still missing" in prepare(merged, *flags, "--shard=2/50")[1]
    assert "6 parts are still missing" in prepare(merged, *flags, "--shard=50/50")[1]
    before = finished_parts(merged)
    assert set(before) == {f"00001-of-{PARTS:05d}"}
    assert prepare(merged, *flags)[0] == 0
    assert tokens(merged) == expected
    assert before.items() <= parts_when_joined[-1].items()


def test_a_share_whose_parts_another_process_has_joined_ends_well(
    prepare: Prepare, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a share finishes all and removes the parts while the share is at work."""
    cache, write = tmp_path / "cache", data.prepare.write_parts

    def overtaken(task: Task, numbers: range) -> None:
        write(task, range(task.parts))
        data.prepare.join_parts(task)
        raise FileNotFoundError(task.in_progress)

    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.write_parts", overtaken)
        code, out, err = prepare(cache, *flags, "--shard=1/2")
    assert (code, err) == (0, "")
    assert f"(train): {ROWS} rows" in out

    def broken(task: Task, numbers: range) -> None:
        raise FileNotFoundError(task.in_progress)

    monkeypatch.setattr("data.prepare.write_parts", broken)
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path / "other", *flags, "--shard=1/2")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_finished_parts(
    prepare: Prepare,
    flags: list[str],
    tmp_path: Path,
    parts_when_joined: list[dict[str, int]],
) -> None:
    file = write_chat(tmp_path / "chat.jsonl", count=3000)
    flags = [*flags[:2], f"--data.path={file}", "--data.prepare_workers=2"]
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM + "sys.exit(main())", f"--cache_dir={cache}", *flags],
        env=clean_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while len(finished_parts(cache)) < 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)  # not its workers: they must notice by themselves
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was through before it could be killed"
    time.sleep(1)
    before = finished_parts(cache)
    assert 2 <= len(before) < 60
    time.sleep(0.5)
    assert finished_parts(cache) == before, "workers outlived the killed process"
    assert prepare(cache, *flags)[0] == 0
    assert before.items() <= parts_when_joined[-1].items()
    assert prepare(tmp_path / "plain", *flags)[0] == 0
    assert tokens(cache) == tokens(tmp_path / "plain")
    assert finished_parts(cache) == {}


@pytest.mark.slow
@pytest.mark.distributed
def test_tokens_are_carried_to_another_machine_and_trained_on(
    prepare: Prepare, tmp_path: Path
) -> None:
    """Training on what --output wrote is training on the rows: the held-out ones too, to a folder or a URL."""
    write_chat(tmp_path / "chat" / "train.jsonl", count=120)
    write_chat(tmp_path / "chat" / "test.jsonl", count=30, split="test")
    model = write_model(tmp_path / "model")
    common = [
        f"--model.path={model}",
        f"--data.seq_len={SEQ_LEN}",
        "--evaluation.split=test",
    ]
    folder, url = tmp_path / "there", f"file://{tmp_path / 'store'}"
    cache = tmp_path / "cache"
    for place in (folder, url):
        code, out, err = prepare(
            cache, *common, f"--data.path={tmp_path / 'chat'}", f"--output={place}"
        )
        assert code == 0, err
        assert [line for line in out.splitlines() if line.startswith("copied")] == [
            f"copied to {place}/{split}" for split in ("train", "test")
        ]
    assert {path.name for path in folder.iterdir()} == {"train", "test"}
    assert tokens(folder) == tokens(tmp_path / "store")
    assert sorted(tokens(folder).values()) == sorted(tokens(cache).values())

    run = [*EXACT, *common, "--steps=2", "--micro_batch_size=2"]
    results = {}
    for name, source in (
        ("rows", f"--data.path={tmp_path / 'chat'}"),
        ("folder", f"--data.prepared={folder}"),
        ("url", f"--data.prepared={url}"),
    ):
        elsewhere, output = tmp_path / f"cache-{name}", tmp_path / name
        result = train([*run, source], 1, cache_dir=elsewhere, output_dir=output)
        assert result.returncode == 0, result.output
        evaluated = [
            row["eval_loss"]
            for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in row
        ]
        assert len(evaluated) == 2
        results[name] = losses(output), evaluated
        assert (elsewhere / "tokens").exists() is (name == "rows")
    assert results["folder"] == results["rows"] == results["url"]

    code, _, err = prepare(
        cache,
        *common,
        f"--data.prepared={folder}",
        '--model.add_special_tokens=["<call>"]',
    )
    assert code == 1 and "was prepared with another tokenizer than this run's" in err


def test_several_sources_are_copied_side_by_side(
    prepare: Prepare, flags: list[str], tmp_path: Path
) -> None:
    other = write_chat(tmp_path / "other.jsonl", count=60, seed=5)
    rows = flags[2].partition("=")[2]
    there, common = tmp_path / "there", flags[:2]
    given = json.dumps([{"path": rows, "weight": 3}, {"path": str(other), "weight": 1}])
    assert (
        prepare(tmp_path / "cache", *common, f"--data.sources={given}", f"--output={there}")[0] == 0
    )
    assert {path.relative_to(there).as_posix() for path in there.glob("*/*")} == {
        "0/train",
        "1/train",
    }
    given = json.dumps([{"prepared": f"{there}/{n}", "weight": 3 - n} for n in range(2)])
    code, out, _ = prepare(tmp_path / "elsewhere", *common, f"--data.sources={given}")
    assert code == 0
    assert [line.partition(" rows")[0] for line in out.splitlines()] == [
        f"{rows} (train): {ROWS}",
        f"{other} (train): 60",
    ]


@pytest.mark.parametrize(
    "shard", ["0/3", "4/3", "1/0", "3", "1/", "/3", "-1/3", "1/3/5", "a/b", "1.0/3", "../3", "²/3"]
)
def test_a_share_that_is_none_is_refused(
    shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--cache_dir={tmp_path / 'cache'}", f"--shard={shard}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--shard must be I/N with I from 1 to N" in err
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_prepared_is_one_line(prepare: Prepare, tmp_path: Path) -> None:
    code, out, err = prepare(
        tmp_path / "a", "--data.path=x.jsonl", "--data.streaming=true", "--steps=1"
    )
    assert (code, out) == (2, "") and "nothing to prepare" in err and err.count("\n") == 1
    code, out, err = prepare(tmp_path / "b", f"--data.path={tmp_path / 'none.jsonl'}")
    assert (code, out) == (1, "") and "does not exist" in err and err.count("\n") == 1


def test_without_ray_its_engine_names_what_to_install(
    prepare: Prepare, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = prepare(tmp_path / "cache", *flags, "--engine=ray")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "pip install -c constraints.txt -e '.[ray]'" in err


def test_a_part_that_ends_its_workers_is_given_up(
    flags: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    """Ray itself tries for ever; what a worker leaves behind when it dies is what is counted."""
    config = DataConfig(path=flags[2].partition("=")[2], seq_len=SEQ_LEN)
    source = load_rows(config, "train", cache_dir=cache_dir)
    task = new_task(source, build_tokenizer(), config, cache_dir=cache_dir)
    for _ in range(4):
        assert _write_part(task, "run", {"part": 0}) == {"part": 0, "error": ""}
        shutil.rmtree(task.part_folder(0))
    error = _write_part(task, "run", {"part": 0})["error"]
    assert "part 0 has ended 4 workers; is memory short?" in error and "\n" not in error
    assert _write_part(task, "another run", {"part": 0})["error"] == ""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_makes_the_same_bytes_with_two_workers(
    prepare: Prepare, flags: list[str], tmp_path: Path
) -> None:
    assert prepare(tmp_path / "plain", *flags)[0] == 0
    cache, env = tmp_path / "cache", clean_environment(tmp_path)
    command = [f"--cache_dir={cache}", *flags[:3], "--data.prepare_workers=2", "--engine=ray"]
    program = (
        _PROGRAM
        + f"""
import shutil, subprocess
from scripts import ray_engine
codes = [main({[*command, "--data.overlong=error", "--data.seq_len=20"]!r})]
write = ray_engine.write_parts_on_ray
def write_and_look(task, numbers):
    write(task, numbers)
    if shutil.which("ss"):
        print(subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout)
ray_engine.write_parts_on_ray = write_and_look
codes.append(main({command!r}))
print("codes", codes)
"""
    )
    result = run_command([sys.executable, "-c", program], timeout=280, env=env)
    assert "codes [1, 0]" in result.stdout, result.output
    assert tokens(cache) == tokens(tmp_path / "plain")
    errors = result.stderr.splitlines()
    assert len(errors) == 1 and "tokens, more than data.seq_len=20" in errors[0], result.stderr
    if shutil.which("ss"):
        lines = result.stdout.splitlines()
        listening = [line.split()[3] for line in lines if re.search(r'\("(ray|gcs)', line)]
        assert listening and all("127.0.0.1" in address for address in listening), listening
    assert not list(Path(env["TMPDIR"]).iterdir())
    assert not (Path(env["HOME"]) / ".ray").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_terminated_run_on_ray_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    file = write_chat(tmp_path / "chat.jsonl", count=5000)
    env, cache = clean_environment(tmp_path), tmp_path / "cache"
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))  # sockets need a short path
    flags = [f"--cache_dir={cache}", f"--data.path={file}", "--data.prepare_workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM + "sys.exit(main())", *flags, "--engine=ray"],
        env=env | {"TMPDIR": str(short)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 200
        while len(finished_parts(cache)) < 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    left = [path.name for path in short.iterdir()]
    shutil.rmtree(short)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output == "prepare_data.py: stopped by SIGTERM; finished parts are kept\n"
    assert left == []
    assert finished_parts(cache)
