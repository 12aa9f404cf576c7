"""Which Qwen fits on which machine, trained how: computed from shapes and types, not measured.

python scripts/what_fits.py

prints the tables of docs/precision.md and docs/what-fits.md, which says what is counted and what is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This repository's `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.planner.facts import Shape, known_models, shape_of
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.precision import BYTES, bytes_per_parameter

LORA_RANK = 16
GB = 1e9


MODELS = {
    name.rpartition("/")[2]: shape_of(config)
    for name, config in known_models().items()
    if name.startswith("Qwen/")
}
MACHINES = {"2x H100 NVL 94 GB": (2, 94), "8x H100 80 GB": (8, 80), "8x H200 141 GB": (8, 141)}

_HALF = ParallelConfig(master_dtype="bfloat16")
METHODS = {
    "default": (ParallelConfig(), OptimizerConfig()),
    "bf16 state": (ParallelConfig(), OptimizerConfig(state_dtype="bfloat16")),
    "bf16 masters and state": (_HALF, OptimizerConfig(state_dtype="bfloat16")),
}
LORA = f"LoRA of rank {LORA_RANK}"


def held_bytes(model: Shape, method: str) -> float:
    """Parameters, gradients and optimizer state over all ranks."""
    if method == LORA:  # a frozen base in bf16, adapters on every linear layer of the layers
        adapters = LORA_RANK * model.layers * sum(n * (r + c) for n, r, c in model.matrices)
        return 2 * model.parameters + adapters * sum(
            bytes_per_parameter(*METHODS["default"]).values()
        )
    return model.parameters * sum(bytes_per_parameter(*METHODS[method]).values())


def working_bytes(model: Shape, method: str) -> float:
    """What a rank holds in backward beside that and activations, with the default `prefetch_layers`; see the docs."""
    parallel = ParallelConfig()
    compute, reduce = BYTES[parallel.param_dtype], BYTES[parallel.reduce_dtype]
    gathered = compute * (
        model.root_parameters + (1 + parallel.prefetch_layers) * model.layer_parameters
    )
    if method == LORA:
        return gathered
    gradients = compute * model.root_parameters + max(
        (compute + reduce) * model.layer_parameters, reduce * model.root_parameters
    )
    return gathered + gradients


def fits_table() -> str:
    """GB a rank needs beside activations, for every model, method and machine."""
    lines = []
    for machine, (ranks, gigabytes) in MACHINES.items():
        lines += [
            f"| {machine} | {' | '.join((*METHODS, LORA))} |",
            "|---" * (len(METHODS) + 2) + "|",
        ]
        for name, model in MODELS.items():
            cells = []
            for method in (*METHODS, LORA):
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
        lines.append(
            f"| {name} | {model.parameters / 1e9:.2f} "
            f"| {working_bytes(model, 'default') / GB:.1f} | {working_bytes(model, LORA) / GB:.1f} "
            f"| {added:.0f} | {kept:.2f} |"
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
    print(bytes_table(), models_table(), fits_table(), sep="\n", end="")
