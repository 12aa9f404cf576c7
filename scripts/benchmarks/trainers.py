"""One rank of each side of the step benchmarks: our trainer, TRL's under FSDP2, and a plain loop.

Every side runs in processes of its own. It reads the clock after every step, logging included, and memory from the end of
the warm-up to the last step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from data.packing import pack
from scripts.benchmarks.common import (
    Result,
    anonymous_bytes,
    forget_peak,
    peak_anonymous_bytes,
)
from scripts.benchmarks.workload import IGNORE_INDEX, SEED, Shape, read_rows

LEARNING_RATE, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 1e-4, 0.01, (0.9, 0.95), 1.0
WORLD_SIZE = 2


@dataclass(frozen=True)
class Work:
    """What one side is to do."""

    folder: str
    """Of `write_model` and `write_rows`, and for a cache."""
    shape: Shape
    dtype: str
    """float32 or bfloat16: of the computation; masters, state and our reduction are fp32."""
    packed: bool
    warm_up: int
    steps: int
    """Behind the warm-up."""
    device: str = "cpu"
    flags: tuple[str, ...] = ()
    """More flags of train.py."""
    micro_batches: int = 1
    """Of a rank in each step of our trainer."""


def now() -> tuple[float, float]:
    """Wall and CPU seconds of this process, when all that a GPU was given is done."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


TIMES = ("seconds", "cpu_seconds")


def differences(
    ticks: Sequence[tuple[float, float]], names: tuple[str, str] = TIMES
) -> list[Result]:
    """Of the steps between them."""
    return [
        {name: end - begin for name, begin, end in zip(names, before, after, strict=True)}
        for before, after in pairwise(ticks)
    ]


@dataclass
class Clock:
    """When steps ended, and what memory was held meanwhile."""

    work: Work
    before: int = field(default_factory=anonymous_bytes)
    """Bytes that the process held when it had imported everything and built nothing; of host memory."""
    ticks: list[tuple[float, float]] = field(default_factory=list)
    peak: int = 0

    def tick(self) -> None:
        """A step has ended."""
        self.ticks.append(now())
        if len(self.ticks) == self.work.warm_up:
            forget_peak_of(self.work.device)
        if len(self.ticks) == self.work.warm_up + self.work.steps:
            self.peak = peak_of(self.work.device, self.before)

    def result(self, counts: Sequence[tuple[int, int]], first_loss: float) -> Result:
        """`counts` are this rank's real tokens and labels of every step."""
        begin = self.work.warm_up
        steps = differences(self.ticks[begin - 1 :])
        tokens, valid = zip(*counts[begin : len(self.ticks)], strict=True)
        return {
            "seconds": [step["seconds"] for step in steps],
            "cpu_seconds": [step["cpu_seconds"] for step in steps],
            "tokens": tokens,
            "valid_tokens": valid,
            "peak_bytes": self.peak,
            "first_loss": first_loss,
        }


def forget_peak_of(device: str) -> None:
    """`peak_of` counts from here."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def peak_of(device: str, before: int) -> int:
    """Bytes: allocated at most on this rank's GPU; on a CPU resident at most, above what it held `before`."""
    import torch

    return (
        torch.cuda.max_memory_allocated() if device == "cuda" else peak_anonymous_bytes() - before
    )


def reserved() -> int:
    """Bytes that the allocator of this rank's GPU took at most; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0


@contextmanager
def logged(folder: Path, name: str) -> Iterator[None]:
    """What this process prints meanwhile goes to a file."""
    file = folder / f"{name}-{os.environ['RANK']}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with file.open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, before in zip((1, 2), kept, strict=True):
                os.dup2(before, descriptor)
                os.close(before)


def use_threads() -> None:
    """As many threads as our trainer takes on a CPU: the cores, divided by the ranks."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))


def peer_attention(work: Work) -> str:
    """What transformers is given: on a GPU flash-attn's kernels, which keep packed documents apart, where they are installed."""
    flash = work.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


