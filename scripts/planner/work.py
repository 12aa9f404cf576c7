"""What one rank of a run does in a step, from the flags of train.py."""

from __future__ import annotations

from scripts.batching import batch_sizes
from scripts.config import TrainConfig
from scripts.planner.facts import Gpu, Shape
from scripts.planner.speed import Work
from trainer.parallel import data_rank, mesh_sizes


def batch_of(config: TrainConfig, *, gpus: int) -> tuple[int, int, int]:
    """Rows of a micro-batch and of a step, and micro-batches; raises TrainError, as train.py, where they do not divide."""
    return batch_sizes(config, data_rank(config.parallel, rank=0, world_size=gpus).size)


def work_of(
    config: TrainConfig,
    shape: Shape,
    gpu: Gpu,
    *,
    gpus: int,
    trained_share: float = 1.0,
    document_length: float | None = None,
    labels: float = 1.0,
) -> Work:
    """What decides the time of a step.

    Args:
        config: as for train.py.
        shape: of the model.
        gpu: each of them.
        gpus: ranks.
        trained_share: of the parameters.
        document_length: sum of the documents' squared lengths over that of their lengths; None: rows are one document.
        labels: share of the tokens that are predicted.

    Raises:
        TrainError: the batch or the mesh does not divide.
    """
    parallel, seq_len = config.parallel, config.data.seq_len
    micro_batch_size, _, grad_accum_steps = batch_of(config, gpus=gpus)
    sizes = mesh_sizes(parallel, world_size=gpus)
    last = config.model.train_last_layers
    return Work(
        shape=shape,
        gpu=gpu,
        gpus=gpus,
        tokens=micro_batch_size * seq_len,
        squared_lengths=micro_batch_size * seq_len * min(document_length or seq_len, seq_len),
        grad_accum_steps=grad_accum_steps,
        labels_share=labels,
        recompute=parallel.activation_checkpointing,
        checkpoint_every=parallel.checkpoint_every,
        compiled=parallel.compile,
        float8=parallel.float8 != "none",
        float32=parallel.param_dtype == "float32",
        shards=sizes["dp_shard"] * sizes["cp"],
        gathers=1 if parallel.reshard_after_forward is False else 2,
        reduce_bytes=4 if parallel.reduce_dtype == "float32" else 2,
        accumulation=parallel.accumulation,
        trained_share=trained_share,
        tensor_parallel=sizes["tp"],
        context_parallel=sizes["cp"],
        offload=parallel.cpu_offload,
        front_share=(shape.layers - last) / shape.layers if last else 0.0,
    )
