"""Streams: every row once per pass, in an order of its own, and exactly again after a resume."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import embedded
from data.config import DataConfig
from data.errors import DataError
from data.streaming import StreamedBatches, stream_format

SEQ_LEN, PAD = 16, 0
CONFIG = DataConfig(
    format="tokenised", streaming=True, seq_len=SEQ_LEN, stream_buffer_rows=10, max_bad_rows_pct=100
)
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.build_tokenizer()


@dataclass
class Every:
    """Every `world_size`-th row from `rank` on; counts those that were read."""

    rows: list[Any]
    rank: int = 0
    world_size: int = 1
    read: int = 0

    def __call__(self, skip: int) -> Iterator[Any]:
        first = self.rank + skip * self.world_size
        for row in itertools.islice(self.rows, first, None, self.world_size):
            self.read += 1
            yield row


def _rows(count: int, longest: int = SEQ_LEN, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 3..longest tokens, of which the first two are the row's number."""
    random = np.random.default_rng(seed)
    return [
        {"input_ids": [1 + i // 50, 1 + i % 50, *random.integers(1, 60, size).tolist()]}
        for i, size in enumerate(random.integers(1, longest - 1, count))
    ]


def _stream(tokenizer, rows: list[Any], config: DataConfig = CONFIG, **options) -> StreamedBatches:
    place = {name: options.get(name, default) for name, default in (("rank", 0), ("world_size", 1))}
    defaults = {"name": "rows", "micro_batch_size": 2, "pad_token_id": PAD, "seed": 3}
    return StreamedBatches(Every(rows, **place), tokenizer, config, **{**defaults, **options})


def _take(batches: StreamedBatches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def _documents(batch: Batch) -> Iterator[list[int]]:
    flat = batch["input_ids"].flatten().tolist()
    for begin, end in itertools.pairwise(batch["document_offsets"].tolist()):
        if begin < end and flat[begin] != PAD:
            yield flat[begin:end]


def _documents_of_pass(batches: StreamedBatches, wanted: int) -> Iterator[list[list[int]]]:
    """The documents of one pass after another, each `wanted` of them."""
    stream = itertools.chain.from_iterable(map(_documents, batches))
    while True:
        yield list(itertools.islice(stream, wanted))


def _same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def test_every_pass_has_each_row_once_in_an_order_of_its_own(tokenizer) -> None:
    rows = _rows(47)
    passes = _documents_of_pass(_stream(tokenizer, rows, micro_batch_size=1), len(rows))
    first, second, third = itertools.islice(passes, 3)
    expected = [row["input_ids"] for row in rows]
    for documents in (first, second, third):
        assert sorted(documents) == sorted(expected)
        assert documents != expected
    assert first != second != third
    # Shuffled within blocks: those stand in the order of the source.
    assert sorted(first[:10]) == sorted(expected[:10])
    other = _documents_of_pass(_stream(tokenizer, rows, micro_batch_size=1, seed=4), len(rows))
    assert next(other) != first


def test_rows_of_ranks_are_disjoint_and_together_all(tokenizer) -> None:
    rows = _rows(50)
    streams = [
        _stream(tokenizer, rows, rank=rank, world_size=3, micro_batch_size=1) for rank in range(3)
    ]
    # Passes of 17, 17 and 16 rows.
    shares = [next(_documents_of_pass(s, len(rows[r::3]))) for r, s in enumerate(streams)]
    for rank, share in enumerate(shares):
        assert sorted(share) == sorted(row["input_ids"] for row in rows[rank::3])
    # All of them go on: a rank whose pass ends earlier begins the next.
    assert [len(_take(stream, 60)) for stream in streams] == [60, 60, 60]


def test_blocks_and_ranks_have_orders_of_their_own(tokenizer) -> None:
    config = replace(CONFIG, packing="none")
    orders = set()
    for rank in range(2):
        stream = _stream(tokenizer, _rows(40), config, rank=rank, world_size=2, micro_batch_size=10)
        # Two blocks of ten rows, in two passes.
        orders |= {tuple(batch["sample_index"].tolist()) for batch in _take(stream, 4)}
    assert len(orders) == 8
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(10))}


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 60),
    buffer=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    parts=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    packing=st.sampled_from(["best_fit", "none", "fixed"]),
    ranks=st.sampled_from([(0, 1), (1, 2)]),
)
def test_a_stream_resumed_twice_is_the_uninterrupted_one(
    tokenizer, count, buffer, sizes, parts, packing, ranks
) -> None:
    """With a micro-batch size of its own after each resume, over edges of blocks and passes."""
    config = replace(CONFIG, stream_buffer_rows=buffer, packing=packing)
    options = {"rank": ranks[0], "world_size": ranks[1]}
    rows = _rows(count * ranks[1])
    resumed, state = [], None
    for size, part in zip(sizes, parts, strict=True):
        stream = _stream(tokenizer, rows, config, micro_batch_size=size, state=state, **options)
        resumed += [row for batch in _take(stream, part) for row in _packed_rows(batch)]
        state = json.loads(json.dumps(stream.state))
    single = _stream(tokenizer, rows, config, micro_batch_size=1, **options)
    whole = [row for batch in _take(single, len(resumed)) for row in _packed_rows(batch)]
    assert resumed == whole
    if resumed:
        assert state == single.state


