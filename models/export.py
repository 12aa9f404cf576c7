"""The live, sharded model as a Hugging Face folder: safetensors, config, tokenizer, template, generation_config."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.tokenizer import stop_token_ids
from models.weights import INDEX_FILE, SINGLE_FILE, export_tensors


def export_model(
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    is_writer: bool,
    source: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the model so that `AutoModelForCausalLM.from_pretrained(folder)` and vLLM load it.

    Every rank must call this: tensors are gathered one at a time. Only the writer touches the disk. The folder
    appears at once, complete; one that was there before is replaced.

    Args:
        model: live model, sharded or not.
        tokenizer: saved beside the weights with its chat template.
        folder: where the export goes.
        dtype: floating-point type on disk.
        is_writer: True on exactly one rank.
        source: folder of the model that was trained; its sampling settings are kept.
        max_shard_bytes: a new file is begun when one would grow beyond this.

    Raises:
        ModelError: on the writer, when a file cannot be written. The gathering is finished first, so that the
            other ranks are not left waiting.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    failure: OSError | None = None
    if is_writer:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as error:
            failure = error
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        nonlocal failure
        if not pending:
            return
        shards.append(list(pending))
        try:
            if failure is None:
                save_file(pending, staging / f"shard-{len(shards)}", metadata={"format": "pt"})
        # safetensors reports a full disk as its own RuntimeError
        except (OSError, RuntimeError) as error:
            failure = OSError(str(error))
        pending.clear()

    for name, tensor in export_tensors(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_writer:
            full = full.detach().to("cpu", dtype).contiguous()
            size = full.numel() * full.element_size()
            if sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
                flush()
            pending[name] = full
            total += size
    if not is_writer:
        return
    flush()
    try:
        if failure:
            raise failure
        _name_shards(staging, shards, total)
        hf_config = type(model.hf.config).from_dict(model.hf.config.to_dict())
        hf_config.dtype = dtype
        hf_config.architectures = [type(model.hf).__name__]
        # What it was trained to end a turn with, everywhere a serving engine may look for it.
        stops = stop_token_ids(tokenizer)
        hf_config.eos_token_id = stops[0]
        hf_config.bos_token_id = None
        hf_config.pad_token_id = tokenizer.pad_token_id
        hf_config.save_pretrained(staging)
        generation = GenerationConfig()
        if source is not None and (source / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(source)
        generation.update(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
        generation.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _replace(folder, staging)
    except OSError as error:
        raise ModelError(
            f"the export to {folder} could not be written ({error}); free space and export again"
        ) from None


def _replace(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, which is only removed once it has been replaced."""
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        os.rename(folder, former)
    os.rename(complete, folder)
    shutil.rmtree(former, ignore_errors=True)


def _name_shards(staging: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards their final names, which say how many there are, and write the index."""
    if len(shards) == 1:
        os.rename(staging / "shard-1", staging / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(staging / f"shard-{number}", staging / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
