"""`benchmark.py load`: a synthetic checkpoint into two sharded ranks, beside `from_pretrained` on every rank.

Both sides end with fp32 parameters. Ours is timed from the configuration to the sharded, loaded model; the other is not
sharded afterwards, which would cost it more time and memory.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import (
    Result,
    Side,
    machine,
    on_ranks,
    peak_memory,
    setting,
    stopwatch,
    take_turns,
    versions,
)

HELP = "a synthetic checkpoint into sharded ranks"
WORLD_SIZE = 2
WIDTH, HEADS, EXPERTS = 1024, 16, 16
SHARD_BYTES = 512 * 2**20
MB = 1e6
# What a rank may take on its host: promised in docs/models.md.
SHARD_FACTOR = 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megabytes", type=int, default=1000, help="size of each checkpoint, in bf16 (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    return {
        "machine": machine(),
        "versions": versions("torch", "transformers", "safetensors"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "models": {
            kind: compare(kind, arguments.megabytes, arguments.repeats)
            for kind in ("dense", "experts")
        },
    }


def compare(kind: str, megabytes: int, repeats: int) -> Result:
    """Both sides on one checkpoint, which stays in the page cache; every run has new processes."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        (largest,) = on_ranks(1, write_checkpoint, Path(folder), kind, megabytes)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        peaks: dict[str, list[float]] = {}

        def side(name: str, load: Any) -> Side:
            def loaded() -> Result:
                ranks = on_ranks(WORLD_SIZE, load, folder)
                peaks.setdefault(name, []).append(max(rank["peak_bytes"] for rank in ranks))
                return {key: max(rank[key] for rank in ranks) for key in ranks[0]}

            return loaded

        result = take_turns(
            {
                "shardloop": side("shardloop", load_sharded),
                "from_pretrained": side("from_pretrained", load_whole),
            },
            repeats,
        )
    for name, found in peaks.items():
        result[name] |= {
            "seconds_per_gb": result[name]["seconds"] / (size / 1e9),
            "highest_peak_bytes": max(found),
        }
    ours = result["shardloop"]
    bound = SHARD_FACTOR * ours["held_bytes"] + largest
    ours |= {"bound_bytes": bound, "within_bound": ours["highest_peak_bytes"] <= bound}
    return {"checkpoint_bytes": size, "largest_tensor_bytes": largest} | result


def write_checkpoint(folder: Path, kind: str, megabytes: int) -> int:
    """Write bf16 safetensors of a quarter embedding and the rest layers; returns the bytes of the largest tensor."""
    import torch
    from transformers import Qwen3Config, Qwen3MoeConfig

    from models.build import build_model
    from models.export import write_weights
    from models.names import stored_parts
    from models.weights import export_tensors

    values: dict[str, Any] = {
        "vocab_size": int(megabytes * MB / 4 / 2 / WIDTH),
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": WIDTH // HEADS,
        "tie_word_embeddings": True,
    }
    attention = 3 * WIDTH * WIDTH
    if kind == "dense":
        per_layer = attention + 9 * WIDTH * WIDTH
        config_class, values["intermediate_size"] = Qwen3Config, 3 * WIDTH
    else:
        per_layer = attention + EXPERTS * 3 * WIDTH * WIDTH // 4
        config_class = Qwen3MoeConfig
        values |= {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH // 4}
    layers = max(1, round(megabytes * MB * 3 / 4 / 2 / per_layer))
    config = config_class(**values, num_hidden_layers=layers, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    model = build_model(config, attention="sdpa", seed=None)
    tensors = export_tensors(model)
    parts = stored_parts(model.hf, tensors)
    write_weights(
        folder,
        parts,
        lambda name: torch.rand(tensors[name].shape, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        max_shard_bytes=SHARD_BYTES,
        verify=False,
    )
    return 2 * max(part.shape.numel() for part in parts.values())


def load_sharded(folder: str) -> Result:
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig

    from models.build import build_model, decoder_layer_classes, materialise
    from models.weights import load_weights
    from trainer.config import ParallelConfig
    from trainer.parallel import build_mesh, parallelise

    config = ParallelConfig()
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    hf_config = AutoConfig.from_pretrained(folder)
    build_model(hf_config, attention="packed", seed=None)  # imports what the model needs
    dist.barrier()
    with peak_memory() as memory, stopwatch() as watch:
        model = build_model(hf_config, attention="packed", seed=None)
        parallelise(
            model,
            config,
            mesh,
            layer_classes=decoder_layer_classes(model),
            root_parameters=[model.head.weight],
        )
        materialise(model, torch.device("cpu"))
        load_weights(model, Path(folder))
        dist.barrier()
    held = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return watch | memory | {"held_bytes": held}


def load_whole(folder: str) -> Result:
    import torch
    import torch.distributed as dist
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with torch.device("meta"):  # imports what the model needs
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder)
        )
    dist.barrier()
    with peak_memory() as memory, stopwatch() as watch:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        dist.barrier()
    return watch | memory | {"held_bytes": sum(p.nbytes for p in model.parameters())}


def as_markdown(result: Result) -> str:
    """The numbers as a Markdown table."""
    lines = [
        setting(result),
        f"{result['ranks']} ranks, fp32 parameters; medians of {result['repeats']} runs, memory of the "
        "highest rank and run",
        "",
        "| checkpoint (bf16) | loader | seconds | seconds per GB | CPU seconds | held MB | peak MB per rank | bound MB "
        "| times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, sides in result["models"].items():
        ours = sides["shardloop"]
        verdict = "ok" if ours["within_bound"] else "ABOVE"
        for name, bound, times in (
            ("shardloop", f"{ours['bound_bytes'] / MB:,.0f}: {verdict}", sides["times_faster"]),
            ("from_pretrained", "", None),
        ):
            side = sides[name]
            lines.append(
                f"| {kind}, {sides['checkpoint_bytes'] / MB:,.0f} MB | {name} | {side['seconds']:.2f} "
                f"| {side['seconds_per_gb']:.2f} | {side['cpu_seconds']:.2f} "
                f"| {side['held_bytes'] / MB:,.0f} "
                f"| {side['highest_peak_bytes'] / MB:,.0f} | {bound} | {f'{times:.1f}' if times else ''} |"
            )
    lines += [
        "",
        f"Bound: {SHARD_FACTOR} x what the rank holds + the largest stored tensor. Peak: how far the "
        "anonymous resident memory of a rank rose above what it was before loading.",
    ]
    return "\n".join(lines)
