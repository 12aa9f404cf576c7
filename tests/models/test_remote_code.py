"""Python files beside a model are never run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from data.embedded import build_tokenizer
from models.build import build_model, read_model_config
from models.config import ModelConfig
from models.errors import ModelError
from models.tokenizer import load_tokenizer
from tests.support.models import tiny_config


def test_S03_code_of_a_model_or_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    build_tokenizer(folder)
    tiny_config(vocab_size=600).save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    for name, classes in {
        "config.json": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }.items():
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": classes}))

    tokenizer = load_tokenizer(folder, cache_dir=tmp_path / "cache")
    config = read_model_config(ModelConfig(), folder, tokenizer)
    build_model(config, attention="sdpa", seed=0)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "evil"}))
    with pytest.raises(ModelError, match="says model_type 'evil'; this trainer knows qwen2"):
        read_model_config(ModelConfig(), folder, tokenizer)

    assert not canary.exists()
    runpy.run_path(str(folder / "evil.py"))  # the canary would have sung
    assert canary.exists()
