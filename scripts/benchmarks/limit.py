"""`benchmark.py limit`: how close a training step comes to what the machine's matrix products allow, and where the rest goes.

train.py runs as it is on two gloo ranks, or on GPUs (`gpu`). After each of its steps, in the same processes and at the same time on all
ranks, every matrix product of a step is timed alone, and on CPUs a plain forward and backward by transformers as well: shares are those of
a round, so that a machine whose speed changes changes both sides. A last step is traced by torch.profiler.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.benchmarks.common import Result, anonymous_bytes, machine, setting, versions
from scripts.benchmarks.step import DTYPES, WARM_UP, launch, usual_dtypes, write_workload
from scripts.benchmarks.trainers import (
    WORLD_SIZE,
    Work,
    differences,
    forget_peak_of,
    now,
    peak_of,
    reserved,
    run_main,
)
from scripts.benchmarks.workload import SHAPES

HELP = "model FLOP/s of a step beside those of its matrix products alone; a profile"
CATEGORIES = (
    "matmul",
    "loss: matmul",
    "loss: rest",
    "attention",
    "elementwise",
    "indexing and copies",
    "communication",
    "clipping",
    "optimizer",
    "data",
    "Python",
)
# Largest matrix of logits that is timed in one piece.
MOST_LOGITS = 2**28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, choices in (("shape", SHAPES), ("dtype", DTYPES)):
        parser.add_argument(
            f"--{name}", choices=tuple(choices), help=f"only this {name} (all, one after the other)"
        )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run (%(default)s)")
    parser.add_argument(
        "--micro_batches", type=int, default=1, help="of a rank in each step (%(default)s)"
    )
    parser.add_argument(
        "--flags", default="", help="more flags of train.py, such as '--parallel.compile=true'"
    )


def run(arguments: argparse.Namespace) -> Result:
    """All numbers."""
    rows, each = [], arguments.micro_batches
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            # One more step is traced.
            write_workload(Path(folder), SHAPES[shape], arguments.steps + 1, micro_batches=each)
            for dtype in [arguments.dtype] if arguments.dtype else usual_dtypes():
                flags = tuple(shlex.split(arguments.flags))
                work = Work(
                    folder,
                    SHAPES[shape],
                    dtype,
                    packed=True,
                    warm_up=WARM_UP,
                    steps=arguments.steps + 1,
                    flags=flags,
                    micro_batches=each,
                )
                runs = [launch(work, measure)[0] for _ in range(arguments.repeats)]
                rows.append({"shape": shape, "dtype": dtype, **combine(runs)})
    return {
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "ranks": WORLD_SIZE,
        "repeats": arguments.repeats,
        "steps": arguments.steps,
        "micro_batches": each,
        "flags": arguments.flags,
        "rows": rows,
    }


def combine(runs: Sequence[Result]) -> Result:
    """Medians of the runs; the profile is that of the run with the fastest traced step."""
    fastest = min(runs, key=lambda run: sum(run["profile"].values()))
    values = {key: median(run[key] for run in runs) for key in runs[0] if key not in _TRACED}
    return {**values, **{key: fastest[key] for key in _TRACED}}


_TRACED = ("profile", "kernels")


def measure(work: Work) -> Result:
    """On a rank: seconds and model FLOPs of a step, FLOP/s of its matrix products alone, and where a traced step went."""
    import trainer.loop
    from models.flops import training_flops
    from trainer.parallel import DTYPES as TORCH_DTYPES

    result: Result = {}
    # Of each micro-batch.
    flops: list[float] = []
    real: list[int] = []
    labels: list[int] = []
    behind = slice(WARM_UP * work.micro_batches, -work.micro_batches)  # the timed steps'
    held = anonymous_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def measured(model: Any, optimizer: Any, batches: Iterable[Any], **options: Any) -> bool:
        steps = options.pop("steps")
        options |= {"save": lambda _: None, "evaluate": lambda _: None}

        def counted() -> Iterator[Any]:
            iterator = iter(batches)
            while True:
                with torch.profiler.record_function("data"):
                    batch = next(iterator)
                tokens, _, valid, squared = batch["counts"].tolist()
                flops.append(training_flops(model.hf.config, tokens, valid, squared))
                labels.append(valid)
                real.append(tokens)
                yield batch

        train = partial(trainer.loop.train, model, optimizer, counted(), **options)
        train(steps=WARM_UP)
        forget_peak_of(work.device)
        rounds: list[Result] = []
        for step in range(WARM_UP + 1, steps):
            seconds, cpu_seconds = timed(lambda step=step: train(steps=step))
            if not rounds:
                result.update(peak_bytes=peak_of(work.device, held), reserved_bytes=reserved())
                plain = Plain(model.hf.config, work) if work.device == "cpu" else None
            products = products_of_step(model, work, labels=round(mean(labels)))
            total = sum(product.flops for product in products.elements())
            model_flops = sum(flops[-work.micro_batches :])
            alone, alone_cpu = seconds_alone(products, TORCH_DTYPES[work.dtype], work.device)
            rounds.append(
                {
                    "step_seconds": seconds,
                    "step_cpu_seconds": cpu_seconds,
                    "peak_flops": total / alone,
                    "peak_flops_cpu": total / alone_cpu,
                    "share_pct": 100 * model_flops / seconds / (total / alone),
                    "cpu_share_pct": 100 * model_flops / cpu_seconds / (total / alone_cpu),
                }
            )
            if plain is not None:
                dist.barrier()
                plain_share = plain.flops / timed(plain.step)[0] / (total / alone)
                rounds[-1]["plain_share_pct"] = 100 * plain_share
        clip = torch.profiler.record_function("clipping")(trainer.loop.clip_gradients)
        with (
            patch.object(trainer.loop, "clip_gradients", clip),
            torch.profiler.profile(activities=activities) as profile,
        ):
            began, _ = now()
            finished = train(steps=steps)
            traced = now()[0] - began
        result.update(
            {key: median(one[key] for one in rounds) for key in rounds[0]},
            model_flops=work.micro_batches * mean(flops[behind]),
            tokens=work.micro_batches * mean(real[behind]),
            valid_tokens=work.micro_batches * mean(labels[behind]),
            profile=categories(profile, traced),
            kernels=kernel_seconds(kernels_of(profile)),
        )
        return finished

    run_main(work, measured)
    return result


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Its wall and CPU seconds."""
    before = now()
    function()
    (step,) = differences([before, now()])
    return step["seconds"], step["cpu_seconds"]


