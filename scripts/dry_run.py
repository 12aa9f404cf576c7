"""The rehearsal of a run: what each rank holds, and a checkpoint that is written, read back and compared."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpointer
from trainer.config import ParallelConfig
from trainer.distributed import Ranks, gather, raise_together
from trainer.errors import TrainError
from trainer.parallel import PlanRow, describe_plan

_MIB = 2**20


@contextmanager
def temporary_output(ranks: Ranks, output_dir: Path) -> Iterator[Path]:
    """An empty folder on the disk of `output_dir`, the same for all ranks, removed at the end.

    Raises:
        TrainError: on every rank, when it cannot be made.
    """
    # Beside what the run will write, so that what the rehearsal shows is true of that disk.
    place = next(path for path in output_dir.absolute().parents if path.is_dir())
    folder, error = None, None
    if ranks.is_first:
        try:
            folder = tempfile.mkdtemp(prefix=".dry-run-", dir=place)
        except OSError as reason:
            error = f"--output_dir {output_dir}: {place} cannot be written ({reason.strerror}); give another folder"
    raise_together(error)
    try:
        yield Path(gather(folder)[0])
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def plan_table(model: nn.Module, config: ParallelConfig, optimizer_bytes: float) -> str:
    """The groups of FSDP with sizes in MiB; equal layers share one line. `optimizer_bytes` are those of a rank."""
    rows = describe_plan(model, config)
    alike: dict[tuple[str, int], list[PlanRow]] = {}
    for row in rows:
        # Layers have a number in their name.
        name = ".".join("*" if part.isdigit() else part for part in row.group.split("."))
        alike.setdefault((name, row.parameters), []).append(row)
    total = PlanRow(
        "all",
        sum(row.parameters for row in rows),
        sum(row.master_bytes for row in rows),
        sum(row.trained_bytes for row in rows),
        sum(row.gathered_bytes for row in rows),
    )
    lines = [("group", "parameters", "MiB per rank", "MiB gathered")]
    for label, row in [
        *(
            (f"{len(same)} x {name}" if len(same) > 1 else same[0].group, same[0])
            for (name, _), same in alike.items()
        ),
        (total.group, total),
    ]:
        sizes = (f"{size / _MIB:,.2f}" for size in (row.master_bytes, row.gathered_bytes))
        lines.append((label, f"{row.parameters:,}", *sizes))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        f"{name:<{widths[0]}}"
        + "".join(f"{text:>{width + 2}}" for text, width in zip(numbers, widths[1:], strict=True))
        for name, *numbers in lines
    )
    held = total.master_bytes + total.trained_bytes + optimizer_bytes
    return (
        f"\n{table}\nWith gradients and the optimizer's state a rank holds {held / _MIB:,.2f} MiB, "
        "beside gathered groups and activations.\n"
    )


def prove_checkpoint(
    checkpointer: Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Wipe parameters and optimizer state, read the newest checkpoint, and compare every bit with before.

    Raises:
        TrainError: on every rank, when a tensor is not what it was.
    """
    before = fingerprints(model, optimizer)
    with torch.no_grad():
        for tensor in _tensors(model, optimizer, saved=True).values():
            tensor.zero_()
    checkpoint = checkpointer.newest()
    if checkpoint is None:
        raise TrainError("there is no step left: --resume names a checkpoint of the end of the run")
    checkpointer.restore(checkpoint)
    after = fingerprints(model, optimizer)
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    raise_together(
        f"a checkpoint does not give back what was saved: {len(changed)} tensors differ, "
        f"the first is {changed[0]}; report this with the command"
        if changed
        else None
    )


def summary(folder: Path) -> str:
    """What the step in `folder` did."""
    row = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    size = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    return (
        f"dry run: one step with loss {row['loss']:.4f} in {row['step_seconds']:.1f} s, peak memory "
        f"{row['memory_peak_gib']:.2f} GiB; a checkpoint of {size / _MIB:,.1f} MiB was written, read "
        "back and equal in every bit; nothing was kept"
    )


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, saved: bool = False
) -> dict[str, Tensor]:
    """This rank's part of every parameter, or of those a checkpoint holds, and of its optimizer state."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if saved and not parameter.requires_grad:
            continue
        state = {
            f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()
        }
        for key, value in {name: parameter, **state}.items():
            if isinstance(value, Tensor):
                found[key] = value.to_local() if isinstance(value, DTensor) else value.detach()
    return found


def fingerprints(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 of each: a copy of them all might not fit."""
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        ).hexdigest()
        for name, tensor in _tensors(model, optimizer).items()
    }
