"""The work that the step benchmarks give to every side: one model folder and one file of tokenised rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.packing import sample_to_pack

SEED = 0
HEAD_WIDTH = 64
# Of a row's tokens those of its answer, which are trained on.
ANSWER = 0.7
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Shape:
    """A Qwen3, and the batch it is trained on."""

    vocabulary: int
    width: int
    layers: int
    seq_len: int
    micro_batch_size: int
    intermediate: int = 0
    """0 for three times the width."""
    heads: int = 0
    """0 for as many as fit into the width."""
    kv_heads: int = 0
    """0 for half of them."""
    head_width: int = HEAD_WIDTH
    tied: bool = True

    @property
    def micro_batch_tokens(self) -> int:
        return self.seq_len * self.micro_batch_size


SHAPES = {
    "vocabulary": Shape(vocabulary=151_936, width=128, layers=2, seq_len=512, micro_batch_size=2),
    "layers": Shape(vocabulary=8192, width=512, layers=4, seq_len=1024, micro_batch_size=2),
}


def model_config(shape: Shape) -> Any:
    from transformers import Qwen3Config

    heads = shape.heads or max(1, shape.width // shape.head_width)
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate or 3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.kv_heads or max(1, heads // 2),
        head_dim=shape.head_width,
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=shape.tied,
    )


def write_model(folder: Path, shape: Shape) -> None:
    """A Hugging Face folder: random fp32 weights, and a tokenizer whose vocabulary is the model's."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = model_config(shape)
    config.dtype = torch.float32
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {f"<{number}>": number for number in range(shape.vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
        eos_token="<1>",
        pad_token="<2>",
    ).save_pretrained(folder)


def write_rows(folder: Path, shape: Shape, *, steps: int, ranks: int) -> None:
    """Rows of random tokens, log-normal in length around a third of `seq_len`, enough for `steps` packed or unpacked.

    train.jsonl is what our trainer reads and shuffles; in_order.jsonl has the same rows in the order in which it comes to
    them when it does not pack.
    """
    generator = np.random.default_rng(SEED)
    rows, tokens = [], 0
    wanted_rows = steps * ranks * shape.micro_batch_size
    # Packing never fills everything, and no side may have to begin a second epoch.
    wanted_tokens = 1.25 * wanted_rows * shape.seq_len
    while len(rows) < wanted_rows or tokens < wanted_tokens:
        length = int(generator.lognormal(np.log(shape.seq_len / 3), 0.6))
        length = min(max(length, 16), shape.seq_len)
        ids = generator.integers(3, shape.vocabulary, size=length)
        labels = ids.copy()
        labels[: round(length * (1 - ANSWER))] = IGNORE_INDEX
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        tokens += length
    _, order = sample_to_pack(SEED, np.arange(len(rows)), len(rows))
    for name, chosen in (("train", range(len(rows))), ("in_order", order)):
        text = "".join(json.dumps(rows[number]) + "\n" for number in chosen)
        (folder / f"{name}.jsonl").write_text(text)


def read_rows(file: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
