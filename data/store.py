"""Tokenised examples and their packing on disk: written once, memory-mapped by every rank.

A folder holds, for all examples one after the other,
    input_ids.bin   int32 [T]
    supervised.bin  uint8 [T]   1 where the token is trained on
    offsets.npy     int64 [examples + 1], example i is [offsets[i], offsets[i + 1])
    meta.json       key (what decides the bytes), source, commit, ledger, and of each file above
                    its size and SHA-256
and in a folder METHOD-SEQ_LEN for each way it has been packed
    document_ids.npy, offsets.npy   the Packs
    borders.npy     int64 [documents + 1]: offsets of what is packed, where `fixed` has cut examples
    meta.json       the ledger after packing, and sizes and SHA-256 as above
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.errors import DataError
from data.ledger import length_histogram
from data.packing import Packs, pack
from data.sources import explain_os_error

Method = Literal["best_fit", "fixed", "none"]
TOKEN_FILES = ("input_ids.bin", "supervised.bin", "offsets.npy")


@dataclass(frozen=True)
class TokenStore:
    """Examples of a folder of tokens, read where they are needed."""

    input_ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def group(self) -> int:
        """Neighbouring examples that always share a packed row: 2 of a preference."""
        return self.meta.get("documents_of_a_row", 1)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [examples]: tokens of each example."""
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32, supervised bool) of one example, both [length]."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[place], self.supervised[place].view(bool)

    def first(self, examples: int | None) -> TokenStore:
        """The same without what comes behind the first `examples`, or groups of them; None keeps all."""
        if examples is None:
            return self
        return replace(self, offsets=self.offsets[: examples * self.group + 1])


@dataclass(frozen=True)
class PackedStore:
    """The examples of a folder, and which of them, or of the pieces they are cut into, share a row."""

    examples: TokenStore
    documents: TokenStore
    """What is packed: the examples, or what `fixed` has cut of them."""

    packs: Packs
    ledger: dict[str, Any]
    """That of the tokens, with what is known after packing: see `pack_store`."""


def open_tokens(folder: str | Path) -> TokenStore:
    """Memory-map a folder of tokens; raises DataError if it is not whole."""
    folder = Path(folder)
    with _damage_explained(folder):
        meta = json.loads((folder / "meta.json").read_text())
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        input_ids = np.asarray(np.memmap(folder / "input_ids.bin", np.int32, "r"))
        supervised = np.asarray(np.memmap(folder / "supervised.bin", np.uint8, "r"))
        if not len(input_ids) == len(supervised) == offsets[-1]:
            raise ValueError("sizes disagree")
    return TokenStore(input_ids, supervised, offsets, meta)


def open_packed(folder: str | Path) -> PackedStore:
    """Memory-map a folder made by `prepare_packs`, and the tokens it is in; raises DataError."""
    folder = Path(folder)
    documents = examples = open_tokens(folder.parent)
    with _damage_explained(folder):
        ledger = json.loads((folder / "meta.json").read_text())["ledger"]
        ids, offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("document_ids", "offsets")
        )
        if (folder / "borders.npy").exists():
            borders = np.load(folder / "borders.npy", mmap_mode="r")
            documents = replace(documents, offsets=borders)
        if not len(ids) == len(documents) == offsets[-1]:
            raise ValueError("sizes disagree")
    return PackedStore(examples, documents, Packs(ids, offsets), ledger)


def prepare_packs(tokens: str | Path, *, method: Method, seq_len: int) -> Path:
    """The folder with the packing of a folder of tokens, made unless it is there already."""
    folder = Path(tokens, f"{method}-{seq_len}")
    if folder.exists():
        return folder
    packed = pack_store(open_tokens(tokens), method=method, seq_len=seq_len)
    with written_whole(folder) as staging:
        files = {"document_ids": packed.packs.document_ids, "offsets": packed.packs.offsets}
        if method == "fixed":
            files["borders"] = packed.documents.offsets
        for name, array in files.items():
            np.save(staging / f"{name}.npy", array)
        write_meta(staging, {"ledger": packed.ledger}, [f"{name}.npy" for name in files])
    return folder


