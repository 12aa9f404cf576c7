"""Which chat template a tokenizer gets, and which token ends a turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from data.embedded import build_tokenizer
from models.errors import ModelError
from models.tokenizer import load_tokenizer, stop_token_ids

_CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
_END_OF_TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as base models have it: no template, and its end is that of a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def _load(folder: Path, chat_template: str, *add: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        folder, cache_dir=folder, add_special_tokens=add, chat_template=chat_template
    )


def test_native_is_what_the_tokenizer_brings(folder: Path, qwen3_tokenizer_dir: Path) -> None:
    base = _load(folder, "native")
    assert base.chat_template is None and base.eos_token == "<|endoftext|>"
    qwen3 = _load(qwen3_tokenizer_dir, "native")
    assert "enable_thinking" in str(qwen3.chat_template)
    assert (qwen3.eos_token, qwen3.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert stop_token_ids(qwen3) == [151645, 151643]


def test_chatml_for_a_model_without_a_template(folder: Path, qwen3_tokenizer_dir: Path) -> None:
    for place in (folder, qwen3_tokenizer_dir):
        tokenizer = _load(place, "chatml")
        text = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        assert tokenizer.apply_chat_template(_CHAT, tokenize=False) == text
        prompt = tokenizer.apply_chat_template(
            _CHAT[:1], tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(prompt) and prompt.endswith("assistant\n")
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        with pytest.raises(Exception, match="no place for tools"):
            tokenizer.apply_chat_template(_CHAT, tools=[{"type": "function"}], tokenize=False)


def test_a_file_decides_where_a_turn_ends(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text(_END_OF_TEXT_TEMPLATE)
    tokenizer = _load(folder, str(file))
    assert tokenizer.chat_template == _END_OF_TEXT_TEMPLATE
    assert tokenizer.eos_token == "<|endoftext|>" and len(stop_token_ids(tokenizer)) == 1
    file.write_text(_END_OF_TEXT_TEMPLATE.replace("endoftext", "end_of_answer"))
    tokenizer = _load(folder, str(file), "<|end_of_answer|>")
    assert tokenizer.eos_token == "<|end_of_answer|>"
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == [
        "<|end_of_answer|>",
        "<|endoftext|>",
    ]
    # What is saved is what was chosen.
    tokenizer.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved", "native")
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, "<|end_of_answer|>")


def test_a_template_that_cannot_be_used_is_one_line(folder: Path, tmp_path: Path) -> None:
    broken, binary = tmp_path / "broken.jinja", tmp_path / "binary.jinja"
    broken.write_text("{% for message in messages %}\n{{ message.content }\n{% endfor %}")
    binary.write_bytes(b"\xff\xfe")
    for chosen, said in (
        (str(broken), f"{broken} is not a Jinja template (line 2: "),
        (str(binary), f"{binary} cannot be read (it is not UTF-8 text)"),
        (str(tmp_path), f"{tmp_path} cannot be read (Is a directory)"),
        (
            "chatlm",
            "model.chat_template chatlm cannot be read (No such file or directory); give native,",
        ),
    ):
        with pytest.raises(ModelError) as error:
            _load(folder, chosen)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_chatml_names_the_tokens_it_lacks(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    text = (folder / "tokenizer.json").read_text()
    file.write_text(text.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|done|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(
        ModelError, match=r"<\|im_start\|> and <\|im_end\|>, which the tok"
    ) as error:
        _load(tmp_path, "chatml")
    flag = """--model.add_special_tokens '["<|im_start|>", "<|im_end|>"]'"""
    assert str(error.value).endswith(flag)
    assert _load(tmp_path, "chatml", "<|im_start|>", "<|im_end|>").eos_token == "<|im_end|>"
