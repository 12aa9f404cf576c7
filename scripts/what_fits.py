"""Which Qwen fits on which machine, trained how: computed from shapes and types, not measured.

python scripts/what_fits.py

prints the tables of docs/precision.md, docs/what-fits.md and docs/recipes.md; docs/what-fits.md says what is counted and
what is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# This repository's `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.config import LoraConfig
from scripts.command_line import parse_train_config
from scripts.config import TrainConfig
from scripts.planner.facts import GPUS, Gpu, Shape, find_model, known_models, shape_of
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.precision import BYTES, bytes_per_parameter

RECIPES = Path(__file__).parent / "recipes"
GB = 1e9
# CUDA's context, NCCL's buffers and the loss's blocks of logits: an allowance, not a count.
OVERHEAD_BYTES = 2.5 * GB


MODELS = {
    name.rpartition("/")[2]: shape_of(config)
    for name, config in known_models().items()
    if name.startswith("Qwen/")
}
MACHINES = {"2x H100 NVL 94 GB": (2, 94), "8x H100 80 GB": (8, 80), "8x H200 141 GB": (8, 141)}

_HALF_STATE = OptimizerConfig(state_dtype="bfloat16")
METHODS = {
    "default": TrainConfig(),
    "bf16 state": TrainConfig(optimizer=_HALF_STATE),
    "bf16 masters and state": TrainConfig(
        parallel=ParallelConfig(master_dtype="bfloat16"), optimizer=_HALF_STATE
    ),
    "LoRA of rank 16": TrainConfig(lora=LoraConfig(rank=16)),
}


@dataclass(frozen=True)
class Need:
    """Bytes one GPU needs."""

    held: float
    """Masters, gradients and the optimizer's state, and what is frozen."""
    working: float
    """Gathered parameters and unsharded gradients in backward."""
    accumulation: float
    """What stays whole on every GPU while micro-batches are added up."""
    activations: float
    """Kept from forward to backward, and one layer's while it is computed again."""

    @property
    def total(self) -> float:
        return self.held + self.working + self.accumulation + self.activations + OVERHEAD_BYTES


def need_of_rank(model: Shape, config: TrainConfig, *, world_size: int) -> Need:
    """What one of `world_size` GPUs needs for a run.

    Raises:
        TrainError: the batch or the mesh does not divide.
    """
    from scripts.batching import batch_sizes
    from trainer.parallel import data_rank

    data_ranks = data_rank(config.parallel, rank=0, world_size=world_size).size
    micro_batch_size, _, grad_accum_steps = batch_sizes(config, data_ranks)
    trained, compute = trained_parameters(model, config), BYTES[config.parallel.param_dtype]
    whole = compute * model.parameters + BYTES[config.parallel.reduce_dtype] * trained
    tokens = micro_batch_size * config.data.seq_len // config.parallel.cp
    shards = world_size // config.parallel.dp_replicate
    return Need(
        held=0 if config.parallel.cpu_offload else held_bytes(model, config) / shards,
        working=working_bytes(model, config),
        accumulation=whole if grad_accum_steps > 1 else 0,
        activations=activation_bytes(model, config, tokens=tokens),
    )


def trained_parameters(model: Shape, config: TrainConfig) -> int:
    """How many parameters a run trains; adapters as if `lora.targets` were all-linear."""
    layers = config.model.train_last_layers or model.layers
    if config.lora.rank:  # experts get none
        adapted = model.matrices[:2] if model.experts else model.matrices
        return config.lora.rank * layers * sum(n * (r + c) for n, r, c in adapted)
    if config.model.train_last_layers:
        return layers * model.layer_parameters + (0 if model.tied else model.root_parameters)
    return model.parameters


def held_bytes(model: Shape, config: TrainConfig) -> float:
    """Over all ranks that share a copy: what is trained, with AdamW's state, and what is frozen."""
    trained = trained_parameters(model, config)
    held = trained * sum(bytes_per_parameter(config.parallel, config.optimizer).values())
    frozen = model.parameters - (0 if config.lora.rank else trained)
    return held + frozen * BYTES[config.parallel.param_dtype]


def working_bytes(model: Shape, config: TrainConfig) -> float:
    """What a rank holds in backward beside that and activations; see the docs."""
    parallel = config.parallel
    compute, reduce = BYTES[parallel.param_dtype], BYTES[parallel.reduce_dtype]
    layer = model.layer_parameters / parallel.tp
    layers = (
        model.layers if parallel.reshard_after_forward is False else 1 + parallel.prefetch_layers
    )
    gathered = compute * (model.root_parameters + layers * layer)
    if config.lora.rank or config.model.train_last_layers:
        return gathered
    gradients = compute * model.root_parameters + max(
        (compute + reduce) * layer, reduce * model.root_parameters
    )
    return gathered + gradients


