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
    import torch.distributed as dist

    from trainer.distributed import sum_over_ranks
    from trainer.optimizer import clip_gradients

    own_tokens = sum(float(batch["counts"][2]) for batch in micro_batches)
    (valid_tokens,) = sum_over_ranks([own_tokens])
    total = 0.0
    for number, batch in enumerate(micro_batches, 1):
        model.set_requires_gradient_sync(number == len(micro_batches))  # one reduction a step
        loss, metrics = loss_fn(model, batch)
        # FSDP averages over ranks: times their number it is a sum, and one global count makes that a mean.
        (loss * dist.get_world_size() / valid_tokens).backward()
        total += float(metrics.get("loss", loss).detach())
    clip_gradients(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    (total,) = sum_over_ranks([total])
    return total / valid_tokens


def main(argv: list[str] | None = None) -> int:
    config = parse_train_config(argv)
    cache_dir = use_cache_dir(config.cache_dir)
    # Only now: these import libraries that read the cache variables when they are imported.
    from scripts.batching import batch_sizes
    from scripts.config import output_folder
    from scripts.job import Job
    from scripts.modelling import export, training_loss
    from scripts.preparation import prepare
    from scripts.wiring import assemble, save_checkpoint
    from trainer.crashes import Attempt
    from trainer.distributed import meet, once, start
    from trainer.hardware import choose_device
    from trainer.loop import to_device
    from trainer.optimizer import learning_rates, set_learning_rate
    from trainer.parallel import data_rank
    from trainer.preemption import StopRequest

    ranks = meet()
    device_type = choose_device(config.device, local_world_size=ranks.local_world_size)
    data = data_rank(config.parallel, rank=ranks.rank, world_size=ranks.world_size)
    micro, size, accumulation = batch_sizes(config, data.size)
    # One rank of a node fetches and tokenises.
    prepared = once(ranks, "prepare", lambda: prepare(config, cache_dir, world_size=data.size))
    job = Job(
        config=config,
        cache_dir=cache_dir,
        output_dir=output_folder(config),
        ranks=ranks,
        data_rank=data,
        stop=StopRequest(),
        attempt=Attempt(None, ""),
        device=start(ranks, device_type),
        micro_batch_size=micro,
        global_batch_size=size,
        grad_accum_steps=accumulation,
        prepared=prepared,
    )
    job.output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as at_end:
        run = assemble(job, at_end)  # data, sharded model, optimizer, checkpoints, where to go on
        loss_fn, batches = training_loss(config, run.model), iter(run.batches)
        peak = config.optimizer.learning_rate
        rates = learning_rates(config.schedule, steps=run.steps, peak=peak)
        for number in range(run.progress.step + 1, run.steps + 1):
            micro_batches = [
                to_device(batch, device=job.device) for batch in islice(batches, accumulation)
            ]
            set_learning_rate(run.optimizer, rates(number))
            loss = step(run.model, run.optimizer, micro_batches, loss_fn)
            run.progress.step, run.progress.samples = number, run.progress.samples + size
            if ranks.is_first:
                print(f"step {number}: loss {loss:.4f}", flush=True)
            if number == run.steps:
                save_checkpoint(job, run, run.progress, print)
        run.checkpointer.wait()
        export(job, run.model, run.tokenizer, step=run.progress.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
