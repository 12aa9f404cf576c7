"""The shape of the code: imports point one way, configuration is cheap, the loop stays short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT, clean_environment, run_command

_ALLOWED = {
    "data": {"data"},
    "models": {"models"},
    "trainer": {"trainer"},
    "scripts": {"scripts", "data", "models", "trainer"},
}
_HEAVY = ["torch", "transformers", "datasets", "huggingface_hub", "numpy"]


def _imported_packages(source: str) -> set[str]:
    """Top-level names of every import, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "packages are imported by their plain names"
            names.add((node.module or "").partition(".")[0])
    return names


_SCRIPTS = [
    file.name
    for file in sorted((ROOT / "scripts").glob("*.py"))
    if '__name__ == "__main__"' in (text := file.read_text(encoding="utf-8"))
    and _imported_packages(text) & {*_ALLOWED}
]


@pytest.mark.parametrize("package", _ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        own = _imported_packages(file.read_text(encoding="utf-8")) & {*_ALLOWED, "tests"}
        assert own <= _ALLOWED[package], f"{file.relative_to(ROOT)} imports {own}"


def test_the_trainer_knows_torch_only() -> None:
    for file in (ROOT / "trainer").rglob("*.py"):
        unwanted = _imported_packages(file.read_text(encoding="utf-8")) & {
            "transformers",
            "datasets",
        }
        assert not unwanted, f"{file.relative_to(ROOT)} imports {unwanted}"


@pytest.mark.parametrize("package", _ALLOWED)
def test_configuration_imports_nothing_heavy(package: str) -> None:
    program = (
        f"import sys, {package}.config; print(*[name for name in {_HEAVY} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize("script", _SCRIPTS)
def test_a_script_takes_its_packages_from_the_repository(script: str, tmp_path: Path) -> None:
    """Another installed `data`, `models` or `trainer` that comes earlier on the path must not win."""
    for package in _ALLOWED:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('the wrong package')")
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='not_main')\n"
        "import data, models, trainer, scripts\n"
        "print(data.__file__, models.__file__, trainer.__file__, scripts.__file__)"
    )
    env = {**clean_environment(tmp_path / "user"), "PYTHONPATH": str(tmp_path)}
    result = run_command([sys.executable, "-c", program], timeout=60, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.output
    expected = [
        str(ROOT / name / "__init__.py") for name in ("data", "models", "trainer", "scripts")
    ]
    assert result.stdout.split() == expected


def test_the_whole_step_reads_top_down_within_120_lines() -> None:
    tree = ast.parse((ROOT / "trainer" / "loop.py").read_text(encoding="utf-8"))
    (train,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 <= 120
