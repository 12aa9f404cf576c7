"""The numbers that the planner believes, fits or is told, kept in constants.json with where each comes from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """All are positive; shares are of what the data sheet says."""

    gemm_share: float
    """Share of the bf16 rate that very large matrix products reach."""
    gemm_half_width: float
    """Model width at which half of that share is reached."""
    gemm_half_tokens: float
    """Tokens of a micro-batch at which half of it is reached."""
    attention_flops: float
    """Forward FLOPs per second of the flash kernel on an H100 SXM, in causal FLOPs."""
    attention_backward_share: float
    """Of that rate in backward."""
    alibi_slowdown: float
    """Of attention with a bias added to its scores."""
    float8_gain: float
    capped_power_share: float
    """Of the compute rates of a GPU with a lower power limit."""
    elementwise_passes: float
    """Factor on the counted elementwise traffic of compiled layers."""
    eager_factor: float
    """More traffic of layers that are not compiled."""
    foundry_factor: float
    """Likewise of llm-foundry's MPT, on which most of the measurements were made."""
    loss_bytes_per_logit: float
    memory_share: float
    """Of the memory's bandwidth that elementwise kernels reach."""
    float32_share: float
    """Of the bf16 rates that fp32 parameters compute with, in TF32."""
    link_share: float
    network_share: float
    exposed_share: float
    """Of the shorter one of compute and traffic that does not hide behind the longer one."""
    seconds_per_collective: float
    straggler_share: float
    """Slowdown with every doubling of the nodes: a step waits for the slowest rank."""
    optimizer_bytes: float
    """Per sharded parameter and step, with clipping."""
    host_optimizer_rate: float
    """Bytes per second of fused AdamW on a GPU's share of the host's cores."""
    allocator_slack: float
    """Memory that allocations take, over their sum."""
    outside_gib: float
    """On each GPU, beside what torch's allocator holds: CUDA's context, NCCL's buffers, cuBLAS's workspace."""


@cache
def _kept() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def fitted_constants() -> Constants:
    """The values in constants.json."""
    return Constants(**{name: entry["value"] for name, entry in _kept()["constants"].items()})


def prior_constants() -> Constants:
    """What is believed of each before any measurement."""
    return Constants(**{name: entry["prior"] for name, entry in _kept()["constants"].items()})


def spreads() -> dict[str, float]:
    """Of the logarithm of each constant that measurements may move: how firmly it is believed."""
    entries = _kept()["constants"].items()
    return {name: entry["spread"] for name, entry in entries if entry["spread"] > 0}


def believed_deviations() -> dict[str, float]:
    """Of the logarithm of a speed: how far the formula itself may be off, and for what no measurement is like."""
    return {name: entry["value"] for name, entry in _kept()["deviations"].items()}


def keep_constants(constants: Constants, *, origin: str) -> None:
    """Write fitted values to constants.json, beside what was believed of them."""
    content = _kept() | {"fitted": origin}
    for name, value in asdict(constants).items():
        content["constants"][name]["value"] = float(f"{value:.5g}")
    _FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _kept.cache_clear()
