"""A run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import CommandResult, clean_environment
from tests.support.job import (
    EXACT,
    checkpoint_steps,
    losses,
    read_rows,
    start_and_signal,
    train,
)
from tests.support.tiny import write_chat, write_model
from trainer.manifest import describe, read_manifest, write_json

pytestmark = pytest.mark.distributed

_STEPS, _EVERY = 6, 3


@dataclass(frozen=True)
class Job:
    """One command, and the finished run of it in `folder`/whole: 6 steps, saved after 3 and 6."""

    folder: Path
    args: list[str]

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def run(self, output_dir: Path, *more: str, world_size: int = 2) -> CommandResult:
        return train(
            [*self.args, f"--micro_batch_size={4 // world_size}", *more],
            world_size,
            cache_dir=self.folder / "cache",
            output_dir=output_dir,
        )

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.whole, to)
        return to


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("resume")
    # 33 packed rows and 4 a step: the end of the run is in the second epoch.
    args = [
        f"--model.path={write_model(folder / 'model')}",
        f"--data.path={write_chat(folder / 'chat.jsonl', count=80)}",
        "--data.seq_len=128",
        "--global_batch_size=4",
        f"--steps={_STEPS}",
        f"--checkpoint.every={_EVERY}",
        *EXACT,
    ]
    job = Job(folder, args)
    result = job.run(job.whole)
    assert result.returncode == 0, result.output
    assert checkpoint_steps(job.whole) == [3, 6]
    return job


def _deterministic(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock or the memory says."""
    measured = ("second", "mfu", "memory")
    return [
        {name: value for name, value in row.items() if not any(part in name for part in measured)}
        for row in read_rows(output_dir)
    ]


def _assert_same_end(found: Path, expected: Path) -> None:
    """The same rows; the same bytes of weights, of parameters and of optimizer state."""
    assert _deterministic(found) == _deterministic(expected)
    weights = Path("export", "model.safetensors")
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    manifests = [
        json.loads((folder / "checkpoints" / "step-00000006" / "manifest.json").read_text())
        for folder in (found, expected)
    ]
    assert (
        manifests[0]["files"]["tensors/__0_0.distcp"]
        == (manifests[1]["files"]["tensors/__0_0.distcp"])
    )


