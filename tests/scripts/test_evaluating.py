"""Evaluation while training: the same numbers and the same answers on every number of ranks, however few rows are held out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.store import TokenStore
from scripts.evaluating import held_out_prompts
from tests.support.job import EXACT, read_rows, train
from tests.support.tiny import write_chat, write_model


def _store(*examples: list[tuple[int, int]]) -> TokenStore:
    """Of examples given as (token, supervised)."""
    tokens = [pair for example in examples for pair in example]
    offsets = np.append(0, np.cumsum([len(example) for example in examples]))
    ids, supervised = np.array(tokens).T
    return TokenStore(ids.astype(np.int32), supervised.astype(np.uint8), offsets, {})


def test_what_is_asked_is_the_last_turn() -> None:
    two_turns = [(1, 0), (2, 1), (3, 0), (4, 0), (5, 1), (6, 1), (7, 0)]
    assert held_out_prompts([_store(two_turns)], 3) == [([1, 2, 3, 4], [5, 6])]


def test_a_text_is_asked_for_what_follows_its_beginning() -> None:
    text = [(n, 1) for n in range(10)]
    assert held_out_prompts([_store(text)], 1) == [(list(range(5)), list(range(5, 10)))]
    ((prompt, rest),) = held_out_prompts([_store([(n, 1) for n in range(500)])], 1)
    assert (len(prompt), len(rest)) == (64, 436)
    assert held_out_prompts([_store([(1, 1)])], 1) == []  # nothing to begin with


def test_sources_are_asked_alike() -> None:
    def source(first: int, count: int) -> TokenStore:
        return _store(*([(first + n, 0), (9, 1)] for n in range(count)))

    def asked(count: int, *stores: TokenStore) -> list[int]:
        return [prompt[0] for prompt, _ in held_out_prompts(list(stores), count)]

    a, b = source(100, 5), source(200, 5)
    assert asked(4, a, b) == [100, 101, 200, 201]
    assert asked(3, a, b) == [100, 101, 200]
    assert asked(6, source(100, 1), b) == [100, 200, 201, 202, 203, 204]
    assert asked(0, a, b) == []
    assert len(asked(99, a, b)) == 10


@pytest.mark.distributed
@pytest.mark.parametrize("held_out", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_evaluation_is_the_same_on_any_number_of_ranks(
    tmp_path: Path, cache_dir: Path, held_out: int
) -> None:
    """Three ranks with one row, or seven in three packed rows: some have nothing, and wait for no one."""
    data = tmp_path / "data"
    write_chat(data / "train.jsonl", count=120)
    write_chat(data / "test.jsonl", count=held_out, split="test")
    model = write_model(tmp_path / "model", trained=False, tied=False)  # whose answers differ

    def run(world_size: int, *more: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        out = tmp_path / f"out-{world_size}"
        result = train(
            [
                f"--model.path={model}",
                f"--data.path={data}",
                "--evaluation.split=test",
                "--evaluation.every=2",
                "--evaluation.generate_rows=5",
                "--evaluation.max_new_tokens=6",
                "--data.seq_len=64",
                "--micro_batch_size=1",
                "--global_batch_size=6",
                "--steps=4",
                "--checkpoint.export=false",
                *EXACT,
                *more,
            ],
            world_size,
            cache_dir=cache_dir,
            output_dir=out,
        )
        assert result.returncode == 0, result.output
        lines = (out / "samples.jsonl").read_text().splitlines()
        return [row for row in read_rows(out) if "eval_loss" in row], [*map(json.loads, lines)]

    alone, answers = run(1)
    assert [row["step"] for row in alone] == [0, 2, 4]
    assert len(answers) == 3 * min(4, held_out)
    assert all("<|im_start|>user" in sample["prompt"] for sample in answers)
    # It has learned something, else equal answers would say little.
    assert alone[-1]["eval_loss"] < alone[0]["eval_loss"]
    assert len({sample["answer"] for sample in answers}) > 1
    for row in alone:
        assert row["perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
        assert 0 <= row["exact_match_pct"] <= 100
    for world_size, more in ((2, ()), (3, ()), (2, ("--parallel.dp_replicate=2",))):
        if more and held_out > 1:
            continue
        rows, other = run(world_size, *more)
        assert other == answers
        for row, expected in zip(rows, alone, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.distributed
def test_without_being_asked_for_it_nothing_is_counted_right(
    tmp_path: Path, cache_dir: Path
) -> None:
    """Of data of one's own four answers are kept, and plain text is continued."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 60), ("test", 6)):
        lines = [
            json.dumps({"text": f"Number {n} is followed by {n + 1}. " * 4}) for n in range(count)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    result = train(
        [f"--data.path={data}", "--evaluation.split=test", "--evaluation.max_new_tokens=4", "--data.seq_len=128",
         "--data.packing=fixed", "--steps=2", "--checkpoint.export=false", *EXACT],
        1,
        cache_dir=cache_dir,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.output
    rows = [row for row in read_rows(tmp_path / "out") if "eval_loss" in row]
    assert [set(row) for row in rows] == [{"step", "eval_loss", "perplexity"}] * 2
    samples = [*map(json.loads, (tmp_path / "out" / "samples.jsonl").read_text().splitlines())]
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4
    assert samples[0]["prompt"].startswith("Number 0 is") and samples[0]["expected"]
