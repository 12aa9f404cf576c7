"""What every test gets: an empty home, no hub, one thread, and the quick tests first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.command import clean_environment
from tests.support.ranks import start_server

pytest_plugins = ["tests.support.s3"]

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def server_of_the_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Start the server that ranks are forked from: it loads the libraries while unit tests run.

    Before any test: one that forks from a server of its own would leave it, bare, to all others.
    """
    if any(item.get_closest_marker("distributed") for item in request.session.items):
        start_server(clean_environment(tmp_path_factory.mktemp("server")))


@pytest.fixture(autouse=True)
def private_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME, XDG_CACHE_HOME and TMPDIR of this test alone, and no variable of the hub libraries."""
    env = clean_environment(tmp_path_factory.mktemp("private"))
    for name in set(os.environ) - set(env):
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, env[name])


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """An empty folder to give as `--cache_dir`."""
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def qwen3_tokenizer_dir() -> Path:
    """Folder of the real Qwen3 tokenizer, named by QWEN3_TOKENIZER_DIR."""
    folder = os.environ.get("QWEN3_TOKENIZER_DIR")
    if not folder:
        pytest.skip("QWEN3_TOKENIZER_DIR is not set to a folder with the Qwen3 tokenizer")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, then those that start ranks, then the slow ones: fail early."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slow") is not None,
            item.get_closest_marker("distributed") is not None,
        )
    )
