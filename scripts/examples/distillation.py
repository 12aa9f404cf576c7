"""Learn the probabilities of a larger model, not the tokens alone (docs/examples/distillation.md).

torchrun --nproc_per_node=2 scripts/train.py --model.name Qwen/Qwen3-0.6B --data.path chat.jsonl \
    --loss scripts.examples.distillation.Distillation --loss_options '{teacher: Qwen/Qwen3-8B}'

Shapes: B rows, S tokens a row, N labels, D model width, V vocabulary; n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.job import Job
from scripts.modelling import frozen_model
from trainer.loss import log_probabilities, map_logits

Batch = Mapping[str, Tensor]


class Distillation:
    """A mixture of the divergence from a frozen teacher (https://arxiv.org/abs/1503.02531) and of cross-entropy.

    Neither model's logits exist for more than a chunk of tokens.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        *,
        teacher: str,
        revision: str | None = None,
        temperature: float = 1.0,
        teacher_share: float = 0.5,
    ) -> None:
        """
        Args:
            job, model: of the run.
            teacher: a folder, or a model on the hub; it takes the tokens of the run's tokenizer.
            revision: of a model on the hub.
            temperature: divides the logits of both.
            teacher_share: of the divergence in the loss; the rest is cross-entropy.
        """
        folder = Path(teacher).is_dir()
        source = replace(
            job.config.model,
            path=teacher if folder else None,
            name=None if folder else teacher,
            revision=revision,
            init="pretrained",
            overrides={},
            function=None,
            router_aux_loss_coef=None,
        )
        self.teacher: Any = frozen_model(job, source)
        self.temperature, self.teacher_share = temperature, teacher_share

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        positions = batch["label_positions"]
        targets = batch["labels"].flatten()[positions]
        with torch.no_grad():
            # The teacher's head stays gathered from here on, for backward makes its logits once more.
            states, weight_of_teacher = self.teacher(
                batch, lambda hidden, weight: (hidden.flatten(0, 1)[positions], weight)
            )

        def losses(logits: Tensor, targets: Tensor, states: Tensor) -> Tensor:
            """[n, 2]: divergence and cross-entropy of each token."""
            taught = (states @ weight_of_teacher.T).float()
            kl = divergence(logits, taught, temperature=self.temperature)
            return torch.stack([kl, -log_probabilities(logits, targets)], 1)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return map_logits(losses, hidden.flatten(0, 1)[positions], weight, targets, states)

        kl, cross_entropy = model(batch, head).sum(0)
        loss = kl.lerp(cross_entropy, 1 - self.teacher_share)
        return loss, {"loss": cross_entropy.detach(), "divergence": kl.detach()}


def divergence(logits: Tensor, taught: Tensor, *, temperature: float) -> Tensor:
    """[n]: KL(teacher || student) in nats, times the square of the temperature, which keeps gradients' size.

    Args:
        logits: [n, V] of the student.
        taught: [n, V'] of the teacher. Sizes of one family differ in rows behind the last token: those are left out.
        temperature: divides both.
    """
    known = min(logits.shape[1], taught.shape[1])
    student = F.log_softmax(logits[:, :known] / temperature, 1)
    teacher = F.log_softmax(taught[:, :known] / temperature, 1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2