class Plain:
    """Forward and backward of transformers' own model and loss on a rank, whole and alone: no other ranks, no optimizer.

    Its micro-batch has as many tokens, all of them predicted, each row one document.
    """

    def __init__(self, hf_config: Any, work: Work) -> None:
        from transformers import AutoModelForCausalLM

        from models.flops import training_flops

        dtype = getattr(torch, work.dtype)
        # A copy: it takes down which attention was asked for, and the trained model reads that in every step.
        own = copy.deepcopy(hf_config)
        self._model = AutoModelForCausalLM.from_config(
            own, attn_implementation="sdpa", dtype=dtype
        ).train()
        rows, length = work.shape.micro_batch_size, work.shape.seq_len
        self._ids = torch.randint(work.shape.vocabulary, (rows, length))
        predicted = rows * (length - 1)
        self.flops = training_flops(hf_config, rows * length, predicted, rows * length**2)

    def step(self) -> None:
        loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        self._model.zero_grad()


# ------------------------------------------------------------------------------- products by themselves


@dataclass(frozen=True)
class Product:
    """One of the three products of a linear layer: of `rows` tokens, `inputs` and `outputs` wide."""

    kind: str
    """forward, input_grad or weight_grad."""
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs


def products_of_step(model: Any, work: Work, *, labels: int) -> Counter[Product]:
    """Those of a rank's micro-batch, the head's for its labels, and how often each is computed."""
    found: Counter[Product] = Counter()
    for name, layer in model.hf.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        rows, times = work.shape.micro_batch_tokens, 1
        if layer is model.head:
            times = math.ceil(labels * layer.out_features / MOST_LOGITS)
            rows = labels // times
        assert rows > 0, name
        for kind in ("forward", "input_grad", "weight_grad"):
            found[Product(kind, rows, layer.in_features, layer.out_features)] += times
    return found


