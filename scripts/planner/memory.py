"""Memory of a rank, from the trainer's own code run on tensors without data.

The model is built, sharded and stepped by the functions that train.py uses, on the meta device, in a process group that
only pretends to have other ranks. Nothing is computed and nothing is allocated; `MemoryTracker` notes what would be. Of a
deep model a few layers are traced, twice, and what every layer's forward and backward hold at most is extrapolated for
itself: each grows by the same number of bytes with every further layer, while the largest of them all does not.

Shapes: B rows, S tokens of each, N labels, V vocabulary, D model width.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, PreTrainedConfig

from models.attention import packed_attention
from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.layers import indexed_layers, linear_attention_layers
from models.partial import decoder_layers
from scripts.config import TrainConfig
from scripts.modelling import optimizer_of, sharded_without_weights, training_loss
from scripts.planner.tracker import ACTIVATIONS, GRADIENTS, HOST, MemoryTracker
from trainer import loss
from trainer.optimizer import clip_gradients
from trainer.parallel import build_mesh, set_gradient_sync, set_prefetch
from trainer.precision import definite

PARAMETERS, STATE, LOSS = "parameters", "optimizer state", "logits and loss"
KERNEL_ATTENTION = "packed_documents_kernel"
AttentionInterface.register(KERNEL_ATTENTION, partial(packed_attention, kernel=True))


@dataclass(frozen=True)
class Trace:
    """What layers hold, on the rank that holds most."""

    phases: dict[str, Counter[str]]
    """Bytes by part, at the peak of each phase of a step."""
    streams: Counter[str]
    """The most bytes that each stream allocates: an allocator keeps them apart, and gives nothing back. And HOST's."""
    trained_parameters: int
    parameters: int


