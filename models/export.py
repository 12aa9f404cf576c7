"""A model as a Hugging Face folder: safetensors, config, tokenizer, template, generation_config, model card.

The weights are written one tensor at a time, whether they come from the live, sharded model or from a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from models.build import build_model
from models.causal_lm import PackedCausalLM
from models.config import LoraConfig
from models.errors import ModelError
from models.partial import merged, trained_tokens, write_adapter
from models.tokenizer import stop_token_ids
from models.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    export_tensors,
    pretrained_name,
    tensor_files,
)

if TYPE_CHECKING:
    import peft

MAX_SHARD_BYTES = 4 * 2**30
CARD_FILE = "README.md"
_CODES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors calls them
_BLOCK_BYTES = 16 * 2**20


def export_model(
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    is_writer: bool,
    lora: LoraConfig = LoraConfig(),  # noqa: B008  # frozen
    source: Path | None = None,
    card: Callable[[], str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
        lora: what the model's adapters were made with; they are merged.
        source: folder of the model that was trained; its sampling settings are kept.
        card: gives the text of the model card; called on the writer.
        max_shard_bytes: a new file is begun when one would grow beyond this.

    Raises:
        ModelError: on the writer, when a file cannot be written. The gathering is finished first, so that the
            other ranks are not left waiting.
    """
    held = {pretrained_name(name) or name: tensor for name, tensor in model.hf.state_dict().items()}
    read = merged(lambda name: _whole(held[name]), held, lora, trained_tokens(model))
    tensors = export_tensors(model)
    waiting = dict.fromkeys(tensors)

    def gather(name: str) -> Tensor:
        del waiting[name]
        return read(name)

    try:
        if is_writer:
            with staged(folder) as staging:
                write_weights(
                    staging, tensors, gather, dtype=dtype, max_shard_bytes=max_shard_bytes
                )
                write_model_files(staging, model, tokenizer, dtype=dtype, source=source)
                if card is not None:
                    (staging / CARD_FILE).write_text(card(), encoding="utf-8")
    finally:
        for name in list(waiting):
            gather(name)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def export_adapter(
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    config: peft.LoraConfig,
    is_writer: bool,
    card: Callable[[], str] | None = None,
) -> None:
    """Write a live model's adapters so that `PeftModel.from_pretrained` loads them; every rank must call this.

    Raises:
        ModelError: on the writer, when a file cannot be written.
    """
    tensors = {
        name: _whole(tensor).cpu()
        for name, tensor in model.hf.named_parameters()  # what is tied comes once
        if pretrained_name(name) is None
    }
    if is_writer:
        write_adapter_folder(
            folder, tensors, tokenizer.save_pretrained, config=config, card=card and card()
        )


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    save_tokenizer: Callable[[Path], object],
    *,
    config: peft.LoraConfig,
    card: str | None,
    replace: bool = True,
) -> None:
    """Adapters, their configuration, tokenizer and model card; the folder appears at once, complete."""
    with staged(folder, replace=replace) as staging:
        write_adapter(staging, tensors, config)
        save_tokenizer(staging)
        if card is not None:
            (staging / CARD_FILE).write_text(card, encoding="utf-8")


