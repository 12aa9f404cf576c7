"""Answer prompts with an exported model, on CPU or GPU.

python scripts/generate.py MODEL_DIR "What is 17 + 25?"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Answer prompts with an exported model."
    )
    parser.add_argument(
        "model", type=Path, help="folder with a Hugging Face model, such as OUTPUT_DIR/export"
    )
    parser.add_argument(
        "prompt", nargs="+", help="one or more user messages, each answered on its own"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="tokens per answer (default: 256)"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.model / "config.json").is_file():
        parser.exit(2, f"generate.py: error: {arguments.model} holds no model (no config.json)\n")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a local folder is all that is read
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from models.causal_lm import PackedCausalLM
    from models.generation import generate_answers

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    hf = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
    answers = generate_answers(
        PackedCausalLM(hf),
        tokenizer,
        [[{"role": "user", "content": prompt}] for prompt in arguments.prompt],
        max_new_tokens=arguments.max_new_tokens,
        device=device,
    )
    for prompt, answer in zip(arguments.prompt, answers, strict=True):
        print(f"{prompt}\n  {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
