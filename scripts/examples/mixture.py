"""Several tasks in one run, and the loss of each of them in the log (docs/examples/mixture.md).

torchrun --nproc_per_node=2 scripts/train.py --loss scripts.examples.mixture.LossBySource \
    --data.sources '[{path: chat.jsonl, weight: 3}, {path: code.jsonl, weight: 1}]'

Shapes: B rows, S tokens a row, N labels, K sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.config import source_configs
from scripts.job import Job
from trainer.errors import TrainError
from trainer.loss import log_probabilities, map_logits


class LossBySource:
    """The usual loss, logged also for the rows of each source: `loss_NAME`."""

    def __init__(
        self, job: Job, model: nn.Module, *, weights: Mapping[str, float] | None = None
    ) -> None:
        """`weights`, by name of a source, are factors on its tokens in what is differentiated; 1 for the others."""
        self.names = source_names(job)
        factors = weights or {}
        if unknown := sorted(factors.keys() - {*self.names}):
            raise TrainError(f"no source is named {unknown[0]}; there are {', '.join(self.names)}")
        self.weights = [float(factors.get(name, 1)) for name in self.names]

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        positions = batch["label_positions"]
        targets = batch["labels"].flatten()[positions]
        # Rows of padding have no labels, so what their source is does not matter.
        sources = batch["source"][positions // batch["labels"].shape[1]]

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return -map_logits(log_probabilities, hidden.flatten(0, 1)[positions], weight, targets)

        losses = model(batch, head)  # [N]
        sums = losses.new_zeros(len(self.names)).index_add(0, sources, losses)  # [K]
        tokens = sums.new_zeros(len(self.names)).index_add(0, sources, losses.new_ones(len(losses)))
        each = zip(self.names, sums.detach(), tokens, strict=True)
        return (sums * sums.new_tensor(self.weights)).sum(), {
            "loss": sums.detach().sum(),
            # A tuple is logged as a ratio: a source's own tokens, not all of them, are what its loss is divided by.
            **{f"loss_{name}": (loss, count) for name, loss, count in each},
        }


def source_names(job: Job) -> list[str]:
    """The last part of each source's path or hub name, numbered where two are alike."""
    configs = [source.data for source in source_configs(job.config.data)]
    names = [
        Path(config.path or config.name or config.prepared or "chat").stem for config in configs
    ]
    return [
        name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)
    ]
