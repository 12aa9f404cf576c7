"""Direct preference optimisation: learn from pairs of answers which one is better (docs/examples/dpo.md).

torchrun --nproc_per_node=2 scripts/train.py --data.path pairs.jsonl --loss scripts.examples.dpo.DPO \
    --loss_options '{beta: 0.1}'

Shapes: N labels, M the most documents of a micro-batch; documents 2k and 2k + 1 are the answers of pair k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.job import Job
from scripts.modelling import frozen_model
from trainer.documents import documents, pairs
from trainer.loss import log_probabilities, map_logits

Batch = Mapping[str, Tensor]


class DPO:
    """The loss of equation 7 in https://arxiv.org/abs/2305.18290, against the model as it was before the first step.

    The reference is a second, frozen model, sharded as the trained one is.
    """

    units = "pairs"

    def __init__(self, job: Job, model: nn.Module, *, beta: float = 0.1) -> None:
        """`beta` is how dearly a departure from the reference is paid."""
        self.beta = beta
        self.reference: Any = frozen_model(job)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            reference = answer_log_probabilities(self.reference, batch)
        self.reference.reshard()
        policy = answer_log_probabilities(model, batch)
        return dpo_loss(policy, reference, documents(batch).exists, beta=self.beta)


def answer_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[M]: of every document the log-probability of its supervised tokens, given those before them."""
    positions = batch["label_positions"]
    targets = batch["labels"].flatten()[positions]

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return map_logits(log_probabilities, hidden.flatten(0, 1)[positions], weight, targets)

    return documents(batch).sums(model(batch, head))


def dpo_loss(
    policy: Tensor, reference: Tensor, exists: Tensor, *, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over pairs, and what is logged of it.

    Args:
        policy, reference: [M], the log-probabilities under the trained model and under the reference.
        exists: bool [M].
        beta: see `DPO`.
    """
    chosen, rejected = pairs(policy - reference)  # logarithms of ratios
    real, _ = pairs(exists)
    margin = beta * (chosen - rejected)
    return (-F.logsigmoid(margin) * real).sum(), {
        "reward_chosen": (beta * chosen * real).sum(),
        "reward_rejected": (beta * rejected * real).sum(),
        "preferred_pct": 100.0 * ((margin > 0) & real).sum(),
    }
