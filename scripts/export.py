"""Turn a checkpoint of train.py into a Hugging Face folder, on one process without a GPU.

python scripts/export.py OUTPUT_DIR/checkpoints/step-00000020 DIR
python scripts/export.py OUTPUT_DIR DIR     (its newest intact checkpoint)

Tensors are read and written one at a time. Of a run that trained a part of a model, the rest comes from its base model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import printable
from scripts.environment import keep_others_out
from scripts.process import run_command

if TYPE_CHECKING:
    import torch

    from models.causal_lm import PackedCausalLM
    from trainer.stored import StoredTensors


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint; returns the exit code: 0, 1 for a fault, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Turn a checkpoint of train.py into a Hugging Face folder."
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="OUTPUT_DIR/checkpoints/step-XXXXXXXX, or OUTPUT_DIR for its newest intact one",
    )
    parser.add_argument("folder", type=Path, help="new folder of the Hugging Face model")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="floating-point type of the safetensors (default: bfloat16)",
    )
    parser.add_argument(
        "--max_shard_gib",
        type=float,
        default=4.0,
        help="GiB beyond which a new safetensors file is begun (default: 4)",
    )
    parser.add_argument(
        "--verify",
        choices=("true", "false"),
        default="true",
        help="read what was written and compare it, by SHA-256, with what it should be (default: true)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="folder of the model that adapters or last layers were trained on (default: where it was)",
    )
    parser.add_argument(
        "--adapter",
        choices=("true", "false"),
        default="false",
        help="write the adapters alone, in float32 and peft's format, not merged (default: false)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.max_shard_gib > 0:
        parser.error("--max_shard_gib must be above 0")

    keep_others_out()
    import torch

    from models.errors import ModelError
    from trainer.errors import TrainError

    try:
        checkpoint = find_checkpoint(arguments.checkpoint)
        if arguments.adapter == "true":
            count = export_adapter_of(checkpoint, arguments.folder, base=arguments.base)
            print(f"{count} tensors of {checkpoint.name}, exported to {arguments.folder}")
            return 0
        count = export_checkpoint(
            checkpoint,
            arguments.folder,
            dtype=getattr(torch, arguments.dtype),
            max_shard_bytes=int(arguments.max_shard_gib * 2**30),
            verify=arguments.verify == "true",
            base=arguments.base,
        )
        size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
        compared = ", read again and compared" if arguments.verify == "true" else ""
        print(
            f"{count} tensors of {checkpoint.name}, {size:,} bytes of {arguments.dtype}{compared}, "
            f"exported to {arguments.folder}"
        )
    except (ModelError, TrainError) as error:
        print(f"export.py: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def find_checkpoint(given: Path) -> Path:
    """An intact checkpoint: the one that is given, or the newest of a run's folder.

    Raises:
        TrainError: there is none.
    """
    from trainer.errors import TrainError
    from trainer.manifest import complete_checkpoints, damage

    if not given.is_dir():
        raise TrainError(f"{given} is not there; give a checkpoint, or the OUTPUT_DIR of a run")
    if given.name.startswith("step-"):
        if problem := damage(given):
            raise TrainError(f"{given} is not an intact checkpoint: {problem}")
        return given
    for candidate in reversed(complete_checkpoints(given / "checkpoints")):
        problem = damage(candidate)
        if problem is None:
            return candidate
        print(f"{candidate} is damaged ({problem}); taking the one before", file=sys.stderr)
    raise TrainError(f"{given} holds no intact checkpoint in checkpoints/step-XXXXXXXX")


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    verify: bool,
    base: Path | None = None,
) -> int:
    """Write a checkpoint as a Hugging Face folder, which appears at once and complete.

    `base` is where the model is now that a checkpoint holds a part of.

    Returns:
        How many tensors were written.

    Raises:
        ModelError: the folder is there or cannot be written, or is not what the checkpoint holds; or the
            base model is not there.
        TrainError: the checkpoint lacks a tensor, or the run its model folder.
    """
    import json

    from models.export import (
        CARD_FILE,
        copy_model_files,
        empty_model,
        staged,
        write_weights,
    )
    from models.names import stored_parts
    from models.weights import export_tensors
    from scripts.model_card import model_card
    from trainer.stored import StoredTensors

    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    output_dir = checkpoint.absolute().parents[1]
    stored = StoredTensors(checkpoint)

    with staged(folder, replace=False) as staging:
        copy_model_files(_model_files(output_dir), staging, dtype=dtype)
        model = empty_model(staging)
        tensors = export_tensors(model)
        read, shapes = _reader(state, stored, dtype, base, model)
        _check_fits(checkpoint, shapes, model.hf.state_dict(), tensors)
        parts = stored_parts(model.hf, tensors)
        write_weights(
            staging, parts, read, dtype=dtype, max_shard_bytes=max_shard_bytes, verify=verify
        )
        (staging / CARD_FILE).write_text(model_card(output_dir, state["step"]), encoding="utf-8")
    return len(parts)


def _reader(
    state: dict[str, Any],
    stored: StoredTensors,
    dtype: torch.dtype,
    base: Path | None,
    model: PackedCausalLM,
) -> tuple[Callable[[str], torch.Tensor], dict[str, torch.Size]]:
    """What reads whole tensors by name, adapters merged, and the shapes of all there are."""
    import torch

    from models.partial import merged
    from models.weights import export_tensors, pretrained_name
    from scripts.partial import lora_of, open_base

    held = {name.removeprefix("hf."): shape for name, shape in stored.shapes().items()}
    record = state.get("partial")
    if record is None:
        return lambda name: stored.read(f"hf.{name}", dtype), held
    read_base = open_base(record, base, model)

    def read(name: str) -> torch.Tensor:
        return stored.read(f"hf.{name}", torch.float32) if name in held else read_base(name)

    shapes = {name: tensor.shape for name, tensor in export_tensors(model).items()}
    shapes |= {name: shape for name, shape in held.items() if pretrained_name(name)}
    return merged(read, held, lora_of(record), record["tokens"]), shapes


def export_adapter_of(checkpoint: Path, folder: Path, *, base: Path | None) -> int:
    """Write the adapters of a checkpoint as `PeftModel.from_pretrained` reads them; returns how many tensors.

    Raises:
        ModelError: the folder is there or cannot be written.
        TrainError: the checkpoint has no adapters.
    """
    import json

    import torch
    from transformers import AutoConfig

    from models.export import copy_tokenizer, write_adapter_folder
    from models.weights import pretrained_name
    from scripts.model_card import model_card
    from scripts.partial import adapter_config
    from trainer.errors import TrainError
    from trainer.stored import StoredTensors

    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    record = state.get("partial")
    if record is None or not record["lora"]["rank"]:
        raise TrainError(f"{checkpoint} has no adapters; leave --adapter out")
    if base is not None:
        record["base"] |= {"folder": str(base.absolute()), "commit": None}
    output_dir = checkpoint.absolute().parents[1]
    files = _model_files(output_dir)
    stored = StoredTensors(checkpoint)
    tensors = {
        name.removeprefix("hf."): stored.read(name, torch.float32)
        for name in stored.shapes()
        if pretrained_name(name) is None and not _is_tied_copy(name, record)
    }
    layers = AutoConfig.from_pretrained(files).num_hidden_layers
    write_adapter_folder(
        folder,
        tensors,
        partial(copy_tokenizer, files),
        config=adapter_config(record, layers=layers),
        card=model_card(output_dir, state["step"], library="peft"),
        replace=False,
    )
    return len(tensors)


def _is_tied_copy(name: str, record: dict[str, Any]) -> bool:
    """A checkpoint names the rows of a tied head too."""
    return name == "hf.lm_head.token_rows" and "lm_head" not in record["token_layers"]


def _model_files(output_dir: Path) -> Path:
    """The folder of a run with the configuration and the tokenizer of what it trains."""
    from trainer.errors import TrainError

    for folder in (output_dir / "model", output_dir / "export"):
        if (folder / "config.json").is_file():
            return folder
    raise TrainError(
        f"{output_dir} has no model/config.json, which says what the checkpoint is a checkpoint of; "
        "copy it from where the run was (train.py writes OUTPUT_DIR/model when it starts or continues)"
    )


def _check_fits(
    checkpoint: Path,
    stored: Mapping[str, torch.Size],
    model: Mapping[str, torch.Tensor],
    exported: Mapping[str, torch.Tensor],
) -> None:
    """Every exported tensor is there with its shape, and nothing that the model lacks."""
    from trainer.errors import TrainError

    wrong = [name for name in exported if stored.get(name) != exported[name].shape]
    wrong += [name for name in stored if name not in model]
    if wrong:
        raise TrainError(
            f"{checkpoint} does not fit the config.json of its run: {len(wrong)} tensors are missing, "
            f"left over or of another shape ({', '.join(wrong[:5])})"
        )


if __name__ == "__main__":
    run_command(main)
