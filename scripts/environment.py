"""Where the libraries keep their files, and how much they say: set before they are imported."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from scripts.command_line import CommandLineError

# Read the environment once, on import.
_LIBRARIES = ("huggingface_hub", "datasets", "transformers")
# What huggingface_hub takes for a switched-on variable.
_TRUE = ("1", "ON", "YES", "TRUE")


def use_cache_dir(cache_dir: str) -> Path:
    """Make `cache_dir` the one folder of every download and derived file of this process.

    It has the layout of a HF_HOME (hub/, datasets/, xet/, ...), so that an existing one can be
    given, plus compiled/ for kernels. What the shell had set for these paths is overridden. A
    token saved by `hf auth login` stays readable where it is.

    Args:
        cache_dir: the folder; created if missing, ~ is expanded.

    Returns:
        The absolute path of the folder.

    Raises:
        CommandLineError: it cannot be created or written. With HF_HUB_OFFLINE=1 a folder that can
            only be read is accepted.
        RuntimeError: a library that has read the environment already would use another folder.
    """
    root = Path(os.path.abspath(os.path.expanduser(cache_dir)))
    settings = cache_settings(root)
    imported = [library for library in _LIBRARIES if library in sys.modules]
    if imported and any(os.environ.get(name) != value for name, value in settings.items()):
        raise RuntimeError(
            f"use_cache_dir({str(root)!r}) was called after the import of {', '.join(imported)}, "
            "which already chose other folders: call it first"
        )
    keep_others_out()
    _require_writable(root)
    _keep_saved_token()
    os.environ.update(settings)
    _quiet_libraries()
    return root


def keep_others_out() -> None:
    """Let no file or folder of this process be writable by everybody, whatever the shell's umask allows."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)


def remove_launcher_folders() -> None:
    """Remove the empty folders torchrun made for this rank in the system's temporary folder, and leaves behind.

    Folders that hold anything, such as logs that were asked for, stay.
    """
    rank_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent
    if not any(part.startswith("torchelastic_") for part in rank_folder.parts):
        return
    with suppress(OSError):  # not empty: another rank has not left yet
        # torchelastic_*/RUN/attempt_*/RANK, from the inside out
        for folder in (rank_folder, *list(rank_folder.parents)[:3]):
            folder.rmdir()


def cache_settings(root: Path) -> dict[str, str]:
    """The environment variables that move every cache under root."""
    hub = root / "hub"
    downloads = root / "datasets" / "downloads"
    compiled = root / "compiled"
    folders = {
        "HF_HOME": root,
        "HF_HUB_CACHE": hub,
        "HUGGINGFACE_HUB_CACHE": hub,
        "HF_ASSETS_CACHE": root / "assets",
        "HUGGINGFACE_ASSETS_CACHE": root / "assets",
        "HF_XET_CACHE": root / "xet",
        "HF_MODULES_CACHE": root / "modules",
        "HF_DATASETS_CACHE": root / "datasets",
        "HF_DATASETS_DOWNLOADED_DATASETS_PATH": downloads,
        "HF_DATASETS_EXTRACTED_DATASETS_PATH": downloads / "extracted",
        "TORCH_HOME": root / "torch",
        "TORCHINDUCTOR_CACHE_DIR": compiled / "inductor",
        "TORCH_EXTENSIONS_DIR": compiled / "extensions",
        "PYTORCH_KERNEL_CACHE_PATH": compiled / "kernels",
        "TRITON_HOME": compiled,
        "TRITON_CACHE_DIR": compiled / "triton",
        "CUDA_CACHE_PATH": compiled / "cuda",
        "MPLCONFIGDIR": root / "matplotlib",
        "WANDB_CACHE_DIR": root / "wandb",
        "WANDB_DATA_DIR": root / "wandb",
        # Catches every other library that follows the XDG convention.
        "XDG_CACHE_HOME": root / "xdg",
    }
    return {name: str(folder) for name, folder in folders.items()}


def _require_writable(root: Path) -> None:
    """Create root and write one byte in it: permission bits say nothing about a full disk."""
    try:
        for folder in [*reversed(root.parents), root]:
            # Each missing level by itself: the mode of os.makedirs is for the last level only.
            if not folder.exists():
                folder.mkdir(mode=0o755, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(b"0")
            probe.flush()
    except (OSError, ValueError) as error:
        if os.path.isdir(root) and os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
            return
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandLineError(
            f"--cache_dir {root} cannot be written ({reason}): give a folder you can write to with "
            "free space; a complete cache that can only be read works with HF_HUB_OFFLINE=1"
        ) from error


def _keep_saved_token() -> None:
    """Point to the token of `hf auth login`, which is searched in HF_HOME, before HF_HOME moves."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HF_TOKEN_PATH"):
        return
    default_home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    token = Path(os.environ.get("HF_HOME", default_home)).expanduser() / "token"
    if token.is_file():
        os.environ["HF_TOKEN_PATH"] = str(token.absolute())


def _quiet_libraries() -> None:
    """No telemetry, errors only, bars on a terminal and rank 0 only. A verbosity that the shell set stays."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # torch's profiler says on stderr that it begins and ends, on its highest level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # Threads of the tokenizer do not survive the fork of a worker process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        for name in ("HF_HUB", "HF_DATASETS"):
            os.environ[f"{name}_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["TQDM_DISABLE"] = "1"
