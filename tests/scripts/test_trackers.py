"""wandb and MLflow for real, without a network: what arrives, within which limits, and that no run fails with them."""

from __future__ import annotations

import http.server
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import trackers
from scripts.command_line import CommandLineError, parse_train_config
from scripts.config import TrainConfig
from scripts.trackers import Entry, Feed, MetricNames, Tracked, to_mlflow, to_wandb, tracking
from tests.support import wandb_file
from tests.support.job import read_rows, train
from tests.support.ranks import run_ranks
from trainer.config import LogConfig

_KEY = "0123456789abcdef0123456789abcdefCANARY00"
_SAMPLE = {"prompt": "2 + 2?", "expected": "4", "answer": "5"}
_BOTH = TrainConfig(log=LogConfig(wandb=True, mlflow=True))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers' own libraries


def _offline(folder: Path) -> dict[str, str]:
    """wandb that only writes files, into the run, and an MLflow store in a folder."""
    return {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": _KEY,
        "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in _offline(tmp_path).items():
        monkeypatch.setenv(name, value)


def _mlflow(folder: Path) -> tuple[Any, Any]:
    """The client and the one run of the store in FOLDER/mlflow."""
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "shardloop"]
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_and_its_continuation_arrive_whole(tmp_path: Path, cache_dir: Path) -> None:
    out = tmp_path / "out"
    for steps in (2, 4):
        result = train(
            ["--log.wandb", "--log.mlflow", "--log.every=1", "--log.tensorboard=false", "--data.seq_len=128",
             "--global_batch_size=4", "--evaluation.max_rows=8", "--evaluation.generate_rows=4", "--schedule.name=constant",
             "--evaluation.max_new_tokens=4", "--checkpoint.export=false", f"--steps={steps}", "--allow_changed=[steps]"],
            2,
            cache_dir=cache_dir,
            output_dir=out,
            env=_offline(tmp_path),
        )  # fmt: skip
        assert result.returncode == 0, result.output
        assert result.stderr == ""
        assert _KEY not in result.output

    rows = [row for row in read_rows(out) if "loss" in row]
    history = wandb_file.history(out)
    found = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert found == {row["step"]: row["loss"] for row in rows}
    assert {"speed/tokens_per_second", "memory/memory_peak_gib", "data/tokens"} <= set().union(
        *history
    )
    assert [row["step"] for row in history if "evaluation/eval_loss" in row] == [0, 2, 4]
    tables = [row for row in history if any("samples" in name for name in row)]
    assert [row["step"] for row in tables] == [0, 2, 4]
    assert (
        len({run.run_id for run in wandb_file.of_kind(out, "run")}) == 1
    )  # both halves are one run to its server

    client, run = _mlflow(tmp_path)
    assert run.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in logged] == [(row["step"], row["loss"]) for row in rows]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "evaluation/eval_loss")] == [0, 2, 4]  # fmt: skip
    assert run.data.params["optimizer.learning_rate"] == "0.003"
    assert (
        run.data.params["steps"] == "2"
    )  # parameters of a run never change; config.yaml has the new ones
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.yaml", "run.json", "report.html", "samples.jsonl"}

    for file in (path for path in out.rglob("*") if path.is_file()):
        assert _KEY.encode() not in file.read_bytes(), file


def _send(config: TrainConfig, folder: Path, *, stopped: bool = False) -> None:
    with tracking(config, folder, stopped=lambda: stopped) as sinks:
        for step in (1, 2):
            for put in sinks:
                put(step, {"train/loss": 1.0 / step}, [_SAMPLE])


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_how_a_run_ended_is_told(tmp_path: Path, end: str) -> None:
    config = replace(_BOTH, log=LogConfig(mlflow=True))
    if end == "stopped":
        _send(config, tmp_path, stopped=True)
    else:
        with (
            pytest.raises(RuntimeError),
            tracking(config, tmp_path, stopped=lambda: False) as (put,),
        ):
            put(1, {"train/loss": 1.0}, [])
            raise RuntimeError("out of memory")
    _, run = _mlflow(tmp_path)
    assert run.info.status == {"stopped": "KILLED", "failed": "FAILED"}[end]
    assert run.data.metrics["train/loss"] in (0.5, 1.0)


def _send_alone(name: str, folder: str) -> str:
    """In a process of its own, since wandb reads its variables once: what a tracker and its library print."""
    file = Path(folder, "printed")
    with file.open("wb") as printed:
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
    _send(replace(_BOTH, log=replace(LogConfig(), **{name: True})), Path(folder))
    sys.stderr.flush()
    return file.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"MLFLOW_TRACKING_URI": "http://user:S3cret@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, "mlflow: .+"),
        ({"MLFLOW_TRACKING_URI": ""}, "mlflow: MLFLOW_TRACKING_URI is not set: .+"),
        ({"MLFLOW_RUN_ID": "of-nobody"}, "mlflow: .*of-nobody.*"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "wandb: no API key: .+"),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}, "wandb: .+"),
        ({"WANDB_MODE": "no-such-mode"}, "wandb: .*no-such-mode.*"),
    ],
)  # fmt: skip
def test_a_tracker_that_fails_is_one_line(tmp_path: Path, env: dict[str, str], line: str) -> None:
    name = line.partition(":")[0]
    (printed,) = run_ranks(
        _send_alone, 1, name, str(tmp_path), env={**_offline(tmp_path), **env}, init_group=False
    )
    assert re.fullmatch(rf"warning: {line}; the run goes on without it\n", printed), printed
    assert "S3cret" not in printed and _KEY not in printed


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes requests and never answers."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ended.wait(60)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()


