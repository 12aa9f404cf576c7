"""Two losses of your own: copy this file, change it, and name it with --loss.

torchrun --nproc_per_node=2 scripts/train.py --loss scripts.examples.losses.focal_loss
python scripts/verify.py --loss scripts.examples.losses.focal_loss

Shapes: B rows, S tokens a row, N valid tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.loss import causal_lm_loss

Z_WEIGHT = 1e-4
FOCUS = 2.0


def z_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The usual loss with one of its options: a penalty that keeps the logits' normaliser near 1.

    Returns:
        The sum over valid tokens that is differentiated, and what is logged: the cross-entropy alone as `loss`.
    """
    return causal_lm_loss(model, batch, z_loss=Z_WEIGHT)


def focal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in which a token counts (1 - its probability) ** FOCUS (https://arxiv.org/abs/1708.02002)."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits, targets = _valid_logits(hidden, weight, batch)
        each = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - torch.exp(-each)) ** FOCUS * each).sum(), each.sum()

    focal, cross_entropy = model(batch, head)
    return focal, {"loss": cross_entropy, "focal_loss": focal}


def _valid_logits(
    hidden: Tensor, weight: Tensor, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """fp32 logits [N, V] and targets [N] of the tokens that have a label.

    `hidden` is [B, S, D] and `weight` [V, D], the head's, gathered while the model's forward runs. All logits of a
    micro-batch exist at once here, which `trainer.loss.causal_lm_loss` avoids: take a smaller one.
    """
    positions = batch["label_positions"]
    targets = batch["labels"].flatten()[positions]
    return (hidden.flatten(0, 1)[positions] @ weight.T).float(), targets
