"""Conversations to token ids, with the assistant's own tokens marked, for any chat template.

Templates rarely say which part of their output the assistant wrote. Here it is derived and then
proven, row by row:

1. A probe conversation shows how the template opens an assistant turn (its header), what a prompt
   for one ends with, and which control token ends it.
2. A row is rendered once. Control tokens can only come from the template, because a row whose own
   text spells one is excluded, or rendered with it disguised; so every header in the output opens
   an assistant turn, and the first end token after it closes that turn. Templates whose header has
   no control token are matched by rendering the conversation up to each turn instead.
3. The turn must hold what the message says, no token may cross its borders, and the marked ids must
   decode to exactly the text of the turn. A row that fails any of this is excluded with a reason.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.errors import DataError
from data.files import BrokenRow
from data.limits import REMEDY, TEMPLATE_CHARACTERS, TEMPLATE_GIB, bounded
from data.words import Words, WordTokenizer, word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""The roles a message may have, and what the template is told instead."""

_DISGUISE = "\ue000"  # a private-use character, for the first of a control token that is only text
BATCH_ROWS = 256  # rows rendered while the ones before are tokenised
_BATCH_ROWS_EXPANDED = 32  # the same, where a row is rendered once for each of its turns


@dataclass(frozen=True)
class Encoded:
    """An example that can be trained on: a row, or with expand_turns a row up to one of its turns."""

    row: int
    """Index of its row in the source."""

    input_ids: np.ndarray
    """int32 [length]: what apply_chat_template gives for the conversation."""

    supervised: np.ndarray
    """bool [length]: the tokens that are trained on. Of a conversation those of the assistant turns
    that are, their end token included."""

    stripped_reasoning_turns: int
    """Assistant turns that are trained on, but whose reasoning the template leaves out."""

    stripped_reasoning_tokens: int
    """Tokens of that reasoning."""


@dataclass(frozen=True)
class Excluded:
    """A row that cannot be used, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class _Turn:
    """Character span of one assistant turn in the rendered text."""

    starts: tuple[int, ...]
    """Where it may begin, the preferred place first; the first on a token border is taken."""

    end: int
    """Behind its end token."""


@dataclass(frozen=True)
class _Rendered:
    row: int
    text: str
    turns: tuple[_Turn, ...]
    """Those that are trained on."""

    controls: tuple[tuple[int, int], ...] | None
    """Character spans of the template's control tokens, where the row's own text spells some too."""

    stripped_reasoning: tuple[str, ...]
    """What the template leaves out of those turns."""


@dataclass(frozen=True)
class _Joined:
    """Encodings of consecutive pieces of one text, to be asked like one Encoding."""

    parts: tuple[Encoding, ...]
    first_characters: tuple[int, ...]
    first_tokens: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [token for part in self.parts for token in part.ids]

    def char_to_token(self, character: int) -> int | None:
        place = bisect_right(self.first_characters, character) - 1
        token = self.parts[place].char_to_token(character - self.first_characters[place])
        return None if token is None else self.first_tokens[place] + token

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        place = bisect_right(self.first_tokens, token) - 1
        span = self.parts[place].token_to_chars(token - self.first_tokens[place])
        first = self.first_characters[place]
        return None if span is None else (first + span[0], first + span[1])


_Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages and tools."""


Tokens = Encoding | Words | _Joined
"""Ids and character places of a text's tokens."""


class Unusable(Exception):
    """Raised with the reason a row is excluded; it becomes an Excluded."""