def pack_store(store: TokenStore, *, method: Method, seq_len: int) -> PackedStore:
    """Pack the examples of `store` into rows of `seq_len` tokens; raises DataError if one is longer.

    fixed takes them as one stream, in their order, cut every `seq_len` tokens: a document is then
    the part of an example that lies in one row. The ledger gets
        packed_rows       rows of `seq_len` tokens
        supervised_tokens labels, counted anew where examples are cut
        masked_tokens     tokens that carry no label
        padding_tokens    what the packed rows hold besides `tokens`
        length_histogram  of the examples, see data.ledger.length_histogram
    """
    ledger = dict(store.meta["ledger"], length_histogram=length_histogram(store.lengths))
    if method == "fixed":
        cuts = np.arange(0, store.offsets[-1], seq_len)
        documents = replace(store, offsets=np.union1d(store.offsets, cuts))
        firsts = np.append(np.searchsorted(documents.offsets, cuts), len(documents))
        packs = Packs(np.arange(len(documents)), firsts)
        # The first token of a piece is no label: nothing stands before it.
        unseen = store.supervised[documents.offsets[:-1]].sum(dtype=np.int64)
        ledger["supervised_tokens"] = int(np.count_nonzero(store.supervised) - unseen)
    else:
        lengths = store.lengths.reshape(-1, store.group).sum(1)
        documents, packs = store, pack(lengths, seq_len=seq_len, method=method).of(store.group)
    ledger["packed_rows"] = len(packs)
    ledger["masked_tokens"] = ledger["tokens"] - ledger["supervised_tokens"]
    ledger["padding_tokens"] = len(packs) * seq_len - ledger["tokens"]
    return PackedStore(store, documents, packs, ledger)


# ------------------------------------------------------------------------------------------- files


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end: it is whole whenever it exists.

    If another process made it first, that one stays. What a process of this machine was writing when
    it was killed is removed. Raises DataError for a full or unwritable disk.
    """
    mine = f"{folder.name}.unfinished-{os.uname().nodename}-"
    for left in folder.parent.glob(f"{mine}*"):
        if not _is_running(left.name.removeprefix(mine)):
            shutil.rmtree(left, ignore_errors=True)
    staging = folder.with_name(f"{mine}{os.getpid()}")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        yield staging
        try:
            staging.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        if line := explain_os_error(error, folder):
            raise DataError(line) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # somebody else's
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True


def write_meta(folder: Path, meta: dict[str, Any], names: list[str]) -> None:
    """Write meta.json with size and SHA-256 of the files `names`, and bring all to the disk."""
    files = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": file.tell(), "sha256": digest}
            os.fsync(file.fileno())
    with open(folder / "meta.json", "w") as file:
        file.write(to_json({**meta, "files": files}))
        file.flush()
        os.fsync(file.fileno())


def find_faults(folder: str | Path) -> list[str]:
    """One line for each file of a folder of tokens, and of its packings, that is not as written."""
    folder = Path(folder)
    packings = sorted(p for p in folder.glob("*/") if ".unfinished-" not in p.name)
    faults = [fault for place in (folder, *packings) for fault in _file_faults(place)]
    if not faults:
        try:
            open_tokens(folder)
            for packing in packings:
                open_packed(packing)
        except DataError as error:
            faults.append(str(error))
    return faults


def _file_faults(folder: Path) -> list[str]:
    faults = []
    try:
        files = json.loads((folder / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder / 'meta.json'}: cannot be read ({' '.join(str(error).split())})"]
    for name, written in files.items():
        try:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            faults.append(f"{folder / name}: {error.strerror}")
            continue
        if size != written["bytes"]:
            faults.append(f"{folder / name}: {size:,} bytes, must be {written['bytes']:,}")
        elif digest != written["sha256"]:
            faults.append(f"{folder / name}: content changed (SHA-256)")
    return faults


@contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: damaged ({reason}); delete it and run again") from error


def to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)
