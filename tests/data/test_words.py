"""Words are remembered, and every text has the tokens the library gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from data.words import Words, WordTokenizer, word_tokenizer

QWEN3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ["the cat's hat isn't  the rat's\n\n", "12 cats, 345 hats!! größer Ünïcode 猫です"] * 20


def _tokenizer(pattern: str = QWEN3, behaviour: str = "isolated") -> Tokenizer:
    """A small tokenizer of Qwen's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behaviour),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("<", normalized=False)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["small", "qwen3"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordTokenizer]:
    if request.param == "small":
        backend = _tokenizer()
    else:
        folder: Path = request.getfixturevalue("qwen3_tokenizer_dir")
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = word_tokenizer(backend)
    assert words is not None
    return backend, words


def _assert_alike(backend: Tokenizer, words: WordTokenizer, texts: list[str]) -> int:
    """Returns how many texts did not go through the library as a whole."""
    expected = backend.encode_batch(texts, add_special_tokens=False)
    found = words.encode_batch(texts)
    for text, one, other in zip(texts, expected, found, strict=True):
        assert other.ids == one.ids, text
        for place in range(len(text) + 1):
            assert other.char_to_token(place) == one.char_to_token(place), (text, place)
        for token in range(len(one.ids) + 1):
            if token < len(one.ids):
                assert other.token_to_chars(token) == one.token_to_chars(token), (text, token)
            else:
                assert other.token_to_chars(token) is None
    return sum(isinstance(other, Words) for other in found)


# What cutting rules treat apart, among characters of every kind.
_PIECES = st.sampled_from(
    ["'s", "'LL", "'\u017f", "<|im_end|>", "<think>", "<", "\r\n", "  ", " \n", "e\u0301", "\u212a"]
)
_CHARACTERS = st.characters(exclude_categories=["Cs"])


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.lists(_PIECES | _CHARACTERS, max_size=12).map("".join), max_size=5))
def test_any_text_has_the_tokens_of_the_library(pair, texts: list[str]) -> None:
    backend, words = pair
    _assert_alike(backend, words, texts)
    # Once more, of words that are known by now.
    expected = [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
    assert [one.ids for one in words.encode_batch(texts)] == expected


def test_ordinary_texts_are_cut_here(pair) -> None:
    texts = [
        "<|im_start|>user\nWhat's 3 + 4, please?<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
        "</think>\n\nIt's 7.<|im_end|>\n",
        "def f(x):\n\treturn  x ** 2  # twice\r\n",
        "Größere Übungen: naïve Äpfel 猫です。 नमस्ते שלום 👍🏽",
        "",
        " ",
    ]
    assert _assert_alike(*pair, texts) == len(texts)
    assert _assert_alike(*pair, texts) == len(texts)  # from memory


def test_what_is_not_normalised_or_not_assigned_goes_through_the_library(pair) -> None:
    assert _assert_alike(*pair, ["e\u0301", "\u0378", "plain"]) == 1


@pytest.mark.slow
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _tokenizer()
    words = word_tokenizer(backend)
    assert words is not None
    monkeypatch.setattr("data.words._MOST_WORDS", 50)
    for first in range(0, 500, 20):
        texts = [f"word{chr(97 + n % 26)} {n} {'long' * 40}" for n in range(first, first + 20)]
        _assert_alike(backend, words, texts)
        assert len(words._known) < 120
    assert not any(len(word) > 64 for word in words._known)


def test_a_text_that_differs_is_never_passed_on() -> None:
    words = word_tokenizer(_tokenizer())
    assert words is not None
    words._known["cat"] = [5, 5, 5]  # as if the library had cut otherwise
    with pytest.raises(RuntimeError, match="are not those of its words"):
        words.encode_batch(["cat"])


def test_other_kinds_of_tokenizers_are_left_to_the_library() -> None:
    assert word_tokenizer(_tokenizer()) is not None
    lower = _tokenizer()
    lower.normalizer = normalizers.Lowercase()
    prefix = _tokenizer()
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    stripping = _tokenizer()
    stripping.add_tokens([AddedToken("<pad>", lstrip=True, normalized=False)])
    dropout = _tokenizer()
    dropout.model.dropout = 0.1
    assert word_tokenizer(_tokenizer(behaviour="removed")) is None
    for other in (lower, prefix, stripping, dropout):
        assert word_tokenizer(other) is None
