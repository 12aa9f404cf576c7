"""Sequence classification: a text's class is the first token of its completion, and no other is thought of.

torchrun --nproc_per_node=2 scripts/train.py --data.path reviews.jsonl \
    --loss scripts.examples.classification.Classification --loss_options '{classes: [" good", " bad"]}'

Shapes: B rows, S tokens a row, D model width, V vocabulary, M the most documents of a micro-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.job import Job
from scripts.preparation import read_tokenizer
from trainer.documents import documents
from trainer.errors import TrainError


class Classification:
    """Cross-entropy among the classes: the logits of all other tokens are left out, and are not computed."""

    units = "documents"

    def __init__(self, job: Job, model: nn.Module, *, classes: Sequence[str]) -> None:
        """`classes` are what completions begin with, each with another token."""
        tokenizer = read_tokenizer(job.config, job.cache_dir, job.prepared["tokenizer"])
        ids = [tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in classes]
        if len({*ids}) < len(ids):
            raise TrainError(
                f"two of the classes {', '.join(map(repr, classes))} begin with the same token; name them otherwise"
            )
        self.ids = torch.tensor(ids, device=job.device)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        found, labels = documents(batch), batch["labels"].flatten()
        # [M]: where the first label of each document is. A document has one, or it would not be trained on.
        places = torch.zeros_like(found.last).scatter_reduce(
            0, found.of_label, batch["label_positions"], "amin", include_self=False
        )
        matches = labels[places].unsqueeze(1) == self.ids  # [M, C]
        known = matches.any(1) & found.exists

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return (hidden.flatten(0, 1)[places] @ weight[self.ids].T).float()

        logits, targets = model(batch, head), matches.int().argmax(1)
        losses = F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(1) == targets) & known
        return (losses * known).sum(), {
            "accuracy_pct": 100.0 * right.sum(),
            "unknown_class_pct": 100.0 * (found.exists & ~known).sum(),
        }


def skill_of_question(row: dict[str, Any]) -> dict[str, Any]:
    """For `--data.transform`, to try it on the built-in conversations: which skill does a question ask for?"""
    questions = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return {"prompt": "\n".join(questions), "completion": row["skill"]}