def seconds_alone(
    products: Counter[Product], dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Wall and CPU seconds of all products, one after the other, each at its best of a few; all ranks at once."""
    wall = cpu = 0.0
    for product, times in products.items():
        dist.barrier()
        best = best_of(product, dtype, device)
        wall, cpu = wall + times * best[0], cpu + times * best[1]
    return wall, cpu


def best_of(
    product: Product, dtype: torch.dtype, device: str, *, tries: int = 3
) -> tuple[float, float]:
    """Wall and CPU seconds, into memory that is there already."""
    inputs = torch.randn(product.rows, product.inputs, device=device).to(dtype)
    weight = torch.randn(product.outputs, product.inputs, device=device).to(dtype)
    grad = torch.randn(product.rows, product.outputs, device=device).to(dtype)
    operands: dict[str, tuple[Tensor, Tensor]] = {
        "forward": (inputs, weight.T),
        "input_grad": (grad, weight),
        "weight_grad": (grad.T, inputs),
    }
    left, right = operands[product.kind]
    out = torch.mm(left, right)
    found = []
    for _ in range(tries):
        (began, _), used = now(), time.thread_time()
        torch.mm(left, right, out=out)
        (ended, _), used = now(), time.thread_time() - used
        found.append((ended - began, used))
    return min(wall for wall, _ in found), min(used for _, used in found)


# ------------------------------------------------------------------------------------------ profile


def categories(profile: torch.profiler.profile, seconds: float) -> Result:
    """Seconds of the traced step by `CATEGORIES`: of each event the time that no event inside it accounts for.

    What no event covers, and what autograd's and modules' own events have for themselves, is Python and bookkeeping.
    """
    on_cpu = torch.autograd.DeviceType.CPU
    events = [
        event
        for event in profile.events() or []
        if event.device_type == on_cpu and event.time_range.elapsed_us() > 0
    ]
    # The thread that trains is the one with the optimizer; the loader's and others run beside it.
    threads = [event.thread for event in events if event.name.startswith("Optimizer.step")]
    mine = sorted(
        (event for event in events if event.thread == threads[0]),
        key=lambda event: (event.time_range.start, -event.time_range.end),
    )
    found: dict[str, float] = defaultdict(float)
    stack: list[tuple[float, str]] = []  # end and category of the events that are open
    for event in mine:
        begin, end = event.time_range.start, event.time_range.end
        while stack and stack[-1][0] <= begin:
            stack.pop()
        outer = stack[-1][1] if stack else "Python"
        category = category_of(event.name, outer)
        found[category] += (end - begin) / 1e6
        if stack:
            found[outer] -= (end - begin) / 1e6
        stack.append((end, category))
    covered = sum(found.values())
    found["Python"] += max(0.0, seconds - covered)
    return {category: found[category] for category in CATEGORIES}


def category_of(name: str, outer: str) -> str:
    """Of an event inside one of category `outer`."""
    matmul = name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mkldnn_linear")
    matmul = matmul or name.startswith(("mkldnn::", "aten::mkldnn"))
    if outer in ("loss: rest", "loss: matmul"):
        return "loss: matmul" if matmul else outer
    if outer in ("communication", "clipping", "optimizer", "data", "attention", "matmul"):
        return outer
    if name in ("data", "clipping"):
        return name
    if name.startswith("Optimizer."):
        return "optimizer"
    if "LinearCrossEntropy" in name:
        return "loss: rest"
    if name.startswith(("FSDP::", "c10d::", "gloo:", "record_param_comms")):
        return "communication"
    if "scaled_dot_product" in name or "tiled_attention" in name:
        return "attention"
    if matmul:
        return "matmul"
    if not name.startswith("aten::"):
        return "Python"
    if name.removeprefix("aten::").rstrip("_") in _MOVES:
        return "indexing and copies"
    return outer if outer == "indexing and copies" else "elementwise"


_MOVES = {
    "_to_copy", "argsort", "cat", "clone", "contiguous", "copy", "embedding", "embedding_dense_backward",
    "gather", "index", "index_add", "index_put", "_index_put_impl", "index_select", "index_select_backward",
    "repeat_interleave", "scatter", "scatter_add", "sort", "stack", "to", "zero", "zeros", "new_zeros", "fill",
}  # fmt: skip


# ------------------------------------------------------------------------------------ a GPU's kernels


Kernel = tuple[str, float, float]
"""Name, begin and end in seconds."""
# Words in the names of kernels; the first kind with one of them counts.
KERNELS = {
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "matmul", "xmma"),
    "copies": ("memcpy", "memset", "copy", "catarray"),
}


# As Kineto names them; annotations, which span kernels, are none.
_ON_GPU = ("kernel", "concurrent_kernel", "gpu_memcpy", "gpu_memset")


def kernels_of(profile: torch.profiler.profile) -> list[Kernel]:
    """What ran on this rank's GPU; nothing on a CPU."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return [
        (event.name(), event.start_ns() / 1e9, event.end_ns() / 1e9)
        for event in profile.profiler.kineto_results.events()
        if event.activity_type() in _ON_GPU
    ]


