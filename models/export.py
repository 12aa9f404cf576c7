"""A model as a Hugging Face folder: safetensors, config, tokenizer, template, generation_config, model card.

The weights are written one tensor at a time, whether they come from the live, sharded model or from a checkpoint. Experts,
which are one tensor in memory, are written one by one, as on the hub.
"""

from __future__ import annotations

import hashlib
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
from models.layers import ngram_layers
from models.names import Part, stored_parts
from models.partial import merged, trained_tokens, write_adapter
from models.tokenizer import stop_token_ids
from models.weights import INDEX_FILE, SINGLE_FILE, export_tensors, pretrained_name

if TYPE_CHECKING:
    import peft

MAX_SHARD_BYTES = 4 * 2**30
CARD_FILE = "README.md"
_CODES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}  # as safetensors calls them
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
    verify: bool = True,
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
        verify: see `write_weights`.

    Raises:
        ModelError: on the writer, when a file cannot be written or does not hold what was written. The gathering is
            finished first, so that the other ranks are not left waiting.
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
                    staging,
                    stored_parts(model.hf, tensors),
                    gather,
                    dtype=dtype,
                    max_shard_bytes=max_shard_bytes,
                    verify=verify,
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


def _sync(path: Path, *, forget: bool = False) -> None:
    """Wait until the disk has it; `forget` drops it from memory, so that it is next read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
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
    if not ngram_layers(hf_config):  # there it also borders n-grams: it belongs to the weights
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
    parts: Mapping[str, Part],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    verify: bool,
) -> None:
    """Write safetensors, and an index if there are several files, with one parameter in memory at a time.

    Args:
        folder: exists.
        parts: what is written, by name, from `stored_parts`.
        read: gives one whole parameter; called once for each, in the order of `parts`.
        dtype: float32 or bfloat16, of weights on disk.
        max_shard_bytes: a new file is begun when one would grow beyond this.
        verify: read each file again, from the disk where the file system lets go of it, and compare the SHA-256 of
            every tensor with that of what was to be written.

    Raises:
        ModelError: names the tensors that differ.
    """
    types = {name: part.dtype or dtype for name, part in parts.items()}
    sizes = {name: part.shape.numel() * types[name].itemsize for name, part in parts.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    parameter, whole = None, torch.empty(0)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        weight_map.update(dict.fromkeys(names, file))
        digests: dict[str, bytes] = {}
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: (parts[name].shape, types[name]) for name in names}))
            for name in names:
                if parts[name].parameter != parameter:
                    parameter = parts[name].parameter
                    del whole  # before there is another
                    whole = read(parameter)
                data = _bytes_of(parts[name].of(whole).to("cpu", types[name]))
                stream.write(data)
                if verify:
                    digests[name] = hashlib.sha256(data).digest()
                del data
        if verify:
            _sync(folder / file, forget=True)
            _check_digests(folder / file, digests)
    if len(shards) > 1:
        total = sum(sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, and that object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
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


def _check_digests(file: Path, digests: Mapping[str, bytes]) -> None:
    """Compare a file that has just been written with the SHA-256 of every tensor that it should hold."""
    entries, start = _read_header(file)
    changed = []
    for name, digest in digests.items():
        begin, end = entries[name]["data_offsets"]
        if _digest(file, start + begin, end - begin) != digest:
            changed.append(name)
    if changed:
        raise ModelError(
            f"what {file.name} holds is not what was written: {len(changed)} of {len(digests)} tensors "
            f"differ ({', '.join(changed[:5])}); check the disk and export again"
        )


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


def _digest(file: Path, begin: int, length: int) -> bytes:
    """SHA-256 of a part of a file; read in blocks, since a mapped file counts as memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(begin)
        for done in range(0, length, _BLOCK_BYTES):
            digest.update(stream.read(min(_BLOCK_BYTES, length - done)))
    return digest.digest()
