"""The model of a run: built sharded and filled, judged before the first step, written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from models.build import (
    build_model,
    check_first_loss,
    decoder_layer_classes,
    first_loss_counts,
    materialise,
    read_model_config,
)
from models.causal_lm import PackedCausalLM
from models.context_parallel import check_context_parallel
from models.export import export_adapter, export_model, staged, write_model_files
from models.layers import sparse_layers
from models.partial import init_adapters
from models.tensor_parallel import tensor_parallel_plan
from models.weights import LoadReport, init_weights, load_weights
from scripts.config import TrainConfig
from scripts.extensions import own_change, own_loss
from scripts.job import Job
from scripts.model_card import model_card
from scripts.partial import adapter_config, added_tokens, freeze_rest, part_record, trains_part
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.distributed import raise_together
from trainer.loop import LossFunction, evaluate_loss
from trainer.loss import causal_lm_loss, routed_causal_lm_loss
from trainer.optimizer import build_optimizer
from trainer.parallel import DTYPES, parallelise


def build_sharded_model(
    job: Job, tokenizer: PreTrainedTokenizerBase, mesh: DeviceMesh
) -> tuple[PackedCausalLM, LoadReport | None]:
    """The model on this rank's device: sharded first, then filled from the checkpoint or at random."""
    config = job.config.model
    folder = Path(job.prepared["model"]) if job.prepared["model"] else None
    random = folder is None or config.init == "random"
    hf_config = read_model_config(config, folder, tokenizer)
    model = sharded_without_weights(
        job.config, hf_config, added_tokens(job.config, tokenizer), mesh
    )
    # Offloaded parameters live on the host; buffers are where the model computes.
    home = torch.device("cpu") if job.config.parallel.cpu_offload else job.device
    materialise(model, home)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(job.device)
    if random:
        init_weights(model, job.config.seed)
        return model, None
    assert folder is not None
    report = load_weights(model, folder)
    init_adapters(model, job.config.seed)
    return model, report


def sharded_without_weights(
    config: TrainConfig, hf_config: PreTrainedConfig, tokens: Sequence[int], mesh: DeviceMesh
) -> PackedCausalLM:
    """The model on the meta device, of which `tokens` are trained beside adapters, sharded over `mesh`."""
    parallel = config.parallel
    plan = tensor_parallel_plan(hf_config, parallel.tp)
    check_context_parallel(hf_config, cp=parallel.cp, tp=parallel.tp)
    model = build_model(hf_config, attention=config.model.attention, seed=None)
    if (change := own_change(config.model)) is not None:
        change(model)
    if trains_part(config):
        freeze_rest(model, config, tokens)
    shard(model, parallel, mesh, plan)
    return model


def optimizer_of(model: PackedCausalLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Of what the sharded model trains, with its decoder layers, embedding and head told apart."""
    return build_optimizer(
        model,
        config,
        layer_classes=decoder_layer_classes(model),
        embedding=model.embedding.weight,
        head=model.head.weight,
    )


def shard(
    model: PackedCausalLM,
    config: ParallelConfig,
    mesh: DeviceMesh,
    layer_plan: Mapping[str, ParallelStyle],
) -> None:
    if config.cp > 1:
        model.cp_group = mesh["cp"].get_group()
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        forward_methods=["generate"],
        layer_plan=layer_plan,
    )


def training_loss(config: TrainConfig, model: PackedCausalLM) -> LossFunction:
    """The user's own; or cross-entropy, and for a mixture of experts also the loss that balances them."""
    if (own := own_loss(config)) is not None:
        return own
    hf_config = model.hf.config
    if not sparse_layers(hf_config):
        return causal_lm_loss
    return partial(
        routed_causal_lm_loss,
        experts_per_token=hf_config.num_experts_per_tok,
        aux_loss_coef=hf_config.router_aux_loss_coef,
    )


def judge_first_loss(
    job: Job,
    model: PackedCausalLM,
    micro_batches: Iterator[dict[str, Tensor]],
    say: Callable[[str], None],
) -> Iterator[dict[str, Tensor]]:
    """Try the first step's own batches without a gradient, unless this model is not to be judged.

    Returns:
        The same micro-batches, none missing.

    Raises:
        ModelError: see `models.build.check_first_loss`.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not first_loss_counts(job.config.model.check_first_loss, parameters):
        return micro_batches
    first = list(islice(micro_batches, job.grad_accum_steps))
    loss = evaluate_loss(
        model, first, loss_fn=causal_lm_loss, device=job.device, parallel=job.config.parallel
    )
    vocab_size = model.hf.config.vocab_size
    check_first_loss(loss, vocab_size=vocab_size)
    say(f"first loss {loss:.2f}; a guess costs {math.log(vocab_size):.2f}")
    return chain(first, micro_batches)


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
    """Write OUTPUT_DIR/export, OUTPUT_DIR/adapter or both; a failure on the writing rank is raised by all."""
    error, wanted = None, job.config.checkpoint.export
    try:
        if wanted != "adapter":
            export_model(
                model,
                tokenizer,
                job.output_dir / "export",
                dtype=DTYPES[job.config.model.dtype],
                is_writer=job.ranks.is_first,
                lora=job.config.lora,
                source=Path(job.prepared["model"]) if job.prepared["model"] else None,
                card=partial(model_card, job.output_dir, step),
                verify=job.config.checkpoint.verify_export,
            )
        if wanted in ("adapter", "both"):
            record = part_record(job, model)
            assert record is not None
            export_adapter(
                model,
                tokenizer,
                job.output_dir / "adapter",
                config=adapter_config(record, layers=model.hf.config.num_hidden_layers),
                is_writer=job.ranks.is_first,
                card=partial(model_card, job.output_dir, step, library="peft"),
            )
    except (OSError, ValueError) as reason:
        error = str(reason)
    raise_together(error)
