"""A base model, trained with a chat template of the user's choice, is exported as a chat model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from models.tokenizer import CHATML
from tests.support.job import load_export, train
from tests.support.tiny import write_chat, write_model


def _as_a_base_model(folder: Path) -> None:
    """Without a template, and with ends that are those of a text."""
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "config.json"):
        file = folder / name
        eos = {"eos_token": "<|endoftext|>"} if name.startswith("tok") else {"eos_token_id": 0}
        file.write_text(json.dumps({**json.loads(file.read_text()), **eos}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "max_new_tokens": 2048}')


@pytest.mark.distributed
def test_the_export_has_the_template_and_stops_at_its_end(tmp_path: Path, cache_dir: Path) -> None:
    model, chat = write_model(tmp_path / "model"), write_chat(tmp_path / "chat.jsonl", count=60)
    _as_a_base_model(model)
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    flags = [
        f"--model.path={model}",
        f"--data.path={chat}",
        "--data.seq_len=128",
        "--micro_batch_size=2",
        "--steps=1",
        "--log.tensorboard=false",
    ]
    output_dir = tmp_path / "out"
    result = train(
        [*flags, "--model.chat_template=chatml"], 2, cache_dir=cache_dir, output_dir=output_dir
    )
    assert result.returncode == 0, result.output

    export = output_dir / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    generation = GenerationConfig.from_pretrained(export)
    config = json.loads((export / "config.json").read_text())
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    assert (config["eos_token_id"], config["pad_token_id"]) == (end, pad)
    assert (generation.eos_token_id, generation.pad_token_id) == ([end, pad], pad)
    assert generation.max_new_tokens == 2048

    loaded: Any = load_export(output_dir)
    calls: list[int] = []

    def end_after_two(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        calls.append(1)
        forced = torch.zeros_like(logits)
        forced[..., end if len(calls) == 3 else 300] = 1.0
        return forced

    loaded.get_output_embeddings().register_forward_hook(end_after_two)
    prompt = torch.tensor([[5, 6]])
    answer = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
    assert answer[0, 2:].tolist() == [300, 300, end]

    # Another template means other tokens: what they have trained is not continued.
    plain = tmp_path / "plain.jinja"
    plain.write_text(CHATML.replace('role ~ "', 'role ~ ":'))
    again = train(
        [*flags, f"--model.chat_template={plain}", "--steps=2"],
        2,
        cache_dir=cache_dir,
        output_dir=output_dir,
    )
    assert again.returncode == 1
    (line,) = again.stderr.splitlines()
    assert "undo the change" in line and "chat_template" in line