def kernel_seconds(kernels: Sequence[Kernel]) -> Result:
    """Seconds of the kernels by kind, in which any ran, and of communication while nothing computed (`exposed`)."""
    found: dict[str, float] = dict.fromkeys((*KERNELS, "elementwise"), 0.0)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for name, begin, end in kernels:
        lower = name.lower()
        kinds = (kind for kind, words in KERNELS.items() if any(word in lower for word in words))
        kind = next(kinds, "elementwise")
        found[kind] += end - begin
        spans[kind == "communication"].append((begin, end))
    busy, computing = covered(spans[True] + spans[False]), covered(spans[False])
    return found | {"busy": busy, "exposed": busy - computing}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds of the union."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    rows = result["rows"]
    lines = [
        setting(result),
        f"{result['ranks']} gloo ranks, packed; medians of {result['repeats']} runs of {result['steps']} steps of "
        f"{result['micro_batches']} micro-batches; numbers are those of one rank{result['flags'] and '; ' + result['flags']}",
        "",
        "| shape | dtype | step seconds | model GFLOP | GFLOP/s | of its products alone | % | by CPU seconds % | plain forward and backward % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['step_seconds']:.3f} | {row['model_flops'] / 1e9:,.0f} "
            f"| {row['model_flops'] / row['step_seconds'] / 1e9:,.1f} | {row['peak_flops'] / 1e9:,.1f} "
            f"| {row['share_pct']:.1f} | {row['cpu_share_pct']:.1f} | {row['plain_share_pct']:.1f} |"
        )
    titles = [f"{row['shape']}, {row['dtype']}" for row in rows]
    lines += [
        "",
        f"| % of a traced step | {' | '.join(titles)} |",
        "|---|" + "---|" * len(rows),
    ]
    for category in CATEGORIES:
        shares = [100 * row["profile"][category] / sum(row["profile"].values()) for row in rows]
        lines.append(f"| {category} | {' | '.join(f'{share:.1f}' for share in shares)} |")
    lines.append(
        "| seconds | " + " | ".join(f"{sum(row['profile'].values()):.3f}" for row in rows) + " |"
    )
    return "\n".join(lines)
