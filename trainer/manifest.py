"""A checkpoint as files: complete or not there, and every byte accounted for.

    checkpoints/step-00000020/
        tensors/        parameters and optimizer state, torch.distributed.checkpoint
        state.json      step, sample cursor, random-number states, what the run was given
        manifest.json   size and SHA-256 of every other file; written last

A checkpoint is staged in a hidden folder and renamed when all of it is on the disk. It goes the same way back:
it is renamed before its files are removed, so that what bears a checkpoint's name never lacks one of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors"
FORMAT = 2

Facts = dict[str, Any]
"""`bytes` and `sha256` of a file."""


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder's name; None where that is no checkpoint's."""
    digits = name.removeprefix("step-")
    return int(digits) if name != digits and len(digits) >= 8 and digits.isdecimal() else None


def checkpoints(folder: Path) -> list[Path]:
    """Everything that bears a checkpoint's name, oldest first; what was set aside does not."""
    found = [(step_of(path.name), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return [path for path in checkpoints(folder) if (path / MANIFEST).is_file()]


def begin(folder: Path, step: int) -> Path | None:
    """An empty hidden folder for the checkpoint after `step`; None if that is there already.

    What an earlier process left unfinished is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rest in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")):
        shutil.rmtree(rest, ignore_errors=True)
    if (folder / name_of(step)).exists():
        return None
    staging = staging_of(folder, step)
    staging.mkdir()
    return staging


def staging_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies until it is complete."""
    return folder / f".{name_of(step)}.partial"


def describe(folder: Path, names: Iterable[str]) -> dict[str, Facts]:
    """Size and SHA-256 of files in `folder`, by name."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in names
    }


def publish(staging: Path, files: Mapping[str, Facts]) -> Path:
    """Write the manifest of `files`, whose contents are on the disk already, and give the checkpoint its name.

    Raises:
        OSError: it cannot be written; or a file is not here, as where another node wrote it to a disk of its own.
    """
    unseen = sorted(set(files) - _present(staging))
    if unseen:
        raise OSError(
            f"{', '.join(unseen[:3])} written by other nodes cannot be seen by the first: "
            "all nodes need --output_dir on the same file system"
        )
    if unknown := sorted(_present(staging) - set(files)):
        raise OSError(f"nobody has written {', '.join(unknown[:3])}")
    for path in staging.rglob("*"):
        if path.is_dir():
            sync(path)
    write_json(staging / MANIFEST, {"format": FORMAT, "files": files})
    return rename(staging)


def rename(staging: Path) -> Path:
    """Give a staged checkpoint, all of it on the disk, its name."""
    final = staging.with_name(staging.name.removeprefix(".").removesuffix(".partial"))
    sync(staging)
    os.rename(staging, final)
    sync(final.parent)
    return final


def read_manifest(checkpoint: Path) -> dict[str, Facts]:
    """The facts of all files by name.

    Raises:
        ValueError: it is damaged, or of another version of this program.
        OSError: it cannot be read.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or set(manifest) != {"format", "files"}:
        raise ValueError("it does not list files")
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this program writes {FORMAT}")
    for name, facts in manifest["files"].items():
        if set(facts) != {"bytes", "sha256"} or ".." in Path(name).parts or name[:1] == "/":
            raise ValueError(f"its entry {name!r} is no file's")
    return manifest["files"]


def damage(checkpoint: Path, *, hashes: bool = True, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint compared with its manifest; None if nothing is.

    Args:
        checkpoint: its folder.
        hashes: compare contents, not only sizes.
        share: of `shares` readers this one; each compares the contents of its own part of the files.
        shares: readers.
    """
    try:
        expected = read_manifest(checkpoint)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    present = _present(checkpoint)
    if present != set(expected):
        odd = ", ".join(sorted(present ^ set(expected)))
        return f"files missing or left over: {odd if odd.isprintable() else ascii(odd)}"
    for number, (name, facts) in enumerate(sorted(expected.items())):
        path = checkpoint / name
        try:
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were written"
            if hashes and number % shares == share and _sha256(path) != facts["sha256"]:
                return f"{name} does not have the SHA-256 it was written with"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that its step can be saved again and nothing is lost."""
    names = itertools.chain([".damaged"], (f".damaged-{n}" for n in itertools.count(2)))
    free = (checkpoint.with_name(checkpoint.name + name) for name in names)
    checkpoint.rename(next(path for path in free if not path.exists()))


def superfluous(names: Collection[str], *, keep_last: int, keep_every: int) -> list[str]:
    """Which of these complete checkpoints are neither among the last nor of a step to be kept for ever."""
    if keep_last == 0:
        return []
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    return [
        name
        for name in sorted(steps, key=lambda name: steps[name])[:-keep_last]
        if not (keep_every and steps[name] % keep_every == 0)
    ]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it is gone at once, whatever happens while its files are removed."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    try:
        os.rename(checkpoint, hidden)
    except OSError:
        return  # it stays, whole, and is tried again after the next save
    shutil.rmtree(hidden, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write and fsync."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _present(folder: Path) -> set[str]:
    """The files in a checkpoint's folder but for the manifest."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return names - {MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
