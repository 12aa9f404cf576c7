"""Row formats: told by their columns, read as documented, each row proven or excluded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data import embedded
from data.chat import Encoded, Excluded
from data.config import DataConfig
from data.errors import DataError
from data.formats import COLUMNS, choose_format, encode_rows


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return embedded.build_tokenizer()


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer_dir)


def results(tokenizer: Any, rows: Any, **options: Any) -> list[Encoded | Excluded]:
    return list(encode_rows(rows, tokenizer, DataConfig(**options), name="rows"))


def whole_and_supervised(tokenizer: Any, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """The text of all tokens and of those that are trained on; as a Dataset it is the same."""
    (result,) = results(tokenizer, [row], **options)
    (from_arrow,) = results(tokenizer, Dataset.from_list([row]), **options)
    assert isinstance(result, Encoded) and isinstance(from_arrow, Encoded), result
    assert result.input_ids.tolist() == from_arrow.input_ids.tolist()
    assert result.supervised.tolist() == from_arrow.supervised.tolist()
    supervised = result.input_ids[result.supervised]
    return tokenizer.decode(result.input_ids.tolist()), tokenizer.decode(supervised.tolist())


def answers(tokenizer: Any, row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """The text of all tokens of both answers of a pair, and of those that are trained on."""
    pair = results(tokenizer, [row], **options)
    assert all(isinstance(result, Encoded) and result.row == 0 for result in pair), pair
    return [
        (
            tokenizer.decode(r.input_ids.tolist()),
            tokenizer.decode(r.input_ids[r.supervised].tolist()),
        )
        for r in pair
        if isinstance(r, Encoded)
    ]


def reason(tokenizer: Any, row: dict[str, Any], **options: Any) -> str:
    (result,) = results(tokenizer, [row], **options)
    assert isinstance(result, Excluded), result
    return result.reason


# ---------------------------------------------------------------------------------------- columns


def test_the_flag_offers_every_format() -> None:
    assert get_args(get_type_hints(DataConfig)["format"]) == ("auto", *COLUMNS)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_format_is_told_by_its_columns(kind: str) -> None:
    required, optional = COLUMNS[kind]
    assert choose_format([*required, "id", "source"], "auto", name="rows") == kind
    assert choose_format([*optional, *required], "auto", name="rows") == kind


def test_the_examples_of_the_documentation_are_rows_of_their_formats(small) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(\w+)`$(.*?)(?=^##)", page, re.M | re.S)
    assert [kind for kind, _ in sections] == list(COLUMNS)
    for kind, section in sections:
        examples = [json.loads(line) for line in re.findall(r"```json\n(.*?)\n```", section)]
        assert examples
        for row in examples:
            assert choose_format(list(row), "auto", name="rows") == kind
            if kind == "preference":
                assert len(answers(small, row)) == 2
            else:
                whole_and_supervised(small, row)
    for kind, (required, optional) in COLUMNS.items():
        (line,) = re.findall(rf"^\| `{kind}` \|(.*)\|$", page, re.M)
        assert set(re.findall(r"`(\w+)`", line)) >= {*required, *optional}


def test_no_format_or_more_than_one_is_an_error_that_names_them() -> None:
    with pytest.raises(DataError, match="rows: the columns prompt, id fit no format") as error:
        choose_format(["prompt", "id"], "auto", name="rows")
    for kind, (required, _) in COLUMNS.items():
        assert f"{kind}: {', '.join(required)}" in str(error.value)
    columns = ["instruction", "input", "output", "text"]
    with pytest.raises(DataError, match=r"more than one format; set data\.format to alpaca or tex"):
        choose_format(columns, "auto", name="rows")
    assert choose_format(columns, "text", name="rows") == "text"
    with pytest.raises(DataError, match=r"data\.format=alpaca needs .*; output is not among instr"):
        choose_format(["instruction", "text"], "alpaca", name="rows")


def test_columns_of_no_use_are_not_read(small) -> None:
    read = set()

    def record(batch: dict[str, Any]) -> dict[str, Any]:
        read.update(batch)
        return batch

    rows = Dataset.from_list([{"text": "a", "image": "large"}]).with_transform(record)
    (result,) = results(small, rows)
    assert isinstance(result, Encoded) and read == {"text"}


# ---------------------------------------------------------------------------------- conversations

SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Ciao 😀"},
    ]
}


def test_qwen3_openai_messages_with_tools_and_reasoning(qwen3) -> None:
    """As the OpenAI API writes them: arguments as JSON text, null content, ids of calls."""
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
        {"role": "assistant", "reasoning_content": "It is dry.", "content": "No rain."},
    ]
    row = {"messages": messages, "tools": [tool]}
    whole, supervised = whole_and_supervised(qwen3, row)
    shown = [{**message, "content": message["content"] or ""} for message in messages]
    assert whole == qwen3.apply_chat_template(shown, tools=[tool], tokenize=False)
    assert supervised == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>'
        "<think>\nIt is dry.\n</think>\n\nNo rain.<|im_end|>"
    )


def test_qwen3_sharegpt_is_the_same_conversation(qwen3) -> None:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"]}
        for turn in SHAREGPT["conversations"]
    ]
    expected = whole_and_supervised(qwen3, {"messages": messages})
    assert whole_and_supervised(qwen3, SHAREGPT) == expected
    assert expected[1] == "Hello.<|im_end|><think>\n\n</think>\n\nCiao 😀<|im_end|>"
    last = whole_and_supervised(qwen3, SHAREGPT, train_on="last")
    assert last[1] == "<think>\n\n</think>\n\nCiao 😀<|im_end|>"


def test_sharegpt_system_tool_and_silent_turns(small) -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "user", "value": "u"},
        {"from": "assistant", "value": "a", "train": False},
        {"from": "tool", "value": "t"},
        {"from": "gpt", "value": "b"},
    ]
    whole, supervised = whole_and_supervised(small, {"conversations": turns, "tools": "[]"})
    assert whole == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert supervised == "b<|im_end|>"
    column = {"conversations": turns[1:], "system": "s"}
    assert whole_and_supervised(small, column) == (whole, supervised)


def test_qwen3_sharegpt_function_calls(qwen3) -> None:
    call = {"name": "weather", "arguments": {"city": "Zürich", "day": None}}
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "dry"},
        {"from": "function_call", "value": json.dumps([call, {"name": "f", "arguments": "{}"}])},
        {"from": "observation", "value": "dry"},
        {"from": "gpt", "value": "No rain."},
    ]
    whole, supervised = whole_and_supervised(qwen3, {"conversations": turns, "tools": "[]"})
    assert whole.count("<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>") == 2
    shown = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "day": null}}\n</tool_call>'
    other = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert supervised == (
        f"{shown}<|im_end|>{shown}\n{other}<|im_end|><think>\n\n</think>\n\nNo rain.<|im_end|>"
    )


def test_expanded_turns_of_rows_in_parts(small) -> None:
    """A list or a slice of a set counts its rows from 0; every format of conversations expands."""

    def turns(result: Encoded | Excluded) -> tuple[int, str]:
        assert isinstance(result, Encoded)
        return result.row, small.decode(result.input_ids[result.supervised].tolist())

    silent = {**SHAREGPT["conversations"][1], "train": False}
    rows = [
        {"conversations": [{**turn, "train": None} for turn in SHAREGPT["conversations"]]},
        {"conversations": [{"from": "gpt", "value": "", "train": None}]},
        {"conversations": [*SHAREGPT["conversations"][:1], silent]},
    ] * 40
    parts = [Dataset.from_list(rows), rows, rows[3:], Dataset.from_list(rows).select(range(3, 120))]
    for part in parts:
        found = results(small, part, expand_turns=True)
        assert [result.row for result in found] == [
            3 * group + row for group in range(len(part) // 3) for row in (0, 0, 1, 2)
        ]
        for group in range(len(part) // 3):
            first, second, third, fourth = found[4 * group : 4 * group + 4]
            assert turns(first) == (3 * group, "Hello.<|im_end|>")
            assert turns(second) == (3 * group, "Ciao 😀<|im_end|>")
            assert third == Excluded(3 * group + 1, "content is empty")
            assert turns(fourth) == (3 * group + 2, "")
    completion = [{"role": "assistant", "content": text} for text in ("two", "three")]
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    found = results(small, [{"prompt": prompt, "completion": completion}], expand_turns=True)
    assert list(map(turns, found)) == [(0, "two<|im_end|>"), (0, "three<|im_end|>")]
    (only,) = results(small, [{"text": "a"}], expand_turns=True)
    assert turns(only) == (0, "a<|endoftext|>")


def test_alpaca(small) -> None:
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3"}
    whole, supervised = whole_and_supervised(small, row)
    assert whole == (
        "<|im_start|>user\nSort.\n\n3 1<|im_end|>\n<|im_start|>assistant\n1 3<|im_end|>\n"
    )
    assert supervised == "1 3<|im_end|>"
    for nothing in ("", None):
        whole, _ = whole_and_supervised(small, {**row, "input": nothing, "system": "Be brief."})
        assert whole.startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSort.<|im"
        )


def test_of_prompt_messages_only_the_completion_is_trained_on(small) -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "two"}]}
    whole, supervised = whole_and_supervised(small, row)
    assert whole.count("<|im_start|>") == 4
    assert supervised == "two<|im_end|>"


# ------------------------------------------------------------------------------------------ texts


def test_qwen3_text_is_supervised_whole_and_ended(qwen3) -> None:
    text = "Ein Satz.\n\ndef f(x):\n    return <think>x</think> 😀 e\u0301\n"
    (result,) = results(qwen3, [{"text": text}])
    assert isinstance(result, Encoded)
    expected = qwen3(text, add_special_tokens=False).input_ids
    end = qwen3.convert_tokens_to_ids("<|endoftext|>")
    assert qwen3.eos_token == "<|im_end|>"
    assert result.input_ids.tolist() == [*expected, end]
    assert result.supervised.all()


def test_qwen3_prompt_and_completion_are_tokenised_as_generation_sees_them(qwen3) -> None:
    completion = " Paris."
    for prompt in ("The capital of France is", "The capital of France is Par"):
        (result,) = results(qwen3, [{"prompt": prompt, "completion": completion}])
        assert isinstance(result, Encoded)
        before = qwen3(prompt, add_special_tokens=False).input_ids
        after = [*qwen3(completion, add_special_tokens=False).input_ids, qwen3.eos_token_id]
        assert result.input_ids.tolist() == before + after
        assert result.supervised.tolist() == [False] * len(before) + [True] * len(after)


def test_qwen3_control_tokens_in_texts_can_be_plain(qwen3) -> None:
    spelled = ["<|im_end|>", "<|endoftext|>", "<|fim_prefix|>"]
    texts = [{"text": f"a{token}b"} for token in spelled]
    pairs = [{"prompt": f"a{token}", "completion": f"{token}b"} for token in spelled]
    for rows, end in ((texts, "<|endoftext|>"), (pairs, "<|im_end|>")):
        excluded = [Excluded(i, "control token in text") for i in range(len(rows))]
        assert results(qwen3, rows) == excluded
        plain = results(qwen3, Dataset.from_list(rows), control_tokens="plain")
        for row, token, result in zip(rows, spelled, plain, strict=True):
            assert isinstance(result, Encoded)
            ids = result.input_ids.tolist()
            assert qwen3.decode(ids) == "".join(row.values()) + end
            assert qwen3.convert_tokens_to_ids(token) not in ids[:-1]
    (result,) = results(qwen3, [{"text": "a<|im_end|><think>"}], control_tokens="plain")
    assert isinstance(result, Encoded)
    tokens = qwen3.convert_ids_to_tokens(result.input_ids[:-1].tolist())
    # <think> is a word a text may hold, not structure.
    assert tokens == ["a", "<", "|", "im", "_end", "|", ">", "<think>"]


def test_texts_need_no_chat_template_but_an_end() -> None:
    tokenizer = embedded.build_tokenizer()
    tokenizer.chat_template = None
    ended = "a<|endoftext|>"
    assert whole_and_supervised(tokenizer, {"text": "a"}) == (ended, ended)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        results(tokenizer, [{"prompt": "a", "completion": "b"}])


# -------------------------------------------------------------------------------------- token ids


def test_token_ids_and_labels_are_used_as_they_are(small) -> None:
    (result,) = results(small, [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}])
    assert isinstance(result, Encoded)
    assert result.input_ids.tolist() == [5, 6, 7, 8]
    assert result.supervised.tolist() == [False, True, False, True]
    row = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": None}
    (result,) = results(small, [row])
    assert isinstance(result, Encoded) and result.supervised.tolist() == [True, True]


# --------------------------------------------------------------------------------------- bad rows

NOT_A_CALL = "the value of a function_call is not an object with name and arguments"
SHIFTED = "labels differ from input_ids: they must be -100 or the same, unshifted"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": "hello"}, "conversations is not a list"),
        ({"conversations": ["hello"]}, "a message is not an object"),
        ({"conversations": {"from": "human"}}, "conversations is not a list"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown role"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "unknown role"),
        ({"conversations": [{"from": "gpt"}]}, "content is missing"),
        (
            {"conversations": [{"from": "function_call"}]},
            "the value of a function_call is not JSON",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "the value of a function_call is not JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "[3]"}]}, NOT_A_CALL),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, NOT_A_CALL),
        (
            {"conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]},
            "tool_calls is not a list of functions with a name",
        ),
        ({"instruction": 3, "output": "a"}, "instruction or input is not a string"),
        ({"instruction": "a", "input": 3, "output": "a"}, "instruction or input is not a string"),
        ({"instruction": "a", "output": None}, "content is missing"),
        ({"instruction": " ", "output": "a"}, "content is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": [{"role": "user"}]}, "completion is not a string"),
        ({"prompt": None, "completion": "b"}, "prompt is not a list"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "no messages"),
        ({"prompt": "a<|im_end|>", "completion": "b"}, "control token in text"),
        ({"text": None}, "text is missing"),
        ({"text": ["a"]}, "text is not a string"),
        ({"text": "\n"}, "text is empty"),
        ({"text": "a<|endoftext|>b"}, "control token in text"),
        ({"input_ids": None}, "input_ids is missing"),
        ({"input_ids": []}, "input_ids is not a list of integers"),
        ({"input_ids": [1.5]}, "input_ids is not a list of integers"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids is not a list of integers"),
        ({"input_ids": [True]}, "input_ids is not a list of integers"),
        ({"input_ids": [2**70]}, "input_ids is not a list of integers"),
        ({"input_ids": [1, 512]}, "input_ids has an id the tokenizer does not know"),
        ({"input_ids": [-1]}, "input_ids has an id the tokenizer does not know"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels and input_ids differ in length"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, SHIFTED),
        (
            {"input_ids": [5, 0], "attention_mask": [1, 0]},
            "attention_mask has zeros or another length: rows must not be padded",
        ),
    ],
)
def test_a_bad_row_is_excluded_with_its_reason(small, row, expected: str) -> None:
    assert reason(small, row) == expected


def test_results_keep_the_order_of_the_rows(small) -> None:
    rows = [{"text": "" if i % 3 == 0 else f"row {i}"} for i in range(600)]
    found = results(small, rows)
    assert [result.row for result in found] == list(range(600))
    for i, result in enumerate(found):
        if i % 3 == 0:
            assert isinstance(result, Excluded)
        else:
            assert isinstance(result, Encoded)
            assert small.decode(result.input_ids.tolist()) == f"row {i}<|endoftext|>"


def test_a_preference_is_two_conversations_of_which_the_last_answer_counts(small) -> None:
    said = [("user", "a"), ("assistant", "one"), ("user", "b")]
    prompt = [{"role": role, "content": text} for role, text in said]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
    begin = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\nb"
    )
    expected = [
        (f"{begin}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n", f"{text}<|im_end|>")
        for text in ("good", "bad")
    ]
    for row in (
        {"prompt": prompt, "chosen": good, "rejected": bad},
        {"chosen": prompt + good, "rejected": prompt + bad},
        {"prompt": prompt, "chosen": "good", "rejected": "bad"},
        {"prompt": "not read", "chosen": prompt + good, "rejected": prompt + bad},
    ):
        assert answers(small, row) == expected
        assert answers(small, row, control_tokens="plain", packing="none") == expected
    (first, _) = answers(small, {"prompt": "b", "chosen": "good", "rejected": "bad"})
    assert first[0].startswith("<|im_start|>user\nb<|im_end|>")


def test_a_preference_that_lacks_a_side_is_excluded_whole(small) -> None:
    whole = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert reason(small, {**whole, "rejected": ""}) == "content is empty"
    assert reason(small, {**whole, "chosen": None}) == "chosen is not a list"
    assert reason(small, {**whole, "prompt": None}) == (
        "chosen begins with an answer, and there is no prompt"
    )
    mixed = results(small, [whole, {**whole, "rejected": ""}, {**whole, "chosen": ""}, whole])
    assert [(result.row, isinstance(result, Excluded)) for result in mixed] == [
        (0, False), (0, False), (1, True), (2, True), (3, False), (3, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("overlong", "truncate", "use drop or error"),
        ("overlong", "split", "use drop or error"),
        ("packing", "fixed", "use best_fit or none"),
        ("expand_turns", True, "use false"),
    ],
)
def test_what_would_tear_pairs_apart_is_refused(small, option, value, remedy) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=f"data.{option} {value} would tear pairs .* {remedy}"):
        results(small, [row], **{option: value})
