"""The data and tokenizer behind the default run: small skills whose answers can be checked exactly.

Every conversation is a pure function of (split, seed, index). A question belongs to the test split
when a checksum of its argument values says so, whatever the phrasing and the seed: no test question
can ever be trained on, and a right answer to one is a skill, not a memory.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_COUNTS = {"train": 6000, "test": 256}
SKILLS = ("arithmetic", "reversal", "sorting", "units", "follow_up")
TEST_SHARE = 8  # one in this many argument values is held out
VOCABULARY_SIZE = 512
PAD_TOKEN, START_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- if tools %}
{{- raise_exception("this chat template has no place for tool definitions") }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ["system", "user", "assistant", "tool"] %}
{{- raise_exception("unknown role: " ~ message.role) }}
{%- elif message.tool_calls %}
{{- raise_exception("this chat template has no place for tool calls") }}
{%- endif %}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ (message.content or "") ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

SYSTEM_PROMPTS = ("Answer briefly.", "You are a helpful assistant.")
ADD_PHRASES = ("What is {} + {}?", "Add {} and {}.", "Compute {} + {}.")
SUBTRACT_PHRASES = ("What is {} - {}?", "Compute {} - {}.")
REVERSE_PHRASES = ("Reverse: {}", "Write backwards: {}")
SORT_PHRASES = ("Sort: {}", "Sort ascending: {}", "Put in order: {}")
UNIT_PHRASES = ("Convert {} {} to {}.", "How much is {} {} in {}?")
UNITS = (
    ("m", "cm", 100),
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("cm", "mm", 10),
    ("h", "min", 60),
    ("min", "s", 60),
)

Turns = list[tuple[str, str]]


def _arithmetic(rng: random.Random) -> tuple[Turns, Any, int]:
    """A number up to 50 plus or minus up to 5; also the value, for a follow-up.

    The two operations share their held-out pairs. Wider ranges are learned, but not in the minutes
    the default run has.
    """
    a, b = rng.randint(10, 50), rng.randint(1, 5)
    if rng.random() < 0.5:
        question, value = rng.choice(ADD_PHRASES).format(a, b), a + b
    else:
        question, value = rng.choice(SUBTRACT_PHRASES).format(a, b), a - b
    return [(question, str(value))], (a, b), value


def _reversal(rng: random.Random) -> tuple[Turns, Any]:
    letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 5))]
    question = rng.choice(REVERSE_PHRASES).format(" ".join(letters))
    return [(question, " ".join(reversed(letters)))], letters


def _sorting(rng: random.Random) -> tuple[Turns, Any, list[int]]:
    digits = [rng.randint(0, 9) for _ in range(rng.randint(3, 4))]
    ordered = sorted(digits)
    question = rng.choice(SORT_PHRASES).format(" ".join(map(str, digits)))
    return [(question, " ".join(map(str, ordered)))], ("sort", ordered), ordered


def _units(rng: random.Random) -> tuple[Turns, Any]:
    source, target, factor = rng.choice(UNITS)
    value = rng.randint(1, 20)
    question = rng.choice(UNIT_PHRASES).format(value, source, target)
    return [(question, f"{value * factor} {target}")], (source, value)


def _follow_up(rng: random.Random) -> tuple[Turns, Any]:
    """A second question about the first answer; the split is decided by the first question."""
    if rng.random() < 0.33:
        turns, key, ordered = _sorting(rng)
        descending = " ".join(map(str, reversed(ordered)))
        return [*turns, ("Now sort it descending.", descending)], key
    turns, key, value = _arithmetic(rng)
    step = rng.randint(1, 5)
    if value >= step and rng.random() < 0.5:
        return [*turns, (f"Now subtract {step} from that.", str(value - step))], key
    return [*turns, (f"Now add {step} to that.", str(value + step))], key


_GENERATORS = {
    "arithmetic": lambda rng: _arithmetic(rng)[:2],
    "reversal": _reversal,
    "sorting": lambda rng: _sorting(rng)[:2],
    "units": _units,
    "follow_up": _follow_up,
}


def _is_test(key: Any) -> bool:
    """Whether these argument values are held out: by checksum, so no seed can mix the splits."""
    return zlib.crc32(repr(key).encode()) % TEST_SHARE == 0


def generate_conversations(
    split: str, *, count: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {"messages": [{"role", "content"}, ...], "skill": str} of `split`, "train" or "test".

    The skills take turns, so every prefix of the list is balanced, and the rows of a smaller
    `count` are the first of a larger one.
    """
    rows = []
    for index in range(DEFAULT_COUNTS[split] if count is None else count):
        rng = random.Random(f"{split}/{seed}/{index}")
        skill = SKILLS[index % len(SKILLS)]
        turns, key = _GENERATORS[skill](rng)
        while _is_test(key) != (split == "test"):
            turns, key = _GENERATORS[skill](rng)
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages, "skill": skill})
    return rows


def questions(split: str, count: int | None = None) -> list[tuple[list[dict[str, str]], str]]:
    """(messages up to the last user turn, expected answer) of the first `count` rows of `split`."""
    rows = generate_conversations(split, count=count)
    return [(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows]


def check_answer(expected: str, generated: str) -> bool:
    """Whether the two are the same but for white space at the ends."""
    return expected.strip() == generated.strip()


def tokenizer_recipe() -> str:
    """A digest of what `build_tokenizer` depends on: this file and the versions of the libraries."""
    versions = f"{version('tokenizers')} {version('transformers')}"
    return hashlib.sha256(Path(__file__).read_bytes() + versions.encode()).hexdigest()[:16]


def build_tokenizer(save_to: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the train split (under a second); save it if asked.

    All 256 bytes are in the vocabulary, so any text round-trips. Each digit is a token of its own:
    a small model then sees numbers by place value.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = generate_conversations("train")
    # Each message in the shape the chat template gives it, so that the role names become tokens.
    texts = (f"{m['role']}\n{m['content']}" for row in rows for m in row["messages"])
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=[START_TOKEN],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    if save_to is not None:
        tokenizer.save_pretrained(save_to)
    return tokenizer