@contextmanager
def staged(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """A hidden folder to write in; when the block is done it takes the place of `folder`, else it is removed.

    Raises:
        ModelError: something could not be written; or `folder` is there and is not to be replaced.
    """
    if not replace and os.path.lexists(folder):
        raise ModelError(f"{folder} is there already; remove it, or give another folder")
    staging = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in [*(path for path in staging.rglob("*") if path.is_file()), staging]:
            _sync(path)
        _replace(folder, staging)
    except OSError as error:
        raise ModelError(
            f"{folder} could not be written ({error}); free space or give another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, which is only removed once it has been replaced."""
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        os.rename(folder, former)
    os.rename(complete, folder)
    shutil.rmtree(former, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_model_files(
    folder: Path,
    model: PackedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    source: Path | None,
) -> None:
    """Write what a Hugging Face folder holds beside the weights: config, generation_config, tokenizer, template.

    Args:
        folder: exists.
        model: gives its configuration.
        tokenizer: its end of turn becomes the end of generation.
        dtype: floating-point type the configuration names.
        source: folder of the model that was trained; its sampling settings are kept.
    """
    hf_config = type(model.hf.config).from_dict(model.hf.config.to_dict())
    hf_config.dtype = dtype
    hf_config.architectures = [type(model.hf).__name__]
    # What it was trained to end a turn with, everywhere a serving engine may look for it.
    stops = stop_token_ids(tokenizer)
    hf_config.eos_token_id = stops[0]
    hf_config.bos_token_id = None
    hf_config.pad_token_id = tokenizer.pad_token_id
    hf_config.save_pretrained(folder)
    generation = GenerationConfig()
    if source is not None and (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    generation.update(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def copy_model_files(source: Path, folder: Path, *, dtype: torch.dtype) -> None:
    """Copy what `write_model_files` wrote to `source` into a folder that exists, for weights of another `dtype`."""
    weights_and_card = shutil.ignore_patterns("*.safetensors", INDEX_FILE, CARD_FILE)
    shutil.copytree(source, folder, ignore=weights_and_card, dirs_exist_ok=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy of what `write_model_files` wrote the tokenizer alone."""
    others = shutil.ignore_patterns("*.safetensors", INDEX_FILE, CARD_FILE, "*config.json")
    shutil.copytree(source, folder, ignore=others, dirs_exist_ok=True)
    shutil.copy(source / "tokenizer_config.json", folder)


def empty_model(folder: Path) -> PackedCausalLM:
    """The model that the folder's config.json describes, without memory: names and shapes only.

    Raises:
        ModelError: transformers cannot read the configuration.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"the config.json of the run cannot be read ({reason})") from None
    return build_model(config, attention="sdpa", seed=None)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write safetensors, and an index if there are several files, with one tensor in memory at a time.

    Args:
        folder: exists.
        tensors: names and shapes; the tensors may be sharded or on the meta device.
        read: gives one whole tensor; called once for each name, in the order of `tensors`.
        dtype: float32 or bfloat16, on disk.
        max_shard_bytes: a new file is begun when one would grow beyond this.
    """
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        weight_map.update(dict.fromkeys(names, file))
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: tensors[name].shape for name in names}, dtype))
            for name in names:
                stream.write(_bytes_of(read(name).to("cpu", dtype)))
    if len(shards) > 1:
        total = sum(sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, and that object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, not copied."""
    array = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # numpy arrays are buffers


def verify_export(folder: Path, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> int:
    """Compare every tensor on the disk with its original, bit for bit, and names and shapes with config.json.

    Args:
        folder: written by `write_weights` and `write_model_files` or `copy_model_files`.
        read: gives the original of a tensor by name.
        dtype: floating-point type the originals were converted to.

    Returns:
        How many tensors there are.

    Raises:
        ModelError: names what differs.
    """
    expected = export_tensors(empty_model(folder))
    files = tensor_files(folder)
    wrong = sorted(set(files) ^ set(expected))
    headers: dict[Path, tuple[dict[str, Any], int]] = {}
    for name in [] if wrong else expected:
        file = files[name]
        if file not in headers:
            headers[file] = _read_header(file)
        entries, start = headers[file]
        entry = entries[name]
        form = entry["shape"], entry["dtype"]
        same = form == (list(expected[name].shape), _CODES[dtype]) and _holds(
            file, start + entry["data_offsets"][0], read(name).to("cpu", dtype)
        )
        if not same:
            wrong.append(name)
    if wrong:
        raise ModelError(
            f"what was written is not the checkpoint: {len(wrong)} of {len(expected)} tensors differ "
            f"({', '.join(wrong[:5])}); check the disk and export again"
        )
    return len(expected)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by name, and the byte at which the data begin."""
    try:
        with safe_open(file, framework="pt"):  # it refuses a file that is cut or contradicts itself
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file.name} was not written whole ({error}); export again") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def _holds(file: Path, offset: int, tensor: Tensor) -> bool:
    """Whether the file has the tensor's bytes at the offset; read in blocks, since a mapped file counts as memory."""
    expected = _bytes_of(tensor)
    with file.open("rb") as stream:
        stream.seek(offset)
        return all(
            stream.read(_BLOCK_BYTES)[: len(expected) - begin]
            == bytes(expected[begin : begin + _BLOCK_BYTES])
            for begin in range(0, len(expected), _BLOCK_BYTES)
        )
