"""Answer prompts with an exported model, an adapter or a checkpoint, on CPU or GPU.

python scripts/generate.py MODEL_DIR "What is 17 + 25?"
python scripts/generate.py OUTPUT_DIR/checkpoints/step-00000020 "What is 17 + 25?"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import printable, printable_lines
from scripts.process import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Answer prompts with an exported model, an adapter or a checkpoint.",
    )
    parser.add_argument(
        "model",
        type=Path,
        help="folder with a Hugging Face model, such as OUTPUT_DIR/export, with an adapter, or a checkpoint of train.py",
    )
    parser.add_argument(
        "prompt", nargs="+", help="one or more user messages, each answered on its own"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="tokens per answer (default: 256)"
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="folder of the model that an adapter or a checkpoint of a part belongs to (default: where it was)",
    )
    arguments = parser.parse_args(argv)
    is_checkpoint = arguments.model.name.startswith("step-")
    is_adapter = (arguments.model / "adapter_config.json").is_file()
    if not is_checkpoint and not is_adapter and not (arguments.model / "config.json").is_file():
        parser.exit(2, f"generate.py: error: {arguments.model} holds no model (no config.json)\n")
    base = arguments.base
    if is_adapter and base is None:
        base = base_of(arguments.model)
    if is_adapter and not (base / "config.json").is_file():
        parser.exit(
            2,
            f"generate.py: error: {base}, which the adapter adapts, is no folder with a model; give --base DIR\n",
        )
    os.environ["HF_HUB_OFFLINE"] = "1"  # a local folder is all that is read
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    if not is_checkpoint:
        answer(
            base if is_adapter else arguments.model,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            adapter=arguments.model if is_adapter else None,
        )
        return 0

    import torch

    from models.errors import ModelError
    from models.export import MAX_SHARD_BYTES
    from scripts.export import export_checkpoint, find_checkpoint
    from trainer.errors import TrainError

    with tempfile.TemporaryDirectory(prefix="generate-") as temporary:
        folder = Path(temporary, "model")
        try:
            export_checkpoint(
                find_checkpoint(arguments.model),
                folder,
                dtype=torch.bfloat16,
                max_shard_bytes=MAX_SHARD_BYTES,
                verify=False,
                base=base,
            )
        except (ModelError, TrainError) as error:
            parser.exit(2, f"generate.py: error: {printable(str(error))}\n")
        answer(folder, arguments.prompt, max_new_tokens=arguments.max_new_tokens)
    return 0


def base_of(adapter: Path) -> Path:
    """Where the model of an adapter is: what peft's configuration names, or, if that is a model on the hub, where the run had it."""
    text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    named = Path(json.loads(text)["base_model_name_or_path"])
    for state in sorted(adapter.parent.glob("checkpoints/step-*/state.json"), reverse=True):
        if (named / "config.json").is_file():
            break
        with suppress(OSError, ValueError, KeyError, TypeError):
            return Path(json.loads(state.read_text(encoding="utf-8"))["partial"]["base"]["folder"])
    return named


def answer(
    model: Path, prompts: list[str], *, max_new_tokens: int, adapter: Path | None = None
) -> None:
    """Print every prompt with the answer of the model in a Hugging Face folder, with an adapter on it or not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from models.causal_lm import PackedCausalLM
    from models.generation import generate_answers

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hf = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(adapter or model, trust_remote_code=False)
    if adapter is not None:
        if len(tokenizer) > hf.config.vocab_size:  # tokens were added, whose rows the adapter holds
            hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        hf.load_adapter(str(adapter))
    answers = generate_answers(
        PackedCausalLM(hf.to(device)),
        tokenizer,
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        device=device,
    )
    for prompt, text in zip(prompts, answers, strict=True):
        print(printable_lines(f"{prompt}\n  {text}"))


if __name__ == "__main__":
    run_command(main)
