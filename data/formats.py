"""What the columns of a row mean: each format turns a row into a conversation, texts or token ids.

Conversations are rendered with the chat template and go through the proof of `data.chat`. Texts and
token ids are used as they are: no template touches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data.chat import (
    BATCH_ROWS,
    Encoded,
    Excluded,
    Row,
    Unusable,
    encode_conversations,
    list_of_objects,
    refuse_broken,
    row_batches,
    text_tokenizer,
)
from data.config import DataConfig
from data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "text": (("text",), ()),
    "tokenised": (("input_ids",), ("labels", "attention_mask")),
    "preference": (("chosen", "rejected"), ("prompt", "tools")),
}
"""For each format the columns it needs and those it also reads."""

DOCUMENTS_OF_A_ROW = {"preference": 2}
"""Formats whose row is several documents, which always share a packed row, in their order; of all others it is one."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, name: str
) -> Iterator[Encoded | Excluded]:
    """One result for every row, in order: its ids and marks, or the reason it has none.

    With data.expand_turns a conversation may have several results, one after the other with the
    same row, and a preference has two; never one that is Excluded among them. Rows are counted from the first of `rows`, which
    may be a part of a source: a list or anything that is sliced like a datasets.Dataset. `rows` has at least one row; `name` is what errors call them. Raises DataError if no format, or
    more than one, fits the columns, an option does not go with the format, or the tokenizer lacks what it needs.
    """
    columns = getattr(rows, "column_names", None) or list(rows[0])
    chosen = choose_format(columns, config.format, name=name)
    select = getattr(rows, "select_columns", None)
    if select:  # a datasets.Dataset would otherwise decode columns for nothing
        required, optional = COLUMNS[chosen]
        rows = select([column for column in required + optional if column in columns])
    if chosen == "tokenised":
        return _encode_tokenised(rows, vocabulary_size=len(tokenizer))
    if chosen == "text":
        end = _end_of_text(tokenizer)
        return _encode_texts(rows, tokenizer, text_parts, config.control_tokens, end)
    if chosen == "prompt_completion" and isinstance(_first_value(rows, "prompt"), str):
        end = tokenizer.get_vocab().get(str(tokenizer.eos_token))
        return _encode_texts(rows, tokenizer, prompt_completion_parts, config.control_tokens, end)
    if chosen == "preference":
        return _encode_pairs(rows, tokenizer, config, name)
    return encode_conversations(
        rows,
        tokenizer,
        to_conversation=_TO_CONVERSATION[chosen],
        train_on=config.train_on,
        expand_turns=config.expand_turns,
        control_tokens=config.control_tokens,
    )


def choose_format(columns: Sequence[str], wanted: str, *, name: str) -> str:
    """`wanted`, or for "auto" the one format whose columns are there; raises DataError."""
    found = ", ".join(map(str, columns))
    if wanted != "auto":
        required = COLUMNS[wanted][0]
        if missing := [column for column in required if column not in columns]:
            raise DataError(
                f"{name}: data.format={wanted} needs the columns {', '.join(required)}; "
                f"{', '.join(missing)} is not among {found}"
            )
        return wanted
    fitting = [kind for kind, (required, _) in COLUMNS.items() if set(required) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{name}: the columns {found} fit more than one format; set data.format to "
            f"{' or '.join(fitting)}"
        )
    known = "; ".join(f"{kind}: {', '.join(required)}" for kind, (required, _) in COLUMNS.items())
    raise DataError(f"{name}: the columns {found} fit no format; rename them to those of {known}")


def _first_value(rows: Sequence[Row], column: str) -> Any:
    """The first value of `column` that is there and not null."""
    values = (rows[i].get(column) for i in range(len(rows)))
    return next((value for value in values if value is not None), None)


# ----------------------------------------------------------------------------------- conversations


def from_messages(row: Row) -> Row:
    return row


def from_sharegpt(row: Row) -> Row:
    messages = []
    for turn in list_of_objects(row.get("conversations"), "conversations"):
        sender = turn.get("from")
        role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        message = {"role": role, "content": turn.get("value"), "train": turn.get("train")}
        if sender == "function_call":
            message |= {"role": "assistant", "content": "", "tool_calls": _tool_calls(turn)}
        messages.append(message)
    return {"messages": [*_system_message(row), *messages], "tools": row.get("tools")}


