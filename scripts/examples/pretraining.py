"""Continued pretraining: documents of a new field, and an eye on what the model knew before (docs/examples/pretraining.md).

torchrun --nproc_per_node=2 scripts/train.py --config scripts/recipes/qwen3-8b-pretrain.yaml --data.path articles.jsonl \
    --data.transform scripts.examples.pretraining.article --evaluation.every 200 \
    --evaluation.functions '[scripts.examples.pretraining.perplexities]'
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import assemble
from scripts.batching import slices
from scripts.job import Job
from trainer.errors import TrainError
from trainer.loop import evaluate_loss
from trainer.loss import causal_lm_loss

MIN_WORDS = 20
TEXTS = "PERPLEXITY_TEXTS"
"""Environment variable: a folder of NAME.jsonl files, each line {"text": ...}; their perplexities are logged."""


def article(row: dict[str, Any]) -> dict[str, Any] | None:
    """{"title", "body"} -> {"text"}, of which every token is trained on; None, left out, for what is too short to teach.

    It returns the same for the same row: what a row becomes is kept in the cache.
    """
    body = "\n".join(line.rstrip() for line in row["body"].strip().splitlines())
    if len(body.split()) < MIN_WORDS:
        return None
    title = (row.get("title") or "").strip()
    return {"text": f"# {title}\n\n{body}" if title else body}


def perplexities(job: Job, model: Any, tokenizer: Any) -> dict[str, float]:
    """`perplexity_NAME`: exp of the mean loss per token of each file of texts.

    Put texts of the new field in one file, and some of what the model must not forget in another.
    """
    folder = Path(os.environ.get(TEXTS, "texts"))
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise TrainError(f"{folder} has no .jsonl files of texts; name another folder in {TEXTS}")
    found = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        loss = evaluate_loss(
            model,
            _batches(job, tokenizer, texts),
            loss_fn=causal_lm_loss,
            device=job.device,
            parallel=job.config.parallel,
        )
        found[f"perplexity_{file.stem}"] = math.exp(loss)
    return found


def _batches(job: Job, tokenizer: Any, texts: list[str]) -> Iterator[dict[str, Any]]:
    """One text in a row, cut to data.seq_len; as many rows on every rank, the last ones empty."""
    length, ranks = job.config.data.seq_len, job.data_rank
    documents = [
        np.array(tokenizer(text, add_special_tokens=False)["input_ids"][:length], dtype=np.int32)
        for text in texts
    ]
    documents += [np.zeros(0, np.int32)] * (-len(documents) % ranks.size)
    rows = [[(ids, np.ones(len(ids), dtype=bool))] if len(ids) else [] for ids in documents]
    batches = [
        assemble(
            [row],
            np.array([0]),
            seq_len=length,
            pad_token_id=tokenizer.pad_token_id,
            max_documents=2,
        )
        for row in rows[ranks.rank :: ranks.size]
    ]
    return slices(job, batches)
