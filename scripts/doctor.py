"""Check the machine and the job before they cost money.

python scripts/doctor.py [the flags of train.py] [--world_size N]

One process, no weights. It downloads no more than configuration, tokenizer and three rows, prints a table of what is in
order and what is not, with remedies, and exits with 1 if the job would fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from data.config import source_configs
    from data.errors import DataError
    from models.errors import ModelError
    from scripts.collective import check_collective
    from scripts.command_line import CommandLineError, parse_run_config, printable, to_yaml
    from scripts.config import TrainConfig, output_folder
    from scripts.environment import use_cache_dir
    from scripts.machine import (
        ROOT,
        Finding,
        check_folder,
        check_gpus,
        check_host_memory,
        check_launcher,
        check_shared_memory,
        check_topology,
        check_versions,
        find_gpus,
    )
    from scripts.process import run_command
    from trainer.errors import TrainError
except ModuleNotFoundError as error:
    print(
        f"doctor.py: error: {error.name} is not installed: pip install -c constraints.txt -e .",
        file=sys.stderr,
    )
    sys.exit(1)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from scripts.planner.memory import MemoryPlan

_ROWS, _LINES, _SHOWN_TOKENS = 3, 3, 16


@dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and one more."""

    world_size: int | None = None
    """Ranks that the job will have, over all nodes; default: the GPUs of this machine, or 1."""


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code: 0, 1 if there is an error in it, 2 for a wrong command line."""
    try:
        config = parse_run_config(DoctorConfig, "doctor.py", argv)
        if config.world_size is not None and config.world_size < 1:
            raise CommandLineError(f"--world_size must be at least 1, got {config.world_size}")
    except CommandLineError as error:
        print(f"doctor.py: error: {error}", file=sys.stderr)
        return 2
    levels: list[str] = []
    try:
        for finding in examine(config):
            levels.append(finding.level)
            print(f"{finding.level:<9}{finding.what:<15}{printable(finding.text)}", flush=True)
            if finding.remedy:
                print(f"{'':<9}{'':<15}-> {printable(finding.remedy)}", flush=True)
    except KeyboardInterrupt:
        print("doctor.py: interrupted", file=sys.stderr)
        return 130
    errors, warnings = levels.count("error"), levels.count("warning")
    print(
        f"\n{_count(errors, 'error')}, {_count(warnings, 'warning')}: "
        + ("the job would fail" if errors else "nothing stands in the job's way that was looked at")
    )
    return 1 if errors else 0


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Everything that is found, in the order in which it should be mended."""
    yield from check_versions(extras=_extras(config))
    if any("not installed" in finding.text for finding in check_versions()):
        return  # nothing below can be imported
    yield from check_launcher()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    cache_dir, fault = None, ""
    try:
        cache_dir = use_cache_dir(config.cache_dir)
    except CommandLineError as error:
        fault = str(error)
    # Only now: torch and the hub's libraries read the cache variables when they are imported.
    gpus = find_gpus()
    world_size = config.world_size or len(gpus) or 1
    yield from check_gpus(gpus, config)
    yield from check_topology(gpus=len(gpus), world_size=world_size)
    yield from check_shared_memory(config, gpus=len(gpus))
    yield from check_collective(ranks=len(gpus))
    if cache_dir is None:
        yield Finding("error", "cache_dir", fault)
        yield from check_folder("output_dir", output_folder(config).absolute(), needed=0)
        text = "hub, data and memory need the cache: not looked at"
        yield Finding("warning", "job", text, "mend --cache_dir first")
        return
    cache, is_whole = check_cache(config)
    hub, to_fetch = check_hub(config, cache_dir, offline=offline, is_whole=is_whole)
    model, job = check_job(config, cache_dir, from_cache=is_whole)
    memory = min((gpu.total for gpu in gpus), default=None)
    plan, unplanned = (
        plan_job(config, model, world_size=world_size, memory=memory) if model else (None, [])
    )
    output_dir = output_folder(config).absolute()
    local_ranks = min(world_size, len(gpus) or world_size)
    on_disk, in_host = (
        _bytes_to_keep(config, plan, share=local_ranks / world_size) if plan else (0, 0)
    )
    yield from check_host_memory(needed=in_host)
    if offline and not os.access(cache_dir, os.W_OK):
        yield Finding("ok", "cache_dir", f"{cache_dir} can only be read, and HF_HUB_OFFLINE is set")
    else:
        yield from check_folder("cache_dir", cache_dir, needed=to_fetch)
    yield from check_folder("output_dir", output_dir, needed=on_disk)
    yield from _resumption(config, output_dir)
    yield from hub
    yield from cache
    told = {finding.text for finding in hub}
    yield from (finding for finding in job if finding.text not in told)
    yield from unplanned
    if plan is not None:
        yield check_fit(plan, world_size=world_size, memory=memory)


