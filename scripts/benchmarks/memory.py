"""`benchmark.py memory`: what activation checkpointing and the optimizer's types save, and what they cost in time.

One rank trains a small Qwen3 as train.py would, on one packed row. Memory is what torch's allocator hands out: its
largest sum above what lived before, from the profiler's events. Times are taken without the profiler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.loader import assemble
from models.build import build_model, decoder_layer_classes
from models.causal_lm import PackedCausalLM
from scripts.benchmarks.common import Result, machine, setting, versions
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer
from trainer.parallel import build_mesh, parallelise

HELP = "activation checkpointing and the optimizer's types: bytes and seconds"
SEED = 0
VOCABULARY = 4096
DOCUMENTS = 4
_MIB = 2**20

ACTIVATIONS = {
    "none": ParallelConfig(),
    "op": ParallelConfig(activation_checkpointing="op"),
    "selective, every 2nd": ParallelConfig(activation_checkpointing="selective"),
    "full": ParallelConfig(activation_checkpointing="full"),
}
_HALF = ParallelConfig(master_dtype="bfloat16")
STATES = {
    "AdamW, all float32": (ParallelConfig(), OptimizerConfig()),
    "AdamW, state bfloat16": (ParallelConfig(), OptimizerConfig(state_dtype="bfloat16")),
    "AdamW, masters bfloat16": (_HALF, OptimizerConfig()),
    "AdamW, masters and state bfloat16": (_HALF, OptimizerConfig(state_dtype="bfloat16")),
    "Muon, all float32": (ParallelConfig(), OptimizerConfig(name="muon")),
    "Muon, masters and state bfloat16": (
        _HALF,
        OptimizerConfig(name="muon", state_dtype="bfloat16"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens a row (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="model width (%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    torch.manual_seed(SEED)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape = {"layers": arguments.layers, "width": arguments.width}
    try:
        batch = one_row(arguments.seq_len)
        result = {
            "machine": machine() | {"threads": torch.get_num_threads()},
            "versions": versions("torch", "transformers"),
            "repeats": arguments.repeats,
            "seq_len": arguments.seq_len,
            "parameters": sum(
                p.numel() for p in small_model(ParallelConfig(), **shape).parameters()
            ),
            **shape,
            "activations": compare(
                {
                    name: lambda config=config: Activations(config, batch, shape)
                    for name, config in ACTIVATIONS.items()
                },
                arguments.repeats,
            ),
            "states": compare(
                {name: lambda case=case: States(*case, shape) for name, case in STATES.items()},
                arguments.repeats,
            ),
        }
    finally:
        dist.destroy_process_group()
    return result


def compare(sides: dict[str, Callable[[], Any]], repeats: int) -> Result:
    """Bytes of each side, and the median seconds of its runs; the sides take turns. The first is the measure."""
    made = {name: make() for name, make in sides.items()}
    for side in made.values():
        side.run()  # allocates what stays: gradients, state
    found = {name: {**side.held(), "peak_mib": peak_mib(side.run)} for name, side in made.items()}
    runs: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in made.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side.run()
            took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            runs[name].append(took)
    first = next(iter(found))
    for name, values in found.items():
        values |= {key: median(t[key] for t in runs[name]) for key in ("seconds", "cpu_seconds")}
        values["every_seconds"] = [took["seconds"] for took in runs[name]]
        for key in ("peak_mib", "held_mib", "cpu_seconds"):
            if found[first].get(key):  # a fused step allocates nothing
                values[f"{key}_ratio"] = values[key] / found[first][key]
    return found


class Activations:
    """Forward and backward of one micro-batch; the gradients stay where they are."""

    def __init__(
        self, config: ParallelConfig, batch: dict[str, torch.Tensor], shape: dict[str, int]
    ) -> None:
        self._model, self._batch = small_model(config, **shape), batch

    def run(self) -> None:
        loss, _ = causal_lm_loss(self._model, self._batch)
        (loss / len(self._batch["label_positions"])).backward()

    def held(self) -> Result:
        return {}


class States:
    """A step of the optimizer."""

    def __init__(
        self, parallel: ParallelConfig, config: OptimizerConfig, shape: dict[str, int]
    ) -> None:
        self._model = small_model(parallel, **shape)
        for parameter in self._model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self._optimizer = build_optimizer(
            self._model, config, layer_classes=decoder_layer_classes(self._model)
        )

    def run(self) -> None:
        self._optimizer.step()

    def held(self) -> Result:
        """Parameters, gradients and state."""
        parameters = list(self._model.parameters())
        tensors = [t for p in parameters for t in (p, p.grad, *self._optimizer.state[p].values())]
        total = sum(nbytes(tensor) for tensor in tensors if tensor is not None)
        count = sum(parameter.numel() for parameter in parameters)
        return {"held_mib": total / _MIB, "bytes_per_parameter": total / count}


def nbytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def peak_mib(run: Callable[[], None]) -> float:
    """The largest sum of what `run` has allocated and not freed."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]).max(), 0) / _MIB


def small_model(config: ParallelConfig, *, layers: int, width: int) -> PackedCausalLM:
    """A Qwen3 with an untied head, sharded over the one rank."""
    from transformers import Qwen3Config

    hf_config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 64),
        head_dim=32,
        tie_word_embeddings=False,
    )
    model = build_model(hf_config, attention="packed", seed=SEED)
    parallelise(
        model,
        config,
        build_mesh(config, world_size=1, device_type="cpu"),
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
    )
    return model


def one_row(seq_len: int) -> dict[str, torch.Tensor]:
    """A micro-batch of one full row of equal documents, all of it trained on."""
    length = seq_len // DOCUMENTS
    random = np.random.default_rng(SEED)
    documents = [
        (random.integers(VOCABULARY, size=length), np.ones(length, dtype=bool))
        for _ in range(DOCUMENTS)
    ]
    return assemble(
        [documents], np.zeros(1), seq_len=seq_len, pad_token_id=0, max_documents=DOCUMENTS + 1
    )


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    lines = [
        setting(result),
        f"Qwen3 of {result['layers']} layers and width {result['width']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, one row of {result['seq_len']} tokens, bfloat16 compute; "
        f"medians of {result['repeats']} runs",
        "",
        "| activation checkpointing | peak MiB | of none | seconds | CPU seconds | of none |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in result["activations"].items():
        lines.append(
            f"| {name} | {side['peak_mib']:.0f} | {side['peak_mib_ratio']:.2f} "
            f"| {side['seconds']:.2f} | {side['cpu_seconds']:.2f} | {side['cpu_seconds_ratio']:.2f} |"
        )
    lines += [
        "",
        "| optimizer | held MiB | bytes per parameter | of the first | step's peak MiB | step seconds | CPU seconds | of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, side in result["states"].items():
        lines.append(
            f"| {name} | {side['held_mib']:.1f} | {side['bytes_per_parameter']:.2f} "
            f"| {side['held_mib_ratio']:.2f} | {side['peak_mib']:.1f} "
            f"| {side['seconds']:.3f} | {side['cpu_seconds']:.3f} | {side['cpu_seconds_ratio']:.1f} |"
        )
    return "\n".join(lines)
