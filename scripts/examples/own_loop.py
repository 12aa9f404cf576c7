"""A training loop from scratch, of the same pieces as train.py: read it, change it, prove its step.

torchrun --nproc_per_node=2 scripts/examples/own_loop.py --cache_dir cache --output_dir outputs/own --steps 20
python scripts/verify.py --cache_dir cache --step scripts.examples.own_loop.step

It takes the flags of train.py, and prints the loss. What train.py does beside: logs, evaluation, guards, restarts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import parse_train_config
from scripts.environment import use_cache_dir


def step(
    model: Any,
    optimizer: Any,
    micro_batches: Sequence[Any],
    loss_fn: Callable[..., Any],
    *,
    max_grad_norm: float = 1.0,
) -> float:
    """One optimizer step on this rank's micro-batches; returns the mean loss per valid token over all ranks."""
    from trainer.optimizer import clip_gradients

    loss = backward(model, micro_batches, loss_fn)
    clip_gradients(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def backward(model: Any, micro_batches: Sequence[Any], loss_fn: Callable[..., Any]) -> float:
    """Leave in the parameters the gradient of that mean."""
    import torch.distributed as dist

    from trainer.distributed import sum_over_ranks
    from trainer.loop import units_of

    (units,) = sum_over_ranks([sum(units_of(loss_fn, batch) for batch in micro_batches)])
    total = 0.0
    for number, batch in enumerate(micro_batches, 1):
        model.set_requires_gradient_sync(number == len(micro_batches))  # one reduction a step
        loss, metrics = loss_fn(model, batch)
        # FSDP averages over ranks: times their number it is a sum, and one global count makes that a mean.
        (loss * dist.get_world_size() / units).backward()
        total += float(metrics.get("loss", loss).detach())
    (total,) = sum_over_ranks([total])
    return total / units


def main(argv: list[str] | None = None) -> int:
    config = parse_train_config(argv)
    cache_dir = use_cache_dir(config.cache_dir)
    # Only now: these import libraries that read the cache variables when they are imported.
    from scripts.batching import slices
    from scripts.config import output_folder
    from scripts.modelling import export
    from scripts.preparation import prepare
    from scripts.wiring import assemble, new_job, save_checkpoint
    from trainer.distributed import meet, once, start
    from trainer.hardware import choose_device
    from trainer.loop import to_device
    from trainer.optimizer import learning_rates, set_learning_rate
    from trainer.parallel import data_rank

    ranks = meet()
    device_type = choose_device(config.device, local_world_size=ranks.local_world_size)
    data = data_rank(config.parallel, rank=ranks.rank, world_size=ranks.world_size)
    # One rank of a node fetches and tokenises.
    prepared = once(ranks, "prepare", lambda: prepare(config, cache_dir, world_size=data.size))
    device = start(ranks, device_type)
    job = new_job(config, cache_dir, ranks, device, prepared, output_folder(config))
    job.output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as at_end:
        run = assemble(job, at_end)  # data, sharded model, optimizer, checkpoints, where to go on
        batches = slices(job, run.batches)
        peak = config.optimizer.learning_rate
        rates = learning_rates(config.schedule, steps=run.steps, peak=peak)
        for number in range(run.progress.step + 1, run.steps + 1):
            micro_batches = [
                to_device(batch, device=job.device)
                for batch in islice(batches, job.grad_accum_steps)
            ]
            set_learning_rate(run.optimizer, rates(number))
            loss = step(run.model, run.optimizer, micro_batches, run.loss)
            run.progress.step, run.progress.samples = (
                number,
                run.progress.samples + job.global_batch_size,
            )
            if ranks.is_first:
                print(f"step {number}: loss {loss:.4f}", flush=True)
            if number == run.steps:
                save_checkpoint(job, run, run.progress, print)
        run.checkpointer.wait()
        export(job, run.model, run.tokenizer, step=run.progress.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
