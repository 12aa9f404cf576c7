"""What wiring decides by itself: batch sizes and names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.config import DataConfig
from models.config import ModelConfig
from scripts.batching import batch_sizes
from scripts.config import TrainConfig, run_name
from scripts.resuming import _flat
from trainer.errors import TrainError


@pytest.mark.parametrize(
    ("micro", "size", "seq_len", "world_size", "expected"),
    [
        (None, None, 4096, 2, (1, 2, 1)),
        (None, None, 256, 2, (16, 32, 1)),
        (None, 8, 256, 2, (4, 8, 1)),
        (None, 8, 256, 8, (1, 8, 1)),
        (None, 64, 4096, 2, (1, 64, 32)),
        (None, 34, 256, 1, (2, 34, 17)),
        (None, 4, 8192, 2, (1, 4, 2)),
        (4, None, 256, 2, (4, 8, 1)),
        (2, 16, 256, 2, (2, 16, 4)),
    ],
)
def test_batch_sizes_follow_from_what_is_given(micro, size, seq_len, world_size, expected) -> None:
    config = TrainConfig(
        micro_batch_size=micro, global_batch_size=size, data=DataConfig(seq_len=seq_len)
    )
    assert batch_sizes(config, world_size) == expected


def test_a_global_batch_that_cannot_be_divided_names_what_can() -> None:
    config = TrainConfig(micro_batch_size=4, global_batch_size=12)
    with pytest.raises(TrainError, match=r"12 is not divisible .* x 2 ranks = 8; use 8 or 16"):
        batch_sizes(config, 2)
    with pytest.raises(TrainError, match=r"use 4$"):
        batch_sizes(replace(config, micro_batch_size=None, global_batch_size=3), 4)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (ModelConfig(), DataConfig(), "embedded-chat"),
        (ModelConfig(name="Qwen/Qwen3-8B"), DataConfig(name="org/a b"), "Qwen3_8B-a_b"),
        (ModelConfig(path="/models/x/"), DataConfig(path="rows/chat.jsonl"), "x-chat"),
    ],
)
def test_a_run_is_named_after_model_and_data(model, data, expected) -> None:
    assert run_name(TrainConfig(model=model, data=data)) == expected


def test_a_changed_key_is_named_by_its_path() -> None:
    assert _flat({"data": {"format": 3, "source": {"name": "x"}}, "seed": 0}) == {
        "data.format": 3,
        "data.source.name": "x",
        "seed": 0,
    }
