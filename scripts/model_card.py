"""The model card of an export: what a run recorded about itself, as the README.md that a hub shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def model_card(output_dir: Path, step: int, *, library: str = "transformers") -> str:
    """The card of the model as it was after `step`, from run.json, config.yaml and metrics.jsonl of its run.

    `library` is what loads the folder. Of a local folder or file only the last part of its path is told. What the run did not record is left out.
    """
    run = json.loads(_text(output_dir / "run.json") or "{}")
    config = yaml.safe_load(_text(output_dir / "config.yaml")) or {}
    rows = [json.loads(line) for line in _text(output_dir / "metrics.jsonl").splitlines()]
    rows = [row for row in rows if row["step"] <= step]
    base = run.get("model", {})
    sources = run.get("data", {}).get("sources", [])

    header: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if base.get("commit"):
        header["base_model"] = base["name"]
    if datasets := [source["name"] for source in sources if source.get("commit")]:
        header["datasets"] = list(dict.fromkeys(datasets))

    settings = {
        "learning rate": config.get("optimizer", {}).get("learning_rate"),
        "schedule": config.get("schedule", {}).get("name"),
        "rows per step": run.get("global_batch_size"),
        "tokens per row": config.get("data", {}).get("seq_len"),
        "seed": run.get("seed"),
    }
    names = {"loss": "loss", "eval_loss": "held-out loss", "exact_match_pct": "exact match, %"}
    last = {name: _last(rows, key) for key, name in names.items()}
    tokens, valid = (sum(row.get(key, 0) for row in rows) for key in ("tokens", "valid_tokens"))
    facts: dict[str, Any] = {
        "base model": _named(base),
        "weights at start": config.get("model", {}).get("init") if base.get("name") else None,
        "data": "; ".join(filter(None, map(_named, sources))),
        "steps": f"{step:,}",
        "tokens": f"{tokens:,}, of them {valid:,} trained on" if tokens else None,
        **{name: f"{value:.4g}" for name, value in last.items() if value is not None},
        "settings": ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None),
        "versions": ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items()),
    }
    table = "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in facts.items() if fact)
    title = public_name(base["name"]) if base.get("name") else "A Qwen model"
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {title}, trained by shardloop\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    """The newest finite value of a metric."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return values[-1] if values else None


def _named(thing: dict[str, Any]) -> str | None:
    """A model or data set with its commit."""
    name, commit = thing.get("name"), thing.get("commit")
    return name and public_name(name) + (f" at commit {commit}" if commit else "")


def public_name(name: str) -> str:
    """A name as the public may read it: nothing of the folders of the machine."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
