"""OUTPUT_DIR/report.html: a whole run on one page that needs nothing else, neither a server nor the network.

python scripts/report.py OUTPUT_DIR

train.py writes it at the end of a run; this writes it again at any time, also of a run that is under way or has crashed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from scripts.charts import STYLE, Curve, column_chart, legend, line_chart, share_bar, short
from scripts.command_line import printable
from scripts.config import TrainConfig
from scripts.ledger import ledger_rows
from scripts.model_card import public_name
from scripts.page import folded, head, section, table, text
from scripts.process import run_command
from trainer.goodput import KINDS, read_goodput

FILE = "report.html"

Row = Mapping[str, Any]

# Names of rows that have a chart, or a place in one; what else is logged gets its own.
_DRAWN = {
    "step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "tokens_per_second_per_gpu",
    "mfu_pct", "step_seconds", "data_wait_seconds", "memory_peak_gib", "valid_tokens", "tokens", "padding_tokens",
}  # fmt: skip
_QUIET_AT_ZERO = {"skipped_steps", "loss_spikes"}


@dataclass(frozen=True)
class Record:
    """What a run has left in its output folder."""

    run: Row
    """run.json."""

    rows: Sequence[Row]
    """metrics.jsonl."""

    samples: Sequence[Row] = ()
    """samples.jsonl."""

    events: Sequence[Row] = ()
    """events.jsonl."""

    goodput: Mapping[str, float] = field(default_factory=dict)
    """See `trainer.goodput.read_goodput`."""

    stopped: Row | None = None
    """`signal` and `step`, where the run was told to stop and has not gone on."""

    config: str = ""
    """config.yaml."""


def read_record(output_dir: Path) -> Record:
    """Raises OSError or ValueError where there is no run.json that can be read."""
    stopped = _lines(output_dir / "preempted")
    config = output_dir / "config.yaml"
    return Record(
        run=json.loads((output_dir / "run.json").read_text(encoding="utf-8")),
        rows=_lines(output_dir / "metrics.jsonl"),
        samples=_lines(output_dir / "samples.jsonl"),
        events=_lines(output_dir / "events.jsonl"),
        goodput=read_goodput(output_dir),
        stopped=stopped[0] if stopped else None,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def write_report(output_dir: Path) -> str | None:
    """Write the page of the run there; returns what went wrong, on one line. It never raises: a page is worth no run."""
    try:
        page = report_page(read_record(output_dir))
        (output_dir / FILE).write_text(page, encoding="utf-8")
    except Exception as error:
        reason = " ".join(str(error).split())
        return printable(
            f"{output_dir / FILE} was not written: {reason or type(error).__name__}"[:500]
        )
    return None


def report_page(record: Record) -> str:
    """The run as one HTML page. Texts of the run are escaped: they come from data and model."""
    model, data = record.run.get("model", {}), record.run.get("data", {})
    names = [public_name(str(source.get("name"))) for source in data.get("sources", [])]
    title = f"{_model_name(model)} on {', '.join(names) or 'its data'}"
    sections = [
        _training(record),
        _held_out(record),
        _samples(record),
        _speed(record),
        _memory(record),
        _time(record),
        *(_ledger(source, record) for source in data.get("sources", []) if source.get("ledger")),
        _warnings(record),
        _settings(record),
    ]
    return (
        f"{head(title, style=STYLE)}<h1>{text(title)}</h1>\n<p class=soft>{text(_state(record))}</p>\n{_cards(record)}\n"
        + "\n".join(filter(None, sections))
        + "\n</html>\n"
    )


def _model_name(model: Row) -> str:
    name = model.get("name") or "a model"
    return "the built-in Qwen3" if name == "built-in" else public_name(str(name))


# ------------------------------------------------------------------------------------- sections


def _state(record: Record) -> str:
    """How far the run is, and on what."""
    run, trained = record.run, _trained(record)
    stopped_at = record.stopped.get("step", 0) if record.stopped else 0
    step = max((row["step"] for row in record.rows), default=0)
    step = max(step, stopped_at)  # of which the last few may be in no row
    steps = run.get("steps")
    parts = [f"step {step:,}" + (f" of {steps:,}" if steps else "")]
    if record.stopped:
        parts.append(
            f"stopped by {record.stopped.get('signal')}, to be continued by the same command"
        )
    elif steps and step < steps:
        parts.append("not at its end")
    ranks = run.get("world_size")
    if ranks:
        parts.append(f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {run.get('device')}")
    tokens = sum(row.get("tokens") or 0 for row in trained)
    if tokens:
        valid = sum(row.get("valid_tokens") or 0 for row in trained)
        parts.append(f"{tokens:,} tokens, {valid:,} of them trained on")
    return "; ".join(parts)


def _cards(record: Record) -> str:
    """The few numbers that are asked for first."""
    trained, cards = _trained(record), []

    def change(name: str, label: str, unit: str = "") -> None:
        values = _values(record.rows, name)
        if values:
            first = f"{values[0]:.4g} → " if len(values) > 1 else ""
            cards.append((label, f"{first}{values[-1]:.4g}{unit}"))

    change("eval_loss", "held-out loss")
    change("exact_match_pct", "exact match", " %")
    change("loss", "training loss")
    # The first row has the warm-up in it.
    steady = trained[1:] or trained
    for name, label, unit in (
        ("tokens_per_second_per_gpu", "tokens/s per rank, median", ""),
        ("mfu_pct", "MFU, median", " %"),
    ):
        if values := _values(steady, name):
            digits = ",.0f" if median(values) >= 1000 else ".3g"
            cards.append((label, f"{median(values):{digits}}{unit}"))
    if values := _values(trained, "memory_peak_gib"):
        cards.append(("peak memory of a rank", f"{max(values):.2f} GiB"))
    if record.goodput:
        seconds = sum(record.goodput[f"{kind}_seconds"] for kind in KINDS)
        cards.append(("time", _duration(seconds)))
        cards.append(("goodput", f"{record.goodput['goodput_pct']:.1f} %"))
    return (
        '<div class="cards">'
        + "".join(f"<div><b>{text(value)}</b><span>{label}</span></div>" for label, value in cards)
        + "</div>"
    )


def _training(record: Record) -> str:
    trained = _trained(record)
    held_out = [(row["step"], row["eval_loss"]) for row in record.rows if "eval_loss" in row]
    charts = [
        line_chart(
            "Loss, nats per token",
            [Curve("training", _curve(trained, "loss")), Curve("held-out", held_out, dots=True)],
        ),
        line_chart("Gradient norm, before clipping", [Curve("", _curve(trained, "grad_norm"))]),
        line_chart("Learning rate", [Curve("", _curve(trained, "learning_rate"))], from_zero=True),
        *_other_charts(trained),
    ]
    return section("Training", _charts(charts))


def _held_out(record: Record) -> str:
    evaluated = [row for row in record.rows if "loss" not in row]
    names = list(dict.fromkeys(name for row in evaluated for name in row if name != "step"))
    if not names:
        return ""
    lines = [[f"{row['step']:,}", *(_number(row.get(name)) for name in names)] for row in evaluated]
    every = table(["step", *names], lines, numbers=len(names) + 1)
    return section(
        "Evaluation",
        _charts(_other_charts(evaluated, dots=True))
        + (every if len(lines) < 8 else folded("every evaluation", every)),
    )


def _other_charts(rows: Sequence[Row], *, dots: bool = False) -> list[str]:
    """Of every number that has no chart elsewhere."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _DRAWN)
    return [
        line_chart(name, [Curve("", _curve(rows, name), dots=dots)])
        for name in names
        if name not in _QUIET_AT_ZERO or any(row.get(name) for row in rows)
    ]


