"""The commands that README.md and the pages of docs/ tell a reader to give."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.support.command import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PROGRAMS = ("python", "torchrun", "make", "pip", "az", "sbatch", "sky", "hf", "lm_eval", "vllm")
_IN_A_LINE = re.compile(rf"(?:{'|'.join(_PROGRAMS)}) \S")


class Command(NamedTuple):
    """One command of a page."""

    page: str
    """Relative to the repository."""
    text: str
    """In one line, as it is written there."""
    environment: dict[str, str]
    """What is set in front of it."""
    words: list[str]
    """The rest, as a shell splits it."""


def commands(page: Path) -> list[Command]:
    """Those of a page, in its order: every line of its blocks of bash, and what begins with a program's name between backticks."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[int, str]] = []
    blocks = list(re.finditer(r"^( *)```(\w*)\n(.*?)^ *```", text, re.M | re.S))
    for block in blocks:
        if block[2] in ("bash", "sh", "console"):
            lines = re.sub(r"\\\n\s*", "", block[3]).splitlines()
            found += [(block.start(), line.strip()) for line in lines if line.strip()]
    prose = re.sub(r"^( *)```.*?^ *```", lambda match: " " * len(match[0]), text, flags=re.M | re.S)
    for span in re.finditer(r"`([^`]+)`", prose):
        if _IN_A_LINE.match(span[1]) and "\n\n" not in span[1]:
            found.append((span.start(), " ".join(span[1].split())))
    name = page.relative_to(ROOT).as_posix()
    return [
        Command(name, line, environment, words)
        for _, line in sorted(found, key=lambda item: item[0])
        for environment, words in [_split(line)]
        if words
    ]


def _split(line: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(line, comments=True)
    environment = {}
    while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
        environment[match[1]] = match[2]
        words.pop(0)
    return environment, words
