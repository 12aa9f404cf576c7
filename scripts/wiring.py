"""From a `TrainConfig` to a finished run: data, model and loop are put together here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from data.embedded import check_answer, questions
from data.ledger import Ledger
from data.loader import PackedBatches
from data.mixture import Mixture, mix
from data.prepare import tokenizer_key
from data.store import open_packed, pack_store
from data.streaming import StreamedBatches
from models.build import (
    build_model,
    check_first_loss,
    decoder_layer_classes,
    first_loss_counts,
    materialise,
    read_model_config,
)
from models.causal_lm import PackedCausalLM
from models.export import export_model, staged, write_model_files
from models.flops import training_flops
from models.generation import generate_answers
from models.weights import LoadReport, load_weights
from scripts import reporting
from scripts.config import TrainConfig
from scripts.dry_run import plan_table, prove_checkpoint, summary, temporary_output
from scripts.model_card import model_card
from scripts.preparation import (
    open_mixture,
    pin_revisions,
    prepare,
    read_tokenizer,
    stream_rows_of_rank,
    uses_embedded_data,
)
from trainer.checkpoint import Checkpointer, complete_checkpoints
from trainer.config import ParallelConfig
from trainer.distributed import Ranks, gather, max_over_ranks, once, raise_together, start
from trainer.errors import TrainError
from trainer.hardware import choose_device, configure, peak_flops
from trainer.loop import Progress, Speedometer, StopRequest, evaluate_loss, train
from trainer.loss import causal_lm_loss
from trainer.metrics import MetricsWriter
from trainer.optimizer import build_optimizer, learning_rate_at
from trainer.parallel import DTYPES, build_mesh, parallelise

# The default micro-batch: one row at the default seq_len. A careful start, not yet measured on a GPU.
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Job:
    """What the pieces of one run share."""

    config: TrainConfig
    cache_dir: Path
    output_dir: Path
    ranks: Ranks
    device: torch.device
    micro_batch_size: int
    global_batch_size: int
    grad_accum_steps: int
    prepared: dict[str, Any]
    """What `prepare` returned on this node."""


def run(config: TrainConfig, cache_dir: Path, ranks: Ranks) -> int:
    """One training job, from nothing to the export; every rank calls this.

    Returns:
        0 when the last step was reached, 128 + n when signal n stopped the run after saving.

    Raises:
        DataError, ModelError, TrainError: what the user can mend.
    """
    device_type = choose_device(config.device, local_world_size=ranks.local_world_size)
    configure(device_type, local_world_size=ranks.local_world_size)
    micro_batch_size, global_batch_size, grad_accum_steps = batch_sizes(config, ranks.world_size)
    # One rank of a node, or of all nodes that share the cache, downloads and tokenises. The process group, whose collectives time out, comes after.
    output_dir = Path(config.output_dir or f"outputs/{reporting.run_name(config)}")
    pinned = pin_revisions(config, output_dir)
    prepared = once(
        ranks,
        "prepare",
        partial(prepare, pinned, cache_dir, world_size=ranks.world_size),
        shared_folder=cache_dir,
    )
    device = start(ranks, device_type)
    job = Job(
        config=config,
        cache_dir=cache_dir,
        output_dir=output_dir,
        ranks=ranks,
        device=device,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        grad_accum_steps=grad_accum_steps,
        prepared=prepared,
    )
    try:
        if config.dry_run:
            with temporary_output(ranks, output_dir) as folder:
                return _run(replace(job, output_dir=folder))
        return _run(job)
    finally:
        dist.destroy_process_group()


def _run(job: Job) -> int:
    config, ranks, device = job.config, job.ranks, job.device
    tokenizer = read_tokenizer(config, job.cache_dir, job.prepared["tokenizer"])
    mixture = None if config.data.streaming else open_mixture(config.data, job.prepared)
    samples_per_epoch = None if mixture is None else len(mixture)
    # A stream has no length: it is given the steps.
    steps = config.steps or math.ceil(
        (samples_per_epoch or 0) * config.epochs / job.global_batch_size
    )

    mesh = build_mesh(config.parallel, world_size=ranks.world_size, device_type=device.type)
    model, weights = build_sharded_model(job, tokenizer, mesh)
    torch.manual_seed(config.seed + ranks.rank)  # what a model draws while training differs by rank
    optimizer = build_optimizer(
        model,
        config.optimizer,
        layer_classes=decoder_layer_classes(model),
        embedding=model.hf.get_input_embeddings().weight,
        head=model.head.weight,
    )
    checkpointer = Checkpointer(job.output_dir / "checkpoints", model, optimizer, config.checkpoint)
    order = order_of_samples(job, mixture, tokenizer)
    progress, states = resume(job, checkpointer, order)
    batches = (
        open_stream(job, tokenizer, states)
        if mixture is None
        else open_batches(job, mixture, tokenizer, start_sample=progress.samples)
    )

    def save(now: Progress) -> None:
        state: dict[str, Any] = {"samples": now.samples, "order": order}
        if isinstance(batches, StreamedBatches):
            state["stream"] = gather(batches.state)
        checkpointer.save(now.step, state)

    say = partial(print, flush=True) if ranks.is_first else (lambda _: None)
    say(reporting.header(job, model, weights, mixture, steps, progress))
    if config.dry_run:
        say(plan_table(model, config.parallel))
    if progress.step >= steps:
        say(f"nothing to train: {job.output_dir} is already at step {progress.step} of {steps}")
    raise_together(
        reporting.write_run_files(job, mesh, weights, mixture) if ranks.is_first else None
    )
    raise_together(save_model_files(job, model, tokenizer) if ranks.is_first else None)
    micro_batches = iter(batches)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    judged = weights is not None and first_loss_counts(config.model.check_first_loss, parameters)
    if progress.step == 0 and judged:
        # The first step's own batches, tried without a gradient, then put back.
        first = list(islice(micro_batches, job.grad_accum_steps))
        loss = evaluate_loss(model, first, loss_fn=causal_lm_loss, device=device)
        check_first_loss(loss, vocab_size=model.hf.config.vocab_size)
        say(f"first loss {loss:.2f}; a guess costs {math.log(model.hf.config.vocab_size):.2f}")
        micro_batches = chain(first, micro_batches)

    before: dict[str, float] = {}
    after: dict[str, float] = {}
    peak, peak_origin = peak_flops(device, DTYPES[config.parallel.param_dtype])
    with (
        MetricsWriter(
            job.output_dir, config.log, is_first=ranks.is_first, steps=steps, step=progress.step
        ) as writer,
        StopRequest().listening() as stop,
    ):

        def evaluate(step: int) -> dict[str, float]:
            values = {} if config.dry_run else evaluate_model(job, model, tokenizer)
            if values:
                writer.write({"step": step, **values})
            return values

        if progress.step == 0:
            before = evaluate(0)
        finished = train(
            model,
            optimizer,
            micro_batches,
            loss_fn=causal_lm_loss,
            learning_rate=partial(
                learning_rate_at,
                steps=steps,
                peak=config.optimizer.learning_rate,
                schedule=config.schedule,
            ),
            optimizer_config=config.optimizer,
            progress=progress,
            steps=min(progress.step + 1, steps) if config.dry_run else steps,
            global_batch_size=job.global_batch_size,
            grad_accum_steps=job.grad_accum_steps,
            samples_per_epoch=samples_per_epoch,
            device=device,
            evaluate=lambda step: after.update(evaluate(step)),
            evaluate_every=config.evaluation.every,
            save=save,
            save_every=config.checkpoint.every,
            log=writer.write,
            log_every=config.log.every,
            advance=writer.advance,
            stop=stop,
            speedometer=Speedometer(
                flops=partial(training_flops, model.hf.config),
                peak_flops=None if peak is None else peak * ranks.world_size,
            ),
        )
        checkpointer.wait()
    if isinstance(batches, StreamedBatches):
        ledger = total_ledger(batches)
        raise_together(reporting.record_stream(job, ledger) if ranks.is_first else None)
        say(reporting.stream_line(job, ledger))
    if not finished:
        (number,) = max_over_ranks([int(stop.signal or 0)])
        say(reporting.stopped(job, int(number), progress.step))
        return 128 + int(number)
    if config.dry_run:
        prove_checkpoint(checkpointer, model, optimizer)
        say(summary(job.output_dir) if ranks.is_first else "")
        return 0
    if config.checkpoint.export:
        export(job, model, tokenizer, step=progress.step)
    say(reporting.footer(job, before, after, mfu_peak=peak_origin))
    return 0


def batch_sizes(config: TrainConfig, world_size: int) -> tuple[int, int, int]:
    """`micro_batch_size`, `global_batch_size` and `grad_accum_steps`.

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


