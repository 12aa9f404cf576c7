"""One cache folder: the real libraries, each in a process of its own, land under it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.command_line import CommandLineError
from scripts.environment import remove_launcher_folders, use_cache_dir
from tests.support.command import ROOT, clean_environment, run_command


@pytest.fixture(autouse=True)
def same_environment_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `use_cache_dir` sets in this process, and pretend that nothing is imported yet."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for library in ("huggingface_hub", "datasets", "transformers"):
        monkeypatch.delitem(sys.modules, library, raising=False)


def python(program: str, folder: Path, **variables: str) -> dict:
    """What the program prints as JSON, run with HOME and TMPDIR inside `folder`."""
    env = clean_environment(folder) | variables
    result = run_command([sys.executable, "-W", "error", "-c", program], timeout=120, env=env)
    assert result.returncode == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


PATHS = """
import json, os, sys
from scripts.environment import remove_launcher_folders, use_cache_dir
root = use_cache_dir(sys.argv[1] if len(sys.argv) > 1 else os.environ["CACHE"])
import datasets.config, huggingface_hub.constants, transformers.utils.hub
assert use_cache_dir(str(root)) == root, "a second call with the same folder is allowed"
import torch.hub
from torch._inductor.runtime.cache_dir_utils import cache_dir
hub, data = huggingface_hub.constants, datasets.config
print(json.dumps({
    "root": str(root),
    "paths": {
        "HF_HUB_CACHE": hub.HF_HUB_CACHE, "HUGGINGFACE_HUB_CACHE": hub.HUGGINGFACE_HUB_CACHE,
        "HF_ASSETS_CACHE": hub.HF_ASSETS_CACHE, "HF_XET_CACHE": hub.HF_XET_CACHE,
        "HF_HOME": hub.HF_HOME, "update": hub.CHECK_FOR_UPDATE_DONE_PATH,
        "HF_DATASETS_CACHE": str(data.HF_DATASETS_CACHE),
        "downloads": str(data.DOWNLOADED_DATASETS_PATH),
        "extracted": str(data.EXTRACTED_DATASETS_PATH),
        "modules": str(data.HF_MODULES_CACHE), "code": transformers.utils.hub.HF_MODULES_CACHE,
        "torch": torch.hub.get_dir(), "inductor": cache_dir(),
    },
    "token": huggingface_hub.get_token(),
    "telemetry": not hub.HF_HUB_DISABLE_TELEMETRY or data.HF_UPDATE_DOWNLOAD_COUNTS,
    "bars": not huggingface_hub.utils.are_progress_bars_disabled(),
    "data_bars": not datasets.are_progress_bars_disabled(),
}))
"""


def test_every_library_lands_in_the_folder_whatever_the_shell_said(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    names = (
        "HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HUGGINGFACE_ASSETS_CACHE "
        "HF_XET_CACHE HF_DATASETS_CACHE HF_DATASETS_DOWNLOADED_DATASETS_PATH HF_MODULES_CACHE "
        "HF_DATASETS_EXTRACTED_DATASETS_PATH TORCH_HOME TORCHINDUCTOR_CACHE_DIR"
    )
    shell = dict.fromkeys(names.split(), elsewhere)
    cache = tmp_path / "cache"
    seen = python(PATHS, tmp_path, CACHE=str(cache), **shell)
    assert seen["root"] == str(cache)
    outside = {
        name: path for name, path in seen["paths"].items() if cache not in Path(path).parents
    }
    assert outside == {"HF_HOME": str(cache)}
    assert seen["paths"]["HF_HUB_CACHE"] == str(cache / "hub")
    assert seen["paths"]["HF_DATASETS_CACHE"] == str(cache / "datasets")
    assert seen["token"] is None and not seen["telemetry"]
    assert not seen["bars"] and not seen["data_bars"]  # in a log they would be thousands of lines
    assert not Path(elsewhere).exists()
    for folder in ("home", "xdg", "tmp"):
        assert not list((tmp_path / folder).rglob("*")), folder


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_progress_bars_are_for_rank_0_on_a_terminal(tmp_path: Path, rank: int) -> None:
    env = clean_environment(tmp_path) | {"CACHE": str(tmp_path / "cache"), "RANK": str(rank)}
    ours, terminal = os.openpty()
    try:
        output = subprocess.check_output(
            [sys.executable, "-c", PATHS], env=env, cwd=ROOT, stderr=terminal, timeout=120
        )
    finally:
        os.close(ours)
        os.close(terminal)
    seen = json.loads(output)
    assert seen["bars"] == seen["data_bars"] == (rank == 0)


TOKEN = """
import json, os
from scripts.environment import remove_launcher_folders, use_cache_dir
use_cache_dir(os.environ["CACHE"])
import huggingface_hub
print(json.dumps(huggingface_hub.get_token()))
"""


@pytest.mark.parametrize(
    ("saved_in", "variables"),
    [
        ("home/.cache/huggingface", {}),
        ("xdg/huggingface", {"XDG": "1"}),
        ("hf", {"HF_HOME": "hf"}),
    ],
)
def test_a_saved_token_stays_readable(
    tmp_path: Path, saved_in: str, variables: dict[str, str]
) -> None:
    token = tmp_path / saved_in / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_saved")
    shell = {"CACHE": str(tmp_path / "cache")}
    if "HF_HOME" in variables:
        shell["HF_HOME"] = str(tmp_path / "hf")
    if "XDG" not in variables:
        shell["XDG_CACHE_HOME"] = str(tmp_path / "home/.cache")
    assert python(TOKEN, tmp_path, **shell) == "hf_saved"
    assert python(TOKEN, tmp_path, **shell, HF_TOKEN="hf_given") == "hf_given"
    assert [path.name for path in token.parent.iterdir()] == ["token"]
    assert not list((tmp_path / "cache").rglob("*token*"))


def test_a_call_after_the_import_of_a_library_is_an_internal_error(tmp_path: Path) -> None:
    program = """
