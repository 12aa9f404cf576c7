"""Two losses of your own: copy this file, change it, and name it with --loss (docs/examples/losses.md).

torchrun --nproc_per_node=2 scripts/train.py --loss scripts.examples.losses.focal_loss --loss_options '{focus: 1.5}'
python scripts/verify.py --loss scripts.examples.losses.focal_loss

Shapes: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.loss import causal_lm_loss, log_probabilities, map_logits

Z_WEIGHT = 1e-4


def z_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The usual loss with one of its options: a penalty that keeps the logits' normaliser near 1.

    Returns:
        The sum over valid tokens that is differentiated, and what is logged: the cross-entropy alone as `loss`.
    """
    return causal_lm_loss(model, batch, z_loss=Z_WEIGHT)


def focal_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, focus: float = 2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in which a token counts (1 - its probability) ** focus (https://arxiv.org/abs/1708.02002)."""
    positions = batch["label_positions"]
    targets = batch["labels"].flatten()[positions]

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        """[n, 2] of logits [n, V]: the focal loss and the cross-entropy of each token."""
        each = -log_probabilities(logits, targets)
        return torch.stack([(1 - torch.exp(-each)) ** focus * each, each], 1)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return map_logits(losses, hidden.flatten(0, 1)[positions], weight, targets)

    focal, cross_entropy = model(batch, head).sum(0)
    return focal, {"loss": cross_entropy.detach(), "focal_loss": focal.detach()}
