"""inspect_data.py shows what training will see, and lets nothing of the data act on the terminal or page."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.embedded import build_tokenizer
from data.loader import IGNORE_INDEX, PackedBatches
from data.mixture import mix
from data.store import open_tokens, pack_store
from scripts.environment import cache_settings
from scripts.inspect_data import main, row_as_text, token_texts, use_colours, visible
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.hub import LoopbackHub
from tests.support.tiny import write_chat, write_model

SEQ_LEN = 256
CONVERSATIONS = [
    [("user", "clear \x1b[2J\x07 the screen"), ("assistant", "no \x1b[31m")],
    [
        ("system", "Answer in HTML."),
        ("user", "<script>alert(1)</script> \"quoted\" & 'so'"),
        ("assistant", "<b>bold</b>\nand a second line"),
        ("user", "https://example.org \u202e reversed"),
        ("assistant", "grüße, 你好 🎉"),
    ],
    [("user", "What is 2 + 2?"), ("assistant", "4")],
]

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def inspect(
    shared_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Inspect]:
    """The exit code of `main` and what it printed; the environment it changes is put back."""
    # The libraries are imported already, so their folders have to be set from outside.
    for name, value in cache_settings(shared_cache).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main([f"--cache_dir={shared_cache}", *argv])
        return code, *capsys.readouterr()

    yield run
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def chat(tmp_path: Path) -> list[str]:
    """Flags for a file of odd conversations."""
    file = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in conversation]}
        for conversation in CONVERSATIONS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"--data.path={file}", f"--data.seq_len={SEQ_LEN}"]


def documents(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    numbers = [token["document"] for token in row["tokens"]]
    assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))
    groups = itertools.groupby(row["tokens"], lambda token: token["document"])
    return [list(document) for _, document in groups]


def supervised_texts(document: list[dict[str, Any]]) -> list[str]:
    """The decoded labels of each stretch that has some."""
    tokenizer = build_tokenizer()
    stretches = itertools.groupby(document, lambda token: token["label"] is not None)
    return [
        tokenizer.decode([token["label"] for token in stretch])
        for supervised, stretch in stretches
        if supervised
    ]


def test_json_labels_are_what_the_assistant_said(inspect: Inspect, chat: list[str]) -> None:
    code, out, _ = inspect(*chat, "--rows=100", "--json")
    rows = json.loads(out)
    assert code == 0 and out.isascii() and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    said = []
    for row in rows:
        assert set(row) == {"source", "tokens"}
        assert row["source"] == chat[0].removeprefix("--data.path=")
        assert 0 < len(row["tokens"]) <= SEQ_LEN
        for token in row["tokens"]:
            assert set(token) == {"token", "id", "label", "document"}
            assert token["label"] in (None, token["id"])
        said += [supervised_texts(document) for document in documents(row)]
    expected = [
        [f"{content}<|im_end|>" for role, content in conversation if role == "assistant"]
        for conversation in CONVERSATIONS
    ]
    assert sorted(said) == sorted(expected)


def test_the_texts_of_a_documents_tokens_make_up_its_text(
    inspect: Inspect, chat: list[str]
) -> None:
    _, out, _ = inspect(*chat, "--rows=100", "--json=true")
    texts = [
        "".join(token["token"] for token in document)
        for row in json.loads(out)
        for document in documents(row)
    ]
    tokenizer = build_tokenizer()
    expected = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in conversation], tokenize=False
        )
        for conversation in CONVERSATIONS
    ]
    assert sorted(texts) == sorted(expected)


def test_a_character_shows_with_the_token_that_completes_it() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("🎉x")
    assert len(ids) > 2
    assert token_texts(tokenizer, ids) == [""] * (len(ids) - 2) + ["🎉", "x"]
    assert token_texts(tokenizer, ids[:1]) == ["\ufffd"]
    assert "".join(token_texts(tokenizer, tokenizer.encode("a\ufffdb"))) == "a\ufffdb"


def test_the_embedded_rows_are_those_that_training_visits_first(
    inspect: Inspect, shared_cache: Path
) -> None:
    code, out, _ = inspect("--json", "--rows=4", "--seed=7")
    assert code == 0
    rows = json.loads(out)
    assert [row["source"] for row in rows] == ["embedded"] * 4
    (folder,) = [
        path
        for path in (shared_cache / "tokens").iterdir()
        if open_tokens(path).meta["source"] == "embedded"
    ]
    batches = PackedBatches(
        mix([pack_store(open_tokens(folder), method="best_fit", seq_len=256)]),
        seq_len=256,
        micro_batch_size=4,
        pad_token_id=0,
        seed=7,
    )
    batch = next(iter(batches))
    for row, input_ids, labels in zip(
        rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        shown = row["tokens"]
        assert [token["id"] for token in shown] == input_ids[: len(shown)]
        shifted = [
            IGNORE_INDEX
            if token["label"] is None or token["document"] != before["document"]
            else token["label"]
            for before, token in itertools.pairwise(shown)
        ]
        assert shifted == labels[: len(shown) - 1]
        assert set(labels[len(shown) - 1 :]) <= {IGNORE_INDEX}


def test_S10_text_marks_what_is_supervised_and_escapes_what_is_not_printable(
    inspect: Inspect, chat: list[str]
) -> None:
    code, out, err = inspect(*chat)
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in out.split("\n"))
    assert "clear \\x1b[2J\\x07 the screen<|im_end|>\\n\n<|im_start|>assistant\\n\n" in out
    assert "⟦no \\x1b[31m<|im_end|>⟧" in out
    assert "⟦<b>bold</b>\\n\nand a second line<|im_end|>⟧" in out
    assert "\\u202e reversed" in out
    assert re.search(r"^row 1 of \d+: .*chat\.jsonl, \d+ documents?, ", out, re.M)
    assert len(re.findall(r"^── document \d+: \d+ tokens, \d+ supervised$", out, re.M)) == 3
    assert re.search(r"^rows +read +3  from .*chat\.jsonl$", out, re.M)


def test_colours_replace_the_brackets_and_end_with_the_line(
    inspect: Inspect, chat: list[str]
) -> None:
    _, out, _ = inspect(*chat, "--rows=1", "--json")
    (row,) = json.loads(out)
    text = row_as_text(row, "row 1", seq_len=SEQ_LEN, colours=True)
    assert "⟦" not in text
    plain = row_as_text(row, "row 1", seq_len=SEQ_LEN, colours=False)
    uncoloured = re.sub(r"\x1b\[(?:32|2|36|0)m", "", text)
    assert "\x1b" not in uncoloured
    assert uncoloured == plain.translate({ord("⟦"): None, ord("⟧"): None})
    supervised = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", text, re.S))
    assert supervised == "".join(re.findall(r"⟦(.*?)⟧", plain, re.S))
    assert not text.endswith("\n")


def test_colours_are_for_terminals_of_people_who_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not use_colours()
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert use_colours()
        monkeypatch.setenv("TERM", "dumb")
        assert not use_colours()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        assert not use_colours()
        monkeypatch.undo()
    os.close(ours)


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.supervised: list[str] = []
        self._class: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._class = dict(attrs).get("class") if "title" in dict(attrs) else None

    def handle_endtag(self, tag: str) -> None:
        self._class = None

    def handle_data(self, data: str) -> None:
        if self._class == "supervised":
            self.supervised.append(data)


def test_the_page_is_self_contained_and_the_data_is_only_text_in_it(
    inspect: Inspect, chat: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    code, out, _ = inspect(*chat, f"--html={file}")
    assert code == 0
    assert out.splitlines()[-1].endswith(f"in {file}") and "alert" not in out
    text = file.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    page = Page(text)
    # No element and no attribute that could load or run anything.
    assert page.tags <= {*("html", "meta", "title", "style", "h1", "h2", "p", "pre", "div", "span")}
    assert page.attributes <= {"lang", "charset", "name", "content", "class", "title"}
    assert not re.search(r"url\(|@import", text)
    said = "".join(page.supervised).replace("▯", "")
    for conversation in CONVERSATIONS:
        for role, content in conversation:
            assert (f"{visible(content)}<|im_end|>" in said) == (role == "assistant")


def test_the_command_line_of_a_training_run_can_be_given_as_it_is(
    inspect: Inspect, chat: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer:\n  learning_rate: 1e-5\nsteps: 3\nrows: 0\n")
    code, out, _ = inspect(*chat, f"--config={recipe}", "--parallel.compile=true")
    assert code == 0
    assert out.startswith("rows ")


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["--row=3"], 2, "unknown flag --row; did you mean --rows?"),
        (["--dataset_name", "org/chat"], 2, "--dataset_name is --data.name here"),
        (["--rows=-1"], 2, "--rows must be at least 0, got -1"),
        (["--json", "maybe"], 2, "--json: expected true or false, got 'maybe'"),
        (["--data.path=/no/\x1bfile"], 1, "data.path /no/\\x1bfile does not exist"),
        (["--model.path=/nowhere"], 1, "/nowhere holds no tokenizer"),
    ],
)
def test_a_mistake_is_one_line(inspect: Inspect, argv: list[str], code: int, line: str) -> None:
    got, out, err = inspect(*argv)
    assert (got, out) == (code, "")
    assert err.startswith(f"inspect_data.py: error: {line}")
    assert err.endswith("\n") and err[:-1].isprintable()


def test_a_page_that_cannot_be_written_is_one_line(
    inspect: Inspect, chat: list[str], tmp_path: Path
) -> None:
    code, out, err = inspect(*chat, f"--html={tmp_path / 'missing' / 'page.html'}")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"inspect_data\.py: error: --html \S+ cannot be written .*\n", err)


@pytest.mark.slow
def test_nothing_of_a_hub_models_weights_is_downloaded(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_chat(tmp_path / "chat" / "train.jsonl", count=5)
    hub = LoopbackHub({"org/tiny": model}, {"org/chat": tmp_path / "chat"})
    with hub:
        command = [
            *(sys.executable, str(ROOT / "scripts" / "inspect_data.py"), "--json", "--rows", "1"),
            *("--model.name", "org/tiny", "--data.name", "org/chat", "--data.seq_len", "256"),
            *("--cache_dir", str(tmp_path / "cache")),
        ]
        env = {**clean_environment(tmp_path / "user"), "HF_ENDPOINT": hub.url}
        result = run_command(command, timeout=120, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["source"] == "org/chat"
    assert sum(token["label"] is not None for token in row["tokens"]) > 0
    names = set(hub.downloads("org/tiny"))
    assert {"config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
