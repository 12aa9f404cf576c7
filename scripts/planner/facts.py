"""What is known without measuring: GPUs, and the shapes of published models.

Shapes: D model width, F width of the MLP, L layers, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_MODELS = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class Gpu:
    """One GPU and the machine it usually comes in; rates of vendors' data sheets, dense, per second."""

    name: str
    bf16_flops: float
    memory_gib: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Between the GPUs of a node, in one direction."""
    network_bytes_per_second: float
    """Between nodes, of one GPU, in one direction."""
    gpus_per_node: int = 8
    capped_power: bool = False
    """Sold with a lower power limit than the bf16 rate needs."""


_GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-sxm", 989e12, 80e9 / _GIB, 3.35e12, 450e9, 50e9),
        # The bridge joins pairs; 80 Gb/s Ethernet for both GPUs of an Azure NC80adis_H100_v5.
        Gpu("h100-nvl", 835e12, 94e9 / _GIB, 3.9e12, 300e9, 5e9, gpus_per_node=2),
        # 96 GB of HBM2e at 500 W, in which torchtitan's published numbers were measured.
        Gpu("h100-500w", 989e12, 96e9 / _GIB, 2.0e12, 450e9, 50e9, capped_power=True),
        Gpu("h200", 989e12, 141e9 / _GIB, 4.8e12, 450e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name as people write it, such as `h100-nvl` or "H100 SXM 80GB".

    Raises:
        KeyError: none is meant.
    """
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    for key, needed in {
        "h200": "h200",
        "h100nvl": "h100-nvl",
        "500w": "h100-500w",
        "h100": "h100-sxm",
    }.items():
        if key in text:
            return GPUS[needed]
    raise KeyError(name)


@dataclass(frozen=True)
class Shape:
    """What of a decoder decides FLOPs and bytes."""

    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    tied: bool
    gated: bool = True
    """SwiGLU, with three matrices in the MLP instead of two."""
    experts: int = 0
    active_experts: int = 0
    qk_norm: bool = False

    @property
    def attention_matrices(self) -> int:
        """Elements of the four projections of one layer."""
        heads = self.query_heads + self.key_value_heads
        return 2 * self.width * heads * self.head_width

    @property
    def mlp_matrices(self) -> int:
        """Elements of one MLP, or of one expert."""
        return (3 if self.gated else 2) * self.width * self.mlp_width

    @property
    def active_matrices(self) -> int:
        """Elements of one layer that a token is multiplied with."""
        router = self.width * self.experts
        return self.attention_matrices + self.mlp_matrices * max(1, self.active_experts) + router

    @property
    def layer_parameters(self) -> int:
        router = self.width * self.experts
        return self.attention_matrices + self.mlp_matrices * max(1, self.experts) + router

    @property
    def parameters(self) -> int:
        """Of all matrices; norms and biases are left out."""
        embeddings = self.width * self.vocabulary * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of a model from the values of its config.json."""
    heads = config["num_attention_heads"]
    experts = config.get("num_experts", 0)
    return Shape(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        query_heads=heads,
        key_value_heads=config.get("num_key_value_heads", heads),
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["moe_intermediate_size"] if experts else config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        gated=config["model_type"] != "mpt",
        experts=experts,
        active_experts=config.get("num_experts_per_tok", 0),
        qk_norm=config["model_type"].startswith("qwen3"),
    )


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """config.json of published models by their name on the hub, without what does not change memory or speed."""
    return json.loads(_MODELS.read_text(encoding="utf-8"))


def find_model(name: str) -> dict[str, Any]:
    """The configuration of a model by its name, with or without the organisation.

    Raises:
        KeyError: it is not among the known ones.
    """

    def plain(text: str) -> str:
        text = re.sub(r"[^a-z0-9]", "", text.lower().rpartition("/")[2])
        return re.sub(r"(instruct|base|chat|hf)$", "", text.removeprefix("meta"))

    alike = {plain(known): known for known in known_models()}
    wanted = plain(name)
    wanted = {"llama38b": "llama318b", "llama370b": "llama3170b"}.get(wanted, wanted)
    if wanted not in alike:
        raise KeyError(name)
    return known_models()[alike[wanted]]
