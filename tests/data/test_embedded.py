"""The embedded data: held-out questions are held out, answers are right, the tokenizer is exact."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import embedded

FACTORS = {("m", "cm"): 100, ("km", "m"): 1000, ("kg", "g"): 1000}
FACTORS |= {("cm", "mm"): 10, ("h", "min"): 60, ("min", "s"): 60}


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return embedded.generate_conversations("train")


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return embedded.generate_conversations("test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    embedded.build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def solve(question: str, previous: str) -> str:
    """Answer a question from its text alone, by other means than the generator's."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    words = question.rstrip(".?").split()
    if "descending" in question:
        return " ".join(sorted(previous.split(), reverse=True))
    if question.startswith("Now"):
        return str(int(previous) + (numbers[0] if "add" in question else -numbers[0]))
    if question.startswith(("Sort", "Put")):
        return " ".join(sorted(map(str, numbers)))
    if question.startswith(("Reverse", "Write")):
        return question.split(": ")[1][::-1]
    if question.startswith(("Convert", "How")):
        units = [word for word in words if word in {u for pair in FACTORS for u in pair}]
        return f"{numbers[0] * FACTORS[units[0], units[1]]} {units[1]}"
    return str(numbers[0] - numbers[1] if " - " in question else sum(numbers))


def arguments(row: dict) -> tuple:
    """What the first question asks, whatever its phrasing and the order of its operands."""
    question = next(m["content"] for m in row["messages"] if m["role"] == "user")
    numbers = re.findall(r"\d+", question)
    if question.startswith(("Reverse", "Write")):
        return ("reverse", question.split(": ")[1])
    if question.startswith(("Sort", "Put")):
        return ("sort", *sorted(numbers))
    if question.startswith(("Convert", "How")):
        return ("convert", *numbers, question.split(numbers[0])[1].split()[0])
    return ("subtract", *numbers) if " - " in question else ("add", *sorted(numbers))


def test_every_answer_is_right(train: list[dict], test: list[dict]) -> None:
    for row in train + test:
        turns = [m for m in row["messages"] if m["role"] != "system"]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        previous = ""
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            previous = assistant["content"]
            before = turns[turns.index(user) - 1]["content"] if user is not turns[0] else ""
            assert embedded.check_answer(solve(user["content"], before), previous), user["content"]


def test_no_test_question_is_in_train_in_any_phrasing_or_seed(test: list[dict]) -> None:
    held_out = {arguments(row) for row in test}
    for seed in (0, 1):
        rows = embedded.generate_conversations("train", seed=seed)
        assert not held_out & {arguments(row) for row in rows}
    other = {arguments(row) for row in embedded.generate_conversations("test", seed=1)}
    assert not other & {arguments(row) for row in embedded.generate_conversations("train")}


def test_rows_are_deterministic_balanced_and_a_prefix_of_a_longer_list(test: list[dict]) -> None:
    assert embedded.generate_conversations("test", count=20) == test[:20]
    assert embedded.generate_conversations("test", count=20, seed=1) != test[:20]
    assert [row["skill"] for row in test[:5]] == list(embedded.SKILLS)
    assert len(test) == 256


def test_questions_end_with_the_user_and_hold_the_answer_back(test: list[dict]) -> None:
    pairs = embedded.questions("test", 256)
    for (messages, answer), row in zip(pairs, test, strict=True):
        assert messages[-1]["role"] == "user"
        assert [*messages, {"role": "assistant", "content": answer}] == row["messages"]


def test_check_answer_forgives_only_outer_white_space() -> None:
    assert embedded.check_answer("1 2", " 1 2\n")
    assert not embedded.check_answer("1 2", "1  2")


def test_tokenizer_is_the_same_file_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        embedded.build_tokenizer(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= embedded.VOCABULARY_SIZE
    for text in ("héllo  日本\n\x00\t 123", "".join(map(chr, range(1, 256)))):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_spaced_letters_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("4071")) == 4
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert len(tokenizer.encode(letters)) == 26


def test_special_tokens_survive_saving(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>")) == 3


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    roles = ("system", "user", "assistant", "tool")
    messages = [{"role": role, "content": f" {role}'s\n"} for role in roles]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "".join(f"<|im_start|>{r}\n {r}'s\n<|im_end|>\n" for r in roles)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == whole + "<|im_start|>assistant\n"
    with pytest.raises(jinja2.TemplateError, match="unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}])
    with pytest.raises(jinja2.TemplateError, match="tool definitions"):
        tokenizer.apply_chat_template(messages, tools=[{"type": "function"}])
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    with pytest.raises(jinja2.TemplateError, match="tool calls"):
        tokenizer.apply_chat_template([call])