def _packed_rows(batch: Batch) -> list[tuple]:
    names = ("input_ids", "labels", "position_ids", "sample_index")
    return [
        tuple(batch[name][row].tolist() for name in names)
        for row in range(len(batch["sample_index"]))
    ]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_are_bit_exact_after_two_resumes_in_a_pass_and_over_its_edge(
    tokenizer, micro_batch_size
) -> None:
    rows = _rows(40)
    make = partial(_stream, tokenizer, rows, micro_batch_size=micro_batch_size)
    whole_stream = make()
    whole, passes = [], []
    for batch in itertools.islice(whole_stream, 40):
        whole.append(batch)
        passes.append(whole_stream.state["pass"])
    edge = passes.index(1)  # the first micro-batch with rows of the second pass
    for cuts in ([2, edge - 1], [edge - 1, edge], [edge, edge + 1], [edge + 1, edge + 2]):
        parts, state = [], None
        for length in (cuts[0], cuts[1] - cuts[0], len(whole) - cuts[1]):
            stream = make(state=state)
            parts += _take(stream, length)
            state = stream.state
        assert _same(parts, whole)


def test_iterating_again_goes_on_behind_the_last_micro_batch(tokenizer) -> None:
    stream, whole = _stream(tokenizer, _rows(40)), _stream(tokenizer, _rows(40))
    assert _same(_take(stream, 3) + _take(stream, 5), _take(whole, 8))


def test_a_worker_process_gives_the_same_and_an_error_of_one_line(tokenizer) -> None:
    rows = [*_rows(35), {"input_ids": None}]
    config = replace(CONFIG, max_bad_rows_pct=1)
    here = _stream(tokenizer, rows, config)
    there = _stream(tokenizer, rows, replace(config, workers=4))
    batches = iter(there)
    with pytest.raises(DataError) as error:
        for expected in here:
            assert _same([next(batches)], [expected])
            # Of what was handed out: the worker is ahead of it.
            assert there.state == here.state
            assert there.ledger == here.ledger
    assert here.state["rows"] == 30
    line = str(error.value)
    with pytest.raises(DataError) as error:
        next(batches)
    assert (
        str(error.value)
        == line
        == (
            "rows: 1 of 36 rows cannot be used so far, more than data.max_bad_rows_pct=1: "
            "1 input_ids is missing (rows 35); mend the rows or raise the limit"
        )
    )


def test_the_next_block_is_prepared_during_this_one_and_no_further(tokenizer) -> None:
    rows = Every(_rows(100))
    stream = StreamedBatches(
        rows, tokenizer, CONFIG, name="rows", micro_batch_size=1, pad_token_id=PAD
    )
    batches = iter(stream)
    next(batches)
    deadline = time.monotonic() + 30
    while rows.read < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert rows.read == 20
    assert stream.state["rows"] == 0
    assert stream.ledger.rows_read == 10  # of the block in hand


