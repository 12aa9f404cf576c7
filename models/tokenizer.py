"""The tokenizer on both paths: as shipped, and with another chat template or added special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.errors import ModelError

START_OF_TURN, END_OF_TURN, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# What has no place in it is refused, row by row, instead of being left out.
CHATML = """\
{%- if tools %}
{{- raise_exception("chatml has no place for tools") }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{{- raise_exception("chatml has no place for tool calls") }}
{%- endif %}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ (message.content or "") ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" }}
{%- endif %}"""


def load_tokenizer(
    folder: Path,
    *,
    cache_dir: Path,
    add_special_tokens: Sequence[str] = (),
    chat_template: str = "native",
) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a local folder (a hub model's snapshot, or the user's own).

    Its end-of-text token becomes the one that ends a turn in the chat template: base models end a
    text, not a turn, and what is trained on chat has to stop where a turn stops.

    Args:
        folder: holds tokenizer.json or what `AutoTokenizer` needs.
        cache_dir: where transformers may keep anything it derives.
        add_special_tokens: tokens the vocabulary is given if it lacks them.
        chat_template: `native`, `chatml` or the path of a Jinja file.

    Raises:
        ModelError: there is no usable tokenizer, or the chat template cannot be used.
    """
    # From a folder without a vocabulary transformers makes a tokenizer that knows no word.
    if not any((folder / vocabulary).is_file() for vocabulary in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{folder} holds no tokenizer.json; name another with --model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, cache_dir=cache_dir / "hub", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{folder} holds no tokenizer that transformers can read ({reason}); "
            "name another with --model.tokenizer"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder} has only a slow tokenizer; masks need character offsets (tokenizer.json)"
        )
    if add_special_tokens:
        tokenizer.add_tokens(list(add_special_tokens), special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    if chat_template != "native":
        tokenizer.chat_template = _read_template(chat_template)
    if lacking := [
        token
        for token in (START_OF_TURN, END_OF_TURN)
        if chat_template == "chatml" and token not in vocabulary
    ]:
        raise ModelError(
            f"model.chat_template chatml needs {' and '.join(lacking)}, which the tokenizer in {folder} "
            f"lacks; add --model.add_special_tokens '{json.dumps(lacking)}'"
        )
    if tokenizer.chat_template:
        place = chat_template if chat_template != "native" else f"the chat template in {folder}"
        tokenizer.eos_token = _end_of_turn(tokenizer, place) or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in vocabulary else tokenizer.eos_token
    return tokenizer


def _read_template(chosen: str) -> str:
    """The text of `chatml` or of a file."""
    if chosen == "chatml":
        return CHATML
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ModelError(
            f"model.chat_template {chosen} cannot be read ({reason}); give native, chatml or the path "
            "of a Jinja file"
        ) from None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, place: str) -> str | None:
    """The special token that the chat template puts behind an answer.

    Raises ModelError for a template that is no Jinja, naming `place`.
    """
    answer = "Sentinel answer"
    conversation = [
        {"role": "user", "content": "Sentinel question"},
        {"role": "assistant", "content": answer},
    ]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{place} is not a Jinja template (line {error.lineno}: {error.message}); mend it, or give "
            "--model.chat_template native, chatml or another file"
        ) from None
    except (
        TemplateError,
        TypeError,
        ValueError,
        RecursionError,
    ):  # not for such a conversation: rows will tell
        text = answer + (END_OF_TURN if END_OF_TURN in str(tokenizer.chat_template) else "")
    behind = text.rpartition(answer)[2].lstrip()
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((token for token in tokens if behind.startswith(token)), None)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: the end of a turn first, then the end of text."""
    ids = []
    for token in (tokenizer.eos_token, END_OF_TEXT):
        if token is not None and token in tokenizer.get_vocab():
            ids.append(tokenizer.convert_tokens_to_ids(token))
    return list(dict.fromkeys(ids))
