"""What is known without measuring: GPUs, and the shapes of published models.

Shapes: D model width, F width of the MLP, L layers, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
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
    """What its name says."""
    torch_gib: float
    """All that torch finds."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Between the GPUs of a node, in one direction."""
    network_bytes_per_second: float
    """Between nodes, of one GPU, in one direction."""
    gpus_per_node: int = 8
    capped_power: bool = False
    """Sold with a lower power limit than the bf16 rate needs."""
    host_bytes_per_second: float = 50e9
    """Between the GPU and pinned memory of its host, in one direction: PCIe 5.0 x16 as it is reached."""
    host_gib: float = 230
    """Memory of the host for each GPU: 1,850 GiB and more for 8 in clouds."""


_GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-sxm", 989e12, 80e9 / _GIB, 79.1, 3.35e12, 450e9, 50e9),
        # The bridge joins pairs; 80 Gb/s Ethernet for both GPUs of an Azure NC80adis_H100_v5.
        Gpu(
            "h100-nvl", 835e12, 94e9 / _GIB, 93.1, 3.9e12, 300e9, 5e9, gpus_per_node=2, host_gib=320
        ),
        # 96 GB of HBM2e at 500 W, in which torchtitan's published numbers were measured.
        Gpu("h100-500w", 989e12, 96e9 / _GIB, 95.0, 2.0e12, 450e9, 50e9, capped_power=True),
        Gpu("h200", 989e12, 141e9 / _GIB, 139.8, 4.8e12, 450e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name as people write it, such as `h100-nvl` or "H100 SXM 80GB".

    Raises:
        KeyError: none is meant.
    """
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    if "pcie" in text and "nvl" not in text:
        raise KeyError(name)  # slower, and not among them
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
    shared_expert_width: int = 0
    """Of an MLP beside the experts that every token goes through, with a gate of one row."""
    biases: bool = False
    """On query, key and value."""
    qk_norm: bool = False

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """Of one layer, with all experts and their router: how many of how many rows and columns."""
        query, key = self.query_heads * self.head_width, self.key_value_heads * self.head_width
        mlps = (3 if self.gated else 2) * max(1, self.experts)
        router = [(1, self.experts, self.width)] if self.experts else []
        if shared := self.shared_expert_width:
            router += [(3, shared, self.width), (1, 1, self.width)]
        return [
            (2, query, self.width),
            (2, key, self.width),
            (mlps, self.mlp_width, self.width),
            *router,
        ]

    @property
    def active_matrices(self) -> int:
        """Elements of one layer that a token is multiplied with."""
        idle = (self.experts - self.active_experts) * (3 if self.gated else 2)
        return _elements(self.matrices) - idle * self.mlp_width * self.width

    @property
    def layer_parameters(self) -> int:
        """Of a decoder layer, with its norms and biases."""
        heads = self.query_heads + 2 * self.key_value_heads if self.biases else 0
        vectors = 2 * self.width + self.head_width * (heads + (2 if self.qk_norm else 0))
        return _elements(self.matrices) + vectors

    @property
    def root_parameters(self) -> int:
        """Of the root group: the head, or the tied embedding, and the last norm."""
        return self.vocabulary * self.width + self.width

    @property
    def parameters(self) -> int:
        embedding = 0 if self.tied else self.vocabulary * self.width
        return self.layers * self.layer_parameters + self.root_parameters + embedding


def _elements(matrices: Iterable[tuple[int, int, int]]) -> int:
    return sum(count * rows * columns for count, rows, columns in matrices)


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of a model from the values of its config.json."""
    heads = config["num_attention_heads"]
    # The hub's name, and what transformers writes today.
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
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
        active_experts=config.get("num_experts_per_tok", 0) if experts else 0,
        shared_expert_width=config.get("shared_expert_intermediate_size", 0) if experts else 0,
        biases=config["model_type"].startswith("qwen2"),
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
