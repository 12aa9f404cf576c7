"""doctor.py finds what is broken, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3NextConfig

from data.config import DataConfig
from models.build import parse_model_config
from models.config import LoraConfig, ModelConfig
from scripts import collective
from scripts import doctor as doctor_module
from scripts.collective import check_collective
from scripts.command_line import parse_train_config
from scripts.config import TrainConfig
from scripts.doctor import check_fit, check_job, main, plan_job
from scripts.environment import cache_settings
from scripts.machine import (
    Finding,
    Gpu,
    _interfaces,
    _links,
    check_folder,
    check_gpus,
    check_host_memory,
    check_launcher,
    check_shared_memory,
    check_versions,
    file_system,
)
from scripts.planner.facts import find_model
from tests.support.command import ROOT
from tests.support.hub import LoopbackHub
from tests.support.ranks import free_port
from tests.support.tiny import write_chat, write_model
from trainer.config import ParallelConfig

_GIB = 2**30
_TOKEN = "hf_" + "secret" * 5
Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Doctor]:
    """The exit code and output of `main`, asking the hub at `url`; the environment it changes is put back."""
    # The libraries are imported already, so their folders have to be set from outside.
    for name, value in cache_settings(cache_dir).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)

    def run(*argv: str, url: str) -> tuple[int, str]:
        constants = "huggingface_hub.constants"
        files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
        code = main([f"--cache_dir={cache_dir}", *argv])
        return code, capsys.readouterr().out

    yield run
    os.environ.clear()
    os.environ.update(before)


def _levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_a_sound_job_is_told_so_and_its_rows_are_shown(
    doctor: Doctor, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", _TOKEN)
    model = write_model(tmp_path / "served" / "tiny", trained=False)
    rows = write_chat(tmp_path / "served" / "chat" / "train.jsonl", count=5)
    with LoopbackHub({"org/tiny": model}, {"org/chat": rows.parent}) as hub:
        flags = ["--model.name=org/tiny", "--data.name=org/chat", "--data.seq_len=128"]
        flags += [f"--output_dir={tmp_path / 'output'}", "--world_size=2", "--micro_batch_size=2"]
        code, out = doctor(*flags, url=hub.url)
        # Configuration and tokenizer, but no weights.
        assert "model.safetensors" not in hub.downloads("org/tiny")
    assert code == 0, out
    assert "error" not in out.replace("0 errors", "")
    answer = json.loads(rows.read_text().splitlines()[0])["messages"][-1]["content"]
    assert f"trained on: '{answer}" in out
    for part in ("ok       versions", "org/tiny at", "org/chat at", "a token in the environment"):
        assert part in out, out
    assert "on 2 ranks" in out
    # Nothing is in the cache yet, which costs time at the start.
    assert "warning  cache" in out
    assert _TOKEN not in out
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_everything_that_is_broken_is_told_at_once(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # left over from somewhere
    (tmp_path / "output" / "checkpoints" / "step-00000020").mkdir(parents=True)
    flags = [f"--output_dir={tmp_path / 'output'}", "--resume=never", "--world_size=2"]
    flags += ["--model.name=Qwen/Qwen3-8B", "--data.name=org/chat", "--global_batch_size=3"]
    flags += ["--micro_batch_size=1"]
    code, out = doctor(*flags, url=f"http://127.0.0.1:{free_port()}")
    assert code == 1
    errors = [line for line in out.splitlines() if line.startswith("error")]
    for part in (
        "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not",
        "--resume never starts no run there",
        "Qwen/Qwen3-8B is not in the cache",
        "dataset org/chat",
        "global_batch_size 3 is not divisible",
    ):
        assert any(part in line for line in errors), out
    assert out.endswith("the job would fail\n")


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name, value in cache_settings(tmp_path / "file").items():
        monkeypatch.setenv(name, value)
    assert main([f"--cache_dir={tmp_path / 'file'}", f"--output_dir={tmp_path / 'out'}"]) == 1
    assert "--cache_dir" in capsys.readouterr().out
    assert main(["--cache_dri=x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_template_that_cannot_be_told_apart_is_an_error(tmp_path: Path, cache_dir: Path) -> None:
    model = write_model(tmp_path / "model", trained=False)
    rows = write_chat(tmp_path / "chat" / "train.jsonl", count=3)
    config = TrainConfig(
        model=ModelConfig(path=str(model)), data=DataConfig(path=str(rows), seq_len=16)
    )

    def found(config: TrainConfig) -> list[Finding]:
        return check_job(config, cache_dir, from_cache=False)[1]

    assert any("left out" in finding.text for finding in found(config))  # seq_len of 16
    assert {*_levels(found(replace(config, data=DataConfig(path=str(rows), seq_len=128))))} == {
        "ok"
    }
    template = tmp_path / "bad.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config = replace(config, data=DataConfig(path=str(rows), seq_len=128))
    bad = replace(config, model=ModelConfig(path=str(model), chat_template=str(template)))
    assert "error" in _levels(found(bad))
    template.write_text("{% for message in %}")
    assert "error" in _levels(found(bad))
    rows.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3)
    assert _levels(found(config)).count("error") == 3


def test_versions_are_compared_with_what_setup_cfg_says() -> None:
    assert _levels(check_versions()) == ["ok"]
    found = check_versions(["torch>=99", "no-such-package>=1", "numpy"])
    assert _levels(found) == ["error", "error"]
    assert "torch" in found[0].text and "no-such-package>=1 is not installed" in found[1].text


def test_extras_that_the_flags_need_are_versions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor_module._extras(TrainConfig()) == []
    config = TrainConfig(
        lora=LoraConfig(rank=8),
        parallel=ParallelConfig(float8="rowwise"),
        data=DataConfig(path="s3://bucket/rows"),
    )
    assert doctor_module._extras(config) == ["lora", "torchao", "s3"]
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8").replace("peft>=0.21", "peft>=99")
    (tmp_path / "setup.cfg").write_text(setup, encoding="utf-8")
    monkeypatch.setattr("scripts.machine.ROOT", tmp_path)
    assert _levels(check_versions()) == ["ok"]
    (found,) = check_versions(extras=["lora"])
    assert found.level == "error" and "peft" in found.text and found.remedy.endswith("'.[lora]'")


@pytest.mark.slow
@pytest.mark.distributed
def test_an_all_reduce_is_timed_checked_and_not_waited_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_collective(ranks=1) == []
    (found,) = check_collective(ranks=2, backend="gloo", numbers=1000)
    assert found.level == "ok" and re.search(r"2 ranks sum .* GB/s", found.text), found
    (found,) = check_collective(ranks=2, backend="gloo", numbers=1000, seconds=0.1)
    assert found.level == "error" and "no answer in 0 s" in found.text
    (found,) = check_collective(ranks=2, backend="nonsense", numbers=1000)
    assert found.level == "error" and "nonsense" in found.text.partition("fails: ")[2]
    wrong = {"sum": 4.0, "seconds": 1.0, "version": "NCCL 2"}
    assert collective._finding(wrong, 2, "nccl", 1000).level == "error"


def test_a_rank_that_another_launcher_made_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _levels(check_launcher()) == ["ok"]
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    assert _levels(check_launcher()) == ["warning"]


def test_gpus_are_judged_by_what_the_job_asks_of_them() -> None:
    def levels(*gpus: Gpu, **parallel: str) -> list[str]:
        return _levels(check_gpus(gpus, TrainConfig(parallel=ParallelConfig(**parallel))))  # type: ignore[arg-type]

    nvl = Gpu("NVIDIA H100 NVL", (9, 0), 93 * _GIB, 92 * _GIB)
    t4 = Gpu("Tesla T4", (7, 5), 15 * _GIB, 15 * _GIB)
    assert levels(nvl, nvl) == ["ok"]
    assert levels(nvl, nvl._replace(free=50 * _GIB)) == ["ok", "warning"]
    assert levels(t4, param_dtype="float32") == ["ok"]
    assert levels(t4, float8="rowwise") == ["ok", "error", "error"]
    assert levels(nvl, t4, param_dtype="float32") == ["ok", "warning"]
    assert levels() == ["warning"]
    assert _levels(check_gpus([], TrainConfig(device="cuda"))) == ["error"]


def test_links_are_read_from_the_table_of_nvidia_smi() -> None:
    table = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV12\t0-39\nGPU1\tNV12\t X \t40-79\n\nLegend:\n"
    assert _links(table, 2) == ("ok", "topology", "NVLink between all GPUs (NV12)", "")
    assert _links(table.replace("NV12", "SYS"), 2).level == "warning"


def test_an_interface_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "^docker0")
    assert _interfaces() == []
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nowhere7")
    assert _levels(_interfaces()) == ["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
def test_a_small_or_read_only_disk_is_an_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount folders")
    try:
        folder = disk / "not" / "yet"
        assert file_system(disk) == "tmpfs"
        assert _levels(check_folder("output_dir", folder, needed=1e6)) == ["ok"]
        (found,) = check_folder("output_dir", folder, needed=1e9)
        assert found.level == "error" and "1.0 GB will be needed" in found.text
        config = TrainConfig()
        assert _levels(check_shared_memory(config, gpus=2, folder=disk)) == ["error"]
        assert _levels(check_shared_memory(config, gpus=0, folder=disk)) == ["warning"]
        assert not folder.exists()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        (found,) = check_folder("output_dir", folder, needed=0)
        assert found.level == "error" and "Read-only file system" in found.text
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_memory_is_compared_with_what_there_is() -> None:
    config = parse_train_config(["--config", str(ROOT / "scripts" / "recipes" / "qwen3-8b.yaml")])
    model = parse_model_config(find_model("Qwen/Qwen3-8B"), config.model, "Qwen/Qwen3-8B")
    plan, unplanned = plan_job(config, model, world_size=2, memory=None)
    assert plan is not None and not unplanned
    # Masters, gradients and state of half of the parameters are 65 GB, and gathered layers and activations come on top.
    reserved = plan.reserved_bytes / _GIB  # more than is needed, without what is beside it
    found = [
        check_fit(plan, world_size=2, memory=gibibytes * _GIB) for gibibytes in (120, reserved, 62)
    ]
    assert _levels(found) == ["ok", "warning", "error"]
    assert "optimizer state" in found[0].text and "there are 120.0" in found[0].text
    assert check_fit(plan, world_size=2, memory=None).level == "ok"
    plan, (finding,) = plan_job(config, model, world_size=3, memory=None)
    assert plan is None and (finding.level, finding.what) == ("error", "batch")
    plan, (finding,) = plan_job(config, Qwen3NextConfig(), world_size=2, memory=None)
    assert plan is None and finding.level == "warning" and "linear" in finding.text
    assert _levels(check_host_memory(needed=0)) == ["ok"]
    assert _levels(check_host_memory(needed=1e15)) == ["error"]


def test_the_command_line_is_that_of_train_py() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py"), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--world_size" in out and "--model.name" in out