def test_resuming_from_a_checkpoint_is_bit_exact(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")
    shutil.rmtree(output_dir / "checkpoints" / "step-00000006")
    shutil.rmtree(output_dir / "export")

    result = job.run(output_dir)

    assert result.returncode == 0, result.output
    assert "after step 3 of 6" in result.stdout
    assert result.stderr == ""
    _assert_same_end(output_dir, job.whole)


@pytest.mark.slow
def test_muon_with_bf16_state_resumes_bit_exactly_too(job: Job, tmp_path: Path) -> None:
    flags = ["--optimizer.name=muon", "--optimizer.state_dtype=bfloat16"]
    job = Job(job.folder, [*job.args, *flags])
    whole, output_dir = tmp_path / "whole", tmp_path / "out"
    result = job.run(whole)
    assert result.returncode == 0 and "optimizer state bfloat16" in result.stdout, result.output
    assert losses(whole) != losses(job.whole)
    shutil.copytree(whole, output_dir)
    shutil.rmtree(output_dir / "checkpoints" / "step-00000006")
    shutil.rmtree(output_dir / "export")

    result = job.run(output_dir)

    assert result.returncode == 0, result.output
    assert "after step 3 of 6" in result.stdout and result.stderr == ""
    _assert_same_end(output_dir, whole)


def test_T07_a_damaged_newest_checkpoint_falls_back_by_one(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")
    newest = output_dir / "checkpoints" / "step-00000006"
    tensors = newest / "tensors" / "__1_0.distcp"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    tensors.write_bytes(content)

    result = job.run(output_dir)

    assert result.returncode == 0, result.output
    assert result.stdout.count(f"checkpoint {newest} is damaged (") == 1
    assert "after step 3 of 6" in result.stdout
    _assert_same_end(output_dir, job.whole)


def test_a_finished_run_has_nothing_to_train_but_exports(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")
    shutil.rmtree(output_dir / "export")

    result = job.run(output_dir)

    assert result.returncode == 0, result.output
    assert f"nothing to train: {output_dir} is already at step 6 of 6" in result.stdout
    assert result.stderr == ""
    _assert_same_end(output_dir, job.whole)


def test_T16_another_number_of_ranks_continues_the_same_samples(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")
    shutil.rmtree(output_dir / "checkpoints" / "step-00000006")

    result = job.run(output_dir, world_size=1)

    assert result.returncode == 0, result.output
    assert losses(output_dir) == pytest.approx(losses(job.whole), rel=0, abs=1e-5)
    assert [row["valid_tokens"] for row in read_rows(output_dir)] == [
        row["valid_tokens"] for row in read_rows(job.whole)
    ]


@pytest.mark.slow
def test_T16_other_ranks_and_hybrid_sharding_continue_the_same_samples(
    job: Job, tmp_path: Path
) -> None:
    job = Job(job.folder, [*job.args, "--schedule.name=constant", "--checkpoint.export=false"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert job.run(whole, "--steps=12").returncode == 0
    hybrid = ["--parallel.dp_replicate=2", "--parallel.dp_shard=2"]
    replicas = ["--parallel.dp_replicate=2", "--parallel.dp_shard=1"]
    meshes = [(2, []), (4, hybrid), (1, []), (4, []), (2, replicas), (4, hybrid)]
    for number, (world_size, mesh) in enumerate(meshes, start=1):
        result = job.run(parts, f"--steps={2 * number}", *mesh, world_size=world_size)
        assert result.returncode == 0, result.output
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert [row["valid_tokens"] for row in read_rows(parts)] == [
        row["valid_tokens"] for row in read_rows(whole)
    ]


def test_D12_T13_other_samples_behind_the_same_settings_are_refused(
    job: Job, tmp_path: Path
) -> None:
    output_dir = job.copy(tmp_path / "out")
    checkpoint = output_dir / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "state.json").read_text())
    assert len(set(state["next_batches"])) == 3
    state["next_batches"][2] = state["next_batches"][1]
    write_json(checkpoint / "state.json", state)
    files = describe(checkpoint, read_manifest(checkpoint))
    write_json(checkpoint / "manifest.json", {"format": 2, "files": files})

    result = job.run(output_dir, world_size=1)

    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "the 3 batches that come next are not those" in line and "CACHE_DIR/tokens" in line


def test_T06_a_run_that_cannot_save_says_so_each_time_and_exports(job: Job, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "checkpoints").write_text("in the way")

    result = job.run(output_dir, "--log.progress=false", world_size=1)

    assert result.returncode == 1
    assert result.stdout.count("warning: checkpoint ") == 1, result.stdout
    (line,) = result.stderr.splitlines()
    assert "step-00000006 could not be written (" in line
    assert losses(output_dir) == pytest.approx(losses(job.whole), abs=1e-5)
    assert (output_dir / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_goes_on_from_its_copies_in_a_store(job: Job, bucket: str, tmp_path: Path) -> None:
    mirror = f"--checkpoint.mirror={bucket}/runs/first"
    result = job.run(tmp_path / "one", mirror)
    assert result.returncode == 0, result.output
    refused = job.run(tmp_path / "two", mirror, "--resume=never", world_size=1)
    assert refused.returncode == 1 and "already holds step-00000006" in refused.stderr

    # Another machine, which has nothing but the store.
    more = ["--steps=7", "--allow_changed=[steps]", "--checkpoint.export=false"]
    resumed = job.run(tmp_path / "two", mirror, *more)
    assert resumed.returncode == 0, resumed.output
    assert "after step 6 of 7" in resumed.stdout
    assert checkpoint_steps(tmp_path / "two") == [6, 7]
    copied, mine = (
        (tmp_path / name / "checkpoints" / "step-00000006" / "manifest.json").read_bytes()
        for name in ("one", "two")
    )
    assert copied == mine
    assert "hunter2" not in result.output + refused.output + resumed.output


def test_a_named_checkpoint_starts_another_run(job: Job, tmp_path: Path) -> None:
    output_dir = tmp_path / "branch"

    result = job.run(output_dir, f"--resume={job.whole / 'checkpoints' / 'step-00000003'}")

    assert result.returncode == 0, result.output
    assert losses(output_dir) == losses(job.whole)[3:]
    assert checkpoint_steps(output_dir) == [6]


def test_more_steps_go_on_from_the_end(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")

    result = job.run(output_dir, "--steps=8", "--allow_changed=[steps]")

    assert result.returncode == 0, result.output
    assert [row["step"] for row in read_rows(output_dir)] == list(range(1, 9))
    assert checkpoint_steps(output_dir) == [6, 8]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resume=never"], ["already holds step-00000006"]),
        (
            ["--seed=1", "--global_batch_size=8", "--data.packing=none"],
            ["seed was 0, is 1", "global_batch_size was 4, is 8", "packing was best_fit, is none"],
        ),
        (
            [
                "--steps=8",
                "--optimizer.weight_decay=0.5",
                "--schedule.name=linear",
                "--parallel.param_dtype=bfloat16",
                "--allow_changed=[data]",
            ],
            [
                "optimizer.weight_decay was 0.01, is 0.5; schedule.name was cosine, is linear; "
                "steps was 6, is 8; precision.param_dtype was float32, is bfloat16); undo the change,",
                "go on with --allow_changed '[data, optimizer, schedule, steps, precision]'",
            ],
        ),
        (
            ['--model.overrides={"hidden_size": 128}', "--model.init=random"],
            ["model.hidden_size was 64, is 128"],
        ),
        (
            ["--optimizer.name=muon", "--allow_changed=[optimizer]"],
            ["does not fit this model and optimizer ("],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_T17_what_would_mix_two_runs_is_one_line(
    job: Job, tmp_path: Path, more: list[str], said: list[str]
) -> None:
    output_dir = job.copy(tmp_path / "out")
    before = _contents(output_dir)

    result = job.run(output_dir, *more)

    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("train.py: error: ")
    assert [part for part in said if part not in lines[0]] == []
    assert result.returncode == 1
    assert _contents(output_dir) == before


def test_D11_changed_data_are_refused_unless_allowed(tmp_path: Path, cache_dir: Path) -> None:
    data = write_chat(tmp_path / "chat.jsonl", count=40)
    given = [f"--data.path={data}", "--data.seq_len=64", "--global_batch_size=2", *EXACT]

    def run(*more: str) -> CommandResult:
        return train([*given, *more], 1, cache_dir=cache_dir, output_dir=tmp_path / "out")

    assert run("--steps=2").returncode == 0
    write_chat(data, count=41)
    refused = run("--steps=3", "--allow_changed=[steps]")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "data.0.source was files/" in line and "--allow_changed '[steps, data]'" in line
    allowed = run("--steps=3", "--allow_changed=[steps,data]")
    assert allowed.returncode == 0, allowed.output
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [1, 2, 3]


def test_T08_only_damaged_checkpoints_do_not_start_over(job: Job, tmp_path: Path) -> None:
    output_dir = job.copy(tmp_path / "out")
    for state in output_dir.glob("checkpoints/*/state.json"):
        state.write_bytes(state.read_bytes()[:-1])

    result = job.run(output_dir)

    assert result.returncode == 1
    assert "every checkpoint in" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize(
    ("number", "nproc", "whole_group"),
    [
        pytest.param(signal.SIGTERM, 1, False, id="SIGTERM-python"),
        pytest.param(signal.SIGINT, 1, True, id="ctrl-C-python", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, False, id="SIGTERM-torchrun", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, True, id="ctrl-C-torchrun", marks=pytest.mark.slow),
    ],
)
def test_T01_a_stopped_run_saves_and_goes_on(
    job: Job, tmp_path: Path, number: signal.Signals, nproc: int, whole_group: bool
) -> None:
    output_dir = tmp_path / "out"
    steps = 400  # far more than pass before the signal arrives
    more = [
        *(arg for arg in job.args if not arg.startswith(("--steps", "--checkpoint.every"))),
        f"--steps={steps}",
        f"--micro_batch_size={4 // nproc}",
    ]
    metrics = output_dir / "metrics.jsonl"

    stopped = start_and_signal(
        [f"--cache_dir={job.folder / 'cache'}", f"--output_dir={output_dir}", *more],
        number,
        lambda: metrics.exists() and metrics.read_text().count("\n") >= 3,
        nproc=nproc,
        whole_group=whole_group,
        timeout=90,
        env=clean_environment(tmp_path / "private"),
    )

    (step,) = checkpoint_steps(output_dir)
    assert 3 <= step < steps
    # torchrun has an exit code and words of its own.
    if nproc == 1:
        assert stopped.returncode == 128 + number
        assert stopped.stderr == ""
    else:
        assert stopped.returncode != 0
    assert stopped.stdout.count(f"stopped by {number.name} after step {step}") == 1
    assert stopped.output.count("stopped by") == 1
    assert "KeyboardInterrupt" not in stopped.stderr.split("torch/distributed")[0]
    assert [row["step"] for row in read_rows(output_dir)] == list(range(1, step + 1))
    assert not (output_dir / "export").exists()

    end = step + 2
    again = [arg for arg in more if not arg.startswith(("--steps", "--micro_batch_size"))]
    resumed = Job(job.folder, again).run(
        output_dir, f"--steps={end}", "--allow_changed=[steps]", world_size=nproc
    )

    assert resumed.returncode == 0, resumed.output
    assert f"after step {step} of {end}" in resumed.stdout
    assert [row["step"] for row in read_rows(output_dir)] == list(range(1, end + 1))


def test_ctrl_c_before_the_first_step_is_one_line(job: Job, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"

    result = start_and_signal(
        [f"--cache_dir={cache_dir}", f"--output_dir={tmp_path / 'out'}", *job.args],
        signal.SIGINT,
        cache_dir.exists,  # made before the libraries are imported
        whole_group=True,
        timeout=60,
        env=clean_environment(tmp_path / "private"),
    )

    assert (result.returncode, result.stdout, result.stderr) == (130, "", "train.py: interrupted\n")


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
