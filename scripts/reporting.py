"""What a run tells people: the lines at its start and end, and run.json."""

from __future__ import annotations

import json
import platform
import re
import signal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from data.packing import Packs
from data.store import TokenStore
from models.causal_lm import PackedCausalLM
from models.weights import LoadReport
from scripts.command_line import to_yaml
from scripts.config import TrainConfig
from scripts.ledger import anything_left_out, complete_ledger, ledger_table
from trainer.loop import Progress
from trainer.parallel import precision_table

if TYPE_CHECKING:
    from scripts.wiring import Job


def run_name(config: TrainConfig) -> str:
    """Model and data in one file name."""
    model = config.model.name or config.model.path or "embedded"
    data = config.data.name or config.data.path or "chat"
    return "-".join(
        re.sub(r"[^A-Za-z0-9._]+", "_", Path(part).stem if Path(part).suffix else Path(part).name)
        for part in (model, data)
    )


def header(
    job: Job,
    model: PackedCausalLM,
    weights: LoadReport | None,
    tokens: TokenStore,
    packs: Packs,
    steps: int,
    progress: Progress,
) -> str:
    """A calm table of what is about to run."""
    config, world_size = job.config, job.ranks.world_size
    parameters = sum(p.numel() for p in model.parameters())
    seq_len = config.data.seq_len
    ledger = complete_ledger(tokens, packs, seq_len=seq_len)
    filled = 100 * ledger["tokens"] / (len(packs) * seq_len)
    precision = precision_table(config.parallel, export_dtype=config.model.dtype)
    rows = {
        "model": f"{config.model.name or config.model.path or 'built-in Qwen3'}, "
        f"{human(parameters)} parameters, {weights or 'random weights'}",
        "data": f"{tokens.meta['source']}: {ledger['rows_read']:,} rows, {ledger['rows_used']:,} used, "
        f"{ledger['tokens']:,} tokens, {100 * ledger['supervised_tokens'] / ledger['tokens']:.0f} % supervised",
        "packing": f"{len(packs):,} rows of {seq_len} tokens, {filled:.1f} % full",
        "run": f"{steps:,} steps of {job.global_batch_size} rows "
        f"({job.micro_batch_size} x {world_size} ranks x {job.grad_accum_steps} accumulated), "
        f"{steps * job.global_batch_size / len(packs):.1f} epochs",
        "ranks": f"{world_size} on {device_name(job.device)}" + (" each" if world_size > 1 else ""),
        "precision": ", ".join(
            f"{what} {how}" for what, how in precision.items() if what != "optimizer state"
        ),
        "output": str(job.output_dir),
    }
    if progress.step:
        rows["resume"] = f"after step {progress.step} of {steps}"
    if not anything_left_out(ledger):
        return table(rows)
    return f"{table(rows)}\n\n{ledger_table(tokens.meta['source'], ledger, seq_len=seq_len)}\n"


def table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def human(count: float) -> str:
    """1234567 -> 1.23 M."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:g}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")


def stopped(job: Job, number: int, step: int) -> str:
    return (
        f"stopped by {signal.Signals(number).name} after step {step}, everything saved; "
        "the same command goes on from there"
    )


def footer(job: Job, before: dict[str, float], after: dict[str, float], *, mfu_peak: str) -> str:
    """What training changed, and where the results are."""
    lines = []
    if after:
        names = {"eval_loss": "held-out loss", "exact_match_pct": "exact match, %"}
        lines.append(f"{'':<16}{'before':>10}{'after':>10}")
        for key, name in names.items():
            if key in after:
                old = f"{before[key]:.2f}" if key in before else "-"
                lines.append(f"{name:<16}{old:>10}{after[key]:>10.2f}")
    if job.config.checkpoint.export:
        lines.append(f"exported to {job.output_dir / 'export'}")
    lines.append(f"metrics in {job.output_dir / 'metrics.jsonl'} (MFU against: {mfu_peak})")
    return "\n".join(lines)


def write_run_files(job: Job, mesh: DeviceMesh, tokens: TokenStore, packs: Packs) -> str | None:
    """Write config.yaml and run.json; returns the error line if that fails."""
    run: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "transformers", "datasets", "huggingface-hub", "safetensors")
            },
        },
        "model": {
            "name": job.config.model.name or job.config.model.path or "built-in",
            "commit": job.prepared["model_commit"],
        },
        "data": {
            "name": tokens.meta["source"],
            "commit": job.prepared["data_commit"],
            "ledger": complete_ledger(tokens, packs, seq_len=job.config.data.seq_len),
        },
        "world_size": job.ranks.world_size,
        "device": device_name(job.device),
        "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        "precision": precision_table(job.config.parallel, export_dtype=job.config.model.dtype),
        "global_batch_size": job.global_batch_size,
        "grad_accum_steps": job.grad_accum_steps,
        "seed": job.config.seed,
    }
    try:
        job.output_dir.mkdir(parents=True, exist_ok=True)
        (job.output_dir / "config.yaml").write_text(to_yaml(job.config), encoding="utf-8")
        (job.output_dir / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        return f"--output_dir {job.output_dir} cannot be written ({error.strerror}); give another folder"
    return None
