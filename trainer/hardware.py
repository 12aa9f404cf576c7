"""Everything that is set because of the hardware, in one place, and what the hardware can do."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl

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
    device_type: Literal["cpu", "cuda"],
    *,
    local_world_size: int,
    output_dir: Path | None = None,
    symmetric_memory: bool = False,
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
        # Copy engines gather, where symmetric memory is used, instead of units that could compute.
        if symmetric_memory:
            os.environ.setdefault("NCCL_CTA_POLICY", "2")
        # What is left in fp32 (norm statistics, the loss) may use TF32 tensor cores; parameters compute in bf16.
        torch.set_float32_matmul_precision("high")
    else:
        # torchrun sets one thread per rank where the user set none; the cores of the machine are divided instead.
        threads = max(1, (os.cpu_count() or 1) // local_world_size)
        if os.environ.get("OMP_NUM_THREADS", "1") == "1" and local_world_size > 1:
            torch.set_num_threads(threads)


FLASH_ATTENTION = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}
"""FlashAttention versions torch can be given, and the module each comes in."""


def use_flash_attention(
    wanted: Literal["auto", "FA2", "FA3", "FA4"], device_type: Literal["cpu", "cuda"]
) -> None:
    """Let torch's attention run on a newer FlashAttention than its own FA2. Not yet run on a GPU.

    Raises:
        TrainError: FA3 or FA4 was asked for and cannot be had here.
    """
    capability = torch.cuda.get_device_capability() if device_type == "cuda" else (0, 0)
    installed = [name for name, module in FLASH_ATTENTION.items() if _is_installed(module)]
    name = choose_flash_attention(wanted, capability[0], installed)
    if name != "FA2":
        try:
            activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, ValueError) as error:
            raise TrainError(
                f"{name} cannot be used: {error}; --model.flash_attention FA2 takes torch's own"
            ) from error


def choose_flash_attention(
    wanted: Literal["auto", "FA2", "FA3", "FA4"], capability: int, installed: Collection[str]
) -> Literal["FA2", "FA3", "FA4"]:
    """`auto` is the one made for this generation, if it is installed: FA3 for Hopper (capability 9), FA4 for Blackwell (10).

    Raises:
        TrainError: what was asked for needs a GPU of such a generation, or a package that is not there.
    """
    if wanted == "auto":
        made_for = {9: "FA3", 10: "FA4"}.get(capability)
        return made_for if made_for in installed else "FA2"  # type: ignore[return-value]
    remedy = "; --model.flash_attention auto takes what there is"
    if wanted != "FA2" and capability not in (9, 10):
        raise TrainError(f"{wanted} needs a Hopper or Blackwell GPU{remedy}")
    if wanted != "FA2" and wanted not in installed:
        raise TrainError(f"{wanted} needs the module {FLASH_ATTENTION[wanted]}{remedy}")
    return wanted


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


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
