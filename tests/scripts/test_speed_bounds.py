"""Regressions of the cheapest ratios of docs/performance.md, with generous bounds: they hold on a busy machine too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.benchmarks.common import Result
from scripts.benchmarks.loss import OURS, Case, Side, sides
from scripts.benchmarks.memory import peak_mib
from scripts.benchmarks.overhead import compare
from scripts.benchmarks.step import launch, write_workload
from scripts.benchmarks.trainers import Work
from scripts.benchmarks.workload import Shape
from tests.support.ranks import start_server


def test_the_loss_holds_a_fraction_of_all_logits() -> None:
    tokens, vocabulary = 2048, 32_768
    case = Case(tokens=tokens, width=32, vocabulary=vocabulary, dtype=torch.float32)
    peaks = {}
    for name in (OURS, "cross_entropy of all logits"):
        side = Side(case, sides()[name])
        peaks[name] = peak_mib(side.run)
    ours, all_logits = peaks.values()
    assert all_logits > 2 * 4 * tokens * vocabulary / 2**20  # the logits and their gradient
    assert ours < 0.25 * all_logits, peaks


class Operations(TorchDispatchMode):
    """How many operations of torch this thread called, and the elements of the results."""

    count = elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **kwargs or {})
        self.count += 1
        self.elements += sum(x.numel() for x in tree_leaves(results) if isinstance(x, Tensor))
        return results


def compare_operations(work: Work, block: int) -> Result:
    """On a rank."""
    with Operations() as seen:
        return compare(work, block, lambda: (seen.count, seen.elements), ("operations", "elements"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loop_costs_little_beside_forward_and_backward(tmp_path: Path) -> None:
    start_server()  # whose ranks have the libraries loaded
    shape = Shape(vocabulary=2048, width=256, layers=2, seq_len=512, micro_batch_size=2)
    block, blocks = 3, 5
    steps = block * (1 + blocks)
    write_workload(tmp_path, shape, steps)
    work = Work(str(tmp_path), shape, "float32", packed=True, warm_up=0, steps=steps)

    # Counts do not depend on what else the machine does.
    counted = launch(replace(work, steps=2 * block), compare_operations, block)[0]
    loop, bare = (
        {
            key: sum(step[key] for step in counted[name]) / block
            for key in ("operations", "elements")
        }
        for name in ("train", "bare")
    )
    assert bare["operations"] < loop["operations"] < bare["operations"] + 100, (loop, bare)
    assert loop["elements"] < 1.01 * bare["elements"], (loop, bare)

    # Seconds do: what other programs do to a step adds to it, so the least disturbed ones are compared, generously.
    found = launch(work, compare, block)[0]
    loop, bare = (min(step["cpu_seconds"] for step in found[name]) for name in ("train", "bare"))
    assert loop < 1.5 * bare, found