def _tool_calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a function_call turn, whose value is one as JSON text, or a list of them."""
    try:
        value = json.loads(turn.get("value") or "")
    except (TypeError, json.JSONDecodeError) as error:
        raise Unusable("the value of a function_call is not JSON") from error
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise Unusable("the value of a function_call is not an object with name and arguments")
    # Arguments as text: a null in them is meant, and not one of those Arrow adds.
    return [
        {
            "type": "function",
            "function": {
                "name": call.get("name"),
                "arguments": arguments
                if isinstance(arguments := call.get("arguments") or {}, str)
                else json.dumps(arguments, ensure_ascii=False),
            },
        }
        for call in calls
    ]


def from_alpaca(row: Row) -> Row:
    """The user says the instruction and, an empty line below it, the input if there is one."""
    parts = [row.get("instruction"), row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise Unusable("instruction or input is not a string")
    question = "\n\n".join(part for part in parts if part.strip())
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row.get("output")},
    ]
    return {"messages": [*_system_message(row), *messages]}


def from_prompt_completion(row: Row) -> Row:
    """The messages of both, of which only the completion's are trained on."""
    prompt = list_of_objects(row.get("prompt"), "prompt")
    completion = list_of_objects(row.get("completion"), "completion")
    silent = [{**message, "train": False} for message in prompt]
    return {"messages": silent + completion, "tools": row.get("tools")}


def _system_message(row: Row) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


_TO_CONVERSATION: dict[str, Callable[[Row], Row]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "prompt_completion": from_prompt_completion,
}

# ------------------------------------------------------------------------------------------- pairs


def from_preference(row: Row, *, answer: str) -> Row:
    """The prompt and one of the two answers, "chosen" or "rejected", whose last message alone is trained on."""
    messages = _said(row.get(answer), answer, "assistant")
    if messages[0].get("role") == "assistant":
        if row.get("prompt") is None:
            raise Unusable(f"{answer} begins with an answer, and there is no prompt")
        messages = _said(row["prompt"], "prompt", "user") + messages
    return {"messages": messages, "tools": row.get("tools")}


