"""Tiny Qwen models, checkpoints of them, and packed batches made by hand.

Shapes: B rows, S tokens a row, M documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from models.build import CONFIG_CLASSES, build_model
from models.causal_lm import PackedCausalLM
from models.layers import indexed_layers

IGNORE_INDEX = -100
VOCABULARY = 97  # odd: no world size divides it


def tiny_config(kind: str = "qwen3", *, tied: bool = True, **changes: Any) -> PreTrainedConfig:
    """Two layers, 4 query heads on 2 key/value heads, 5 experts where there are any.

    `kind` is a key of `CONFIG_CLASSES`. Where a family has layers of linear attention the first of the two is one.
    """
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        # Large enough that a wrong tensor or a leak moves the logits far beyond rounding.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config_class = CONFIG_CLASSES[kind]
    if kind != "qwen2":
        values["head_dim"] = 8
    known = config_class().to_dict()
    if "num_experts" in known or "num_local_experts" in known:
        values |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if "shared_expert_intermediate_size" in known:
        values["shared_expert_intermediate_size"] = 20
    if "linear_num_key_heads" in known:
        values |= {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
    if "ple_layer_ids" in known:
        values |= {
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ple_embed_dim": 16,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 16,
            "split_ngram_parts": 3,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    return config_class(**{**values, **changes})


def tiny_model(
    kind: str = "qwen3",
    *,
    tied: bool = True,
    attention: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> PackedCausalLM:
    """A model with weights, the same for the same arguments; biases, norms and convolutions are not trivial."""
    hf_config = tiny_config(kind, tied=tied, **changes)
    model = build_model(hf_config, attention=attention or attention_of(kind), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def attention_of(kind: str) -> str:
    """The attention that a family is trained with."""
    return "sdpa" if indexed_layers(tiny_config(kind)) else "packed"


def save_checkpoint(
    folder: Path,
    kind: str = "qwen3",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **changes: Any,
) -> nn.Module:
    """Write a Hugging Face folder with transformers' own code; returns the model as transformers reads it back."""
    model = tiny_model(kind, tied=tied, **changes).hf.to(dtype)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder, max_shard_size=shard_size)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


def random_documents(lengths: Sequence[int], *, seed: int = 0) -> list[Tensor]:
    """One [length] int64 document per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]


def packed_batch(
    rows: Sequence[Sequence[Tensor]], seq_len: int, *, max_documents: int = 0, pad: int = 0
) -> dict[str, Tensor]:
    """A micro-batch as the loader makes it: padding is one more document; every token but a last one is a label.

    Args:
        rows: per row its documents, each [length] int64.
        seq_len: S.
        max_documents: the offsets are padded to this many documents, and at least to as many as the fullest
            row of every batch would need.
        pad: token id of the padding.
    """
    shape = len(rows), seq_len
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE_INDEX)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    offsets, real, squared = [0], 0, 0
    for row, documents in enumerate(rows):
        begin = 0
        for document in documents:
            end = begin + len(document)
            input_ids[row, begin:end] = document
            labels[row, begin : end - 1] = document[1:]
            position_ids[row, begin:end] = torch.arange(len(document))
            offsets.append(row * seq_len + end)
            squared += len(document) ** 2
            begin = end
        real += begin
        if begin < seq_len:
            position_ids[row, begin:] = torch.arange(seq_len - begin)
            offsets.append((row + 1) * seq_len)
    bound = len(rows) * (1 + max(len(documents) for documents in rows))
    offsets += [len(rows) * seq_len] * (max(bound, max_documents) + 1 - len(offsets))
    label_positions = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "document_offsets": torch.tensor(offsets, dtype=torch.int32),
        "label_positions": label_positions,
        "row_tokens": torch.tensor([sum(map(len, documents)) for documents in rows]),
        "counts": torch.tensor(
            [real, len(rows) * seq_len - real, len(label_positions), squared], dtype=torch.int64
        ),
    }


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, as a copy; a collective if it is."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