def _samples(record: Record) -> str:
    prompts: dict[str, list[Row]] = {}
    for sample in record.samples:
        prompts.setdefault(str(sample.get("prompt")), []).append(sample)
    cards = []
    for prompt, answers in prompts.items():
        first, *between, last = answers if len(answers) > 1 else (answers[0], answers[0])
        shown = [("expected", last.get("expected"), False)]
        shown += [
            (
                f"step {sample['step']:,}",
                sample.get("answer"),
                str(sample.get("answer")).strip() == str(sample.get("expected")).strip(),
            )
            for sample in ([first, last] if len(answers) > 1 else [last])
        ]
        card = f"<pre>{text(prompt)}</pre>{_answers(shown)}"
        if between:
            rest = [(f"step {s['step']:,}", s.get("answer"), False) for s in between]
            card += folded(f"{len(between)} evaluations between", _answers(rest))
        cards.append(f'<div class="sample">{card}</div>')
    return section("Samples, before and after", "".join(cards)) if cards else ""


def _answers(shown: Sequence[tuple[str, Any, bool]]) -> str:
    lines = "".join(
        f"<tr><th>{text(label)}{' <span class=right>✓</span>' if right else ''}</th>"
        f"<td><pre>{text(answer if str(answer).strip() else json.dumps(answer))}</pre></td></tr>"
        for label, answer, right in shown
    )
    return f"<table>{lines}</table>"


def _speed(record: Record) -> str:
    trained = _trained(record)
    charts = [
        line_chart(
            "Tokens per second and rank",
            [Curve("", _curve(trained, "tokens_per_second_per_gpu"))],
            from_zero=True,
        ),
        line_chart("MFU, %", [Curve("", _curve(trained, "mfu_pct"))], from_zero=True),
        line_chart(
            "Seconds of a step",
            [
                Curve("step", _curve(trained, "step_seconds")),
                Curve("waiting for data", _curve(trained, "data_wait_seconds")),
            ],
            from_zero=True,
        ),
    ]
    return section("Speed", _charts(charts))


def _memory(record: Record) -> str:
    chart = line_chart(
        "Peak memory of the largest rank, GiB",
        [Curve("", _curve(_trained(record), "memory_peak_gib"))],
        from_zero=True,
    )
    labels = {
        "memory_allocated_gib": "memory, GiB",
        "tokens_per_second_per_gpu": "tokens/s per GPU",
        "step_seconds": "step, s",
    }
    lines = [
        [label, *(_number(planned.get(key)) for key in ("planned", "measured", "error_pct"))]
        for name, label in labels.items()
        if (planned := record.run.get("plan", {}).get(name))
    ]
    if lines:
        beside = table(["", "planned", "measured", "error, %"], lines, numbers=3)
    else:
        beside = "<p class=soft>Measured only: plan.py knows GPUs, and was not asked about this machine.</p>"
    return section("Memory, and the plan", _charts([chart]) + beside) if chart or lines else ""


