"""Batches: shifted labels, documents apart, the same samples per step however many ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import (
    IGNORE_INDEX,
    PackedBatches,
    assemble,
    read_ahead,
    slice_sequence,
    trim,
)
from data.mixture import mix
from data.packing import pack
from data.store import PackedStore, TokenStore

SEQ_LEN, PAD = 16, 0


def _store(lengths: list[int], seed: int = 0) -> TokenStore:
    random = np.random.default_rng(seed)
    total = sum(lengths)
    return TokenStore(
        input_ids=random.integers(1, 1000, total).astype(np.int32),
        supervised=random.integers(0, 2, total).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        meta={},
    )


@pytest.fixture
def store() -> TokenStore:
    return _store(np.random.default_rng(1).integers(2, SEQ_LEN + 1, 60).tolist())


def _batches(store: TokenStore, **options) -> PackedBatches:
    packs = pack(store.lengths, seq_len=SEQ_LEN)
    defaults = {"seq_len": SEQ_LEN, "micro_batch_size": 2, "pad_token_id": PAD, "seed": 3}
    mixture = mix([PackedStore(store, store, packs, {})])
    return PackedBatches(mixture, **{**defaults, **options})


def _documents(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[int]]]:
    """(input_ids, labels, position_ids) of each document or stretch of padding."""
    borders = batch["document_offsets"].tolist()
    flat = [batch[name].flatten().tolist() for name in ("input_ids", "labels", "position_ids")]
    return [
        (flat[0][a:b], flat[1][a:b], flat[2][a:b]) for a, b in itertools.pairwise(borders) if a < b
    ]


def test_one_epoch_holds_every_document_once_with_its_own_labels(store: TokenStore) -> None:
    expected = []
    for index in range(len(store)):
        ids, supervised = store.example(index)
        labels = [
            int(token) if marked else IGNORE_INDEX
            for token, marked in zip(ids[1:], supervised[1:], strict=True)
        ]
        expected.append((ids.tolist(), [*labels, IGNORE_INDEX], list(range(len(ids)))))
    packs = len(pack(store.lengths, seq_len=SEQ_LEN))
    batches = list(_batches(store, end_sample=packs))
    documents = [document for batch in batches for document in _documents(batch)]
    real = [document for document in documents if document[0][0] != PAD]
    assert sorted(real) == sorted(expected)
    for ids, labels, positions in documents:
        if ids[0] == PAD:
            assert set(ids) == {PAD} and set(labels) == {IGNORE_INDEX}
            assert positions == list(range(len(ids)))
    samples = torch.cat([batch["sample_index"] for batch in batches])
    assert sorted(samples[samples >= 0].tolist()) == list(range(packs))


def test_shapes_are_fixed_and_counts_true(store: TokenStore) -> None:
    packs = len(pack(store.lengths, seq_len=SEQ_LEN))
    fixed = set()
    for batch in _batches(store, end_sample=packs, global_batch_size=8):
        fixed.add(
            tuple(
                (name, tuple(tensor.shape), tensor.dtype)
                for name, tensor in batch.items()
                if name != "label_positions"
            )
        )
        labels = batch["labels"].flatten()
        found = torch.nonzero(labels != IGNORE_INDEX).flatten()
        assert batch["label_positions"].tolist() == found.tolist()
        documents = [len(ids) for ids, _, _ in _documents(batch) if ids[0] != PAD]
        assert batch["row_tokens"].tolist() == (batch["input_ids"] != PAD).sum(1).tolist()
        real = int((batch["input_ids"] != PAD).sum())
        squared = sum(length**2 for length in documents)
        assert batch["counts"].tolist() == [real, 2 * SEQ_LEN - real, len(found), squared]
        assert batch["document_offsets"][0] == 0
        assert batch["document_offsets"][-1] == 2 * SEQ_LEN
        assert batch["document_offsets"].dtype == torch.int32
        for row_start in (0, SEQ_LEN):
            assert row_start in batch["document_offsets"]
    assert len(fixed) == 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_of_rows_make_the_whole_rows(store: TokenStore, size: int) -> None:
    batch = next(iter(_batches(store, micro_batch_size=3)))
    slices = [slice_sequence(batch, rank, size) for rank in range(size)]
    for name in ("input_ids", "labels", "position_ids"):
        assert {part[name].shape for part in slices} == {(3, SEQ_LEN // size)}
        assert torch.equal(torch.cat([part[name] for part in slices], dim=1), batch[name])
    labelled = 0
    for part in slices:
        labels = part["labels"].flatten()
        assert (labels[part["label_positions"]] != IGNORE_INDEX).all()
        labelled += len(part["label_positions"])
        for name in ("document_offsets", "counts", "sample_index"):
            assert torch.equal(part[name], batch[name])
    assert labelled == len(batch["label_positions"]) > 0


@pytest.mark.parametrize(
    ("lengths", "width"), [([5, 9], 12), ([12, 1], 12), ([13], 16), ([], 4), ([16, 3], 16)]
)
def test_a_trimmed_batch_is_the_batch_of_shorter_rows(lengths: list[int], width: int) -> None:
    random = np.random.default_rng(0)
    rows = [[(random.integers(1, 1000, n), random.random(n) < 0.5)] for n in lengths] or [[], []]
    options = {"pad_token_id": PAD, "max_documents": 2 * len(rows)}
    batch, expected = (
        assemble(rows, np.arange(len(rows)), seq_len=seq_len, **options)
        for seq_len in (SEQ_LEN, width)
    )
    found = trim(batch, multiple=4)
    assert found["input_ids"].shape == (len(rows), width)
    for name in expected.keys() - {"document_offsets"}:
        assert torch.equal(found[name], expected[name]), name
    # A full row has no padding behind it, and one border less.
    borders = [batch["document_offsets"].unique() for batch in (found, expected)]
    assert torch.equal(*borders)
    assert found["document_offsets"].dtype == torch.int32


def _step_samples(store: TokenStore, world_size: int, micro: int, steps: int) -> list[list[int]]:
    """Samples of each step over all ranks, in the order of the data."""
    ranks = [
        _batches(
            store,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            global_batch_size=8,
            start_sample=24,
        )
        for rank in range(world_size)
    ]
    accumulation = ranks[0].grad_accum_steps
    streams = [iter(batches) for batches in ranks]
    return [
        [
            sample
            for _ in range(accumulation)
            for stream in streams
            for sample in next(stream)["sample_index"].tolist()
        ]
        for _ in range(steps)
    ]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_a_step_has_the_same_samples_for_any_number_of_ranks(
    store: TokenStore, world_size: int, micro: int
) -> None:
    # 24 + 5 * 8 samples run over the edge of the first epoch.
    assert len(pack(store.lengths, seq_len=SEQ_LEN)) < 64
    expected = [list(range(24 + 8 * step, 32 + 8 * step)) for step in range(5)]
    assert _step_samples(store, world_size, micro, 5) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_D12_resuming_continues_the_sequence_at_and_behind_epoch_edges(
    store: TokenStore, workers: int
) -> None:
    packs = len(pack(store.lengths, seq_len=SEQ_LEN))
    whole = list(itertools.islice(_batches(store), 2 * packs))
    for start in (2, packs // 2 * 2, packs // 2 * 2 + 2):
        resumed = _batches(store, start_sample=start, workers=workers)
        expected = whole[start // 2 : start // 2 + 3]
        for batch, again in zip(expected, itertools.islice(resumed, 3), strict=True):
            assert all(torch.equal(batch[name], again[name]) for name in batch)
        # And once more in the same epoch.
        twice = next(iter(_batches(store, start_sample=start + 2, workers=workers)))
        assert all(torch.equal(batch, twice[name]) for name, batch in expected[1].items())


def test_iterating_leaves_the_global_random_state_alone(store: TokenStore) -> None:
    before = torch.get_rng_state()
    next(iter(_batches(store)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_tail_is_padded_so_that_ranks_take_equal_steps(world_size: int) -> None:
    store = _store([SEQ_LEN] * 11)
    seen = []
    for rank in range(world_size):
        batches = _batches(
            store,
            rank=rank,
            world_size=world_size,
            micro_batch_size=1,
            global_batch_size=4,
            end_sample=11,
            shuffle=False,
        )
        rows = list(batches)
        assert len(rows) == len(batches) == 3 * batches.grad_accum_steps
        seen += [int(batch["sample_index"]) for batch in rows]
        for batch in rows:
            if batch["sample_index"] < 0:
                assert batch["counts"].tolist() == [0, SEQ_LEN, 0, 0]
                assert (batch["labels"] == IGNORE_INDEX).all()
    assert sorted(seen) == [-1, *range(11)]


def test_an_epoch_is_visited_in_another_order_each_time(store: TokenStore) -> None:
    packs = len(pack(store.lengths, seq_len=SEQ_LEN))
    rows = itertools.islice(_batches(store, micro_batch_size=1), 2 * packs)
    ids = [tuple(batch["input_ids"].flatten().tolist()) for batch in rows]
    assert sorted(ids[:packs]) == sorted(ids[packs:])
    assert ids[:packs] != ids[packs:]


def test_sizes_that_do_not_fit_are_errors(store: TokenStore) -> None:
    with pytest.raises(DataError, match=r"global_batch_size=10 .* 4 data-parallel .* 8 or 16"):
        _batches(store, global_batch_size=10, world_size=4)
    with pytest.raises(DataError, match=r"global_batch_size=2 .* nearest are 4$"):
        _batches(store, global_batch_size=2, world_size=2)
    with pytest.raises(DataError, match="3 packed rows are fewer than global_batch_size=4"):
        _batches(_store([SEQ_LEN] * 3), global_batch_size=4)


def test_reading_ahead_keeps_the_order_and_raises_in_its_place() -> None:
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield {"number": torch.tensor(number)}
        raise ValueError("broken")

    read = read_ahead(items(), 2)
    assert int(next(read)["number"]) == 0
    read.close()
    assert len(made) <= 3
    numbers = []
    with pytest.raises(ValueError, match="broken"):
        for item in read_ahead(items(), 3):
            numbers.append(int(item["number"]))
    assert numbers == list(range(6))
