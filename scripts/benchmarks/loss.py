"""`benchmark.py loss`: the cross-entropy over a large vocabulary, without and with all logits.

Forward and backward from hidden states [tokens, width] and a head [vocabulary, width] to their gradients, in one process.
Memory is what torch's allocator hands out, at its highest, above what lived before. Each type is a group of sides that
take turns; the first, `trainer.loss` as it is used, is the measure.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmarks.common import Result, machine, setting, versions
from scripts.benchmarks.memory import compare
from scripts.benchmarks.step import usual_dtypes
from trainer import loss as loss_module
from trainer.loss import linear_cross_entropy_sum
from trainer.parallel import DTYPES as TORCH_DTYPES

HELP = "cross-entropy over a large vocabulary: seconds and memory"
SEED = 0
OURS = "trainer.loss"
CHUNKS_MIB = (32, 512)
_MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512, help="with a label (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="model width (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="(%(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    """The types of this machine, and with the last of them the head frozen as under LoRA."""
    shape = {name: getattr(arguments, name) for name in ("tokens", "width", "vocabulary")}
    cases = {name: Case(**shape, dtype=TORCH_DTYPES[name]) for name in usual_dtypes()}
    *_, name = cases
    cases[f"{name}, frozen head"] = Case(**shape, dtype=TORCH_DTYPES[name], frozen=True)
    return {
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("torch"),
        "repeats": arguments.repeats,
        **shape,
        "cases": {
            name: compare(
                {side: partial(Side, case, loss) for side, loss in sides().items()},
                arguments.repeats,
            )
            for name, case in cases.items()
        },
    }


def sides() -> dict[str, Loss]:
    """The losses that are compared, ours first."""
    return {
        OURS: _ours,
        **{f"{OURS}, chunks of {mib} MiB": partial(_ours, chunk_mib=mib) for mib in CHUNKS_MIB},
        "cross_entropy of all logits": _all_logits,
        "F.linear_cross_entropy, the same chunks": _torch_chunked,
    }


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_mib: int = 0) -> Tensor:
    usual = loss_module.CHUNK_BYTES
    loss_module.CHUNK_BYTES = chunk_mib * _MIB or usual
    try:
        return linear_cross_entropy_sum(hidden, weight, targets)[0]
    finally:
        loss_module.CHUNK_BYTES = usual


def _all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As transformers computes it: logits, then all of them in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With as many tokens a chunk as ours; the precision is what torch chooses for this type and device."""
    rows = loss_module.chunk_rows(len(weight), weight.device)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


class Case:
    """Inputs of one type."""

    def __init__(
        self,
        *,
        tokens: int,
        width: int,
        vocabulary: int,
        dtype: torch.dtype,
        frozen: bool = False,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(SEED)
        hidden = torch.randn(tokens, width, generator=generator)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
        self.weight = weight.to(device, dtype).requires_grad_(not frozen)
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)


class Side:
    """One loss on one case, as `memory.compare` runs it."""

    def __init__(self, case: Case, loss: Loss) -> None:
        self._case, self._loss = case, loss

    def run(self) -> None:
        case = self._case
        wanted = [x for x in (case.hidden, case.weight) if x.requires_grad]
        with warnings.catch_warnings():
            # torch's says that an in-place backward is made safe for a second one, which nobody asks for.
            warnings.simplefilter("ignore")
            loss = self._loss(case.hidden, case.weight, case.targets)
            torch.autograd.grad(loss, wanted)
        self.loss = float(loss.detach())

    def held(self) -> Result:
        return {"loss": self.loss}


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    lines = [
        setting(result),
        f"{result['tokens']} tokens, width {result['width']}, vocabulary {result['vocabulary']:,}; "
        f"forward and backward, medians of {result['repeats']} runs",
    ]
    for name, sides in result["cases"].items():
        lines += [
            "",
            f"| {name} | seconds | of the first | peak MiB | of the first | loss per token |",
            "|---|---|---|---|---|---|",
        ]
        for side, values in sides.items():
            lines.append(
                f"| {side} | {values['seconds']:.2f} | {values['cpu_seconds_ratio']:.2f} "
                f"| {values['peak_mib']:.0f} | {values['peak_mib_ratio']:.2f} "
                f"| {values['loss'] / result['tokens']:.6f} |"
            )
    return "\n".join(lines)