def build_sharded_model(
    job: Job, tokenizer: PreTrainedTokenizerBase, mesh: DeviceMesh
) -> tuple[PackedCausalLM, LoadReport | None]:
    """The model on this rank's device: sharded first, then filled from the checkpoint, unless weights are random."""
    config = job.config.model
    folder = Path(job.prepared["model"]) if job.prepared["model"] else None
    random = folder is None or config.init == "random"
    model = build_model(
        read_model_config(config, folder, tokenizer),
        attention=config.attention,
        seed=job.config.seed if random else None,
    )
    shard(model, job.config.parallel, mesh)
    # Offloaded parameters live on the host; buffers are where the model computes.
    home = torch.device("cpu") if job.config.parallel.cpu_offload else job.device
    if random:
        model.to(home)
    else:
        materialise(model, home)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(job.device)
    if random:
        return model, None
    assert folder is not None
    return model, load_weights(model, folder)


def shard(model: PackedCausalLM, config: ParallelConfig, mesh: DeviceMesh) -> None:
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        forward_methods=["generate"],
    )


def open_batches(
    job: Job,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start_sample: int = 0,
    training: bool = True,
) -> PackedBatches:
    """This rank's micro-batches: of training from a sample on, or of evaluation once through."""
    config, world_size = job.config, job.ranks.world_size
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
        rank=job.ranks.rank,
        world_size=world_size,
        global_batch_size=job.global_batch_size if training else job.micro_batch_size * world_size,
        start_sample=start_sample,
        end_sample=end_sample,
        workers=config.data.workers if training else 0,
    )


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
    """This rank's micro-batches of a stream; `states` are those of all ranks at a checkpoint."""
    config, ranks, stream = job.config, job.ranks, job.prepared["stream"]
    # Another number of ranks is refused by any of the states, since each names it.
    state = states[min(ranks.rank, len(states) - 1)] if states else None
    data = replace(config.data, format=stream["format"], revision=stream["commit"])
    return StreamedBatches(
        partial(stream_rows_of_rank, data, job.cache_dir, ranks.world_size, ranks.rank),
        tokenizer,
        data,
        name=stream["name"],
        micro_batch_size=job.micro_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        state=state,
    )


