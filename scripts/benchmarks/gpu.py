"""`benchmark.py gpu`: on a machine with GPUs, everything that decides a run's speed, in under ten minutes.

What the GPUs and the links between them reach alone, training steps of train.py in several settings beside TRL and a
plain loop, the loss, and how long a save stops the loop. `--calibration` is the file that `plan.py --calibrate` reads.
Parts come in the order of their worth; those that no time is left for are named. Not yet run on a GPU: with
`--device cpu` the same code runs on tiny shapes, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError
from scripts.benchmarks.common import Result, as_launched, machine, setting, versions
from scripts.benchmarks.limit import Product, best_of, combine, measure
from scripts.benchmarks.step import WARM_UP, attempt, compare, launch, ratios, write_workload
from scripts.benchmarks.trainers import (
    Work,
    forget_peak_of,
    now,
    output_folder_of,
    peak_of,
    run_main,
)
from scripts.benchmarks.workload import Shape, model_config

HELP = "on GPUs: their rates, training steps in several settings, peers, the loss, saves; a calibration"
FORMAT = "shardloop-calibration/1"
MINUTES = 10
GB, MIB = 1e9, 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured: of GPUs, or of a CPU in the time of a test."""

    models: dict[str, Shape]
    """The first is the one whose settings, peers and saves are compared."""
    product_rows: int
    copied_bytes: int
    collective_bytes: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    """Tokens of a row, and of each document in it."""
    attention_shape: tuple[int, int, int]
    """Query heads, key/value heads, head width."""
    loss: tuple[int, int, int]
    """Labels, width, vocabulary."""