# ------------------------------------------------------------------------------------------- ours


def train_arguments(work: Work, output_dir: Path) -> list[str]:
    """The command line of train.py."""
    folder = Path(work.folder)
    return [
        f"--cache_dir={folder / 'cache'}",
        f"--output_dir={output_dir}",
        f"--device={work.device}",
        f"--steps={work.warm_up + work.steps}",
        f"--seed={SEED}",
        f"--micro_batch_size={work.shape.micro_batch_size}",
        f"--global_batch_size={work.shape.micro_batch_size * work.micro_batches * int(os.environ['WORLD_SIZE'])}",
        f"--model.path={folder / 'model'}",
        "--model.check_first_loss=never",  # of random weights
        f"--data.path={folder / 'train.jsonl'}",
        f"--data.seq_len={work.shape.seq_len}",
        f"--data.packing={'best_fit' if work.packed else 'none'}",
        "--data.prepare_workers=1",
        f"--parallel.param_dtype={work.dtype}",
        f"--optimizer.learning_rate={LEARNING_RATE}",
        f"--optimizer.weight_decay={WEIGHT_DECAY}",
        f"--optimizer.betas={list(BETAS)}",
        f"--optimizer.max_grad_norm={MAX_GRAD_NORM}",
        "--schedule.name=constant",
        "--checkpoint.export=false",
        "--log.every=1",
        "--log.tensorboard=false",
        "--log.progress=false",
        *work.flags,
    ]


def output_folder_of(work: Work) -> Path:
    """Of this run."""
    return Path(work.folder, f"output-{os.environ['MASTER_PORT']}")


def run_main(work: Work, train: Callable[..., bool]) -> list[Result]:
    """Run the `main` of train.py with `train` in the place of `trainer.loop.train`; returns the rows of metrics.jsonl."""
    import scripts.wiring
    from scripts.train import main

    folder, output_dir = Path(work.folder), output_folder_of(work)
    with logged(folder, "shardloop"), patch.object(scripts.wiring, "train", train):
        code = main(train_arguments(work, output_dir))
    if code != 0:
        logs = [file.read_text().splitlines() for file in folder.glob("shardloop-*.log")]
        last = " ".join(line for lines in logs for line in lines[-1:])  # one rank speaks for all
        raise RuntimeError(f"train.py ended with {code}: {last}")
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def run_shardloop(work: Work) -> Result:
    """train.py as it is; its loop's `advance` is listened to."""
    import scripts.wiring  # noqa: F401  # everything is imported before memory counts
    from trainer.loop import train

    clock = Clock(work)

    def listened(*args: Any, advance: Callable[..., None], **options: Any) -> bool:
        def advanced(*told: Any) -> None:
            clock.tick()
            advance(*told)

        return train(*args, advance=advanced, **options)

    rows = run_main(work, listened)
    # The rows count all ranks together.
    first = os.environ["RANK"] == "0"
    counts = [(row["tokens"] * first, row["valid_tokens"] * first) for row in rows]
    return clock.result(counts, rows[0]["loss"])


# --------------------------------------------------------------------------------------------- TRL


