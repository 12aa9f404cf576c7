"""The pages of docs/ name what exists: each other, our flags, our messages."""

from __future__ import annotations

import re

import pytest

from scripts.command_line import build_parser
from scripts.doctor import DoctorConfig
from scripts.foreign_names import FOREIGN_NAMES
from tests.support.command import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = sorted(DOCS.glob("examples/*.md"))
# What programs beside ours take.
_FLAGS_OF_OTHERS = {
    "--nproc_per_node", "--nnodes", "--node_rank", "--rdzv", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint",
    "--master_addr", "--master_port", "--name", "--type", "--size", "--min", "--max", "--set", "--signal", "--shutdown",
    "--per_device_train_batch_size", "--local_addr", "--logdir",
    # Groups of ours.
    "--parallel", "--lora", "--optimizer", "--model",
}  # fmt: skip


def test_the_index_has_every_page_once() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\| \[([\w-]+\.md)\]\(\1\) \|", index)
    assert sorted(listed) == [page.name for page in PAGES if page.name != "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_files_that_are_linked_to_exist(page) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_names_of_other_trainers_are_answered_as_the_page_says() -> None:
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? \|$", text, re.M)
    assert len(rows) > 60
    assert [row for row in rows if FOREIGN_NAMES.get(row[0]) != row[1]] == []


@pytest.mark.parametrize(
    "name",
    [
        *("migration", "doctor", "launch", "recipes", "troubleshooting", "watching"),
        *(f"examples/{page.stem}" for page in EXAMPLES),
    ],
)
def test_our_flags_are_declared(name: str) -> None:
    known = {
        option
        for action in build_parser(DoctorConfig, "doctor.py")._actions
        for option in action.option_strings
    } | {"--check", "--step"}
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(?<![\w-])--[a-z_]+(?:\.[a-z0-9_]+)*", text))
    assert shown - known - _FLAGS_OF_OTHERS == set()


def test_messages_that_are_explained_are_ours() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \| ", text, re.M)
    assert len(messages) > 20
    # Without the line breaks of the code, and with ... for what is filled in.
    sources = [
        re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "...", re.sub(r"\"\s*\n\s*f?\"", "", file.read_text(encoding="utf-8")))
        for package in ("data", "models", "trainer", "scripts")
        for file in sorted((ROOT / package).rglob("*.py"))
    ]  # fmt: skip
    assert [m for m in messages if not any(m in source for source in sources)] == []


def test_the_tour_names_functions_where_they_are() -> None:
    text = (DOCS / "tour.md").read_text(encoding="utf-8")
    stops = re.findall(r"\[([\w/]+\.py)\]\([^)]+\)\s+((?:`\w+`(?:,\s+|\s+and\s+)?)+)", text)
    assert len(stops) > 25
    for file, names in stops:
        defined = re.findall(
            r"^\s*(?:def|class) (\w+)", (ROOT / file).read_text(encoding="utf-8"), re.M
        )
        assert {*re.findall(r"\w+", names.replace(" and ", " "))} <= {*defined}, file