def _said(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    """Text is one message of `role`; messages stay."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list_of_objects(value, name)


def _encode_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, name: str
) -> Iterator[Encoded | Excluded]:
    """The conversation that was chosen and then the one that was rejected, or why a row has none."""
    for option, value, remedy in (
        ("overlong", config.overlong in ("truncate", "split"), "drop or error"),
        ("packing", config.packing == "fixed", "best_fit or none"),
        ("expand_turns", config.expand_turns, "false"),
    ):
        if value:
            raise DataError(
                f"{name}: data.{option} {getattr(config, option)} would tear pairs of answers apart; use {remedy}"
            )
    answers = [
        encode_conversations(
            rows,
            tokenizer,
            to_conversation=partial(from_preference, answer=answer),
            train_on="last",
            control_tokens=config.control_tokens,
        )
        for answer in ("chosen", "rejected")
    ]
    for pair in zip(*answers, strict=True):
        excluded = [result for result in pair if isinstance(result, Excluded)]
        yield from excluded[:1] or pair


# ------------------------------------------------------------------------------------------- texts

Parts = list[tuple[str, bool]]
"""Consecutive pieces of one text, and whether each is trained on."""


def text_parts(row: Row) -> Parts:
    return [(_text(row, "text"), True)]


def prompt_completion_parts(row: Row) -> Parts:
    return [(_text(row, "prompt"), False), (_text(row, "completion"), True)]


def _text(row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise Unusable(f"{column} is {'missing' if text is None else 'not a string'}")
    if not text.strip():
        raise Unusable(f"{column} is empty")
    return text


def _encode_texts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    to_parts: Callable[[Row], Parts],
    control_tokens: Literal["exclude", "plain"],
    end_id: int | None,
) -> Iterator[Encoded | Excluded]:
    """The parts' tokens one after the other, and the token that ends them.

    Each part is tokenised alone: a prompt then has the tokens that it has when one generates from
    it, whatever the completion begins with.
    """
    if end_id is None:
        raise DataError("the tokenizer has no eos_token, which must end every text; set one")
    core, end = text_tokenizer(tokenizer), [end_id]
    plain = control_tokens == "plain"
    for first, batch in row_batches(rows, BATCH_ROWS):
        read = [
            _read_parts(index, row, to_parts, None if plain else core.control)
            for index, row in enumerate(batch, first)
        ]
        texts = [text for parts in read if isinstance(parts, list) for text, _ in parts]
        encodings = (
            core.as_text.encode_batch_fast(texts, add_special_tokens=False)
            if plain
            else core.encode_batch(texts)
        )
        ids_of_texts = [encoding.ids for encoding in encodings]
        decoded = core.backend.decode_batch(ids_of_texts, skip_special_tokens=False)
        remaining = zip(texts, ids_of_texts, decoded, strict=True)
        for index, parts in enumerate(read, first):
            if isinstance(parts, Excluded):
                yield parts
                continue
            ids, supervised, proven = [], [], True
            for (_, trained), (text, part, back) in zip(parts, remaining, strict=False):
                ids += part
                supervised += [trained] * len(part)
                proven = proven and core.control_ids.isdisjoint(part) and core.same(back, text)
            if proven:
                marks = np.array([*supervised, True], dtype=bool)
                yield Encoded(index, np.array(ids + end, dtype=np.int32), marks, 0, 0)
            else:
                yield Excluded(index, "the tokens do not decode to the text")


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Qwen ends a document with a token of its own; eos_token may be the end of a turn."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get("<|endoftext|>", vocabulary.get(str(tokenizer.eos_token)))


def _read_parts(
    index: int, row: Row, to_parts: Callable[[Row], Parts], forbidden: re.Pattern[str] | None
) -> Parts | Excluded:
    try:
        refuse_broken(row)
        parts = to_parts(row)
        if forbidden and any(forbidden.search(text) for text, _ in parts):
            raise Unusable("control token in text")
    except Unusable as reason:
        return Excluded(index, str(reason))
    return parts


# --------------------------------------------------------------------------------------- token ids


def _encode_tokenised(rows: Sequence[Row], vocabulary_size: int) -> Iterator[Encoded | Excluded]:
    for first, batch in row_batches(rows, BATCH_ROWS):
        for index, row in enumerate(batch, first):
            try:
                refuse_broken(row)
                ids, supervised = from_tokenised(row, vocabulary_size)
                yield Encoded(index, ids, supervised, 0, 0)
            except Unusable as reason:
                yield Excluded(index, str(reason))


def from_tokenised(row: Row, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids int32, supervised bool), both [length].

    `labels` repeat input_ids in place, not shifted, with -100 at tokens that are not trained on;
    without them every token is. Raises Unusable.
    """
    ids = _integers(row, "input_ids")
    if ids.min() < 0 or ids.max() >= vocabulary_size:
        raise Unusable("input_ids has an id the tokenizer does not know")
    supervised = np.ones(len(ids), dtype=bool)
    if row.get("attention_mask") is not None:
        mask = _integers(row, "attention_mask")
        if len(mask) != len(ids) or not mask.all():
            raise Unusable("attention_mask has zeros or another length: rows must not be padded")
    if row.get("labels") is not None:
        labels = _integers(row, "labels")
        if len(labels) != len(ids):
            raise Unusable("labels and input_ids differ in length")
        supervised = labels != -100
        if not np.array_equal(labels[supervised], ids[supervised]):
            raise Unusable("labels differ from input_ids: they must be -100 or the same, unshifted")
    return ids.astype(np.int32), supervised


def _integers(row: Row, column: str) -> np.ndarray:
    """Column `column` as int64 [length]."""
    value = row.get(column)
    try:
        numbers = np.asarray(value)
    except (ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise Unusable(f"{column} is {'missing' if value is None else 'not a list of integers'}")
    return numbers.astype(np.int64)
