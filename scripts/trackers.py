"""The numbers of a run to Weights & Biases and to MLflow: each has a thread, so that training neither waits nor fails with it.

A tracker is a plain function of what is tracked and of the entries that come: it opens its run, sends until there are no
more, and closes. What it raises is one warning, and the rest of the run goes on without it.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from data.sources import shown_url
from scripts.command_line import printable
from scripts.config import TrainConfig, run_name
from scripts.report import FILE as REPORT
from scripts.report import flat
from trainer.metrics import Sample, Tracker

PROJECT = "shardloop"
# What is kept with the run on the server, where there is such a place.
FILES = ("config.yaml", "run.json", REPORT, "samples.jsonl")
# Of the variables that trackers read, those whose values nobody may see.
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_PATIENCE_SECONDS, _HURRIED_SECONDS = 60.0, 10.0

# Of Azure Machine Learning, https://learn.microsoft.com/azure/machine-learning/resource-limits-capacity; its limit on
# parameters is told by its server only (github.com/Azure/azure-sdk-for-python/issues/35685).
AZURE_METRIC_NAMES = 50
AZURE_METRICS_PER_BATCH = 250
AZURE_PARAMETERS = 200
# Of MLflow's servers before 2.10, Azure's among them.
PARAMETER_CHARACTERS = 500
_PARAMETERS_PER_BATCH = 100


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked."""

    output_dir: Path
    name: str
    settings: Mapping[str, Any]
    """The configuration by dotted names."""


@dataclass(frozen=True)
class Entry:
    """What came at once."""

    milliseconds: int
    """Since 1970."""

    step: int
    numbers: Mapping[str, float]
    """By `GROUP/NAME`."""

    samples: Sequence[Sample]


class Feed:
    """Entries on their way from the training loop to a tracker. Iterate over it for all that have come, again and again, until the run ends."""

    def __init__(self) -> None:
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()
        self._ended = False
        self.outcome = ""
        """How the run ended, at the end of the iteration: finished, stopped or failed."""

    def put(self, step: int, numbers: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """A `trainer.metrics.Tracker`."""
        self._entries.put(Entry(int(time.time() * 1000), step, numbers, samples))

    def close(self, outcome: str) -> None:
        """There will be no more."""
        self.outcome = outcome
        self._entries.put(None)

    def __iter__(self) -> Iterator[list[Entry]]:
        while not self._ended:
            waiting = [self._entries.get()]  # and whatever came while the last ones were sent
            with suppress(Empty):
                while True:
                    waiting.append(self._entries.get_nowait())
            self._ended = waiting[-1] is None
            if entries := [entry for entry in waiting if entry is not None]:
                yield entries


@contextmanager
def tracking(
    config: TrainConfig, output_dir: Path, *, stopped: Callable[[], bool]
) -> Iterator[list[Tracker]]:
    """Run the trackers that are asked for; at the end they get a minute to send what is left, and ten seconds where the run did not come to its end.

    Args:
        config: of the run.
        output_dir: with its files.
        stopped: asked at the end, whether the run was told to stop.
    """
    wanted = {"wandb": to_wandb, "mlflow": to_mlflow}
    wanted = {name: track for name, track in wanted.items() if getattr(config.log, name)}
    settings = {
        name: shown_url(value) if isinstance(value, str) else value
        for name, value in flat(asdict(config)).items()
    }
    tracked = Tracked(output_dir, run_name(config), settings)
    feeds: dict[str, Feed] = {}
    threads: dict[str, threading.Thread] = {}
    for name, track in wanted.items():
        with warned(name):
            # Here and not in its thread: worker processes are forked, and none may be while a module is half imported.
            _library(name)
            feed = Feed()
            threads[name] = threading.Thread(
                target=_track, args=(name, track, tracked, feed), name=name, daemon=True
            )
            threads[name].start()
            feeds[name] = feed
    outcome = "failed"
    try:
        yield [feed.put for feed in feeds.values()]
        outcome = "stopped" if stopped() else "finished"
    finally:
        for feed in feeds.values():
            feed.close(outcome)
        seconds = _PATIENCE_SECONDS if outcome == "finished" else _HURRIED_SECONDS
        deadline = time.monotonic() + seconds
        for name, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _warn(
                    f"{name} has not taken everything in {seconds:.0f} s; {output_dir} has it all"
                )


def _track(name: str, track: Callable[[Tracked, Feed], None], tracked: Tracked, feed: Feed) -> None:
    with warned(name):
        track(tracked, feed)
    for _ in feed:  # of a tracker that has given up
        pass


@contextmanager
def warned(name: str) -> Iterator[None]:
    """Make one line of whatever is raised inside."""
    try:
        yield
    except Exception as error:
        _warn(f"{name}: {_told(error)}; the run goes on without it")


def _warn(line: str) -> None:
    tqdm.write(f"warning: {line}", file=sys.stderr)


def _told(error: Exception) -> str:
    """The message on one line, without passwords."""
    text = re.sub(r"(?<=://)[^/\s@]*@", "", " ".join(str(error).split())) or type(error).__name__
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "...")
    return printable(text[:300])