_QWEN3 = Shape(
    vocabulary=151_936, width=1024, layers=28, seq_len=4096, micro_batch_size=4,
    intermediate=3072, heads=16, kv_heads=8, head_width=128,
)  # fmt: skip
_TINY = Shape(vocabulary=512, width=64, layers=2, seq_len=64, micro_batch_size=2)
PLANS = {
    "cuda": Plan(
        models={
            "Qwen3-0.6B": _QWEN3,
            "Qwen3-1.7B": replace(_QWEN3, width=2048, intermediate=6144),
            "Qwen3-4B": replace(
                _QWEN3, width=2560, layers=36, intermediate=9728, heads=32, micro_batch_size=2
            ),
        },
        product_rows=16_384,
        copied_bytes=2**30,
        collective_bytes=(2**20, 2**24, 2**28),
        attention=((4096, 512), (4096, 4096), (32_768, 4096), (32_768, 32_768)),
        attention_shape=(16, 8, 128),
        loss=(16_384, 1024, 151_936),
    ),
    "cpu": Plan(
        models={"tiny": _TINY},
        product_rows=64,
        copied_bytes=2**20,
        collective_bytes=(2**16,),
        attention=((128, 32),),
        attention_shape=(2, 1, 64),
        loss=(64, 64, 512),
    ),
}
# Flags of train.py beside those of every step; named by what they change.
SETTINGS: dict[str, tuple[str, ...]] = {
    "usual": (),
    "compile": ("--parallel.compile=true",),
    "activation checkpointing": ("--parallel.activation_checkpointing=full",),
    "compile, float8": ("--parallel.compile=true", "--parallel.float8=rowwise"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=tuple(PLANS), default="cuda", help="cpu only shows that it runs"
    )
    parser.add_argument("--gpus", type=int, help="ranks (all GPUs; 2 on a CPU)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run (%(default)s)")
    parser.add_argument(
        "--minutes", type=int, default=MINUTES, help="no part begins after them (%(default)s)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="for `plan.py --calibrate FILE`"
    )


def run(arguments: argparse.Namespace) -> Result:
    """All numbers.

    Raises:
        DataError: there is no GPU, or fewer than are asked for.
    """
    device, plan = arguments.device, PLANS[arguments.device]
    ranks = arguments.gpus or (gpu_count() if device == "cuda" else 2)
    if device == "cuda" and not 0 < ranks <= gpu_count():
        raise DataError(
            f"--gpus {ranks}, but torch finds {gpu_count()} GPUs here; `--device cpu` only shows that the "
            "command runs"
        )
    deadline = time.monotonic() + 60 * arguments.minutes
    result: Result = {
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "device": device,
        "ranks": ranks,
        "repeats": arguments.repeats,
        "date": date.today().isoformat(),
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name, part in parts(plan, Path(folder), device, ranks, arguments.steps).items():
            if time.monotonic() > deadline:
                result["parts"][name] = {"failed": f"not begun in {arguments.minutes} minutes"}
                continue
            began = time.monotonic()
            done = attempt(part)  # what one part cannot do must not cost the others
            result["parts"][name] = {"failed": done} if isinstance(done, str) else done
            result["parts"][name]["part_seconds"] = time.monotonic() - began
    if arguments.calibration:
        text = json.dumps(calibration(result), indent=1) + "\n"
        arguments.calibration.write_text(text, encoding="utf-8")
    return result


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def parts(
    plan: Plan, folder: Path, device: str, ranks: int, steps: int
) -> dict[str, Callable[[], Any]]:
    """Each measures something, given nothing."""
    first, *others = plan.models
    ours = {
        f"{first}, {name}": partial(steps_of, folder, plan, first, device, ranks, steps, flags)
        for name, flags in SETTINGS.items()
        if "float8" not in name or float8_runs(device)
    }
    return {
        "rates": lambda: as_launched(ranks, {}, rates, plan, device)[0],
        next(iter(ours)): ours.pop(next(iter(ours))),
        **{
            f"{name}, usual": partial(steps_of, folder, plan, name, device, ranks, steps, ())
            for name in others
        },
        **ours,
        "peers": partial(peers, folder, plan, first, device, ranks, steps),
        "loss": lambda: as_launched(1, {}, losses, plan, device)[0],
        "saves": partial(saves, folder, plan, first, device, ranks),
    }


def float8_runs(device: str) -> bool:
    import torch

    return (
        device == "cuda"
        and torch.cuda.get_device_capability() >= (8, 9)
        and importlib.util.find_spec("torchao") is not None
    )


# ------------------------------------------------------------------------------------------- rates


def rates(plan: Plan, device: str) -> Result:
    """On every rank: what its GPU reaches alone, then all together in collectives; rank 0's numbers."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        return {
            "device_name": device_name(device),
            "memory_total_bytes": total_memory(device),
            "matmul_flops": {
                dtype: products(plan, device, getattr(torch, dtype))
                for dtype in ("bfloat16", "float32")
            },
            "memory_bandwidth_bytes_per_second": copy_rate(plan.copied_bytes, device),
            "host_bytes_per_second": host_rate(plan.copied_bytes, device),
            "attention_flops": [
                attention_rate(plan.attention_shape, *lengths, device) for lengths in plan.attention
            ],
            "collectives": [
                collective_rate(operation, size, device)
                for operation in ("all_gather", "reduce_scatter", "all_reduce")
                for size in plan.collective_bytes
            ],
        }
    finally:
        dist.destroy_process_group()


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def total_memory(device: str) -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0


def best_seconds(work: Callable[[], Any], *, tries: int = 5) -> float:
    """Of a few runs behind one that counts for nothing."""
    work()
    found = []
    for _ in range(tries):
        began, _ = now()
        work()
        found.append(now()[0] - began)
    return min(found)


def products(plan: Plan, device: str, dtype: Any) -> list[Result]:
    """FLOP/s of forward products of the models' layers, each shape once; in fp32 as `trainer.hardware` sets it."""
    import torch

    torch.set_float32_matmul_precision("high")
    shapes = {
        (shape.width, outputs)
        for shape in plan.models.values()
        for outputs in (shape.width, model_config(shape).intermediate_size)
    }
    found = []
    for inputs, outputs in sorted(shapes):
        product = Product("forward", plan.product_rows, inputs, outputs)
        seconds, _ = best_of(product, dtype, device)
        sizes = {"m": product.rows, "n": outputs, "k": inputs}
        found.append(sizes | {"flops_per_second": product.flops / seconds})
    return found


def copy_rate(size: int, device: str) -> float:
    """Bytes read and written a second."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def host_rate(size: int, device: str) -> float:
    """Bytes a second from the GPU into pinned memory of the host."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")
    return size / best_seconds(lambda: target.copy_(source))


def attention_rate(heads: tuple[int, int, int], seq_len: int, document: int, device: str) -> Result:
    """FLOP/s of packed attention on one row, forward and backward: 2 and 4 products over half of each document's square."""
    import torch

    from models.attention import packed_attention

    query_heads, kv_heads, width = heads
    query, key, value = (
        torch.randn(1, count, seq_len, width, device=device, dtype=torch.bfloat16).requires_grad_()
        for count in (query_heads, kv_heads, kv_heads)
    )
    offsets = torch.arange(0, seq_len + 1, document, device=device, dtype=torch.int32)

    def both() -> None:
        out, _ = packed_attention(
            torch.nn.Identity(), query, key, value, None, document_offsets=offsets
        )
        torch.autograd.grad(out.sum(), (query, key, value))

    flops = 6 * 2 * query_heads * width * document * seq_len / 2
    rate = flops / best_seconds(both)
    return {"seq_len": seq_len, "document": document, "flops_per_second": rate}


def collective_rate(operation: str, size: int, device: str) -> Result:
    """Bus bandwidth of all ranks together: what each has to send and receive at least, a second (nccl-tests' `busbw`)."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    whole = torch.zeros(size // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    share = torch.zeros(len(whole) // ranks, dtype=torch.bfloat16, device=device)
    run = {
        "all_gather": lambda: dist.all_gather_single(whole, share),
        "reduce_scatter": lambda: dist.reduce_scatter_single(share, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
    }[operation]
    dist.barrier()
    seconds = best_seconds(run)
    sent = whole.nbytes * (ranks - 1) / ranks * (2 if operation == "all_reduce" else 1)
    return {
        "op": operation,
        "ranks": ranks,
        "bytes": whole.nbytes,
        "bytes_per_second": sent / seconds,
    }


# ------------------------------------------------------------------------------------------- steps


@contextmanager
def workload(
    folder: Path, shape: Shape, device: str, steps: int, ranks: int, flags: tuple[str, ...]
) -> Iterator[Work]:
    """Model and rows, written once for each shape."""
    named = folder / "-".join(map(str, asdict(shape).values()))
    if not named.is_dir():
        write_workload(named, shape, steps + 1, ranks=ranks)
    dtype = "bfloat16" if device == "cuda" else "float32"
    yield Work(str(named), shape, dtype, True, WARM_UP, steps + 1, device, flags)


def steps_of(
    folder: Path,
    plan: Plan,
    model: str,
    device: str,
    ranks: int,
    steps: int,
    flags: tuple[str, ...],
) -> Result:
    """Of train.py: speed beside the matrix products' own, memory, and where a traced step went."""
    with workload(folder, plan.models[model], device, steps, ranks, flags) as work:
        done = combine(launch(work, measure, ranks=ranks)[:1])
        config = model_config(work.shape).to_dict()
    return done | {
        "kind": "steps",
        "flags": [f"--data.seq_len={work.shape.seq_len}", *work_flags(work), *flags],
        "model": {key: config[key] for key in FACTS},
        "tokens_per_second_per_gpu": done["tokens"] / done["step_seconds"],
    }


FACTS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip


def work_flags(work: Work) -> list[str]:
    return [
        f"--micro_batch_size={work.shape.micro_batch_size}",
        f"--parallel.param_dtype={work.dtype}",
    ]


def peers(folder: Path, plan: Plan, model: str, device: str, ranks: int, steps: int) -> Result:
    """The same steps by TRL and by a plain loop, as `benchmark.py step` takes them."""
    with_trl = importlib.util.find_spec("trl") is not None
    with workload(folder, plan.models[model], device, steps, ranks, ()) as work:
        sides = compare(work, 1, with_trl=with_trl, ranks=ranks)
    return {"kind": "peers", "sides": sides, "ratios": ratios(sides)}


# ------------------------------------------------------------------------------------ loss and saves


def losses(plan: Plan, device: str) -> Result:
    """Seconds and peak bytes of `benchmark.py loss`'s sides on this device, in bf16."""
    import torch

    from scripts.benchmarks.loss import Case, Side, sides

    tokens, width, vocabulary = plan.loss
    case = Case(
        tokens=tokens, width=width, vocabulary=vocabulary, dtype=torch.bfloat16, device=device
    )
    found: Result = {}
    for name, loss in sides().items():
        side = Side(case, loss)
        side.run()
        # On a CPU resident memory is what is read, which stays after the first run: 0.
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        forget_peak_of(device)
        seconds = best_seconds(side.run, tries=3)
        peak = peak_of(device, 0) - held
        found[name] = {"seconds": seconds, "peak_bytes": peak, "loss": side.loss / tokens}
    return {"kind": "loss", "sides": found}


def saves(folder: Path, plan: Plan, model: str, device: str, ranks: int) -> Result:
    """Of saves of train.py, the first of which also takes host memory: seconds the loop stops, and until durable."""
    with workload(folder, plan.models[model], device, 1, ranks, ()) as work:
        return launch(work, timed_saves, ranks=ranks)[0] | {"kind": "saves"}


def timed_saves(work: Work) -> Result:
    from trainer.loop import train
    from trainer.manifest import complete_checkpoints, step_of

    found: list[Result] = []
    folder = output_folder_of(work) / "checkpoints"

    def saving(*arguments: Any, **options: Any) -> bool:
        save, progress = options.pop("save"), options["progress"]
        options |= {"evaluate": lambda _: None}

        def timed(told: Any) -> None:
            began, _ = now()
            save(told)
            stopped = now()[0] - began
            while not any(step_of(path.name) == told.step for path in complete_checkpoints(folder)):
                time.sleep(0.01)
            found.append({"stall_seconds": stopped, "durable_seconds": now()[0] - began})

        last = options.pop("steps")
        options["save_every"] = 0
        for step in range(progress.step + 1, last + 1):  # the last step of each saves
            finished = train(*arguments, steps=step, save=timed, **options)
        return finished

    run_main(work, saving)
    return {"saves": found}


# ------------------------------------------------------------------------------------- calibration


def calibration(result: Result) -> Result:
    """What `plan.py --calibrate` reads."""
    measured = result["parts"]
    rates = measured["rates"] if "failed" not in measured["rates"] else {}
    steps = [part for part in measured.values() if part.get("kind") == "steps"]
    name = rates.get("device_name", "")
    found = {key: rates[key] for key in rates.keys() & set(_RATES)}
    if any(part["reserved_bytes"] for part in steps):
        found["reserved_over_allocated"] = max(
            part["reserved_bytes"] / part["peak_bytes"] for part in steps
        )
    found["steps"] = [
        {
            "model": part["model"],
            "flags": part["flags"],
            "gpus": result["ranks"],
            "tokens_per_second_per_gpu": part["tokens_per_second_per_gpu"],
            "peak_allocated_bytes": part["peak_bytes"],
            "peak_reserved_bytes": part["reserved_bytes"],
        }
        for part in steps
    ]
    return {
        "format": FORMAT,
        "gpu": planner_gpu(name),
        "device_name": name,
        "torch": result["versions"]["torch"],
        "date": result["date"],
        "measurements": found,
    }


_RATES = (
    "matmul_flops", "memory_bandwidth_bytes_per_second", "host_bytes_per_second", "attention_flops",
    "collectives", "memory_total_bytes",
)  # fmt: skip


def planner_gpu(name: str) -> str:
    """The planner's name of it, else its own."""
    from scripts.planner.facts import find_gpu

    try:
        return find_gpu(name).name
    except KeyError:
        return name


# ------------------------------------------------------------------------------------------- tables


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    found = result["parts"]
    failed = {name: part["failed"] for name, part in found.items() if "failed" in part}
    done = {name: part for name, part in found.items() if name not in failed}
    lines = [setting(result), f"{result['ranks']} ranks on {result['device']}"]
    if "rates" in done:
        lines += rates_table(done["rates"])
    steps = {name: part for name, part in done.items() if part.get("kind") == "steps"}
    if steps:
        lines += steps_table(steps)
    for part in done.values():
        if part.get("kind") == "peers":
            lines += peers_table(part)
        if part.get("kind") == "loss":
            lines += loss_table(part)
        if part.get("kind") == "saves":
            lines += [
                "",
                "| save | seconds the loop stops | seconds until durable |",
                "|---|---|---|",
            ]
            lines += [
                f"| {number} | {save['stall_seconds']:.3f} | {save['durable_seconds']:.3f} |"
                for number, save in enumerate(part["saves"], 1)
            ]
    lines += ["", *(f"{name}: {why}" for name, why in failed.items())] if failed else []
    seconds = sum(part.get("part_seconds", 0) for part in found.values())
    return "\n".join([*lines, "", f"measured in {seconds / 60:.1f} minutes"])


def rates_table(rates: Result) -> list[str]:
    lines = [
        f"{rates['device_name']}, {rates['memory_total_bytes'] / GB:.0f} GB",
        "",
        "| alone | rate |",
        "|---|---|",
    ]
    for dtype, products in rates["matmul_flops"].items():
        for p in products:
            shape = f"{p['m']} x {p['k']} x {p['n']}"
            lines.append(f"| {dtype} {shape} | {p['flops_per_second'] / 1e12:.3g} TFLOP/s |")
    for a in rates["attention_flops"]:
        what = f"attention, {a['seq_len']} tokens in documents of {a['document']}"
        lines.append(f"| {what} | {a['flops_per_second'] / 1e12:.3g} TFLOP/s |")
    for name, key in (
        ("memory", "memory_bandwidth_bytes_per_second"),
        ("to the host", "host_bytes_per_second"),
    ):
        lines.append(f"| {name} | {rates[key] / GB:.4g} GB/s |")
    for c in rates["collectives"]:
        what = f"{c['op']}, {c['bytes'] / MIB:g} MiB on {c['ranks']} ranks"
        lines.append(f"| {what} | {c['bytes_per_second'] / GB:.3g} GB/s |")
    return lines


def steps_table(steps: Result) -> list[str]:
    kinds = list(next(iter(steps.values()))["kernels"])
    lines = [
        "",
        "| steps of train.py | seconds | tokens/s per rank | model TFLOP/s | % of its products alone | peak GB | reserved GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in steps.items():
        lines.append(
            f"| {name} | {s['step_seconds']:.4f} | {s['tokens_per_second_per_gpu']:,.0f} "
            f"| {s['model_flops'] / s['step_seconds'] / 1e12:.3g} | {s['share_pct']:.1f} "
            f"| {s['peak_bytes'] / GB:.2f} | {s['reserved_bytes'] / GB:.2f} |"
        )
    lines += [
        "",
        f"| kernels of a traced step, ms | {' | '.join(kinds)} | communication hidden, % |",
        "|---|" + "---|" * (len(kinds) + 1),
    ]
    for name, s in steps.items():
        cells = " | ".join(f"{1000 * s['kernels'][kind]:.1f}" for kind in kinds)
        communication = s["kernels"]["communication"]
        hidden = 1 - s["kernels"]["exposed"] / communication if communication else None
        lines.append(f"| {name} | {cells} | {'' if hidden is None else f'{100 * hidden:.0f}'} |")
    return lines


def peers_table(part: Result) -> list[str]:
    lines = [
        "",
        "| side | step seconds | valid tokens/s | peak GB per rank | ours: times faster | memory of theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in part["sides"].items():
        if "failed" in side:
            lines.append(f"| {name} | {side['failed']} |  |  |  |  |")
            continue
        ratio = part["ratios"].get(name)
        compared = [
            f"{ratio[key]:.2f}" if ratio else "" for key in ("times_faster", "memory_ratio")
        ]
        lines.append(
            f"| {name} | {side['step_seconds']:.4f} | {side['valid_tokens_per_second']:,.0f} "
            f"| {side['peak_bytes'] / GB:.2f} | {' | '.join(compared)} |"
        )
    return lines


def loss_table(part: Result) -> list[str]:
    return [
        "",
        "| loss, bf16 | seconds | peak MiB | per token |",
        "|---|---|---|---|",
        *(
            f"| {name} | {side['seconds']:.4f} | {side['peak_bytes'] / MIB:,.0f} | {side['loss']:.4f} |"
            for name, side in part["sides"].items()
        ),
    ]
