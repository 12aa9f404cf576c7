"""Everything that is set because of the hardware, in one place, and what the hardware can do."""

from __future__ import annotations

import os
import random
import resource
import time
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from trainer.errors import TrainError

# AdamW as one kernel over all parameters: no launch per parameter, none of foreach's temporaries.
FUSED_OPTIMIZER = True

# Dense bf16 FLOP/s from NVIDIA's data sheets, without sparsity. The first name found in the device's name counts.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def choose_device(
    wanted: Literal["auto", "cpu", "cuda"], *, local_world_size: int
) -> Literal["cpu", "cuda"]:
    """`auto` is CUDA where there is a GPU for every local rank.

    Raises:
        TrainError: CUDA was asked for, and there are fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return "cpu"
    if gpus == 0:
        raise TrainError("--device cuda, but there is no usable GPU here; use --device cpu")
    if gpus < local_world_size:
        raise TrainError(
            f"{local_world_size} ranks on this node but {gpus} usable GPUs; "
            f"start torchrun with --nproc_per_node={gpus}, or use --device cpu"
        )
    return "cuda"


def configure(
    device_type: Literal["cpu", "cuda"], *, local_world_size: int, output_dir: Path | None = None
) -> None:
    """Settings for the whole process; call before the first tensor is put on a GPU. Not yet run on a GPU.

    NCCL's flight recorder leaves what it knows of a collective that timed out in `output_dir`.
    """
    if device_type == "cuda":
        # Packed rows have one shape, but loss and evaluation do not: growing segments instead of caching blocks of
        # every size keeps reserved memory near allocated memory.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # An error in one rank's collective ends that rank with a message instead of hanging the others.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        # Keep the last collectives in a ring buffer, and write it when one times out: a hang can be explained afterwards.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        if output_dir is not None:
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(output_dir / "nccl-trace-rank-"))
        # What is left in fp32 (norm statistics, the loss) may use TF32 tensor cores; parameters compute in bf16.
        torch.set_float32_matmul_precision("high")
    else:
        # torchrun sets one thread per rank where the user set none; the cores of the machine are divided instead.
        threads = max(1, (os.cpu_count() or 1) // local_world_size)
        if os.environ.get("OMP_NUM_THREADS", "1") == "1" and local_world_size > 1:
            torch.set_num_threads(threads)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s one rank can reach at best, and where the number is from.

    Returns:
        The data sheet's dense peak for a known GPU (fp32 parameters compute in TF32 at half of it); on CPU the best
        of a few square matrix products, measured now; None for an unknown GPU.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_BF16_FLOPS.items():
            if known in name:
                return (peak if dtype == torch.bfloat16 else peak / 2), f"data sheet of {known}"
        return None, f"no peak known for {name}"
    size = 512
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    # As layers multiply: of bf16 on some CPUs another order of the memory is several times slower.
    best = min(_seconds(lambda: F.linear(a, b)) for _ in range(5))
    return 2 * size**3 / best, f"{size}x{size} matrix product measured at start"


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices itself (AVX512-BF16, AMX, or NEON's) instead of number by number."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _seconds(work: object) -> float:
    begin = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begin


def peak_memory_gib(device: torch.device) -> float:
    """Peak allocated memory on CUDA, peak resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux


def seed_generators(seed: int) -> None:
    """Seed every generator whose state a checkpoint keeps: Python's, numpy's, torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