def run_trl(work: Work, strategy: str) -> Result:
    """TRL's SFTTrainer under FSDP2 through accelerate; `strategy` packs, where anything is packed."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, counts = Path(work.folder), []
    use_threads()
    clock = Clock(work)

    class Ticks(TrainerCallback):
        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            clock.tick()

    with logged(folder, "trl"):
        arguments = SFTConfig(
            output_dir=str(folder / "trl"),
            use_cpu=work.device == "cpu",
            bf16=work.dtype == "bfloat16",
            fsdp=True,
            fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
            packing=work.packed,
            packing_strategy=strategy,
            max_length=work.shape.seq_len,
            per_device_train_batch_size=work.shape.micro_batch_size,
            max_steps=work.warm_up + work.steps,
            train_sampling_strategy="random" if work.packed else "sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=SEED,
            ddp_timeout=300,
        )
        if work.device == "cpu":
            # accelerate takes FSDP for GPUs only, and would replicate the model here without a word. Told that its
            # ranks are GPUs', it shards with FSDP2 on the CPU.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                folder / "model", dtype="float32", attn_implementation=peer_attention(work)
            ),
            args=arguments,
            train_dataset=Dataset.from_list(read_rows(folder / "in_order.jsonl")),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Ticks()],
        )
        collate = trainer.data_collator

        def counted(examples: Any) -> Any:
            batch = collate(examples)
            real = batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] + 1
            labels = batch["labels"][:, 1:] != IGNORE_INDEX
            counts.append((int((real > 0).sum()), int(labels.sum())))
            return batch

        trainer.data_collator = counted
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return clock.result(counts, losses[0]) | {"sharded": is_sharded(trainer.model)}


def is_sharded(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


# -------------------------------------------------------------------------------------- plain loop


def run_plain(work: Work) -> Result:
    """transformers and FSDP2 as its documentation has them, and nothing else."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    use_threads()
    clock, folder = Clock(work), Path(work.folder)
    if work.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if work.device == "cuda" else "gloo")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation=peer_attention(work)
        )
        model.to(work.device)
        dtype = getattr(torch, work.dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        model.train()
        counts, losses = [], []
        for inputs, tokens in plain_batches(work, dist.get_rank()):
            on_device = {name: tensor.to(work.device) for name, tensor in inputs.items()}
            loss = model(**on_device, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            counts.append((tokens, int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())))
            clock.tick()
    finally:
        dist.destroy_process_group()
    return clock.result(counts, losses[0])


def plain_batches(work: Work, rank: int) -> Iterator[tuple[Result, int]]:
    """The model's inputs and the real tokens of every step."""
    import torch.distributed as dist

    shape = work.shape
    rows = read_rows(Path(work.folder, "in_order.jsonl"))
    groups = [[number] for number in range(len(rows))]
    if work.packed:
        packs = pack(np.array([len(row["input_ids"]) for row in rows]), seq_len=shape.seq_len)
        order = np.random.default_rng(SEED).permutation(len(packs))
        groups = [packs.documents(number).tolist() for number in order]
    per_step = shape.micro_batch_size * dist.get_world_size()
    for step in range(work.warm_up + work.steps):
        begin = step * per_step + rank * shape.micro_batch_size
        batch = groups[begin : begin + shape.micro_batch_size]
        yield plain_inputs([[rows[number] for number in group] for group in batch], work)


def plain_inputs(batch: list[list[dict[str, list[int]]]], work: Work) -> tuple[Result, int]:
    """Packed rows tell their documents by positions, as transformers reads them; others are padded to the longest."""
    import torch

    lengths = [sum(len(row["input_ids"]) for row in group) for group in batch]
    size = (len(batch), work.shape.seq_len if work.packed else max(lengths))
    ids, positions = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    labels = torch.full(size, IGNORE_INDEX)
    for place, group in enumerate(batch):
        begin = 0
        for row in group:
            end = begin + len(row["input_ids"])
            ids[place, begin:end] = torch.tensor(row["input_ids"])
            labels[place, begin:end] = torch.tensor(row["labels"])
            labels[place, begin] = IGNORE_INDEX  # the document before does not predict it
            positions[place, begin:end] = torch.arange(end - begin)
            begin = end
        positions[place, begin:] = torch.arange(size[1] - begin)
    inputs = {"input_ids": ids, "labels": labels}
    if work.packed:
        inputs["position_ids"] = positions
    else:
        inputs["attention_mask"] = torch.tensor(
            [[place < length for place in range(size[1])] for length in lengths]
        ).long()
    return inputs, sum(lengths)