def encode_conversations(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_conversation: Callable[[Row], Row] | None = None,
    train_on: Literal["all", "last"] = "all",
    expand_turns: bool = False,
    control_tokens: Literal["exclude", "plain"] = "exclude",
) -> Iterator[Encoded | Excluded]:
    """One result for every row, in order: its ids and marks, or the reason it has none.

    A row is {"messages": [{"role", "content", ...}, ...]} and may have "tools"; `to_conversation`
    makes that of a row that is not, or raises Unusable. Of its assistant turns all or the last are
    trained on, but for those with "train": false. With `expand_turns` a row has a result for each
    of those turns, one after the other: the conversation that ends with it, and of which only it is
    trained on; an example that cannot be proven excludes the row. A row whose text spells a control
    token is excluded, or the token is taken for plain text. Raises DataError if the tokenizer has
    no chat template, or one whose assistant turns cannot be told apart.
    """
    template = ChatTemplate(
        tokenizer, train_on=train_on, expand_turns=expand_turns, control_tokens=control_tokens
    )
    batch_rows = _BATCH_ROWS_EXPANDED if expand_turns else BATCH_ROWS
    # The tokenizer leaves the interpreter lock, so the next rows are rendered meanwhile.
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for first, batch in row_batches(rows, batch_rows):
            rendered = template.render(batch, first, to_conversation)
            encodings = pool.submit(template.tokenise, rendered)
            if waiting is not None:
                yield from template.mark(waiting[0], waiting[1].result())
            waiting = rendered, encodings
        if waiting is not None:
            yield from template.mark(waiting[0], waiting[1].result())


def row_batches(rows: Sequence[Row], size: int) -> Iterator[tuple[int, list[Row]]]:
    """(index of its first row, rows) of every batch of `size` rows."""
    for first in range(0, len(rows), size):
        batch: Any = rows[first : first + size]
        if isinstance(batch, dict):  # a slice of a datasets.Dataset is a dict of columns
            columns = zip(*batch.values(), strict=True)
            batch = [dict(zip(batch, values, strict=True)) for values in columns]
        yield first, batch


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TextTokenizer:
    """The fast tokenizer behind `tokenizer`; raises DataError if there is none, or it is of no use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError("the tokenizer has no tokenizer.json; masks need its character offsets")
    return _load_text_tokenizer(backend.to_str())


@lru_cache(maxsize=1)  # loading takes most of a second, which every block of rows would pay
def _load_text_tokenizer(serialised: str) -> TextTokenizer:
    return TextTokenizer(serialised)


def refuse_broken(row: Row) -> None:
    """Raise Unusable for what only stands for a row: a line that could not be read, a row that is left out."""
    if isinstance(row, BrokenRow):
        raise Unusable(row.reason)


class TextTokenizer:
    """A fast tokenizer, and those of its tokens that are structure and never text."""

    def __init__(self, serialised: str) -> None:
        """`serialised` is a tokenizer.json."""
        # An own copy, free of whatever padding or truncation a caller has switched on.
        self.backend: Tokenizer = Tokenizer.from_str(serialised)
        self.backend.no_padding()
        self.backend.no_truncation()
        # Tags such as <think> are added tokens too, but ordinary words of the model: a message may
        # hold them. <|...|> is structure even where a tokenizer does not call it special.
        control = {
            token.content: number
            for number, token in self.backend.get_added_tokens_decoder().items()
            if token.content and (token.special or token.content.startswith(("<|", "<\uff5c")))
        }
        if not control:
            raise DataError("the tokenizer has no control tokens; masks cannot be proven with it")
        longest_first = sorted(control, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))
        self.control_ids = frozenset(control.values())
        self._control_texts = list(control)

    @cached_property
    def _words(self) -> WordTokenizer | None:
        return word_tokenizer(self.backend)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding | Words]:
        """The tokens of each text, with their places; no special tokens but those it spells."""
        if self._words is not None:
            return self._words.encode_batch(texts)
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def as_text(self) -> Tokenizer:
        """The same tokenizer, but for it a control token is text like any other."""
        tokenizer = Tokenizer.from_str(self.backend.to_str())
        # It can pass over special tokens, so all of them must be.
        tokenizer.add_special_tokens(self._control_texts)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def same(self, decoded: str, text: str) -> bool:
        """Equal but for what this tokenizer's normaliser and decoder do to any text."""
        if decoded == text:
            return True
        return "".join(decoded.split()) == "".join(self._normalise(text).split())

    @cached_property
    def _normalise(self):
        normalizer = self.backend.normalizer
        return normalizer.normalize_str if normalizer is not None else str


