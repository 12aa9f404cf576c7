"""What a run tells people: the lines at its start and end, and run.json."""

from __future__ import annotations

import json
import platform
import signal
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import current_flash_attention_impl

from data.config import source_configs
from data.ledger import Ledger
from data.mixture import Mixture
from models.build import INDEXER
from models.causal_lm import PackedCausalLM
from models.layers import indexed_layers
from models.partial import adapted, trained_tokens
from models.weights import LoadReport
from scripts.command_line import printable, to_yaml
from scripts.config import TrainConfig
from scripts.ledger import anything_left_out, ledger_table
from scripts.partial import trains_part
from scripts.report import FILE as REPORT
from trainer.loop import Progress
from trainer.parallel import mesh_sizes
from trainer.precision import precision_table

if TYPE_CHECKING:
    from scripts.job import Job


def header(
    job: Job,
    model: PackedCausalLM,
    weights: LoadReport | None,
    mixture: Mixture | None,
    steps: int,
    progress: Progress,
) -> str:
    """A calm table of what is about to run."""
    config, world_size = job.config, job.ranks.world_size
    sizes = mesh_sizes(config.parallel, world_size=world_size)
    parameters = sum(p.numel() for p in model.parameters())
    seq_len = config.data.seq_len
    precision = precision_table(
        config.parallel,
        config.optimizer,
        export_dtype=config.model.dtype,
        partial=trains_part(config),
    )
    rows = {
        "model": f"{config.model.name or config.model.path or 'built-in Qwen3'}, "
        f"{human(parameters)} parameters, {weights or 'random weights'}",
        **({"trained": trained_line(model, config)} if trains_part(config) else {}),
        **({"frozen": line} if (line := frozen_line(model)) else {}),
        **(
            {"data": f"{job.prepared['stream']['name']}, read while training"}
            if mixture is None
            else data_rows(mixture, seq_len)
        ),
        "run": f"{steps:,} steps of {job.global_batch_size} rows "
        f"({job.micro_batch_size} x {job.data_rank.size} {'data-parallel ' * (job.data_rank.size < world_size)}"
        f"ranks x {job.grad_accum_steps} accumulated)"
        + (f", {steps * job.global_batch_size / len(mixture):.1f} epochs" if mixture else ""),
        "ranks": f"{world_size} on {device_name(job.device)}"
        + (" each" if world_size > 1 else "")
        + (f", {flash}" if (flash := current_flash_attention_impl()) else "")
        + (
            f", {' x '.join(f'{name} {size}' for name, size in sizes.items() if size > 1)}"
            if job.data_rank.size < world_size
            else ""
        ),
        "precision": ", ".join(
            f"{what} {how}"
            for what, how in precision.items()
            if (what, how) != ("optimizer state", "float32")
        ),
        "output": str(job.output_dir),
    }
    if progress.step:
        rows["resume"] = f"after step {progress.step} of {steps}"
    tables = [
        ledger_table(source.documents.meta["source"], source.ledger, seq_len=seq_len)
        for source in (mixture.sources if mixture else ())
        if anything_left_out(source.ledger)
    ]
    return "\n\n".join([table(rows), *tables]) + ("\n" if tables else "")


def trained_line(model: PackedCausalLM, config: TrainConfig) -> str:
    """How many of how many parameters are trained, and which."""
    trained, parameters = parameter_counts(model)
    lora, last = config.lora, config.model.train_last_layers
    layers = model.hf.config.num_hidden_layers
    which = f"decoder layers {layers - last + 1} to {layers}"
    if lora.rank:
        kind = "DoRA" if lora.dora else "LoRA"
        what = f"{kind} of rank {lora.rank} on {', '.join(adapted(model))}"
        what += f" of {which}" if last else ""
        what += f", rows of {len(trained_tokens(model))} tokens" if trained_tokens(model) else ""
    else:
        what = f"{which}, final norm{'' if model.hf.config.tie_word_embeddings else ', head'}"
    share = 100 * trained / parameters
    return f"{human(trained)} of {human(parameters)} parameters ({share:.2g} %): {what}"


def frozen_line(model: PackedCausalLM) -> str:
    """What no flag can train; empty where there is no such thing."""
    layers = len(indexed_layers(model.hf.config))
    count = sum(p.numel() for name, p in model.named_parameters() if INDEXER in name)
    return (
        f"the indexers of {layers} attention layers ({human(count)} parameters): they choose tokens, "
        "which has no gradient"
        if layers
        else ""
    )


