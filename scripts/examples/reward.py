"""A reward model: one number for an answer, higher for the better one of a pair (docs/examples/reward.md).

torchrun --nproc_per_node=2 scripts/train.py --data.path pairs.jsonl \
    --model.function scripts.examples.reward.add_score --loss scripts.examples.reward.ranking_loss

Shapes: B rows, S tokens a row, D model width, M the most documents of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.documents import documents, pairs


def add_score(model: Any) -> None:
    """Give the model a linear layer from a hidden state to one number, by the name that transformers' models have for it.

    The export then loads as AutoModelForSequenceClassification, which scores the last token of a text.
    """
    config = model.hf.config
    model.hf.score = nn.Linear(config.hidden_size, 1, bias=False, device="meta")
    config.num_labels = 1


def ranking_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid of the score of the chosen answer minus that of the rejected one (https://arxiv.org/abs/2203.02155, equation 1)."""
    found = documents(batch)

    def head(hidden: Tensor, _: Tensor) -> Tensor:
        """[M]. Called where the whole score layer is gathered."""
        score: Any = model.hf.score  # type: ignore[union-attr]
        return score(hidden.flatten(0, 1)[found.last]).squeeze(-1).float()

    chosen, rejected = pairs(model(batch, head))
    real, _ = pairs(found.exists)
    margin = chosen - rejected
    return torch.sum(-F.logsigmoid(margin) * real), {
        "score_margin": (margin * real).sum(),
        "ranked_right_pct": 100.0 * ((margin > 0) & real).sum(),
    }


ranking_loss.units = "pairs"