def _library(name: str) -> Any:
    """Import what a tracker needs. It sends nothing about itself."""
    if name == "wandb":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        return wandb
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    return MlflowClient, Metric, Param


def _kept(tracked: Tracked, name: str, value: str | None = None) -> str:
    """The id of the run at the tracker, under which a continued run goes on; "" where it has none. With `value` it is written."""
    file = tracked.output_dir / f".{name}-run"
    if value is not None:
        file.write_text(value + "\n", encoding="utf-8")
        return value
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def to_wandb(tracked: Tracked, feed: Feed) -> None:
    """A run of Weights & Biases, with the variables of its own: WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE and others."""
    wandb = _library("wandb")
    shared = wandb.setup().settings
    online = shared.mode == "online"
    if online and not _has_key(shared):  # on a terminal it would ask for one, and wait
        raise ValueError("no API key: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")
    kept = _kept(tracked, "wandb") or _kept(tracked, "wandb", secrets.token_hex(4))
    run = wandb.init(
        dir=tracked.output_dir,
        id=kept,
        resume="allow",
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=os.environ.get("WANDB_NAME", tracked.name),
        config=dict(tracked.settings),
        settings=wandb.Settings(console="off", x_disable_meta=True, x_save_requirements=False),
    )
    # Steps that are done again after a crash are sent again, and wandb's own count only goes up.
    run.define_metric("*", step_metric="step")
    if online:
        tqdm.write(f"wandb: {run.url}")
    for entries in feed:
        for entry in entries:
            run.log({"step": entry.step, **entry.numbers})
            if entry.samples:
                columns = ["prompt", "expected", "answer"]
                rows = [[sample[column] for column in columns] for sample in entry.samples]
                run.log({"step": entry.step, "samples": wandb.Table(columns=columns, data=rows)})
    for name in FILES:
        if (tracked.output_dir / name).is_file():
            run.save(str(tracked.output_dir / name), base_path=tracked.output_dir, policy="now")
    run.finish(exit_code=0 if feed.outcome == "finished" else 1)


def _has_key(settings: Any) -> bool:
    """Whether wandb finds a key in the environment, in its settings, or in .netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    with suppress(OSError, NetrcParseError):
        host = urlsplit(settings.base_url).hostname or ""
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def to_mlflow(tracked: Tracked, feed: Feed) -> None:
    """A run of MLflow at MLFLOW_TRACKING_URI: that of MLFLOW_RUN_ID, as an Azure ML job has one, or its own."""
    client_class, metric, param = _library("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ValueError("MLFLOW_TRACKING_URI is not set: give it the address of a server")
    client = client_class(tracking_uri=uri)
    given = os.environ.get("MLFLOW_RUN_ID")
    run_id = given or _mlflow_run(client, tracked)
    known = set(client.get_run(run_id).data.params)  # those of a run never change
    params = [
        param(name, str(value)[:PARAMETER_CHARACTERS])
        for name, value in [*tracked.settings.items()][:AZURE_PARAMETERS]
        if name not in known
    ]
    for start in range(0, len(params), _PARAMETERS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMETERS_PER_BATCH])
    names = MetricNames(AZURE_METRIC_NAMES if uri.startswith("azureml:") else None)
    for entries in feed:
        metrics = [
            metric(names.of(name), value, entry.milliseconds, entry.step)
            for entry in entries
            for name, value in entry.numbers.items()
            if names.of(name)
        ]
        for start in range(0, len(metrics), AZURE_METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + AZURE_METRICS_PER_BATCH])
    for name in FILES:
        if (tracked.output_dir / name).is_file():
            client.log_artifact(run_id, str(tracked.output_dir / name))
    if given is None:  # otherwise it is ended by whom it belongs to
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        client.set_terminated(run_id, states[feed.outcome])


def _mlflow_run(client: Any, tracked: Tracked) -> str:
    """The run that is continued, or a new one in the experiment of MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME."""
    if kept := _kept(tracked, "mlflow"):
        with suppress(Exception):  # it was at another server
            client.update_run(kept, status="RUNNING")
            return kept
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not experiment:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
    return _kept(
        tracked, "mlflow", client.create_run(experiment, run_name=tracked.name).info.run_id
    )


class MetricNames:
    """Names of metrics as MLflow takes them, and no more than a server does."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._names: dict[str, str] = {}

    def of(self, name: str) -> str:
        """With `_` for what may not be in a name; "" for one too many, of which the first is warned of."""
        if name not in self._names:
            full = self._most is not None and sum(map(bool, self._names.values())) >= self._most
            if full and "" not in self._names.values():
                _warn(
                    f"mlflow: {name} and later metrics are left out: the server takes {self._most} names"
                )
            self._names[name] = "" if full else re.sub(r"[^\w\-. /]", "_", name, flags=re.A)
        return self._names[name]