def _time(record: Record) -> str:
    if not record.goodput:
        return ""
    seconds = [(kind, record.goodput[f"{kind}_seconds"]) for kind in KINDS]
    seconds = [(kind, value) for kind, value in seconds if value >= 0.05]
    total = sum(value for _, value in seconds) or 1
    lines = [
        [kind, f"{value:,.1f}", f"{100 * value / total:.1f}", KINDS[kind]]
        for kind, value in seconds
    ]
    restarts = int(record.goodput["restarts"])
    return section(
        "Where the time went",
        share_bar("Shares of the time", seconds)
        + legend([kind for kind, _ in seconds])
        + table(["", "seconds", "%", ""], lines, numbers=2)
        + (f"<p>{restarts:,} restarts after a crash.</p>" if restarts else ""),
    )


def _ledger(source: Row, record: Record) -> str:
    """What became of the rows and tokens of one source."""
    config = _config(record)
    seq_len = config.get("data", {}).get("seq_len") or 0
    rows = ledger_rows(str(source.get("name")), source["ledger"], seq_len=seq_len)
    lengths = [(name, float(count)) for group, name, count, _ in rows if group == "lengths"]
    counts = [
        [f"{group}, {name}", f"{count:,}", note]
        for group, name, count, note in rows
        if group != "lengths" and (count or name in ("read", "used"))
    ]
    chart = column_chart("Examples by their tokens, up to", [_up_to(entry) for entry in lengths])
    return section(
        f"Data: {public_name(str(source.get('name')))}",
        table(["", "", ""], counts, numbers=1, first=1) + (_charts([chart]) if lengths else ""),
    )


def _up_to(entry: tuple[str, float]) -> tuple[str, float]:
    """The end of a range of lengths, and its count."""
    return short(float(entry[0].rpartition("-")[2].replace(",", ""))), entry[1]


def _warnings(record: Record) -> str:
    if not record.events:
        return ""
    shown = record.events[-50:]
    lines = [[f"{event.get('step', 0):,}", str(event.get("line"))] for event in shown]
    more = f" (the last {len(shown)} of {len(record.events):,})" if len(record.events) > 50 else ""
    return section(f"Warnings{more}", table(["step", ""], lines, numbers=1))


def _settings(record: Record) -> str:
    run, model = record.run, record.run.get("model", {})
    facts = {
        "model": ", ".join(
            str(part)
            for part in (
                model.get("name"),
                model.get("commit") and f"commit {model['commit']}",
                model.get("parameters") and f"{model['parameters']:,} parameters",
                model.get("trained_parameters")
                and f"{model['trained_parameters']:,} of them trained",
            )
            if part
        ),
        "mesh": ", ".join(f"{name} {size}" for name, size in run.get("mesh", {}).items()),
        "precision": ", ".join(f"{what} {how}" for what, how in run.get("precision", {}).items()),
        "versions": ", ".join(
            f"{name} {number}" for name, number in run.get("versions", {}).items()
        ),
    }
    changed = _changed(flat(_config(record)), flat(asdict(TrainConfig())))
    return section(
        "Settings",
        table(["", ""], [[name, fact] for name, fact in facts.items() if fact])
        + (
            "<h3>Other than the defaults</h3>" + table(["", ""], [list(pair) for pair in changed])
            if changed
            else ""
        )
        + (folded("config.yaml", f"<pre>{text(record.config)}</pre>") if record.config else ""),
    )


# -------------------------------------------------------------------------------------- numbers


def _charts(charts: Sequence[str]) -> str:
    drawn = [chart for chart in charts if chart]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _trained(record: Record) -> list[Row]:
    return [row for row in record.rows if "loss" in row]


def _curve(rows: Sequence[Row], name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row.get(name)) for row in rows]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _config(record: Record) -> dict[str, Any]:
    return yaml.safe_load(record.config) or {} if record.config else {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def _changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, json.dumps(value) if not isinstance(value, str) else value)
        for name, value in config.items()
        if value != defaults.get(name)
    ]


def _lines(file: Path) -> list[Row]:
    """The objects in a file of JSON lines, without one that was cut off."""
    found = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write OUTPUT_DIR/report.html: a run on one page."
    )
    parser.add_argument("output_dir", type=Path, help="folder of a run of train.py")
    folder = parser.parse_args(argv).output_dir
    if not (folder / "run.json").is_file():
        print(
            f"report.py: error: {printable(str(folder))} holds no run.json: give the --output_dir of a run",
            file=sys.stderr,
        )
        return 2
    if error := write_report(folder):
        print(f"report.py: error: {error}", file=sys.stderr)
        return 1
    print(folder / FILE)
    return 0


if __name__ == "__main__":
    run_command(main)
