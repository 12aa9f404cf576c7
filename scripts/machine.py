"""What doctor.py finds out about the machine: one function per part, each of which returns findings."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, NamedTuple

from scripts.config import TrainConfig
from trainer.launchers import launch_fault

ROOT = Path(__file__).resolve().parents[1]
_GIB = 2**30
_PROBE_BYTES = 32 * 2**20
# What NCCL's ranks of a node share messages through; Docker's default of 64 MiB is not enough for it.
_SHARED_MEMORY_BYTES = 2**30
_INSTALL = "pip install -c constraints.txt -e ."
# File systems behind a network: slower, and some without locks or atomic renames.
_NETWORK = re.compile(r"nfs|cifs|smb|fuse|lustre|ceph|9p|beegfs|gpfs|wekafs")


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    what: str
    text: str
    remedy: str = ""
    """What to do about it; empty where nothing is to be done."""


def check_versions(
    requirements: Iterable[str] | None = None, *, extras: Sequence[str] = ()
) -> list[Finding]:
    """Installed packages against the ranges of setup.cfg, those of some of its extras too, without importing one."""
    from packaging.requirements import Requirement

    if requirements is None:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        requirements = setup["options"]["install_requires"].split("\n")
        for extra in extras:
            requirements += setup["options.extras_require"][extra].split("\n")
    install = _INSTALL if not extras else f"{_INSTALL[:-1]}'.[{','.join(extras)}]'"
    found, findings = {"python": platform.python_version()}, []
    for requirement in map(Requirement, filter(None, map(str.strip, requirements))):
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            text = f"{requirement} is not installed"
            findings.append(Finding("error", "versions", text, install))
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            text = f"{requirement.name} {found[requirement.name]} is not {requirement.specifier}"
            findings.append(Finding("error", "versions", text, install))
    shown = ("python", "torch", "transformers", "datasets", "huggingface_hub")
    text = ", ".join(f"{name} {found[name]}" for name in shown if name in found)
    return findings or [Finding("ok", "versions", text)]


def check_launcher() -> list[Finding]:
    """Whether the variables of a launcher are set, and make sense."""
    if fault := launch_fault():
        return [Finding("error", "launcher", fault)]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        text = "this was started by torchrun: once per rank, where once per node is enough"
        return [Finding("warning", "launcher", text, "start doctor.py with python")]
    if "RANK" in os.environ:
        text = (
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set, not by torchrun: train.py "
            "started with python will be that rank, and wait for the others"
        )
        remedy = "unset RANK WORLD_SIZE LOCAL_RANK, unless a launcher such as Azure ML's has set them for this"
        return [Finding("warning", "launcher", text, remedy)]
    return [Finding("ok", "launcher", "none has set RANK: torchrun will")]


class Gpu(NamedTuple):
    """What torch says of one GPU; memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


def find_gpus() -> list[Gpu]:
    """The usable GPUs of this machine."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        item = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        found.append(Gpu(item.name, (item.major, item.minor), item.total_memory, free))
    return found


def check_gpus(gpus: Sequence[Gpu], config: TrainConfig) -> list[Finding]:
    """Number, kind, capability and free memory."""
    if not gpus:
        return [_no_gpu(config)]
    names = " and ".join(sorted({gpu.name for gpu in gpus}))
    capability = min(gpu.capability for gpu in gpus)
    shown = ".".join(map(str, capability))
    memory = min(gpu.total for gpu in gpus) / _GIB
    text = f"{len(gpus)} x {names}, capability {shown}, {memory:.1f} GiB"
    found = [Finding("ok", "GPUs", text)]
    if " and " in names:
        text = "they are of several kinds: every step waits for the slowest"
        found.append(Finding("warning", "GPUs", text, "choose with CUDA_VISIBLE_DEVICES"))
    if capability < (8, 0) and config.parallel.param_dtype != "float32":
        remedy = "--parallel.param_dtype float32, or newer GPUs"
        found.append(Finding("error", "GPUs", f"capability {shown} has no bf16 units", remedy))
    if capability < (8, 9) and config.parallel.float8 != "none":
        text = f"--parallel.float8 {config.parallel.float8} needs capability 8.9, here is {shown}"
        found.append(Finding("error", "GPUs", text, "--parallel.float8 none"))
    for index, gpu in enumerate(gpus):
        if gpu.free < 0.95 * gpu.total:
            text = f"GPU {index} has {gpu.free / _GIB:.1f} of {gpu.total / _GIB:.1f} GiB free: another process uses it"
            found.append(Finding("warning", "GPUs", text, "nvidia-smi names the process"))
    return found


def _no_gpu(config: TrainConfig) -> Finding:
    import torch

    if torch.version.cuda is None and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        text = f"torch {torch.__version__} is built without CUDA, and this machine has an NVIDIA driver"
        return Finding("error", "GPUs", text, "install a CUDA build of the same torch version")
    if config.device == "cuda":
        text = "--device cuda, but torch finds no usable GPU"
        return Finding("error", "GPUs", text, "check nvidia-smi and the driver, or --device auto")
    text = (
        "none on this machine: train.py would train on the CPU, and nothing about GPUs is checked"
    )
    return Finding("warning", "GPUs", text, "run this again where the job will run")


def check_topology(*, gpus: int, world_size: int) -> list[Finding]:
    """How this machine's GPUs are connected, and its network. Not yet run on a GPU."""
    found: list[Finding] = []
    if gpus > 1:
        try:
            command = subprocess.run(
                ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True
            )
            found.append(_links(command.stdout, gpus))
        except (OSError, subprocess.SubprocessError) as error:
            text = f"nvidia-smi topo -m does not answer ({type(error).__name__})"
            found.append(Finding("warning", "topology", text, "check the driver"))
    if gpus and world_size > gpus:
        adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
        text = f"{world_size} ranks are more than the {gpus} GPUs here, so several nodes: "
        if adapters:
            found.append(Finding("ok", "topology", f"{text}RDMA by {', '.join(adapters)}"))
        else:
            text += "no InfiniBand, gradients and parameters travel over Ethernet"
            remedy = "--parallel.dp_replicate NODES keeps parameters inside a node (HSDP)"
            found.append(Finding("warning", "topology", text, remedy))
    return [*found, *_interfaces()]


