"""What a model is measured by while it is trained: its loss on held-out rows, its answers to held-out prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data.embedded import check_answer
from data.mixture import mix
from data.store import TokenStore, open_packed, pack_store
from models.causal_lm import PackedCausalLM
from models.generation import continue_prompts
from scripts.batching import open_batches, slices
from scripts.extensions import own_evaluations
from scripts.job import Job
from scripts.preparation import uses_embedded_data
from trainer.errors import TrainError
from trainer.loop import LossFunction, evaluate_loss
from trainer.loss import causal_lm_loss
from trainer.metrics import Sample

_SAMPLES = 4  # answers that are kept of an evaluation
_EMBEDDED_ROWS = 128  # questions of the embedded data whose answers are checked
_TEXT_PROMPT = 64  # most tokens of a text, of which all is learned, that are given as its beginning
_TOKENS_TOGETHER = (
    16384  # prompts and answers decoded at once on a rank: their keys and values are in memory
)
_PROMPTS_TOGETHER = 64


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, the same on every rank."""

    numbers: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def evaluate_model(
    job: Job, model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase, loss_fn: LossFunction
) -> Evaluation:
    """`eval_loss` and `perplexity` on the held-out rows, answers to some of them, and what the user's own evaluations return; nothing when the run is told to stop meanwhile.

    Raises:
        TrainError: an own evaluation returned something else than new names of numbers.
    """
    evaluation = Evaluation()
    if job.prepared["evaluation"]:
        # Of the usual losses, cross-entropy alone is comparable.
        comparable = loss_fn if job.config.loss else causal_lm_loss
        evaluation = _evaluate_held_out(job, model, tokenizer, comparable)
    values = evaluation.numbers
    for name, function in own_evaluations(job.config).items():
        if job.stop.agreed():
            return Evaluation()
        model.eval()
        with torch.no_grad():
            found = function(job, model, tokenizer)
        model.train()
        model.reshard()  # type: ignore[operator]  # a method of FSDP modules
        fits = isinstance(found, dict) and all(
            isinstance(value, (int, float)) for value in found.values()
        )
        if not fits or not found.keys().isdisjoint(values):
            raise TrainError(
                f"--evaluation.functions {name} returned {found!r:.200}; it must return a dict of numbers, "
                f"with names of its own{' beside ' + ', '.join(values) if values else ''}"
            )
        values.update(found)
    return evaluation


def _evaluate_held_out(
    job: Job, model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase, loss_fn: LossFunction
) -> Evaluation:
    config = job.config
    stores = [
        open_packed(source["packs"]).examples.first(config.evaluation.max_rows)
        for source in job.prepared["evaluation"]
    ]
    sources = [
        pack_store(store, method=config.data.packing, seq_len=config.data.seq_len)
        for store in stores
    ]
    batches = slices(job, open_batches(job, mix(sources), tokenizer, training=False))
    loss = evaluate_loss(
        model,
        batches,
        loss_fn=loss_fn,
        device=job.device,
        parallel=config.parallel,
        stop=job.stop,
    )
    if job.stop.agreed():
        return Evaluation()
    values = {"eval_loss": loss}
    if config.loss is None and loss < 700:  # e to the power of more is no float
        values["perplexity"] = math.exp(loss)
    embedded, rows = uses_embedded_data(config), config.evaluation.generate_rows
    count = (_EMBEDDED_ROWS if embedded else _SAMPLES) if rows is None else rows
    samples = _answer(job, model, tokenizer, held_out_prompts(stores, count))
    # Few answers of a run that asked for none are to be read, not counted.
    if samples and (embedded or rows is not None):
        right = sum(check_answer(sample["expected"], sample["answer"]) for sample in samples)
        values["exact_match_pct"] = 100 * right / len(samples)
    return Evaluation(values, samples[:_SAMPLES])


def _answer(
    job: Job,
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[tuple[list[int], list[int]]],
) -> list[Sample]:
    """Every prompt with what should follow, at most `max_new_tokens` of it, and the model's own answer."""
    if not asked:
        return []
    most = job.config.evaluation.max_new_tokens
    longest = max(len(prompt) for prompt, _ in asked) + most
    answers = continue_prompts(
        model,
        tokenizer,
        [prompt for prompt, _ in asked],
        max_new_tokens=most,
        device=job.device,
        batch_size=max(1, min(_PROMPTS_TOGETHER, _TOKENS_TOGETHER // longest)),
        copies=job.config.parallel.tp,
    )
    model.reshard()  # type: ignore[operator]  # a method of FSDP modules
    return [
        {
            "prompt": str(tokenizer.decode(prompt)),
            "expected": str(tokenizer.decode(expected[:most], skip_special_tokens=True)),
            "answer": answer,
        }
        for (prompt, expected), answer in zip(asked, answers, strict=True)
    ]


def held_out_prompts(stores: list[TokenStore], count: int) -> list[tuple[list[int], list[int]]]:
    """`count` pairs of tokens, prompt and what should follow, the same number of every source as far as they last.

    Of a conversation that is the last turn that is trained on; of a text, all of which is, what follows its beginning.
    """
    found: list[tuple[list[int], list[int]]] = []
    for number, store in enumerate(stores):
        left = -(-(count - len(found)) // (len(stores) - number))
        for index in range(len(store)):
            if left <= 0:
                break
            ids, supervised = store.example(index)
            (learned,) = np.nonzero(supervised)
            if not len(learned):
                continue
            end = int(learned[-1]) + 1
            (others,) = np.nonzero(~supervised[:end])
            start = int(others[-1]) + 1 if len(others) else min(end // 2, _TEXT_PROMPT)
            if start > 0:
                found.append((ids[:start].tolist(), ids[start:end].tolist()))
                left -= 1
    return found