def parameter_counts(model: PackedCausalLM) -> tuple[int, int]:
    """Trained and all."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def data_rows(mixture: Mixture, seq_len: int) -> dict[str, str]:
    """One line for each source, and one about the packing."""
    rows = {}
    for number, (source, count) in enumerate(zip(mixture.sources, mixture.counts, strict=True), 1):
        ledger = source.ledger
        line = (
            f"{source.documents.meta['source']}: {ledger['rows_read']:,} rows, "
            f"{ledger['rows_used']:,} used, {ledger['tokens']:,} tokens, "
            f"{100 * ledger['supervised_tokens'] / ledger['tokens']:.0f} % supervised"
        )
        if count != len(source.packs):
            line += f", {count / len(source.packs):.3g} times an epoch"
        rows[f"data {number}" if len(mixture.sources) > 1 else "data"] = line
    packed = sum(len(source.packs) for source in mixture.sources)
    filled = 100 * sum(source.ledger["tokens"] for source in mixture.sources) / (packed * seq_len)
    rows["packing"] = f"{packed:,} rows of {seq_len} tokens, {filled:.1f} % full"
    return rows


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
    export = job.config.checkpoint.export
    folders = {"adapter": ["adapter"], "both": ["export", "adapter"], True: ["export"]}
    if export:
        places = " and ".join(str(job.output_dir / name) for name in folders[export])
        lines.append(f"exported to {places}")
    if (page := job.output_dir / REPORT).exists():
        lines.append(f"report in {page}")
    lines.append(f"metrics in {job.output_dir / 'metrics.jsonl'} (MFU against: {mfu_peak})")
    return "\n".join(lines)


def write_run_files(
    job: Job,
    model: PackedCausalLM,
    mesh: DeviceMesh,
    weights: LoadReport | None,
    mixture: Mixture | None,
    *,
    steps: int,
) -> str | None:
    """Write config.yaml and run.json; returns the error line if that fails."""
    trained, parameters = parameter_counts(model)
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
            "revision": job.config.model.revision,
            "commit": job.prepared["model_commit"],
            "weights": weights.summary() if weights else "random",
            "parameters": parameters,
            "trained_parameters": trained,
        },
        "data": {"sources": _sources_of_run(job, mixture)},
        "steps": steps,
        "world_size": job.ranks.world_size,
        "device": device_name(job.device),
        "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        "precision": precision_table(
            job.config.parallel,
            job.config.optimizer,
            export_dtype=job.config.model.dtype,
            partial=trains_part(job.config),
        ),
        "global_batch_size": job.global_batch_size,
        "grad_accum_steps": job.grad_accum_steps,
        "seed": job.config.seed,
    }
    return _write(job, {"config.yaml": to_yaml(job.config), "run.json": _to_json(run)})


def description(job: Job, mixture: Mixture | None) -> tuple[dict[str, str], dict[str, Any]]:
    """For TensorBoard: texts by their names, and the lengths [examples] of each source's examples."""
    texts, lengths = {"config": to_yaml(job.config)}, {}
    for number, source in enumerate(mixture.sources if mixture else (), 1):
        name = source.documents.meta["source"]
        texts[f"ledger/{number}"] = ledger_table(
            name, source.ledger, seq_len=job.config.data.seq_len
        )
        lengths[str(number)] = source.examples.lengths
    return texts, lengths


def _sources_of_run(job: Job, mixture: Mixture | None) -> list[dict[str, Any]]:
    data = job.config.data
    if mixture is None:
        stream = job.prepared["stream"]
        return [{**stream, "revision": data.revision, "streaming": True}]
    return [
        {
            "name": prepared["name"],
            "revision": config.data.revision,
            "commit": prepared["commit"],
            "weight": config.weight,
            "packed_rows_per_epoch": rows,
            "ledger": packed.ledger,
        }
        for config, prepared, rows, packed in zip(
            source_configs(data),
            job.prepared["sources"],
            mixture.counts,
            mixture.sources,
            strict=True,
        )
    ]


def record_stream(job: Job, ledger: Ledger) -> str | None:
    """Put what was read of a stream into run.json; returns the error line if that fails."""
    run = json.loads((job.output_dir / "run.json").read_text(encoding="utf-8"))
    run["data"]["sources"][0]["ledger"] = asdict(ledger)
    return _write(job, {"run.json": _to_json(run)})


def record(job: Job, **values: Any) -> str | None:
    """Put what is known at the end into run.json; returns the error line if that fails."""
    run = json.loads((job.output_dir / "run.json").read_text(encoding="utf-8"))
    return _write(job, {"run.json": _to_json({**run, **values})})


def stream_line(job: Job, ledger: Ledger) -> str:
    """What this run has read of a stream."""
    reasons = "; ".join(f"{entry['rows']:,} {why}" for why, entry in ledger.excluded.items())
    left_out = f", excluded: {printable(reasons)}" if reasons else ""
    return (
        f"read {ledger.rows_read:,} rows of {job.prepared['stream']['name']}, "
        f"{ledger.rows_used:,} used{left_out}"
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(job: Job, texts: dict[str, str]) -> str | None:
    try:
        job.output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (job.output_dir / name).write_text(text, encoding="utf-8")
    except OSError as error:
        return f"--output_dir {job.output_dir} cannot be written ({error.strerror}); give another folder"
    return None
