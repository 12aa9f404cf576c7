"""Batches of a run: their sizes, this rank's part of them, and what decides their order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.ledger import Ledger
from data.loader import Batch, PackedBatches, slice_sequence, trim
from data.mixture import Mixture
from data.prepare import tokenizer_key
from data.streaming import StreamedBatches
from scripts.config import TrainConfig
from scripts.job import Job
from scripts.preparation import (
    stream_rows_of_rank,
)
from trainer.distributed import gather
from trainer.errors import TrainError

# The default micro-batch: one row at the default seq_len. A careful start, not yet measured on a GPU.
MICRO_BATCH_TOKENS = 4096


def batch_sizes(config: TrainConfig, world_size: int) -> tuple[int, int, int]:
    """`micro_batch_size`, `global_batch_size` and `grad_accum_steps` on so many data-parallel ranks.

    Raises:
        TrainError: the global batch is no whole number of micro-batches on every rank.
    """
    micro = config.micro_batch_size
    if micro is None:
        most = max(1, MICRO_BATCH_TOKENS // config.data.seq_len)
        rows = (config.global_batch_size or most * world_size) // world_size
        micro = max(n for n in range(1, most + 1) if rows % n == 0)
    together = micro * world_size
    size = config.global_batch_size or together
    if size % together:
        lower, upper = size // together * together, -(-size // together) * together
        nearest = " or ".join(str(n) for n in (lower, upper) if n)
        raise TrainError(
            f"global_batch_size {size} is not divisible by micro_batch_size {micro} "
            f"x {world_size} ranks = {together}; use {nearest}"
        )
    return micro, size, size // together


def open_batches(
    job: Job,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start_sample: int = 0,
    training: bool = True,
) -> PackedBatches:
    """This rank's micro-batches: of training from a sample on, or of evaluation once through."""
    config, world_size = job.config, job.data_rank.size
    if not training:
        end_sample: int | None = len(mixture)
    elif config.steps is None:
        # The last epoch may end inside a step; what is left of that step is padding.
        end_sample = math.ceil(len(mixture) * config.epochs)
    else:
        end_sample = None
    return PackedBatches(
        mixture,
        seq_len=config.data.seq_len,
        micro_batch_size=job.micro_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        shuffle=training,
        rank=job.data_rank.rank,
        world_size=world_size,
        global_batch_size=job.global_batch_size if training else job.micro_batch_size * world_size,
        start_sample=start_sample,
        end_sample=end_sample,
        workers=config.data.workers if training else 0,
    )


def slices(job: Job, batches: Iterable[Batch]) -> Iterator[Batch]:
    """This rank's part of each of the micro-batches, where ranks share rows; and less padding where shapes may vary."""
    data = job.data_rank
    if data.parts == 1:
        trims = job.config.data.packing == "none" and not job.config.parallel.compile
        return map(trim, batches) if trims else iter(batches)
    return (slice_sequence(batch, data.part, data.parts) for batch in batches)


def order_of_samples(
    job: Job, mixture: Mixture | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What decides which sample a cursor stands for: it means the same only while these are the same."""
    config = job.config
    if mixture is None:
        options = ("train_on", "expand_turns", "control_tokens", "broken_lines", "overlong")
        data: dict[str, Any] = {
            **job.prepared["stream"],
            **tokenizer_key(tokenizer),
            **{name: getattr(config.data, name) for name in options},
        }
    else:
        data = {str(i): s.documents.meta["key"] for i, s in enumerate(mixture.sources)}
        data["rows_per_epoch"] = list(mixture.counts)
    return {
        "data": data,
        "packing": config.data.packing,
        "seq_len": config.data.seq_len,
        "global_batch_size": job.global_batch_size,
        "seed": config.seed,
    }


def open_stream(
    job: Job, tokenizer: PreTrainedTokenizerBase, states: list[dict[str, int]] | None
) -> StreamedBatches:
    """This rank's micro-batches of a stream; `states` are those of all data-parallel ranks at a checkpoint."""
    config, ranks, stream = job.config, job.data_rank, job.prepared["stream"]
    # Another number of ranks is refused by any of the states, since each names it.
    state = states[min(ranks.rank, len(states) - 1)] if states else None
    data = replace(config.data, format=stream["format"], revision=stream["commit"])
    return StreamedBatches(
        partial(stream_rows_of_rank, data, job.cache_dir, ranks.size, ranks.rank),
        tokenizer,
        data,
        name=stream["name"],
        micro_batch_size=job.micro_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        state=state,
    )


def gather_data(job: Job, value: Any) -> list[Any]:
    """The values of all data-parallel ranks, in their order, on every rank."""
    return gather(value)[:: job.ranks.world_size // job.data_rank.size]


def total_ledger(job: Job, batches: StreamedBatches) -> Ledger:
    """What all ranks have read of a stream."""
    total = Ledger()
    for ledger in gather_data(job, batches.ledger):
        total.add(ledger)
    return total