def activation_bytes(model: Shape, config: TrainConfig, *, tokens: int) -> float:
    """Of `tokens` tokens on a rank: what backward needs of all layers, and what it makes anew of one."""
    parallel, layers = config.parallel, model.layers
    query, key = (heads * model.head_width for heads in (model.query_heads, model.key_value_heads))
    active = max(1, model.active_experts)
    # Bytes in bf16 that autograd keeps of a token in transformers' layers (a test counts them). Norms keep fp32 copies.
    vectors = 16 * model.width + (4 * active * model.width if model.experts else 0)
    heads = 16 * query + 6 * key if model.qk_norm else 4 * query + 4 * key
    layer = vectors + (heads + 8 * model.mlp_width * active) / parallel.tp
    entry = 2 * model.width
    products = 2 * entry + 2 * (2 * query + 2 * key + 2 * model.mlp_width * active) / parallel.tp
    again = layers // parallel.checkpoint_every
    kept = {
        "none": layers * layer,
        "full": layers * entry + layer,
        "selective": (layers - again) * layer + again * entry + layer,
        "op": layers * (entry + products) + layer,
    }[parallel.activation_checkpointing]
    return tokens * kept * BYTES[parallel.param_dtype] / 2


def fits_table() -> str:
    """GB a rank needs beside activations, for every model, method and machine."""
    lines = []
    for machine, (ranks, gigabytes) in MACHINES.items():
        lines += [f"| {machine} | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
        for name, model in MODELS.items():
            cells = []
            for method in METHODS.values():
                size = (held_bytes(model, method) / ranks + working_bytes(model, method)) / GB
                cells.append(f"{size:.0f}" if size < gigabytes else f"({size:,.0f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def models_table() -> str:
    """What does not depend on the machine: parameters, what accumulation adds, what a row of tokens keeps."""
    lines = [
        "| model | parameters, B | working, GB | LoRA working, GB | accumulation adds, GB | kept by 4,096 tokens, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        # Parameters stay gathered, gradients whole in the type of the reduction.
        added = model.parameters * (BYTES["bfloat16"] + BYTES["float32"]) / GB
        kept = BYTES["bfloat16"] * 4096 * model.width * model.layers / GB
        working, lora = (
            working_bytes(model, METHODS[method]) / GB for method in ("default", "LoRA of rank 16")
        )
        lines.append(
            f"| {name} | {model.parameters / 1e9:.2f} | {working:.1f} | {lora:.1f} "
            f"| {added:.0f} | {kept:.2f} |"
        )
    return "\n".join(lines) + "\n"


def recipes() -> Iterator[tuple[Path, int, Gpu, TrainConfig]]:
    """Every recipe that names its machine in its first line, with GPUs and their kind."""
    for file in sorted(RECIPES.glob("*.yaml"), key=lambda file: _in_order(file.name)):
        line = file.read_text(encoding="utf-8").partition("\n")[0]
        if found := re.match(r"# Machine: (\d+)x ([\w-]+)", line):
            config = parse_train_config(["--config", str(file)])
            yield file, int(found[1]), GPUS[found[2]], config


def _in_order(name: str) -> list[float | str]:
    """Numbers by their value."""
    return [float(part) if part[:1].isdigit() else part for part in re.split(r"(\d+\.?\d*)", name)]


def recipes_table() -> str:
    """What each recipe trains, where, how much of a step is done at once, and what a GPU needs for it."""
    lines = [
        "| recipe | model | GPUs | trains | tokens a step | accumulates | GB a GPU needs | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file, ranks, gpu, config in recipes():
        from scripts.batching import batch_sizes
        from trainer.parallel import data_rank

        model = shape_of(find_model(config.model.name or ""))
        need = need_of_rank(model, config, world_size=ranks)
        _, rows, accumulated = batch_sizes(
            config, data_rank(config.parallel, rank=0, world_size=ranks).size
        )
        how = f"LoRA, rank {config.lora.rank}" if config.lora.rank else "all"
        lines.append(
            f"| [{file.name}](../scripts/recipes/{file.name}) | {(config.model.name or '').partition('/')[2]} "
            f"| {ranks} x {gpu.name} | {how} | {rows * config.data.seq_len:,} | {accumulated} "
            f"| {need.total / GB:.0f} | {gpu.memory_gib * 2**30 / GB:.0f} |"
        )
    return "\n".join(lines) + "\n"


def bytes_table() -> str:
    """Bytes of each trained parameter, by what the flags say."""
    lines = [
        "| flags | masters | gradients | AdamW's state | sum | Muon's state | sum |",
        "|---|---|---|---|---|---|---|",
    ]
    for masters in ("float32", "bfloat16"):
        for state in ("float32", "bfloat16"):
            case = ParallelConfig(master_dtype=masters), OptimizerConfig(state_dtype=state)
            adamw, muon = bytes_per_parameter(*case), bytes_per_parameter(*case, muon=True)
            shown = [*adamw.values(), sum(adamw.values())]
            shown += [muon["optimizer state"], sum(muon.values())]
            flags = f"`master_dtype {masters}`, `state_dtype {state}`"
            lines.append(f"| {flags} | {' | '.join(f'{size:.3g}' for size in shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(bytes_table(), models_table(), fits_table(), recipes_table(), sep="\n", end="")