import json, huggingface_hub
from scripts.environment import remove_launcher_folders, use_cache_dir
try: use_cache_dir("cache")
except RuntimeError as error: print(json.dumps(str(error)))
"""
    message = python(program, tmp_path)
    assert "after the import of huggingface_hub" in message
    assert not Path("cache/hub").exists()


def test_the_folder_is_created_absolute_and_not_world_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0)
    try:
        assert use_cache_dir("a/b") == tmp_path / "a" / "b"
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert not stat.S_IMODE(folder.stat().st_mode) & 0o022
    assert list((tmp_path / "a" / "b").iterdir()) == []
    os.environ["HOME"] = str(tmp_path / "home")
    assert use_cache_dir("~/cache") == tmp_path / "home" / "cache"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder, reason in (
        (file, "Not a directory"),
        (file / "below", "Not a directory"),
        (Path("/proc/shardloop"), "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "embedded null byte"),
    ):
        with pytest.raises(CommandLineError) as caught:
            use_cache_dir(str(folder))
        line = str(caught.value)
        assert line.isprintable() and reason in line and "give a folder you can write to" in line
        assert line.startswith("--cache_dir /")
    assert "HF_HOME" not in os.environ


@pytest.mark.parametrize(
    ("options", "fill", "reason"),
    [
        ("ro", False, "Read-only file system"),
        ("size=64k", True, "No space left on device"),
    ],
)
def test_read_only_and_full_disks(tmp_path: Path, options: str, fill: bool, reason: str) -> None:
    """In a mount namespace of its own, so that nothing outside sees the mount."""
    program = (
        "import sys; from scripts.environment import use_cache_dir\n"
        "try: print('used', use_cache_dir(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    steps = [f"mount -t tmpfs -o {options} tmpfs {disk}"]
    if fill:
        steps.append(f"(head -c 1M /dev/zero > {disk}/zeros) 2>/dev/null")
    command = [sys.executable, "-c", program, str(disk)]
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, steps[0]], capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not allowed here")
    shell = [*namespace, "; ".join([*steps, '"$@"']), "sh", *command]
    env = clean_environment(tmp_path)
    online = run_command(shell, timeout=60, env=env)
    assert reason in online.stdout and "--cache_dir" in online.stdout, online.output
    offline = run_command(shell, timeout=60, env=env | {"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == f"used {disk}\n", offline.output


def test_the_folders_of_a_launcher_go_with_its_last_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "torchelastic_x"
    ranks = [root / "run" / "attempt_0" / str(rank) for rank in range(2)]
    for folder in ranks:
        folder.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(ranks[0] / "error.json"))
    remove_launcher_folders()
    assert not ranks[0].exists()
    assert ranks[1].exists()
    (ranks[1] / "stdout.log").write_text("kept")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(ranks[1] / "error.json"))
    remove_launcher_folders()
    assert (ranks[1] / "stdout.log").exists()
    (ranks[1] / "stdout.log").unlink()
    remove_launcher_folders()
    assert list(tmp_path.iterdir()) == []
