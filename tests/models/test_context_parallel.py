"""Ranks that share every row compute what one process computes, with documents across the slices' borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.loader import slice_sequence
from models.build import decoder_layer_classes
from models.context_parallel import check_context_parallel, heads_for_tokens, tokens_for_heads
from models.errors import ModelError
from models.tensor_parallel import tensor_parallel_plan
from tests.support.models import full, packed_batch, random_documents, tiny_config, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.optimizer import clip_gradients
from trainer.parallel import build_mesh, data_rank, parallelise, set_gradient_sync

SEQ_LEN = 24
# Query and key/value heads: with fewer, as many, and more key/value heads than ranks, also with no common factor.
HEADS = [(4, 1), (4, 2), (4, 4), (12, 2), (12, 3), (8, 8), (16, 4)]


def _exchanged(heads: list[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    """Per pair: this rank's query, key and value heads of whole rows, and its slice after the way back."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    results = []
    for query_heads, key_heads in heads:
        whole = _qkv(query_heads, key_heads)
        mine = [x.chunk(group.size(), dim=1)[rank].contiguous() for x in whole]
        query, key, value = heads_for_tokens(*mine, group)
        results.append((query, key, value, tokens_for_heads(query.contiguous(), group), mine[0]))
    return results


def _qkv(query_heads: int, key_heads: int) -> list[Tensor]:
    """[B, S, heads, H] of two rows of eight tokens, every number another."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 8, heads, 3, generator=generator)
        for heads in (query_heads, key_heads, key_heads)
    ]


@pytest.mark.distributed
def test_every_rank_gets_whole_rows_of_its_heads_and_their_keys() -> None:
    for rank, results in enumerate(run_ranks(_exchanged, 4, HEADS)):
        for (query_heads, key_heads), result in zip(HEADS, results, strict=True):
            query, key, value, back, before = result
            whole_query, *whole = _qkv(query_heads, key_heads)
            count = query_heads // 4
            own = torch.arange(rank * count, (rank + 1) * count)
            assert torch.equal(query, whole_query[:, :, own])
            assert torch.equal(back, before)
            # Query head h attends to key head h // (N / K): of all heads, and of those a rank has.
            theirs = torch.arange(count) // (count // key.shape[2])
            for found, expected in zip((key, value), whole, strict=True):
                wanted = expected[:, :, own // (query_heads // key_heads)]
                assert torch.equal(found[:, :, theirs], wanted), (query_heads, key_heads)


def _kept(shared: bool) -> int:
    """Bytes of activations that autograd keeps for backward, on this rank."""
    model = tiny_model()
    batch = packed_batch(_rows(), SEQ_LEN)
    if shared:
        model.cp_group = dist.group.WORLD
        batch = slice_sequence(batch, dist.get_rank(), dist.get_world_size())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(kept.values())


def _kept_alone_and_shared() -> tuple[int, int]:
    return _kept(False), _kept(True)


@pytest.mark.distributed
def test_a_rank_keeps_its_part_of_the_activations() -> None:
    for alone, shared in run_ranks(_kept_alone_and_shared, 2):
        assert shared < 0.6 * alone


def test_heads_that_cannot_be_shared_are_an_error() -> None:
    config = tiny_config(num_attention_heads=12, num_key_value_heads=3)
    for cp, tp in ((1, 1), (4, 1), (4, 3), (12, 1)):
        check_context_parallel(config, cp=cp, tp=tp)
    with pytest.raises(ModelError, match=r"cp 8 does not divide the 12 .* use 1, 2, 3, 4, 6, 12$"):
        check_context_parallel(config, cp=8)
    with pytest.raises(
        ModelError, match=r"cp 4 .* the 6 query heads .*tp 2 leaves; use 1, 2, 3, 6$"
    ):
        check_context_parallel(config, cp=4, tp=2)
    config.model_type = "qwen3_moe"
    check_context_parallel(config, cp=1)
    with pytest.raises(ModelError, match="cp 2 is for qwen2 and qwen3 models, not for qwen3_moe"):
        check_context_parallel(config, cp=2)


def _rows() -> list[list[Tensor]]:
    """Four packed rows. Slices of 12 or 6 tokens: whole documents, parts of them, and nothing but padding."""
    lengths = [[24], [7, 10, 2], [3], [1, 16, 1, 6]]
    return [random_documents(row, seed=seed) for seed, row in enumerate(lengths)]


def _valid() -> int:
    return sum(len(document) - 1 for row in _rows() for document in row)


Case = tuple[str, bool, ParallelConfig, int]
"""Family, tied, how it is spread, micro-batches per step."""


def _step(case: Case) -> dict[str, Any]:
    """Loss per token, gradient norm and whole gradients of one step over all of `_rows`."""
    kind, tied, config, grad_accum_steps = case
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mesh = build_mesh(config, world_size=world_size, device_type="cpu")
    data = data_rank(config, rank=rank, world_size=world_size)
    model = tiny_model(kind, tied=tied)
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        layer_plan=tensor_parallel_plan(model.hf.config, config.tp),
    )
    model.cp_group = mesh["cp"].get_group()
    rows = _rows()
    count = len(rows) // data.size // grad_accum_steps
    total = torch.zeros(())
    for index, start in enumerate(range(data.rank * count, len(rows), data.size * count)):
        set_gradient_sync(model, last=index == grad_accum_steps - 1, config=config)
        batch = packed_batch(rows[start : start + count], SEQ_LEN, max_documents=9)
        loss_sum, _ = causal_lm_loss(model, slice_sequence(batch, data.part, data.parts))
        (loss_sum * (world_size / config.tp / _valid())).backward()
        total += loss_sum.detach() / config.tp
    dist.all_reduce(total)
    norm = clip_gradients(model.parameters(), 0.0)
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    return {"loss": float(total) / _valid(), "norm": norm, "gradients": gradients}


def _steps(cases: list[Case]) -> list[dict[str, Any]]:
    return [_step(case) for case in cases]


def _config(**changes: Any) -> ParallelConfig:
    return ParallelConfig(param_dtype="float32", **changes)


RECOMPUTED = {"activation_checkpointing": "full"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (
            2,
            [
                ("qwen3", True, _config(cp=2), 1),
                ("qwen3", False, _config(cp=2, **RECOMPUTED), 4),
                ("qwen2", True, _config(cp=2, activation_checkpointing="op"), 2),
            ],
        ),
        pytest.param(
            4,
            [
                ("qwen3", True, _config(cp=4, **RECOMPUTED), 2),
                ("qwen3", False, _config(cp=2, activation_checkpointing="selective"), 2),
                ("qwen2", False, _config(cp=4, reshard_after_forward=2), 1),
                ("qwen2", True, _config(cp=2, dp_replicate=2, **RECOMPUTED), 1),
                ("qwen3", False, _config(cp=2, tp=2, **RECOMPUTED), 2),
                ("qwen2", True, _config(cp=2, tp=2), 1),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(world_size: int, cases: list[Case]) -> None:
    results = run_ranks(_steps, world_size, cases)
    for number, case in enumerate(cases):
        plain = tiny_model(case[0], tied=case[1])
        loss = causal_lm_loss(plain, packed_batch(_rows(), SEQ_LEN))[0] / _valid()
        loss.backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in plain.parameters()]))
        for found in (result[number] for result in results):
            assert found["loss"] == pytest.approx(loss.item(), rel=5e-6), case
            assert found["norm"] == pytest.approx(norm, rel=2e-5), case
            assert set(found["gradients"]) == {name for name, _ in plain.named_parameters()}
            for name, parameter in plain.named_parameters():
                error = (found["gradients"][name] - parameter.grad).norm()
                assert error < 5e-6 * norm, (case, name)