def _extras(config: TrainConfig) -> list[str]:
    """Those of setup.cfg that this run needs."""
    places = [source.data.path or "" for source in source_configs(config.data)]
    places.append(config.checkpoint.mirror or "")
    wanted = {
        "lora": config.lora.rank > 0,
        "torchao": config.parallel.float8 != "none",
        "s3": any(place.startswith("s3://") for place in places),
    }
    return [extra for extra, is_needed in wanted.items() if is_needed]


def check_cache(config: TrainConfig) -> tuple[list[Finding], bool]:
    """What `prefetch.py --check` says, and whether all is there; in a process that is offline from its first import on."""
    plain = TrainConfig(
        **{field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(plain), encoding="utf-8")
        script = str(ROOT / "scripts" / "prefetch.py")
        result = subprocess.run(
            [sys.executable, script, f"--config={file}", "--check"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    lines = [line for line in result.stdout.splitlines() if line] or result.stderr.splitlines()[-1:]
    if result.returncode == 0:
        return [Finding("ok", "cache", lines[-1])], True
    found = []
    for line in lines[:_LINES]:
        if "delete" in line:
            found.append(Finding("error", "cache", line))
        else:
            remedy = "train.py brings it while the GPUs wait; prefetch.py with the same flags brings it ahead"
            found.append(Finding("warning", "cache", line, remedy))
    if len(lines) > _LINES:
        text = f"{len(lines) - _LINES} more: prefetch.py --check with the same flags lists them"
        found.append(Finding("warning", "cache", text))
    return found, False


def check_hub(
    config: TrainConfig, cache_dir: Path, *, offline: bool, is_whole: bool
) -> tuple[list[Finding], int]:
    """Whether what the run names on the hub can be read, and how many bytes that will take in the cache."""
    # After the cache folder is chosen.
    from huggingface_hub import get_token

    from data.sources import bytes_to_fetch as bytes_of_data
    from data.sources import hub_commit
    from models.hub import bytes_to_fetch as bytes_of_model
    from models.hub import snapshot

    chosen, hub = config.model, cache_dir / "hub"
    datasets = {source.data.name: source.data.revision for source in source_configs(config.data)}
    datasets.pop(None, None)
    if chosen.name is None and not datasets:
        return [Finding("ok", "hub", "nothing is fetched from it")], 0
    if offline:
        if is_whole:
            return [Finding("ok", "hub", "HF_HUB_OFFLINE is set: the cache alone is used")], 0
        text = "HF_HUB_OFFLINE is set, and the cache lacks something"
        return [Finding("error", "hub", text, "run prefetch.py with a network")], 0
    # Where it is from, never what it is.
    where = "in the environment" if os.environ.get("HF_TOKEN") else "saved by hf auth login"
    token = f"a token {where} is used" if get_token() else "no token: enough for what is public"
    found, needed = [Finding("ok", "hub", token)], 0

    def look(name: str, ask: Callable[[], tuple[str, int]]) -> int:
        try:
            commit, size = ask()
        except (
            Exception
        ) as error:  # the client's errors share no base class; ours are ready to print
            ours = isinstance(error, (DataError, ModelError))
            text = (
                str(error) if ours else f"{name}: the hub does not answer ({type(error).__name__})"
            )
            if is_whole:
                found.append(Finding("warning", "hub", text, "the cache is whole, and will do"))
            else:
                found.append(Finding("error", "hub", text))
            return 0
        text = f"{name} at {commit[:12]} can be read, {size / 1e9:,.2f} GB are not in the cache yet"
        found.append(Finding("ok", "hub", text))
        return size

    def ask_model() -> tuple[str, int]:
        commit = snapshot(str(chosen.name), chosen.revision, hub, ["config.json"]).name
        patterns = ["*.json"] if chosen.init == "random" else ["*.json", "*.safetensors"]
        return commit, bytes_of_model(str(chosen.name), commit, hub, patterns)

    def ask_dataset(name: str, revision: str | None) -> tuple[str, int]:
        commit = hub_commit(name, revision, cache_dir)
        return commit, 0 if config.data.streaming else bytes_of_data(name, commit, cache_dir)

    if chosen.name is not None:
        needed += look(chosen.name, ask_model)
    for name, revision in datasets.items():
        # Arrow files and tokens are made of what is fetched.
        needed += 3 * look(str(name), partial(ask_dataset, str(name), revision))
    return found, needed


def check_job(
    config: TrainConfig, cache_dir: Path, *, from_cache: bool
) -> tuple[PreTrainedConfig | None, list[Finding]]:
    """Model, tokenizer, chat template, and what is trained on in the first rows; and the model's configuration, where it is known."""
    import torch

    from models.build import parse_model_config, read_model_config
    from models.hub import snapshot
    from scripts.planner.facts import find_model
    from scripts.preparation import prepare_model, read_tokenizer

    chosen = config.model
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else None
    try:
        if chosen.name is not None and chosen.tokenizer is not None:
            # Its folder need not have a tokenizer, and here needs no weights.
            folder = snapshot(chosen.name, chosen.revision, cache_dir / "hub", ["config.json"])
            chosen = replace(chosen, name=None, revision=None, path=str(folder))
        looked_at = replace(config, model=chosen)
        prepared = prepare_model(looked_at, cache_dir, only_tokenizer=True, device_type=device)
        tokenizer = read_tokenizer(config, cache_dir, prepared["tokenizer"])
        folder = Path(prepared["model"]) if prepared["model"] else None
        model = read_model_config(chosen, folder, tokenizer)
    except (DataError, ModelError) as error:
        known, called = None, config.model.name or ""
        with suppress(KeyError, ModelError):  # of published models it is known without a network
            known = parse_model_config(find_model(called), config.model, called)
        return known, [Finding("error", "model", str(error))]
    name = config.model.name or config.model.path or "the built-in model"
    found = [
        Finding("ok", "model", f"{name} ({model.model_type}) and its tokenizer belong together")
    ]
    found += check_rows(config, tokenizer, cache_dir, from_cache=from_cache)
    return model, found


def check_rows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, *, from_cache: bool
) -> Iterator[Finding]:
    """Template and mask on the first rows of every source, as training would see them."""
    from data.chat import Excluded
    from data.formats import encode_rows
    from data.sources import load_rows, shown_url, stream_rows

    for source in (source.data for source in source_configs(config.data)):
        if source.prepared is not None:
            text = f"{source.prepared} holds tokens: their rows are not looked at"
            yield Finding("ok", "data", text)
            continue
        name = source.name or (shown_url(source.path) if source.path else "the built-in data")
        try:
            if from_cache and not config.data.streaming:
                table = load_rows(source, source.split, cache_dir=cache_dir).rows
                rows = [dict(table[index]) for index in range(min(_ROWS, len(table)))]
            else:
                stream = stream_rows(source, source.split, cache_dir=cache_dir)
                rows = list(islice(stream, _ROWS))
            results = list(encode_rows(rows, tokenizer, source, name=name))
        except DataError as error:
            yield Finding("error", "data", str(error))
            continue
        bad = [result for result in results if isinstance(result, Excluded)]
        for result in results:
            place = f"{name}, row {result.row}"
            if isinstance(result, Excluded):
                text = f"{place} cannot be used: {result.reason}"
                remedy = "inspect_data.py with the same flags counts such rows"
                yield Finding(
                    "error" if len(bad) == len(results) else "warning", "data", text, remedy
                )
                continue
            length, trained = len(result.input_ids), result.input_ids[result.supervised]
            text = f"{place}: {length:,} tokens, {len(trained):,} of them trained on"
            if length > source.seq_len and source.packing != "fixed" and source.overlong == "drop":
                text += f", longer than --data.seq_len {source.seq_len}: left out"
                yield Finding("warning", "data", text, "--data.overlong split or truncate")
                continue
            if len(trained):
                start = tokenizer.decode(trained[:_SHOWN_TOKENS].tolist())
                text += f": {start!r}" + " ..." * (len(trained) > _SHOWN_TOKENS)
            yield Finding("ok" if len(trained) else "warning", "data", text)


def plan_job(
    config: TrainConfig, model: PreTrainedConfig, *, world_size: int, memory: float | None
) -> tuple[MemoryPlan | None, list[Finding]]:
    """What a GPU of `memory` bytes, or any, will hold, as plan.py says; or why that cannot be said."""
    from scripts.planner.memory import plan_memory
    from scripts.planner.work import batch_of

    try:
        micro_batch_size, _, grad_accum_steps = batch_of(config, gpus=world_size)
        plan = plan_memory(
            config,
            model,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            gpu_gib=(memory or 0) / 2**30,
        )
    except TrainError as error:
        remedy = f"looked at for {_count(world_size, 'rank')}: --world_size says otherwise"
        return None, [Finding("error", "batch", str(error), remedy)]
    except ModelError as error:
        return None, [Finding("warning", "memory", str(error))]
    return plan, []


def check_fit(plan: MemoryPlan, *, world_size: int, memory: float | None) -> Finding:
    """What a GPU needs is there: `memory` bytes, if any."""
    from scripts.planner.planning import room_of

    room = room_of(plan, gib=(memory or 0) / 2**30)
    parts = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in plan.parts.items())
    text = f"{room.needed:.1f} GiB a GPU on {_count(world_size, 'rank')} ({parts}), planned, not measured"
    if memory is None:
        return Finding("ok", "memory", f"{text}; no GPU here to compare with")
    text += f"; there are {room.there:.1f}"
    remedy = "--parallel.activation_checkpointing full, a smaller --micro_batch_size; plan.py --search finds a way"
    if not room.fits:
        return Finding("error", "memory", text, remedy)
    if room.tight:
        return Finding("warning", "memory", f"{text}, and {room.reserved:.1f} reserved", remedy)
    return Finding("ok", "memory", text)


def _bytes_to_keep(config: TrainConfig, plan: MemoryPlan, *, share: float) -> tuple[float, float]:
    """In output_dir: checkpoints, one of them still being written, and the export. In the host memory of a node with this
    share of the ranks: copies of a checkpoint, and what is offloaded.
    """
    from trainer.precision import BYTES, bytes_per_parameter, definite

    sizes = bytes_per_parameter(config.parallel, config.optimizer)
    trained = plan.trained_parameters
    checkpoint = trained * (sizes["masters"] + sizes["optimizer state"])
    saved = config.checkpoint
    on_disk = checkpoint * (1 + saved.keep_last if saved.every else 1)
    if saved.export in (True, "both"):
        on_disk += plan.parameters * BYTES[config.model.dtype]
    in_host = checkpoint if saved.asynchronous else 0
    if config.parallel.cpu_offload:
        frozen = (plan.parameters - trained) * BYTES[definite(config.parallel, "cuda").param_dtype]
        in_host += trained * sum(sizes.values()) + frozen
    return on_disk, in_host * min(1, share * config.parallel.dp_replicate)


def _resumption(config: TrainConfig, output_dir: Path) -> Iterator[Finding]:
    """What an output folder that has been used before means."""
    steps = sorted(path.name for path in output_dir.glob("checkpoints/step-*"))
    if steps and config.resume == "never":
        text = f"{output_dir} holds {steps[-1]}, and --resume never starts no run there"
        yield Finding("error", "output_dir", text, "give another --output_dir")
    elif steps:
        yield Finding("ok", "output_dir", f"the run there continues from {steps[-1]}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


if __name__ == "__main__":
    run_command(main)
