"""A user's functions by name: what is found, and one line for each way in which one is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.errors import TrainError
from trainer.functions import import_function, import_object, source_digest

_MODULE = """
limit = 3
def loss(model, batch): ...
def rate(step, *, steps, peak, schedule): ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current folder, which is not on Python's path."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(_MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import not_installed_here")
    (tmp_path / f"{name}_typo.py").write_text("def loss(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_function_in_the_current_folder_is_found(module: str) -> None:
    loss = import_function(f"{module}.loss", flag="--loss", takes="model, batch")
    assert loss is import_object(f"{module}.loss", flag="--loss")
    takes = "step, *, steps, peak, schedule"
    rate = import_function(f"callable:{module}.rate", flag="--schedule.name", takes=takes)
    assert rate.__name__ == "rate"
    import_function("math.hypot", flag="--loss", takes="model, batch")  # no signature: written in C


def test_the_digest_is_that_of_the_file(module: str) -> None:
    import_object(f"{module}.loss", flag="--loss")
    before = source_digest(f"{module}.loss")
    assert source_digest(f"callable:{module}.rate") == before
    Path(f"{module}.py").write_text(_MODULE + "# changed\n")
    assert source_digest(f"{module}.loss") != before


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere.loss", "there is no module nowhere; give package.module.function"),
        ("{}_broken.loss", r"importing \w+ failed \(ModuleNotFoundError: No module named 'not_ins"),
        ("{}_typo.loss", r"importing \w+ failed \(SyntaxError: "),
        ("{}.los", r"has no los; did you mean loss\?"),
        ("{}.limit", "is a int, not a function"),
        ("{}.rate", r"has the arguments \(step, .*, and is called with \(model, batch\): "),
        ("loss", "give package.module.function"),
    ],
)
def test_what_cannot_be_used_is_one_line(module: str, path: str, line: str) -> None:
    with pytest.raises(TrainError, match=line) as error:
        import_function(path.format(module), flag="--loss", takes="model, batch")
    assert str(error.value).startswith("--loss ")
    assert "\n" not in str(error.value)
