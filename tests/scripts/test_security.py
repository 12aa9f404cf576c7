"""What a run leaves behind and says: no token, no open door, nothing that moves a terminal's cursor."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from scripts.command_line import CommandLineError, parse_train_config, print_traceback
from scripts.preparation import prepared_place
from scripts.prepare_data import parse_shard
from tests.support.command import ROOT, clean_environment
from tests.support.hub import LoopbackHub
from tests.support.job import EXACT, TRAIN, train
from tests.support.ranks import run_ranks
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed

_TOKEN = "hf_ThisIsACanaryAndNoToken"
_LISTENING = "0A"
_LOOPBACK = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")


@dataclass(frozen=True)
class _Run:
    folder: Path
    output: str
    returncode: int
    listeners: set[str]
    """Addresses that were listened on, in hexadecimal."""


def _listeners(process: int | str) -> set[str]:
    """The addresses a process listens on, IPv4 and IPv6, as /proc writes them."""
    by_socket = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == _LISTENING:
                by_socket[f"socket:[{inode}]"] = address
    found = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.add(by_socket.get(os.readlink(descriptor)))
        except OSError:
            continue
    return {address for address in found if address is not None}


def _is_loopback(address: str) -> bool:
    return address.partition(":")[0] in _LOOPBACK


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    """Model and data from a hub, a token in the environment, a shell whose umask forbids nothing."""
    folder = tmp_path_factory.mktemp("run")
    model, data = write_model(folder / "model"), write_chat(folder / "chat" / "train.jsonl").parent
    env = {**clean_environment(folder / "private"), "HF_TOKEN": _TOKEN}
    listeners: set[str] = set()
    with (
        LoopbackHub({"org/tiny": model}, {"org/chat": data}) as hub,
        (folder / "log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [
                sys.executable,
                TRAIN,
                f"--cache_dir={folder / 'job' / 'cache'}",
                f"--output_dir={folder / 'job' / 'out'}",
                "--model.name=org/tiny",
                "--data.name=org/chat",
                "--data.seq_len=128",
                "--micro_batch_size=2",
                "--steps=4",
                "--checkpoint.every=2",
            ],
            cwd=ROOT,
            env={**env, "HF_ENDPOINT": hub.url},
            stdout=log,
            stderr=log,
            umask=0,
        )
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    listeners |= _listeners(process.pid)
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    output = (folder / "log").read_text(errors="replace")
    return _Run(folder, output, process.returncode, listeners)


@pytest.mark.slow
def test_S09_a_token_is_in_nothing_that_a_run_leaves(run: _Run) -> None:
    assert run.returncode == 0, run.output
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "config.yaml", ".metadata", "state.json", "metrics.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    holding = [path for path in files if _TOKEN.encode() in path.read_bytes()]
    assert holding == []
    assert _TOKEN not in run.output  # which is also in a file


@pytest.mark.parametrize("flag", ["hf_token", "hub_token", "use_auth_token", "token"])
def test_S09_no_flag_takes_a_token_and_none_is_shown(flag: str) -> None:
    with pytest.raises(CommandLineError) as error:
        parse_train_config([f"--{flag}={_TOKEN}"])
    assert f"--{flag}" in str(error.value) and _TOKEN not in str(error.value)


def test_S11_a_single_process_can_be_reached_from_here_only(run: _Run) -> None:
    assert [address for address in run.listeners if not _is_loopback(address)] == []


def _open_ports() -> dict[str, set[str]]:
    from trainer.distributed import meet, start

    ranks = meet()
    store = _listeners("self")
    start(ranks, "cpu")
    dist.new_group(backend="gloo")
    dist.barrier()
    return {"store": store, "all": _listeners("self")}


def test_S11_ranks_of_a_node_open_no_port_but_the_store_of_torchrun() -> None:
    first, second = run_ranks(_open_ports, 2, timeout=60, init_group=False)
    reachable = [{a for a in rank["all"] if not _is_loopback(a)} for rank in (first, second)]
    assert len(first["store"]) == 1  # that of rank 0, where torchrun has said that it is to be
    assert reachable == [first["store"], set()]
    assert len(first["all"]) > 1 and second["all"]  # gloo listens, but on loopback


def test_S12_nobody_else_may_write_to_what_a_run_leaves(run: _Run) -> None:
    left = [*(run.folder / "job").rglob("*"), run.folder / "job"]
    assert len(left) > 50
    assert [
        path for path in left if path.lstat().st_mode & stat.S_IWOTH and not path.is_symlink()
    ] == []
    # By itself the shell would have let everybody write.
    made = subprocess.run(
        [sys.executable, "-c", "import os; os.mkdir('open'); print(oct(os.stat('open').st_mode))"],
        cwd=run.folder,
        umask=0,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == "0o40777\n"


def test_S08_names_of_splits_and_shards_are_no_paths() -> None:
    for split in ("..", ".", "../x", "/etc", "a/../../b", "train"):
        name = prepared_place("out", split).removeprefix("out/")
        assert "/" not in name and name.strip(".")
    for shard in ("../1/2", "1/../2", "-1/2", "1/2/..", "0x1/2"):
        with pytest.raises(CommandLineError, match="--shard must be I/N"):
            parse_shard(shard)


def test_S10_errors_and_the_table_show_control_characters_of_data_escaped(
    tmp_path: Path, cache_dir: Path
) -> None:
    data = write_chat(tmp_path / "clear\x1b[2J.jsonl", count=20)
    args = [f"--data.path={data}", "--data.seq_len=64", "--global_batch_size=2", "--steps=1"]
    quick = [*EXACT, "--checkpoint.export=false"]
    fine = train([*args, *quick], 1, cache_dir=cache_dir, output_dir=tmp_path / "fine")
    assert fine.returncode == 0, fine.output
    data.write_text(data.read_text() + '{"messages": "\x1b]0;title\x07"}\nbroken \x1b[31m')
    bad = train([*args, *quick], 1, cache_dir=cache_dir, output_dir=tmp_path / "bad")
    assert bad.returncode == 1
    for result in (fine, bad):
        assert "clear\\x1b[2J.jsonl" in result.output
        assert all(line.isprintable() for line in result.output.split("\n"))


def test_S10_a_traceback_shows_control_characters_escaped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        raise RuntimeError("one \x1b[2J\nand \x07 two")
    except RuntimeError as error:
        print_traceback(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert "RuntimeError: one \\x1b[2J\nand \\x07 two\n" in said and "Traceback" in said
    assert all(line.isprintable() for line in said.split("\n"))
