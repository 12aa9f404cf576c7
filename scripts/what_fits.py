"""Which Qwen fits on which machine, trained how: computed from shapes and types, not measured.

python scripts/what_fits.py

prints the tables of docs/precision.md and docs/what-fits.md, which says what is counted and what is not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# This repository's `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.config import OptimizerConfig, ParallelConfig
from trainer.precision import BYTES, bytes_per_parameter

LORA_RANK = 16
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Qwen as its config.json on the hub describes it."""

    name: str
    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    feed_forward: int
    """Of one expert, where there are several."""
    experts: int = 1
    head_width: int = 128
    vocabulary: int = 151_936
    tied: bool = False
    qwen2: bool = False
    """Biases on query, key and value, instead of their norms."""

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """Of one layer: how many of how many rows and columns."""
        query, key = self.query_heads * self.head_width, self.key_value_heads * self.head_width
        h, f = self.width, self.feed_forward
        router = [(1, self.experts, h)] if self.experts > 1 else []
        return [(2, query, h), (2, key, h), (3 * self.experts, f, h), *router]

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        heads = self.query_heads + 2 * self.key_value_heads
        vectors = 2 * self.width + self.head_width * (heads if self.qwen2 else 2)
        return sum(count * rows * columns for count, rows, columns in self.matrices) + vectors

    @property
    def root(self) -> int:
        """Parameters of the root group: the head, or the tied embedding, and the last norm."""
        return self.vocabulary * self.width + self.width

    @property
    def parameters(self) -> int:
        embedding = 0 if self.tied else self.vocabulary * self.width
        return self.layers * self.layer + self.root + embedding


MODELS = (
    Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, head_width=64, tied=True, qwen2=True),
    Shape("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, tied=True, qwen2=True),
    Shape("Qwen2.5-3B", 2048, 36, 16, 2, 11008, tied=True, qwen2=True),
    Shape("Qwen2.5-7B", 3584, 28, 28, 4, 18944, vocabulary=152_064, qwen2=True),
    Shape("Qwen2.5-14B", 5120, 48, 40, 8, 13824, vocabulary=152_064, qwen2=True),
    Shape("Qwen2.5-32B", 5120, 64, 40, 8, 27648, vocabulary=152_064, qwen2=True),
    Shape("Qwen2.5-72B", 8192, 80, 64, 8, 29568, vocabulary=152_064, qwen2=True),
    Shape("Qwen3-0.6B", 1024, 28, 16, 8, 3072, tied=True),
    Shape("Qwen3-1.7B", 2048, 28, 16, 8, 6144, tied=True),
    Shape("Qwen3-4B", 2560, 36, 32, 8, 9728, tied=True),
    Shape("Qwen3-8B", 4096, 36, 32, 8, 12288),
    Shape("Qwen3-14B", 5120, 40, 40, 8, 17408),
    Shape("Qwen3-32B", 5120, 64, 64, 8, 25600),
    Shape("Qwen3-30B-A3B", 2048, 48, 32, 4, 768, experts=128),
    Shape("Qwen3-235B-A22B", 4096, 94, 64, 4, 1536, experts=128),
)
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
    gathered = compute * (model.root + (1 + parallel.prefetch_layers) * model.layer)
    if method == LORA:
        return gathered
    gradients = compute * model.root + max((compute + reduce) * model.layer, reduce * model.root)
    return gathered + gradients


def fits_table() -> str:
    """GB a rank needs beside activations, for every model, method and machine."""
    lines = []
    for machine, (ranks, gigabytes) in MACHINES.items():
        lines += [
            f"| {machine} | {' | '.join((*METHODS, LORA))} |",
            "|---" * (len(METHODS) + 2) + "|",
        ]
        for model in MODELS:
            cells = []
            for method in (*METHODS, LORA):
                size = (held_bytes(model, method) / ranks + working_bytes(model, method)) / GB
                cells.append(f"{size:.0f}" if size < gigabytes else f"({size:,.0f})")
            lines.append(f"| {model.name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def models_table() -> str:
    """What does not depend on the machine: parameters, what accumulation adds, what a row of tokens keeps."""
    lines = [
        "| model | parameters, B | working, GB | LoRA working, GB | accumulation adds, GB | kept by 4,096 tokens, GB |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        # Parameters stay gathered, gradients whole in the type of the reduction.
        added = model.parameters * (BYTES["bfloat16"] + BYTES["float32"]) / GB
        kept = BYTES["bfloat16"] * 4096 * model.width * model.layers / GB
        lines.append(
            f"| {model.name} | {model.parameters / 1e9:.2f} "
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
