"""Byte-level BPE as the tokenizers library does it, but each distinct word only once.

A tokenizer of this kind cuts a text into words by a regular expression and merges bytes within a word
alone, so the tokens of a word do not depend on what is around it. Texts repeat their words: it is
quicker to cut the text here and to remember what the library made of each word. The library decides
every token; that the cutting is the same is checked for every character before it is relied on, and
again for a share of the texts. Whatever does not pass goes through the library as a whole.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import regex
from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers

_CHECKED_SHARE = 32  # one text in so many is compared with the library
_MOST_WORDS = 1 << 19  # remembered at a time
_LONGEST_WORD = 64  # characters; longer ones hardly come again
# What a cutting rule can tell apart: letters, digits, spaces, line breaks, other, and contractions.
_AROUND = (
    "a{}a",
    "1{}1",
    " {} ",
    "  {}",
    "!{}!",
    "\n{}\n",
    "{0}{0}",
    "x'{} ",
    "'{}a",
    "{}\r\n",
    " {0}{0}a",
)


class Words:
    """The tokens of one text, to be asked like one Encoding."""

    def __init__(self, words: list[str], tokens: list[list[int]], backend: Tokenizer) -> None:
        self._words, self._tokens, self._backend = words, tokens, backend
        self.ids: list[int] = list(chain.from_iterable(tokens))
        self._ends: tuple[list[int], list[int]] | None = None

    def char_to_token(self, character: int) -> int | None:
        """The token that `character` is in; None behind the end."""
        characters, tokens = self._ends or self._find_ends()
        place = bisect_right(characters, character)
        if place == len(characters):
            return None
        first = tokens[place] - len(self._tokens[place])
        inside = character - (characters[place] - len(self._words[place]))
        if len(self._tokens[place]) == 1 or inside == 0:
            return first
        token = self._backend.encode(self._words[place], add_special_tokens=False)
        found = token.char_to_token(inside)
        return None if found is None else first + found

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """(first character, character behind the last) of a token; None behind the end."""
        characters, tokens = self._ends or self._find_ends()
        place = bisect_right(tokens, token)
        if place == len(tokens):
            return None
        begin, end = characters[place] - len(self._words[place]), characters[place]
        if len(self._tokens[place]) == 1:
            return begin, end
        word = self._backend.encode(self._words[place], add_special_tokens=False)
        span = word.token_to_chars(token - (tokens[place] - len(self._tokens[place])))
        return None if span is None else (begin + span[0], begin + span[1])

    def _find_ends(self) -> tuple[list[int], list[int]]:
        self._ends = (
            list(accumulate(map(len, self._words))),
            list(accumulate(map(len, self._tokens))),
        )
        return self._ends


class WordTokenizer:
    """`encode_batch` of a tokenizer whose words are independent; see `word_tokenizer`."""

    def __init__(self, backend: Tokenizer, pattern: str, added: dict[str, int]) -> None:
        self._backend = backend
        self._cut = regex.compile(pattern, regex.VERSION0)
        self._library_cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        longest_first = sorted(added, key=len, reverse=True)
        self._added = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self._structure = {text: [token] for text, token in added.items()}
        self._known = dict(self._structure)  # words, and what the library made of them
        self._characters: dict[str, bool] = {}  # whether the two cut alike around it
        self._texts = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Words | Encoding]:
        """The library's tokens of each text, without special tokens that are not in it."""
        if len(self._known) > _MOST_WORDS:
            self._known = dict(self._structure)
        known = self._known
        cuts = [self._cut_text(text) for text in texts]
        new = list({word for words in cuts if words for word in words} - known.keys())
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        results: list[Words | Encoding] = []
        for text, words in zip(texts, cuts, strict=True):
            if words is None:
                results.append(self._backend.encode(text, add_special_tokens=False))
                continue
            results.append(Words(words, [known[word] for word in words], self._backend))
            self._texts += 1
            if self._texts % _CHECKED_SHARE == 1:
                self._compare(text, results[-1].ids)
        for word in new:
            if len(word) > _LONGEST_WORD:
                del known[word]
        return results

    def _compare(self, text: str, ids: list[int]) -> None:
        if self._backend.encode(text, add_special_tokens=False).ids != ids:
            raise RuntimeError(
                "the tokens of a text are not those of its words; please report the tokenizer and "
                f"this text: {text[:200]!r}"
            )

    def _cut_text(self, text: str) -> list[str] | None:
        """Its words and added tokens; None where the library must cut it."""
        if not all(map(self._is_alike, set(text))) or not unicodedata.is_normalized("NFC", text):
            return None
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                words.append(part)
            elif part:
                words += self._cut.findall(part)
        return words if sum(map(len, words)) == len(text) else None

    def _is_alike(self, character: str) -> bool:
        alike = self._characters.get(character)
        if alike is None:
            # How unassigned characters are classed depends on the version of Unicode.
            alike = unicodedata.category(character) != "Cn" and all(
                self._cut.findall(text)
                == [word for word, _ in self._library_cut.pre_tokenize_str(text)]
                for text in (around.format(character) for around in _AROUND)
            )
            self._characters[character] = alike
        return alike


def word_tokenizer(backend: Tokenizer) -> WordTokenizer | None:
    """For a tokenizer that works as Qwen's do: byte-level BPE of words cut by a regular expression.

    None for any other, and for one whose added tokens depend on what is beside them.
    """
    parts: dict[str, Any] = json.loads(backend.to_str())
    model, steps = parts["model"], parts["pre_tokenizer"] or {}
    cutting = steps.get("pretokenizers", [])
    if (
        model["type"] != "BPE"
        or model["dropout"]
        or (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC"
        or [step["type"] for step in cutting] != ["Split", "ByteLevel"]
        or "Regex" not in cutting[0]["pattern"]
        or (cutting[0]["behavior"], cutting[0]["invert"]) != ("Isolated", False)
        or cutting[1]["add_prefix_space"]
        or cutting[1]["use_regex"]
        or (parts["post_processor"] or {"type": "ByteLevel"})["type"] != "ByteLevel"
    ):
        return None
    added = parts["added_tokens"]
    if not added or any(
        token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in added
    ):
        return None
    return WordTokenizer(
        backend, cutting[0]["pattern"]["Regex"], {token["content"]: token["id"] for token in added}
    )
