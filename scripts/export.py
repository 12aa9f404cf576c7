"""Turn a checkpoint of train.py into a Hugging Face folder, on one process without a GPU.

python scripts/export.py OUTPUT_DIR/checkpoints/step-00000020 DIR
python scripts/export.py OUTPUT_DIR DIR     (its newest intact checkpoint)

Tensors are read and written one at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import torch


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
    arguments = parser.parse_args(argv)
    if not arguments.max_shard_gib > 0:
        parser.error("--max_shard_gib must be above 0")

    import torch

    from models.errors import ModelError
    from trainer.errors import TrainError

    try:
        checkpoint = find_checkpoint(arguments.checkpoint)
        count = export_checkpoint(
            checkpoint,
            arguments.folder,
            dtype=getattr(torch, arguments.dtype),
            max_shard_bytes=int(arguments.max_shard_gib * 2**30),
            verify=arguments.verify == "true",
        )
        size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
        compared = ", read again and compared" if arguments.verify == "true" else ""
        print(
            f"{count} tensors of {checkpoint.name}, {size:,} bytes of {arguments.dtype}{compared}, "
            f"exported to {arguments.folder}"
        )
    except (ModelError, TrainError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
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
) -> int:
    """Write a checkpoint as a Hugging Face folder, which appears at once and complete.

    Returns:
        How many tensors were written.

    Raises:
        ModelError: the folder is there or cannot be written, or is not what the checkpoint holds.
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

    def read(name: str) -> torch.Tensor:
        return stored.read(f"hf.{name}", dtype)

    with staged(folder, replace=False) as staging:
        copy_model_files(_model_files(output_dir), staging, dtype=dtype)
        model = empty_model(staging)
        tensors = export_tensors(model)
        _check_fits(checkpoint, stored.shapes(), model.hf.state_dict(), tensors)
        parts = stored_parts(model.hf, tensors)
        write_weights(
            staging, parts, read, dtype=dtype, max_shard_bytes=max_shard_bytes, verify=verify
        )
        (staging / CARD_FILE).write_text(model_card(output_dir, state["step"]), encoding="utf-8")
    return len(parts)


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
    """Every exported tensor is in the checkpoint with its shape, and nothing is there that the model lacks."""
    from trainer.errors import TrainError

    wrong = [name for name in exported if stored.get(f"hf.{name}") != exported[name].shape]
    wrong += [name for name in stored if name.removeprefix("hf.") not in model]
    if wrong:
        raise TrainError(
            f"{checkpoint} does not fit the config.json of its run: {len(wrong)} tensors are missing, "
            f"left over or of another shape ({', '.join(wrong[:5])})"
        )


if __name__ == "__main__":
    sys.exit(main())
