"""What a step reads on the host: each read of a device's tensor makes the host wait for all that was queued before."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.build import decoder_layer_classes
from tests.support.guards import plain_guards
from tests.support.models import packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.loop import Progress, Speedometer, train
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer
from trainer.parallel import build_mesh, parallelise
from trainer.preemption import StopRequest

pytestmark = pytest.mark.distributed
STEPS = 3
CPU = torch.device("cpu")
aten = torch.ops.aten
# What copies a value, or a size that depends on values, to the host.
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)


class _Operations(TorchDispatchMode):
    """Counts those that read, whoever calls them, also in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shards come here again
        if func.overloadpacket in READS:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counted_calls() -> Iterator[Counter[str]]:
    """Counts what copies a whole tensor to the host, by the file and the function that ask for it."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            code = sys._getframe(1).f_code
            found[f"{Path(code.co_filename).name}: {code.co_name}"] += 1
            return original(tensor, *args, **options)

        return call

    names = ("tolist", "cpu", "numpy")
    with patch.multiple(torch.Tensor, **{name: counted(name) for name in names}):
        yield found


def _reads_of_steps(layers: int, accumulate: int) -> Any:
    """What the steps behind the first one read, without the row that is logged after the last."""
    config = ParallelConfig()
    model = tiny_model(num_hidden_layers=layers)
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
    )
    optimizer = build_optimizer(model, OptimizerConfig())
    # Long and short documents, and padding.
    rows = [random_documents(lengths) for lengths in ([150, 3, 40, 1], [7, 9, 170])]
    batches = [
        packed_batch(rows, 200) | {"sample_index": torch.arange(2)}
        for _ in range(STEPS * accumulate)
    ]
    operations, seen = _Operations(), []
    with operations, _counted_calls() as calls:

        def advance(*_: Any) -> None:
            seen.append((operations.found.copy(), calls.copy()))

        train(
            model,
            optimizer,
            batches,
            loss_fn=causal_lm_loss,
            learning_rate=lambda step: 1e-3,
            optimizer_config=OptimizerConfig(),
            progress=Progress(),
            steps=STEPS,
            global_batch_size=4 * accumulate,
            grad_accum_steps=accumulate,
            samples_per_epoch=100,
            device=CPU,
            evaluate=lambda _: None,
            evaluate_every=0,
            save=lambda _: None,
            save_every=0,
            log=lambda _: None,
            log_every=STEPS + 1,
            advance=advance,
            stop=StopRequest(),
            guards=plain_guards(model, optimizer),
            speedometer=Speedometer(lambda *_: 0.0, None),
        )
    (first, first_calls), *_, (last, last_calls) = seen
    steps = STEPS - 1
    return [
        {name: count / steps for name, count in (after - before).items()}
        for before, after in ((first, last), (first_calls, last_calls))
    ]


def _reads() -> Any:
    return [_reads_of_steps(*setting) for setting in ((2, 1), (4, 1), (2, 3))]


def test_a_step_waits_for_the_device_once() -> None:
    for settings in run_ranks(_reads, 2):
        for (operations, calls), micro_batches in zip(settings, (1, 1, 3), strict=True):
            # The gradient norm, whatever the number of layers and micro-batches.
            assert operations == {"_local_scalar_dense": 1}
            assert calls == {
                # Tensors of the host on every device: counts and rows of the loader, and what gloo has summed.
                "loop.py: train": 1,
                "loop.py: units_of": micro_batches,
                "distributed.py: _reduced": 1,
                "guards.py: <listcomp>": micro_batches,
                # Without the kernel for variable lengths only: once a micro-batch, for all layers.
                "attention.py: _find_documents": micro_batches,
            }