@dataclass(frozen=True)
class MemoryPlan(Trace):
    """Of a whole model."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def parts(self) -> Counter[str]:
        """At the peak."""
        return self.phases[self.peak_phase]

    @property
    def allocated_bytes(self) -> int:
        return self.parts.total()

    @property
    def reserved_bytes(self) -> int:
        return max(self.streams.total() - self.host_bytes, self.allocated_bytes)

    @property
    def host_bytes(self) -> int:
        """In host memory: what is offloaded."""
        return self.streams[HOST]


def plan_memory(
    config: TrainConfig,
    hf_config: PreTrainedConfig,
    *,
    world_size: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    gpu_gib: float | None,
    labels: float = 1.0,
    each: Callable[..., Iterable[Any]] = map,
) -> MemoryPlan:
    """What a step takes, extrapolated from traces of few layers.

    Args:
        config: as for train.py. Compiled and float8 layers are taken for plain ones, which hold as much or more.
        hf_config: of the whole model.
        world_size: ranks of the run; none of them has to exist.
        micro_batch_size: B.
        grad_accum_steps: micro-batches of a step.
        gpu_gib: memory of each GPU, by which the loss chooses how many logits exist at once; None: the run is on CPUs
            such as this one, which prefetch no layers.
        labels: N / (B S), the share of tokens that are predicted.
        each: as `map`, by which the traces are made: that of a pool makes them at once.

    Raises:
        ModelError, TrainError: as the trainer would, and for linear attention, whose kernels run on GPUs only, and indexed.
    """
    if linear_attention_layers(hf_config) or indexed_layers(hf_config):
        raise ModelError(
            f"{hf_config.model_type} has linear or indexed attention, which cannot be traced without a GPU: its memory "
            "is not planned; measure it with train.py --dry_run true"
        )
    # From either end of the model on the layers differ by what is prefetched there; between them they do not.
    prefetched = 0 if gpu_gib is None else config.parallel.prefetch_layers
    edge = 1 + max(1, prefetched)
    trace = partial(
        _trace_few,
        config,
        hf_config,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        gpu_gib=gpu_gib,
        labels=labels,
        edge=edge,
    )
    layers, last = hf_config.num_hidden_layers, config.model.train_last_layers
    period = _period(config, hf_config)
    # Frozen layers in front and the others: as many as there are, or few of the same remainder.
    whole = (layers - last, last) if last else (0, layers)
    few = [min(n, 2 * edge + (n - 2 * edge) % period) if period else n for n in whole]
    sizes, times = [few], []
    for axis in (0, 1):
        if whole[axis] > few[axis]:
            sizes.append([n + period * (i == axis) for i, n in enumerate(few)])
            times.append((whole[axis] - few[axis]) // period)
    base, *further = each(trace, sizes)

    def extend(of: Callable[[Trace], Counter[str]]) -> Counter[str]:
        total = Counter(of(base))
        for one, count in zip(further, times, strict=True):
            for part in of(base) | of(one):
                total[part] += count * (of(one)[part] - of(base)[part])
        return total

    phases: dict[str, Counter[str]] = {}
    for place in base.phases:
        phase, held = place.partition("/")[0], extend(lambda trace, at=place: trace.phases[at])
        if phase not in phases or held.total() > phases[phase].total():
            phases[phase] = held
    counts = extend(lambda trace: Counter(trained=trace.trained_parameters, all=trace.parameters))
    return MemoryPlan(phases, extend(lambda trace: trace.streams), counts["trained"], counts["all"])


def _trace_few(
    config: TrainConfig, hf_config: PreTrainedConfig, sizes: Sequence[int], **settings: Any
) -> Trace:
    return trace_step(*cut(config, hf_config, *sizes), **settings)


def _period(config: TrainConfig, hf_config: PreTrainedConfig) -> int:
    """Layers after which their kinds repeat, 0 if they do not."""
    if getattr(hf_config, "mlp_only_layers", None):
        return 0
    selective = config.parallel.activation_checkpointing == "selective"
    every = config.parallel.checkpoint_every if selective else 1
    return math.lcm(every, getattr(hf_config, "decoder_sparse_step", 1))


def cut(
    config: TrainConfig, hf_config: PreTrainedConfig, front: int, others: int
) -> tuple[TrainConfig, PreTrainedConfig]:
    """The same run of a model with fewer layers, `front` of them frozen."""
    values = copy.deepcopy(hf_config.to_dict())
    values["num_hidden_layers"] = front + others
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: front + others]
    model = replace(config.model, train_last_layers=others if config.model.train_last_layers else 0)
    return replace(config, model=model), type(hf_config).from_dict(values)


def trace_step(
    config: TrainConfig,
    hf_config: PreTrainedConfig,
    *,
    world_size: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    gpu_gib: float | None,
    labels: float = 1.0,
    edge: int = 10**6,
) -> Trace:
    """Bytes by part at the peak of each phase of a step, on rank 0 of `world_size`.

    Phases of layers are named by their place; they are told apart up to `edge` of them from either end of the model, and of its frozen part.
    """
    parallel = definite(config.parallel, "cpu" if gpu_gib is None else "cuda")
    parallel = replace(parallel, compile=False, float8="none")
    config = replace(config, parallel=parallel)
    with fake_ranks(world_size), nullcontext() if gpu_gib is None else _loss_on_gpu(gpu_gib):
        mesh = build_mesh(parallel, world_size=world_size, device_type="cpu")
        tokens = range(len(config.model.add_special_tokens))
        model = sharded_without_weights(config, hf_config, tokens, mesh)
        if config.model.attention == "packed":
            model.hf.set_attn_implementation(KERNEL_ATTENTION)
        layers = decoder_layers(model)
        if gpu_gib is not None:
            set_prefetch(layers, parallel.prefetch_layers)
        tracker = MemoryTracker()
        _mark_layers(layers, tracker, config.model.train_last_layers, edge)
        with tracker:
            rows = micro_batch_size, config.data.seq_len // parallel.cp
            _step(tracker, model, config, grad_accum_steps, partial(_batch, *rows, labels))
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Trace(
        phases=tracker.peaks(),
        streams=tracker.stream_peaks(),
        trained_parameters=sum(size for size, trained in sizes if trained),
        parameters=sum(size for size, _ in sizes),
    )


@contextmanager
def _loss_on_gpu(gib: float) -> Iterator[None]:
    """Chunks of its size, and bf16 where a CPU without units for it computes in fp32."""
    size = max(loss.CHUNK_BYTES, int(gib * 2**30 * loss.GPU_SHARE))
    with (
        patch.object(loss, "CHUNK_BYTES", size),
        patch.object(loss, "has_bf16_units", return_value=True),
    ):
        yield


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many, of which the others do not exist: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _mark_layers(layers: Sequence[nn.Module], tracker: MemoryTracker, last: int, edge: int) -> None:
    """Begin a phase where the forward and the backward of a layer begin."""
    front = len(layers) - last if last else 0
    for index, layer in enumerate(layers):
        begin, end = (0, front) if index < front else (front, len(layers))
        side = "frozen" if index < front else "layer"
        if index - begin < edge:
            place = f"{side} {index - begin}"
        elif end - index <= edge:
            place = f"{side} {index - end}"
        else:
            place = ""  # between its neighbours

        def before(*_: Any, place: str = place) -> None:
            tracker.begin(f"forward/{place}" if place else "")

        def after(_module: Any, _inputs: Any, output: Any, place: str = place) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: tracker.begin(f"backward/{place}" if place else ""))

        layer.register_forward_pre_hook(before, prepend=True)
        layer.register_forward_hook(after, prepend=True)


def _step(
    tracker: MemoryTracker,
    model: PackedCausalLM,
    config: TrainConfig,
    grad_accum_steps: int,
    make_batch: Callable[[], dict[str, Tensor]],
) -> None:
    """One step as `trainer.loop.train` takes it, with an optimizer that has stepped before."""
    offload = config.parallel.cpu_offload
    kept = {name: HOST if offload else name for name in (PARAMETERS, GRADIENTS, STATE)}
    parameters = list(model.parameters())
    tracker.relabel(parameters, kept[PARAMETERS])
    tracker.relabel(model.buffers(), ACTIVATIONS)
    optimizer = optimizer_of(model, config.optimizer)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    states = optimizer.state.values()
    tracker.relabel(
        (value for state in states for value in state.values() if isinstance(value, Tensor)),
        kept[STATE],
    )
    loss_fn, batch = training_loss(config, model), make_batch()

    def mark_head(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(inputs) < 2:  # a loss that takes logits
            return inputs
        batch, head = inputs

        def marked(*given: Tensor) -> Any:
            tracker.begin("loss")
            with tracker.label(LOSS):
                return head(*given)

        return batch, marked

    model.register_forward_pre_hook(mark_head)
    for micro_batch in range(min(grad_accum_steps, 2)):  # the first, the last
        last = micro_batch == min(grad_accum_steps, 2) - 1
        set_gradient_sync(model, last, config.parallel)
        tracker.begin("forward/before layers")
        loss_sum, _ = loss_fn(model, batch)
        tracker.begin("backward/head")
        (loss_sum * 1.0).backward()
        del loss_sum
        tracker.relabel(_whole_gradients(model), GRADIENTS)
        tracker.begin("")
    tracker.relabel((p.grad for p in parameters), kept[GRADIENTS])
    tracker.begin("clipping")
    clip_gradients(parameters, config.optimizer.max_grad_norm)
    tracker.begin("optimizer")
    optimizer.step()
    tracker.begin("")
    optimizer.zero_grad()


def _whole_gradients(model: nn.Module) -> Iterator[Tensor | None]:
    """What FSDP keeps of a micro-batch that is not the last."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    yield parameter.unsharded_accumulated_grad
                    unsharded = getattr(parameter, "_unsharded_param", None)
                    yield None if unsharded is None else unsharded.grad


def _batch(rows: int, length: int, labels: float) -> dict[str, Tensor]:
    """A micro-batch of this rank, as its loader makes it."""
    shape = rows, length
    names = ("input_ids", "labels", "position_ids")
    return {
        **{name: torch.zeros(shape, dtype=torch.int64) for name in names},
        "label_positions": torch.zeros(max(1, round(rows * length * labels)), dtype=torch.int64),
        "document_offsets": torch.zeros(rows + 1, dtype=torch.int32),
        "row_tokens": torch.zeros(rows, dtype=torch.int64),
    }
