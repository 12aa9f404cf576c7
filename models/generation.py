"""Greedy answers from a live, sharded model or from a loaded one: the same text for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from models.causal_lm import PackedCausalLM
from models.tokenizer import stop_token_ids

Messages = list[dict[str, Any]]


def generate_answers(
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    device: torch.device,
    batch_size: int = 128,
    copies: int = 1,
) -> list[str]:
    """Answer every conversation, which ends with a user turn; see `continue_prompts`."""
    texts = [
        str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        for messages in prompts
    ]
    return continue_prompts(
        model,
        tokenizer,
        tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [],
        max_new_tokens=max_new_tokens,
        device=device,
        batch_size=batch_size,
        copies=copies,
    )


@torch.no_grad()
def continue_prompts(
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    device: torch.device,
    batch_size: int = 64,
    copies: int = 1,
) -> list[str]:
    """Continue every prompt by greedy decoding; each rank takes its share and all return all answers.

    Args:
        model: every rank of the default process group calls this with the same prompts.
        tokenizer: says what ends an answer.
        prompts: token ids, at least one each.
        max_new_tokens: tokens per answer.
        device: where the model lives.
        batch_size: prompts decoded together on one rank.
        copies: neighbouring ranks that answer the same, because they compute together.
    """
    grouped = dist.is_initialized()
    ranks = dist.get_world_size() if grouped else 1
    rank, world_size = (dist.get_rank() // copies if grouped else 0), ranks // copies
    per_rank = -(-len(prompts) // world_size)
    answers: list[str] = []
    was_training = model.training
    model.eval()
    for start in range(0, per_rank, batch_size):
        # Every rank runs the same number of batches, else the gathers of FSDP would not meet: short of a prompt,
        # it repeats the last one and drops the answer.
        wanted = [rank + world_size * i for i in range(start, min(start + batch_size, per_rank))]
        ids = [list(prompts[min(i, len(prompts) - 1)]) for i in wanted]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=ranks > 1,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [text for i, text in zip(wanted, decoded, strict=True) if i < len(prompts)]
    model.train(was_training)
    if ranks == 1:
        return answers
    gathered: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(gathered, answers)
    gathered = gathered[::copies]
    return [gathered[i % world_size][i // world_size] for i in range(len(prompts))]