class ChatTemplate:
    """A tokenizer's chat template, and what a probe of it has shown."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: Literal["all", "last"],
        expand_turns: bool,
        control_tokens: Literal["exclude", "plain"],
    ) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._expand_turns = expand_turns
        self._control_tokens = control_tokens
        self._text = text_tokenizer(tokenizer)
        self._control = self._text.control
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; use the one of an instruct model, or put "
                "chat_template.jinja beside it"
            )
        if len(str(tokenizer.chat_template)) > TEMPLATE_CHARACTERS:
            raise DataError(
                f"the chat template has more than {TEMPLATE_CHARACTERS:,} characters; {REMEDY}"
            )
        try:
            with bounded("the chat template", gib=TEMPLATE_GIB):
                self._probe()
        except DataError:
            raise
        except Exception as error:  # a template is a program: it raises whatever it likes
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"the chat template fails on a plain conversation ({line}); {REMEDY}"
            ) from error

    def _probe(self) -> None:
        """Find the prompt's ending, the header and the end token of an assistant turn."""
        first, second, question = "Sentinel answer one", "Sentinel answer two", "Sentinel question"
        messages = [
            {"role": "user", "content": "Sentinel opening"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": question},
            {"role": "assistant", "content": second},
        ]
        text = self._apply(messages)
        opening, prompt = self._apply(messages[:1]), self._apply(messages[:1], prompt=True)
        places = [text.find(part) for part in (first, question, second)]
        if -1 in places or places != sorted(places):
            raise DataError("the chat template does not show every message of a conversation")
        inner = self._control.search(text, places[0], places[1])
        last = self._control.search(text, places[2])
        if inner is None or last is None or inner.group() != last.group():
            raise DataError("the chat template does not end every assistant turn with one token")
        self.end_token: str = last.group()
        # What a prompt adds to the messages, and how much of it a finished turn shows: a template may
        # prompt with more (an opened <think>) than it keeps.
        shared = len(_common_start(opening, prompt))
        self._prompt = prompt[shared:]
        rest = text[shared:] if text.startswith(prompt[:shared]) else ""
        header = _common_start(self._prompt, rest)
        self._header = header if self._control.search(header) else None

        ids = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        if ids != self._text.backend.encode(text, add_special_tokens=False).ids:
            raise DataError("tokenizer.json and apply_chat_template disagree about a conversation")
        if self._control_tokens == "plain":
            controls = tuple(match.span() for match in self._control.finditer(text))
            if self._tokenise_between(text, controls).ids != ids:
                raise DataError(
                    "data.control_tokens=plain: this tokenizer's control tokens change the tokens "
                    "beside them; use exclude"
                )

    def _apply(self, messages: list[dict], tools: Any = None, *, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        return cast(str, text)

    # ------------------------------------------------------------------------------------- render

    def render(
        self, rows: list[Row], first: int, to_conversation: Callable[[Row], Row] | None = None
    ) -> list[_Rendered | Excluded]:
        """The text and assistant turns of the examples of each row; `first` is the first's index."""
        results: list[_Rendered | Excluded] = []
        # No bound of memory here: beside training it would be that of other threads as well.
        with bounded(f"the chat template, in one of the rows from {first} on,") as restart:
            for index, row in enumerate(rows, first):
                restart()
                try:
                    refuse_broken(row)
                    conversation = to_conversation(row) if to_conversation else row
                    results += self._render_row(index, conversation)
                except Unusable as reason:
                    results.append(Excluded(index, str(reason)))
        return results

    def _render_row(self, index: int, row: Row) -> list[_Rendered]:
        messages, tools = _clean_messages(row.get("messages")), _clean_tools(row.get("tools"))
        # Taken out of the messages: whether a turn is trained on must not reach the template.
        flags = [message.pop("train", True) for message in messages]
        if not all(isinstance(flag, bool) for flag in flags):
            raise Unusable("train is not true or false")
        if any("tool_calls" in message for message in messages) and not self._arguments_as_text:
            messages = [_with_argument_objects(message) for message in messages]
        as_written = messages, tools
        if any(self._control.search(text) for text in _strings([messages, tools])):
            messages, tools = self._disguise(messages, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if flags[i] and (self._train_on == "all" or i == answers[-1])]
        if not self._expand_turns or not trained:
            return [self._render(index, as_written, (messages, tools), trained)]
        return [
            self._render(
                index, (as_written[0][: i + 1], as_written[1]), (messages[: i + 1], tools), [i]
            )
            for i in trained
        ]

    def _render(
        self, index: int, as_written: _Conversation, disguised: _Conversation, trained: list[int]
    ) -> _Rendered:
        """One example, whose messages `trained` are trained on.

        `disguised` is the same as `as_written` but for control tokens in texts.
        """
        messages, tools = disguised
        try:
            text = self._apply(messages, tools)
            as_shown = self._apply(*as_written) if messages is not as_written[0] else text
            spans = self._find_turns(messages, tools, text)
        except Unusable:
            raise
        except Exception as error:  # a template is a program: it raises whatever it likes
            first_line = (str(error) or type(error).__name__).splitlines()[0][:80]
            raise Unusable(f"the chat template refuses it: {first_line}") from error
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns, stripped = [], []
        for place, turn in zip(answers, spans, strict=True):
            message = messages[place]
            said = text[turn.starts[-1] : turn.end]
            reasoning, answer = _split_reasoning(message)
            names = [_function(call)["name"] for call in message.get("tool_calls", ())]
            if not answer and not names:
                raise Unusable("an assistant turn has reasoning but no answer")
            if answer not in said or not all(name in said for name in names):
                raise Unusable("the chat template changes the text of an assistant turn")
            if place in trained:
                turns.append(turn)
                before = said.rpartition(answer)[0] if answer else said
                if reasoning not in before:
                    stripped.append(_split_reasoning(as_written[0][place])[0])
        if not all(
            message["content"].strip() in text
            for message in messages
            if message["role"] in ("system", "user")
        ):
            raise Unusable("the chat template changes the text of a message")
        controls = None
        if text != as_shown:
            pairs = zip(text, as_shown, strict=False)
            if len(text) != len(as_shown) or any(a not in (b, _DISGUISE) for a, b in pairs):
                raise Unusable("the chat template takes a control token in text for its own")
            controls = tuple(match.span() for match in self._control.finditer(text))
        return _Rendered(index, as_shown, tuple(turns), controls, tuple(stripped))

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template shows JSON text as arguments of a tool call as it does an object.

        Some would quote it as a string, or refuse it: they are given the object.
        """

        def shown(arguments: Any) -> str:
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self._apply([{"role": "user", "content": "a"}, turn])

        try:
            return shown('{"a": 1}') == shown({"a": 1})
        except Exception:  # a template is a program: it raises whatever it likes
            return False

    def _disguise(self, messages: list[dict], tools: Any) -> tuple[list[dict], Any]:
        """Both with another first character in every control token, so that lengths stay."""
        disguised: Any = _map_strings(
            [messages, tools],
            lambda text: self._control.sub(lambda match: _DISGUISE + match.group()[1:], text),
        )
        if (
            self._control_tokens == "exclude"
            or any(_DISGUISE in text for text in _strings([messages, tools]))
            or any(self._control.search(text) for text in _strings(disguised))
        ):
            raise Unusable("control token in text")
        return disguised[0], disguised[1]

    def _find_turns(self, messages: list[dict], tools: Any, text: str) -> tuple[_Turn, ...]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        headers: list[int] = []
        if self._header is not None:
            headers = [match.start() for match in re.finditer(re.escape(self._header), text)]
        if len(headers) == len(answers) and self._header is not None:
            starts = [
                (place + len(self._prompt), place + len(self._header))
                if text.startswith(self._prompt, place)
                else (place + len(self._header),)
                for place in headers
            ]
        else:
            prompts = [self._apply(messages[:i], tools, prompt=True) for i in answers]
            if not all(text.startswith(prompt) for prompt in prompts):
                raise Unusable("the conversation does not begin with its own prompt")
            starts = [(len(prompt),) for prompt in prompts]
        turns = []
        for number, places in enumerate(starts):
            end = text.find(self.end_token, places[0])
            limit = starts[number + 1][-1] if number + 1 < len(starts) else len(text)
            if end < 0 or end >= limit:
                raise Unusable("an assistant turn has no end token")
            turns.append(_Turn(tuple(dict.fromkeys(places)), end + len(self.end_token)))
        return tuple(turns)

    # ---------------------------------------------------------------------------- tokenise and mark

    def tokenise(self, rendered: list[_Rendered | Excluded]) -> list[tuple[Tokens, int]]:
        """(encoding, tokens of stripped reasoning) of the examples."""
        items = [item for item in rendered if isinstance(item, _Rendered)]
        texts = [item.text for item in items if item.controls is None]
        whole = iter(self._text.encode_batch(texts))
        stripped = [reasoning for item in items for reasoning in item.stripped_reasoning]
        counted = self._text.encode_batch(stripped)
        counts = iter([len(encoding.ids) for encoding in counted])
        return [
            (
                next(whole)
                if item.controls is None
                else self._tokenise_between(item.text, item.controls),
                sum(islice(counts, len(item.stripped_reasoning))),
            )
            for item in items
        ]

    def _tokenise_between(self, text: str, controls: tuple[tuple[int, int], ...]) -> _Joined:
        """The control tokens at `controls`, and between them nothing but text."""
        pieces, position = [], 0
        for begin, end in (*controls, (len(text), len(text))):
            pieces.append((position, text[position:begin], self._text.as_text))
            pieces.append((begin, text[begin:end], self._text.backend))
            position = end
        parts, first_characters, first_tokens, count = [], [], [], 0
        for first, piece, tokenizer in pieces:
            if piece:
                parts.append(tokenizer.encode(piece, add_special_tokens=False))
                first_characters.append(first)
                first_tokens.append(count)
                count += len(parts[-1].ids)
        return _Joined(tuple(parts), tuple(first_characters), tuple(first_tokens))

    def mark(
        self,
        rendered: list[_Rendered | Excluded],
        tokenised: list[tuple[Tokens, int]],
    ) -> Iterator[Encoded | Excluded]:
        """Mark the tokens of the assistant turns and prove that they are those and no others."""
        results: list[Encoded | Excluded] = []
        to_decode: list[list[int]] = []
        expected: list[tuple[int, str]] = []  # place in results, text of a turn
        remaining = iter(tokenised)
        for item in rendered:
            if isinstance(item, Excluded):
                results.append(item)
                continue
            encoding, stripped_tokens = next(remaining)
            ids = encoding.ids
            if item.controls is not None:
                acting = sum(token in self._text.control_ids for token in ids)
                if acting != len(item.controls):
                    results.append(Excluded(item.row, "control token in text"))
                    continue
            supervised = np.zeros(len(ids), dtype=bool)
            for turn in item.turns:
                borders = [_token_at_border(encoding, start) for start in turn.starts]
                place = next((i for i, token in enumerate(borders) if token is not None), None)
                last = encoding.char_to_token(turn.end - 1)
                if place is None or last is None:
                    results.append(Excluded(item.row, "a token crosses the border of a turn"))
                    break
                begin = borders[place]
                supervised[begin : last + 1] = True
                to_decode.append(ids[begin : last + 1])
                expected.append((len(results), item.text[turn.starts[place] : turn.end]))
            else:
                results.append(
                    Encoded(
                        item.row,
                        np.array(ids, dtype=np.int32),
                        supervised,
                        len(item.stripped_reasoning),
                        stripped_tokens,
                    )
                )
        decoded = self._text.backend.decode_batch(to_decode, skip_special_tokens=False)
        for (place, text), back in zip(expected, decoded, strict=True):
            if not self._text.same(back, text):
                results[place] = Excluded(
                    results[place].row, "the marked tokens do not decode to the turn"
                )
        # A row is used whole or not at all.
        for _, group in groupby(results, key=lambda result: result.row):
            examples = list(group)
            bad = next((example for example in examples if isinstance(example, Excluded)), None)
            yield from examples if bad is None else [bad]


def _token_at_border(encoding: Tokens, start: int) -> int | None:
    """The token that begins at character `start`; None where one crosses it."""
    token = encoding.char_to_token(start)
    span = None if token is None else encoding.token_to_chars(token)
    return token if span is not None and span[0] == start else None


def _common_start(one: str, other: str) -> str:
    length = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None
    )
    return one[: min(len(one), len(other)) if length is None else length]


# ------------------------------------------------------------------------------------------- clean


def list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages of column `name`; raises Unusable if they are not a list of some objects."""
    if isinstance(value, dict):  # how datasets gives a column of type Sequence of dict
        columns = [column for column in value.values() if isinstance(column, list)]
        if len(columns) == len(value) and len(set(map(len, columns))) == 1:
            value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise Unusable(f"{name} is not a list")
    if not value:
        raise Unusable("no messages")
    if not all(isinstance(item, dict) for item in value):
        raise Unusable("a message is not an object")
    return value


def _clean_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages without null fields; raises Unusable for anything that is not a conversation."""
    cleaned = []
    for message in list_of_objects(messages, "messages"):
        # Arrow gives every message the fields of all others, as null: they were never there.
        message = _without_nulls(message)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable("unknown role")
        message["role"] = ROLES[role]
        if "function_call" in message:  # how the OpenAI API wrote it before it had tool_calls
            if message.get("tool_calls"):
                raise Unusable("a message has both tool_calls and function_call")
            message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(map(_function, calls))):
            raise Unusable("tool_calls is not a list of functions with a name")
        content = message.get("content", "" if calls else None)
        if isinstance(content, list):
            content = "".join(map(_text_of_part, content))
        if not isinstance(content, str):
            raise Unusable("content is missing" if content is None else "content is not a string")
        if not content.strip() and message["role"] != "tool" and not calls:
            raise Unusable("content is empty")
        cleaned.append({**message, "content": content})
    if not any(message["role"] == "assistant" for message in cleaned):
        raise Unusable("no assistant turn")
    return cleaned


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise Unusable("content has a part that is not text")


def _function(call: Any) -> dict[str, Any]:
    """{"name", "arguments"} of a tool call, which may stand alone or in "function"; else empty."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
        return function
    return {}


def _with_argument_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with objects for those arguments of its tool calls that are JSON text."""

    def parsed(call: dict[str, Any]) -> dict[str, Any]:
        function = _function(call)
        if not isinstance(function.get("arguments"), str):
            return call
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except json.JSONDecodeError as error:
            raise Unusable("the arguments of a tool call are not JSON") from error
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [parsed(call) for call in calls]} if calls else message


def _clean_tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise Unusable("tools is not JSON") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools is not a list of objects")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(key)): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def _split_reasoning(message: dict[str, Any]) -> tuple[str, str]:
    """(reasoning, answer) of an assistant message, without white space at the ends."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    if not reasoning and "</think>" in content:
        before, _, content = content.rpartition("</think>")
        reasoning = before.rpartition("<think>")[2]
    return str(reasoning).strip(), content.strip()
