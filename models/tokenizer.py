"""The tokenizer on both paths: as shipped, and with added special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.errors import ModelError

END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def load_tokenizer(
    folder: Path, *, cache_dir: Path, add_special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a local folder (a hub model's snapshot, or the user's own).

    Args:
        folder: holds tokenizer.json or what `AutoTokenizer` needs.
        cache_dir: where transformers may keep anything it derives.
        add_special_tokens: tokens the vocabulary is given if it lacks them.

    Raises:
        ModelError: there is no usable tokenizer with a chat template.
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
    if END_OF_TURN in vocabulary and END_OF_TURN in str(tokenizer.chat_template):
        # Base models end a text, not a turn; what is trained on chat has to stop where a turn stops.
        tokenizer.eos_token = END_OF_TURN
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in vocabulary else tokenizer.eos_token
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: the end of a turn first, then the end of text."""
    ids = []
    for token in (tokenizer.eos_token, END_OF_TEXT):
        if token is not None and token in tokenizer.get_vocab():
            ids.append(tokenizer.convert_tokens_to_ids(token))
    return list(dict.fromkeys(ids))
