"""What docs/reliability.md and SECURITY.md say is tested, is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELIABILITY = {f"T{number}" for number in range(1, 21)} - {"T15"} | {"D11", "D12", "W2", "W6"}
SECURITY = {f"S{number}" for number in range(1, 13)}


def _tests() -> set[str]:
    """The names of all tests."""
    return {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def _cases(test: str) -> set[str]:
    """test_T03_T11_killed_and -> {T3, T11}."""
    leading = re.match(r"test_((?:[DSTW]\d\d_)+)", test)
    return {f"{kind}{int(n)}" for kind, n in re.findall(r"(\w)(\d\d)_", leading[1])} if leading else set()  # fmt: skip


@pytest.mark.parametrize(
    ("page", "cases"), [("docs/reliability.md", RELIABILITY), ("SECURITY.md", SECURITY)]
)
def test_every_case_has_a_test_that_bears_its_name(page: str, cases: set[str]) -> None:
    tests, text = _tests(), (ROOT / page).read_text(encoding="utf-8")
    assert cases - {case for test in tests for case in _cases(test)} == set()
    for path in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    in_table = set()
    for line in re.findall(r"^\| [DSTW]\d.*$", text, re.MULTILINE):
        in_first_column = set(re.findall(r"\b[DSTW]\d+\b", line.split(" | ")[0]))
        named = re.findall(r"`(test_\w+)(?:\.\.\.)?`", line)
        found = [[test for test in tests if test.startswith(name)] for name in named]
        assert found and all(found), f"{page} names a test that is not there: {line}"
        # Of each line some test bears each of its cases.
        assert in_first_column <= {c for names in found for t in names for c in _cases(t)}, line
        in_table |= in_first_column
    assert in_table == cases