def total_ledger(batches: StreamedBatches) -> Ledger:
    """What all ranks have read of a stream."""
    total = Ledger()
    for ledger in gather(batches.ledger):
        total.add(ledger)
    return total


def resume(
    job: Job, checkpointer: Checkpointer, order: dict[str, Any]
) -> tuple[Progress, list[dict[str, int]] | None]:
    """Continue from a checkpoint if there is one to continue from.

    Returns:
        How far it was, and of a stream the state of each rank.

    Raises:
        TrainError: `--resume never` would mix two runs; or the checkpoint counts samples in another order.
    """
    wanted = job.config.resume
    if wanted == "never":
        held = complete_checkpoints(checkpointer.folder)
        raise_together(
            f"{job.output_dir} already holds {held[-1].name} and checkpoints are never overwritten; "
            "give another --output_dir, or continue with --resume auto"
            if held
            else None
        )
        return Progress(), None
    checkpoint = checkpointer.newest() if wanted == "auto" else Path(wanted)
    if checkpoint is None:
        return Progress(), None
    state = checkpointer.restore(checkpoint)
    was, now = _flat(state["order"]), _flat(order)
    changed = {
        key: f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in was | now
        if was.get(key) != now.get(key) and key.split(".")[0] not in job.config.allow_changed
    }
    if changed:
        raise TrainError(
            f"{checkpoint} was trained on other samples ({'; '.join(changed.values())}); undo the "
            "change, start anew with another --output_dir, or go on at the same number of samples "
            f"with --allow_changed '[{', '.join(dict.fromkeys(key.split('.')[0] for key in changed))}]'"
        )
    return Progress(step=state["step"], samples=state["samples"]), state.get("stream")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"format": 1}} -> {"data.format": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def evaluate_model(
    job: Job, model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """`eval_loss` on the held-out rows and, where answers can be checked, `exact_match_pct`; {} without held-out rows."""
    config = job.config
    if not job.prepared["evaluation"]:
        return {}
    sources = [
        pack_store(
            open_packed(source["packs"]).examples.first(config.evaluation.max_rows),
            method=config.data.packing,
            seq_len=config.data.seq_len,
        )
        for source in job.prepared["evaluation"]
    ]
    batches = open_batches(job, mix(sources), tokenizer, training=False)
    values = {"eval_loss": evaluate_loss(model, batches, loss_fn=causal_lm_loss, device=job.device)}
    if uses_embedded_data(config) and config.evaluation.generate_rows > 0:
        asked = questions("test", config.evaluation.generate_rows)
        answers = generate_answers(
            model,
            tokenizer,
            [prompt for prompt, _ in asked],
            max_new_tokens=config.evaluation.max_new_tokens,
            device=job.device,
        )
        model.reshard()  # type: ignore[operator]  # a method of FSDP modules
        right = sum(
            check_answer(expected, answer)
            for (_, expected), answer in zip(asked, answers, strict=True)
        )
        values["exact_match_pct"] = 100 * right / len(asked)
    return values


def save_model_files(
    job: Job, model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Write OUTPUT_DIR/model, with which a checkpoint can be exported; returns the error line if that fails."""
    source = job.prepared["model"]
    try:
        with staged(job.output_dir / "model") as folder:
            write_model_files(
                folder,
                model,
                tokenizer,
                dtype=DTYPES[job.config.model.dtype],
                source=Path(source) if source else None,
            )
    except (OSError, ValueError) as reason:
        return str(reason)
    return None


def export(
    job: Job, model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase, *, step: int
) -> None:
    """Write OUTPUT_DIR/export; a failure on the writing rank is raised by all."""
    error = None
    try:
        export_model(
            model,
            tokenizer,
            job.output_dir / "export",
            dtype=DTYPES[job.config.model.dtype],
            is_writer=job.ranks.is_first,
            source=Path(job.prepared["model"]) if job.prepared["model"] else None,
            card=partial(model_card, job.output_dir, step),
        )
    except (OSError, ValueError) as reason:
        error = str(reason)
    raise_together(error)
