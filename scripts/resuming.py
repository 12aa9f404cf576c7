"""What a checkpoint says of its run beside tensors, and whether a run may go on from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.loader import batch_digests
from data.mixture import Mixture
from models.causal_lm import PackedCausalLM
from scripts.batching import order_of_samples
from scripts.config import OF_SAMPLES, TrainConfig
from scripts.extensions import source_of
from scripts.job import Job
from scripts.partial import check_part
from trainer.checkpoint import Checkpointer, Store
from trainer.errors import TrainError
from trainer.functions import CALLABLE
from trainer.loop import Progress

# Global batches behind a checkpoint whose content it holds the hash of.
_NEXT_BATCHES = 3
_SHOWN_CHANGES = 8
_PRECISION = ("param_dtype", "reduce_dtype", "master_dtype", "float8")
# Of a model's configuration, what its computation does not depend on.
_NOT_THE_MODEL = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def lasting_settings(
    job: Job,
    mixture: Mixture | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PackedCausalLM,
    steps: int,
) -> dict[str, Any]:
    """What may not change unnoticed when a run goes on: which samples come, and what a step makes of them.

    The keys at the top are those of `--allow_changed`. Not among them, so free: how often is logged, evaluated and
    saved, micro_batch_size, the number of ranks and everything of `parallel` but its precision.
    """
    config = job.config
    architecture = json.loads(model.hf.config.to_json_string(use_diff=False))
    optimizer, schedule = asdict(config.optimizer), asdict(config.schedule)
    del optimizer["max_skipped_steps"]
    for part in (optimizer, schedule):
        if part["name"].startswith(CALLABLE):
            part["name"] = source_of(part["name"])
    settings = {
        **order_of_samples(job, mixture, tokenizer),
        "loss": {"function": source_of(config.loss), **config.loss_options}
        if config.loss_options
        else source_of(config.loss),
        "model": {
            "function": source_of(config.model.function),
            "name": config.model.name,
            **{key: value for key, value in architecture.items() if key not in _NOT_THE_MODEL},
        },
        "optimizer": optimizer,
        "schedule": schedule,
        # A constant rate does not depend on where the run ends.
        "steps": None if config.schedule.name == "constant" else steps,
        "precision": {name: getattr(config.parallel, name) for name in _PRECISION},
    }
    return json.loads(json.dumps(settings))  # as a checkpoint gives them back


def next_batches(job: Job, mixture: Mixture, samples: int) -> list[str]:
    """Hashes of the global batches behind the first `samples` samples."""
    return batch_digests(
        mixture,
        seq_len=job.config.data.seq_len,
        seed=job.config.seed,
        start_sample=samples,
        global_batch_size=job.global_batch_size,
        count=_NEXT_BATCHES,
    )


def open_mirror(config: TrainConfig) -> Store | None:
    """Where copies of the checkpoints go. Raises DataError."""
    if config.checkpoint.mirror is None or config.dry_run:
        return None
    from data.remote import RemoteFolder  # and with it fsspec, which few runs need

    return RemoteFolder(config.checkpoint.mirror)


def resume(
    job: Job,
    checkpointer: Checkpointer,
    settings: dict[str, Any],
    mixture: Mixture | None,
    part: dict[str, Any] | None,
) -> tuple[Progress, list[dict[str, int]] | None]:
    """Continue from a checkpoint if there is one to continue from.

    Returns:
        How far it was, and of a stream the state of each data-parallel rank.

    Raises:
        TrainError: `--resume never` would mix two runs; or the checkpoint is of a run with other settings or samples,
            or trained another part of the model.
    """
    wanted = job.config.resume
    if wanted == "never":
        if held := checkpointer.held():
            mirror = " or --checkpoint.mirror" if job.config.checkpoint.mirror else ""
            raise TrainError(
                f"{job.output_dir}{mirror} already holds {held[-1]} and checkpoints are never "
                f"overwritten; give another --output_dir{mirror}, or continue with --resume auto"
            )
        return Progress(), None
    checkpoint = checkpointer.newest() if wanted == "auto" else Path(wanted)
    if checkpoint is None:
        return Progress(), None
    state = checkpointer.read_state(checkpoint)
    check_part(checkpoint, state.get("partial"), part)
    _check_settings(checkpoint, state["settings"], settings, job.config.allow_changed)
    was = state["settings"]
    # With a change of what decides the samples other ones were asked for.
    if mixture is not None and all(was[key] == settings[key] for key in OF_SAMPLES):
        now = next_batches(job, mixture, state["samples"])
        if state.get("next_batches") != now:
            raise TrainError(
                f"{checkpoint}: the {_NEXT_BATCHES} batches that come next are not those the run would have seen, "
                "though no setting differs; the tokens in --cache_dir have been changed: remove "
                "CACHE_DIR/tokens, or bring back the version of this program that wrote the checkpoint"
            )
    checkpointer.restore(checkpoint)
    return Progress(step=state["step"], samples=state["samples"]), state.get("stream")


def _check_settings(
    checkpoint: Path, was: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...]
) -> None:
    before, after = _flat(was), _flat(now)
    changed = [
        key
        for key in before | after
        if before.get(key) != after.get(key) and key.split(".")[0] not in allowed
    ]
    if changed:
        shown = [
            f"{key} was {before.get(key)}, is {after.get(key)}" for key in changed[:_SHOWN_CHANGES]
        ]
        more = [f"{len(changed) - len(shown)} more"] if len(changed) > len(shown) else []
        keys = dict.fromkeys([*allowed, *(key.split(".")[0] for key in changed)])
        raise TrainError(
            f"{checkpoint} is of a run with other settings ({'; '.join([*shown, *more])}); undo the change, start "
            f"anew with another --output_dir, or go on with --allow_changed '[{', '.join(keys)}]'"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"format": 1}} -> {"data.format": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