def test_a_tracker_that_hangs_holds_up_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    silent_server: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # ends with the server
    monkeypatch.setattr(trackers, "_PATIENCE_SECONDS", 0.5)
    began = time.monotonic()
    _send(replace(_BOTH, log=LogConfig(mlflow=True)), tmp_path)
    assert time.monotonic() - began < 5
    assert capfd.readouterr().err == f"warning: mlflow has not taken everything in 0 s; {tmp_path} has it all\n"  # fmt: skip


def _feed(entries: Sequence[Entry]) -> Feed:
    feed = Feed()
    for entry in entries:
        feed.put(entry.step, entry.numbers, entry.samples)
    feed.close("finished")
    return feed


def test_entries_that_wait_come_together() -> None:
    entries = [Entry(0, step, {"a": 1.0}, []) for step in range(5)]
    feed = _feed(entries)
    (together,) = feed
    assert [entry.step for entry in together] == [0, 1, 2, 3, 4]
    assert list(feed) == []  # and not for ever waiting
    assert list(_feed([])) == []


def test_values_are_cut_and_batches_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the requests that reach the store."""
    from mlflow import MlflowClient

    batches: list[tuple[int, int]] = []
    real = MlflowClient.log_batch

    def count(self: Any, run_id: str, metrics: Any = (), params: Any = (), **rest: Any) -> Any:
        batches.append((len(metrics), len(params)))
        return real(self, run_id, metrics=metrics, params=params, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", count)
    settings = {f"flag_{n}": "x" * 600 for n in range(250)}
    numbers = {f"train/number_{n}": float(n) for n in range(60)}
    to_mlflow(
        Tracked(tmp_path, "run", settings), _feed([Entry(0, s, numbers, []) for s in range(10)])
    )
    _, run = _mlflow(tmp_path)
    assert len(run.data.params) == 200
    assert {len(value) for value in run.data.params.values()} == {500}
    assert len(run.data.metrics) == 60
    assert sum(metrics for metrics, _ in batches) == 600
    assert max(metrics for metrics, _ in batches) == 250
    assert max(params for _, params in batches) == 100


def test_names_are_those_a_server_takes(capsys: pytest.CaptureFixture[str]) -> None:
    names = MetricNames(2)
    assert names.of("train/loss") == "train/loss"
    assert names.of("evaluation/pass@1 (é)") == "evaluation/pass_1 ___"
    assert names.of("third") == names.of("fourth") == ""
    assert names.of("train/loss") == "train/loss"
    assert capsys.readouterr().err.count("warning: mlflow: third and later") == 1
    assert all(MetricNames(None).of(f"name_{n}") for n in range(60))


def test_a_run_of_somebody_else_is_written_to_and_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an Azure ML job, which has made the run and ends it."""
    from mlflow import MlflowClient

    uri = (tmp_path / "store").as_uri()
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("of the job"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    to_mlflow(Tracked(tmp_path, "run", {"seed": 0}), _feed([Entry(0, 1, {"train/loss": 1.0}, [])]))
    found = client.get_run(run.info.run_id)
    assert (found.info.status, found.data.metrics) == ("RUNNING", {"train/loss": 1.0})


def test_passwords_in_addresses_are_not_sent(tmp_path: Path) -> None:
    config = parse_train_config(
        ["--data.path=https://someone:S3cret@host/chat.jsonl?sig=S3cret", "--log.mlflow"]
    )
    _send(config, tmp_path)
    _, run = _mlflow(tmp_path)
    assert run.data.params["data.path"] == "https://host/chat.jsonl"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_not_there_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("scripts.command_line.find_spec", lambda module: None)
    with pytest.raises(
        CommandLineError, match=rf"--log.{name} needs {name}: pip install .*\[{name}\]"
    ):
        parse_train_config([f"--log.{name}"])


def test_wandb_gets_configuration_and_files(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>page</p>")
    to_wandb(Tracked(tmp_path, "run", {"optimizer.learning_rate": 0.5}), _feed([]))
    import wandb

    wandb.teardown()  # its other process writes the end of the file
    (run,) = wandb_file.of_kind(tmp_path, "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optimizer.learning_rate"] == 0.5
    assert (run.project, run.display_name) == ("shardloop", "run")
    files = wandb_file.of_kind(tmp_path, "files")
    assert [file.path for group in files for file in group.files] == ["report.html"]
