"""Regressions of the cheapest ratios of docs/performance.md, with generous bounds: they hold on a busy machine too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loop_costs_little_beside_forward_and_backward(tmp_path: Path) -> None:
    start_server()  # whose ranks have the libraries loaded
    shape = Shape(vocabulary=2048, width=256, layers=2, seq_len=512, micro_batch_size=2)
    block, blocks = 3, 5
    steps = block * (1 + blocks)
    write_workload(tmp_path, shape, steps)
    work = Work(str(tmp_path), shape, "float32", packed=True, warm_up=0, steps=steps)
    found = launch(work, compare, block)[0]
    # What other programs do to a step only adds to it: the least disturbed ones are compared.
    loop, bare = (min(step["cpu_seconds"] for step in found[name]) for name in ("train", "bare"))
    assert loop < 1.1 * bare, found
