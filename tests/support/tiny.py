"""Models and data small enough to train end to end in seconds, in the formats of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from data.embedded import build_tokenizer, generate_conversations

VOCABULARY = 576  # embedding rows; the tokenizer has fewer tokens, as Qwen's own have


def write_model(
    folder: Path,
    family: Literal["qwen2", "qwen3"] = "qwen3",
    *,
    tied: bool = True,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a random 2-layer model of width 64 with the embedded tokenizer; returns `folder`.

    `changes` go into the model's configuration.
    """
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        **changes,
    }
    config = Qwen3Config(head_dim=16, **values) if family == "qwen3" else Qwen2Config(**values)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def write_chat(file: Path, *, count: int = 200, split: str = "train", seed: int = 0) -> Path:
    """Write conversations as JSON lines, or as parquet if `file` ends so; returns `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"messages": row["messages"]}
        for row in generate_conversations(split, count=count, seed=seed)
    ]
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