def _links(table: str, gpus: int) -> Finding:
    """Of `nvidia-smi topo -m`: rows and columns GPU0, GPU1, ... with NV12 (NVLink), PIX, PHB, NODE or SYS."""
    kinds = set()
    for line in table.splitlines():
        if re.match(r"GPU\d+\s", line):  # the header begins with a tab
            kinds |= {*line.split()[1 : gpus + 1]} - {"X"}
    slow = sorted(kind for kind in kinds if not kind.startswith("NV"))
    if not kinds or slow:
        text = f"GPUs are connected by {', '.join(slow) or 'nothing that is known'}, not NVLink: all-gathers will be slow"
        return Finding("warning", "topology", text, "nvidia-smi topo -m shows which")
    return Finding("ok", "topology", f"NVLink between all GPUs ({', '.join(sorted(kinds))})")


def _interfaces() -> list[Finding]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name interfaces that exist; they begin with what is given."""
    there = [name for _, name in socket.if_nameindex()]
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        wanted = [part.lstrip("=") for part in value.split(",") if part]
        if value.startswith("^") or not wanted:
            continue
        if not any(name.startswith(part) for name in there for part in wanted):
            text = (
                f"{variable}={value} is no interface of this machine, which has {', '.join(there)}"
            )
            found.append(Finding("error", "topology", text, f"unset {variable}, or name one"))
    return found


def check_shared_memory(
    config: TrainConfig, *, gpus: int, folder: Path = Path("/dev/shm")
) -> list[Finding]:
    """What the ranks of a node and the workers of a loader exchange data through."""
    try:
        size = shutil.disk_usage(folder)
    except OSError as error:
        return [Finding("warning", "shared memory", f"{folder}: {error.strerror}")]
    text = f"{folder} has {size.free / _GIB:.2f} of {size.total / _GIB:.2f} GiB free"
    if size.free >= _SHARED_MEMORY_BYTES:
        return [Finding("ok", "shared memory", text)]
    remedy = "docker run --ipc=host (or --shm-size=16g); Azure ML: shm_size under resources; Kubernetes: an emptyDir of medium Memory"
    needed = gpus > 1 or config.data.workers > 0
    level: Literal["error", "warning"] = "error" if needed else "warning"
    return [
        Finding(level, "shared memory", f"{text}: NCCL and loader processes need 1 GiB", remedy)
    ]


def check_host_memory(*, needed: float) -> list[Finding]:
    """Host memory a node needs beside the libraries: copies of checkpoints, what is offloaded; in bytes."""
    free = _available_memory()
    if free is None:
        return []
    text = (
        f"{free / 1e9:,.1f} GB available, this run keeps about {needed / 1e9:,.1f} GB there"
        if needed
        else f"{free / 1e9:,.1f} GB available"
    )
    if needed > 0.9 * free:
        remedy = "--checkpoint.asynchronous false keeps no copy of a checkpoint there"
        return [Finding("error", "host memory", text, remedy)]
    return [Finding("ok", "host memory", text)]


def _available_memory() -> int | None:
    """In bytes, of the machine or of this container, whichever is less."""
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable:\s+(\d+) kB", text):
            free = int(match[1]) * 1024
            with suppress(OSError, ValueError):  # no limit: "max"
                group = Path("/sys/fs/cgroup")
                limit = int((group / "memory.max").read_text())
                free = min(free, limit - int((group / "memory.current").read_text()))
            return free
    return None


def check_folder(flag: str, folder: Path, *, needed: float) -> list[Finding]:
    """Whether a folder can be written, has `needed` bytes free, and how fast it is; made if missing, like train.py does."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        if not place.is_dir():
            raise NotADirectoryError(None, "Not a directory")
        free = shutil.disk_usage(place).free
        probe = min(_PROBE_BYTES, free // 2)
        begin = time.perf_counter()
        with NamedTemporaryFile(dir=place) as file:
            file.write(bytes(probe))
            file.flush()
            os.fsync(file.fileno())
        speed = probe / (time.perf_counter() - begin)
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror})"
        return [Finding("error", flag, text, f"give --{flag} a folder that you can write to")]
    kind = file_system(place)
    text = (
        f"{folder} has {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB will be needed; "
        f"writes {speed / 1e6:,.0f} MB/s ({kind})"
    )
    if free < needed:
        return [Finding("error", flag, text, f"free some space, or give another --{flag}")]
    if _NETWORK.search(kind):
        remedy = (
            "a local disk is faster; checkpoints need renames and locks that hold (docs/launch.md)"
        )
        return [Finding("warning", flag, f"{text}: behind a network", remedy)]
    return [Finding("ok", flag, text)]


def file_system(folder: Path) -> str:
    """Type of the file system that `folder`, which exists, lies on; "unknown" where the system does not tell."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    path = folder.resolve()
    for line in mounts:
        _, place, found, *_ = line.split()
        place = place.replace("\\040", " ")
        if path.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return kind