def test_shapes_are_fixed_however_many_documents_there_are(tokenizer) -> None:
    short = [{"input_ids": [5, 6]}] * 30
    shapes = set()
    stream = _stream(tokenizer, short + _rows(20))
    for batch in itertools.islice(stream, 40):
        fixed = {name: tensor.shape for name, tensor in batch.items() if name != "label_positions"}
        shapes.add(tuple(sorted(fixed.items())))
        for row in range(2):
            borders = batch["document_offsets"].unique()
            inside = (borders >= row * SEQ_LEN) & (borders < (row + 1) * SEQ_LEN)
            assert int(inside.sum()) <= 1 + SEQ_LEN // 8 + 1  # the padding is one
    assert len(shapes) == 1
    passes = _documents_of_pass(_stream(tokenizer, short + _rows(20), micro_batch_size=1), 50)
    documents = next(passes)
    assert documents.count([5, 6]) == 30


def test_fixed_packing_cuts_the_stream_of_a_block(tokenizer) -> None:
    rows = [row for row in _rows(60, longest=60) if len(row["input_ids"]) > 10][:10]
    tokens = list(itertools.chain.from_iterable(row["input_ids"] for row in rows))
    config = replace(CONFIG, packing="fixed")
    packed = -(-len(tokens) // SEQ_LEN)
    batches = _take(_stream(tokenizer, rows, config, micro_batch_size=1), packed)
    assert [int(batch["sample_index"]) for batch in batches] != list(range(packed))
    ordered = sorted(batches, key=lambda batch: int(batch["sample_index"]))
    joined = torch.cat([batch["input_ids"].flatten() for batch in ordered]).tolist()
    assert joined == tokens + [PAD] * (len(joined) - len(tokens))


def test_conversations_are_masked_and_too_long_ones_counted(tokenizer) -> None:
    def row(answer: Any) -> dict[str, Any]:
        turns = [("user", "q"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    # A row without the columns is a bad one, also where it begins a block.
    rows = [{"other": 1}, row("fine"), row(""), row("good"), row("z " * 200)]
    config = replace(CONFIG, format="messages", seq_len=64)
    stream = _stream(tokenizer, rows, config, micro_batch_size=1, rank=0, world_size=1)
    (batch,) = _take(stream, 1)
    labels = batch["labels"][batch["labels"] != -100]
    assert tokenizer.decode(labels).count("<|im_end|>") == 2
    ledger = stream.ledger
    assert (ledger.rows_read, ledger.rows_used, ledger.overlong_dropped) == (5, 2, 1)
    assert {reason: entry["first"] for reason, entry in ledger.excluded.items()} == {
        "messages is not a list": [0],
        "content is empty": [2],
    }
    assert ledger.tokens_read == ledger.tokens + ledger.tokens_dropped
    assert int(batch["counts"][0]) == ledger.tokens


def test_bad_rows_are_named_by_their_place_in_the_source(tokenizer) -> None:
    rows = _rows(40)
    rows[3 + 2 * 14]["input_ids"] = []
    stream = _stream(tokenizer, rows, rank=1, world_size=2)
    _take(stream, 30)
    (entry,) = stream.ledger.excluded.values()
    assert entry["first"][0] == 31


def test_too_many_bad_rows_stop_after_a_thousand_or_a_pass(tokenizer) -> None:
    bad: list[Any] = [{"input_ids": None}]
    config = replace(CONFIG, max_bad_rows_pct=1, stream_buffer_rows=2000)
    good = [{"input_ids": [5, 6, 7]}]
    few = _stream(tokenizer, bad + good * 500, config)
    assert len(_take(few, 120)) == 120 and few.state["pass"] == 1
    with pytest.raises(DataError, match=r"^rows: 6 of 501 rows cannot be used so far"):
        _take(_stream(tokenizer, bad * 6 + good * 495, config), 400)
    with pytest.raises(DataError, match=r"^rows: 20 of 1000 rows cannot be used so far"):
        _take(_stream(tokenizer, bad * 19 + good * 980 + bad + good * 3000, config), 1)
    # One in twelve is much, but a block of twelve says little.
    config = replace(config, stream_buffer_rows=12)
    assert _take(_stream(tokenizer, bad + good * 900, config), 1)


def test_a_pass_without_anything_to_train_on_is_an_error(tokenizer) -> None:
    rows = [{"input_ids": [5] * 20}, {"input_ids": [5, 6], "labels": [-100, -100]}]
    with pytest.raises(DataError) as error:
        _take(_stream(tokenizer, rows), 1)
    assert str(error.value) == (
        "rows: none of 2 rows can be trained on (0 excluded, 1 longer than data.seq_len=16, "
        "1 without labels)"
    )


def test_fewer_rows_than_ranks_is_an_error(tokenizer) -> None:
    config = replace(CONFIG, format="auto")
    with pytest.raises(DataError) as error:
        stream_format(iter(_rows(3)), config, name="rows", world_size=4)
    assert str(error.value) == (
        "rows: 3 rows are fewer than 4 data-parallel ranks; give more rows, or start fewer ranks"
    )
    with pytest.raises(DataError) as error:
        _take(_stream(tokenizer, _rows(3), rank=3, world_size=4), 1)
    assert str(error.value) == (
        "rows: no row behind the first 0 of rank 3 of 4; give more rows, or start fewer ranks"
    )
    assert stream_format(iter(_rows(4)), config, name="rows", world_size=4) == "tokenised"
    with pytest.raises(DataError, match=r"^rows: the columns prose fit no format"):
        stream_format(iter([{"prose": ""}]), config, name="rows", world_size=1)


@pytest.mark.parametrize("key", ["world_size", "stream_buffer_rows"])
def test_a_state_of_another_layout_is_refused(tokenizer, key) -> None:
    stream = _stream(tokenizer, _rows(20))
    _take(stream, 1)
    state = {**stream.state, key: 7}
    with pytest.raises(DataError) as error:
        _stream(tokenizer, _rows(20), state=state)
    assert str(error.value) == (
        f"rows: a stream resumes only with the {key} it began with, 7, not "
        f"{stream.state[key]}; set it back, or start anew"
    )


def test_a_buffer_of_no_rows_is_refused(tokenizer) -> None:
    with pytest.raises(DataError, match=r"^data.stream_buffer_rows=0 must be at least 1$"):
        _stream(tokenizer, _rows(20), replace(CONFIG, stream_buffer_rows=0))


def test_rows_that_have_gone_since_the_checkpoint_are_noticed(tokenizer) -> None:
    stream = _stream(tokenizer, _rows(30), micro_batch_size=1)
    for _ in stream:
        if stream.state["rows"] == 20 and stream.state["packs"] > 1:
            break
    with pytest.raises(DataError, match=r"^rows: no row behind the first 20 .* as it was"):
        _take(_stream(tokenizer, _rows(20), state=stream.state), 1)
    with pytest.raises(DataError, match=r"^rows: the rows behind the first 20 .* as it was"):
        _take(_stream(tokenizer, _rows(21), state=stream.state), 1)


def test_what_the_source_raises_comes_out(tokenizer) -> None:
    def rows(skip: int) -> Iterator[Any]:
        yield from itertools.islice(_rows(12), skip, None)
        raise DataError("rows: line 13 is not JSON")

    stream = StreamedBatches(
        rows, tokenizer, CONFIG, name="rows", micro_batch_size=1, pad_token_id=PAD
    )
    with pytest.raises(DataError, match=r"^rows: line 13 is not JSON$"):
        _take(stream, 100)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_streamed_pairs_stay_together(tokenizer, packing: Any) -> None:
    rows = [{"prompt": "q", "chosen": "b" * (i % 9 + 1), "rejected": "c"} for i in range(40)]
    config = replace(CONFIG, format="preference", packing=packing, seq_len=64)
    for batch in _take(_stream(tokenizer, rows, config), 6):
        found = list(_documents(batch))
        assert len(found) == 4 or (packing == "best_fit" and len(found) % 2 == 0)
        for number, document in enumerate(found):
            answer = tokenizer.decode(document).split("assistant\n")[1]
            assert answer.strip("bc") == "<|im_end|>\n" and answer[0] == "bc"[number % 2]
