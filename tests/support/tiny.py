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
    trained: bool = True,
    **changes: Any,
) -> Path:
    """Save a 2-layer model of width 64 with the embedded tokenizer; returns `folder`.

    `changes` go into the model's configuration. Unless `trained` is false it has seen some of the
    embedded chat data: a run refuses pretrained weights that know nothing.
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = build_tokenizer(folder)
    if trained:
        text = [
            token
            for row in generate_conversations("train", count=40, seed=seed)
            for token in tokenizer.apply_chat_template(row["messages"], return_dict=False)
        ]
        ids = torch.tensor(text[: 8 * 128]).view(8, 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(10):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
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
