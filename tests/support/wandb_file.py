"""What wandb has written down to be sent: a log of protobuf records in the block format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32768
_FULL, _LAST = 1, 4


def records(output_dir: Path) -> list[Any]:
    """The records of all offline runs in OUTPUT_DIR/wandb, the older runs first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted((output_dir / "wandb").glob("offline-run-*/*.wandb")):
        for data in _entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def _entries(data: bytes) -> Iterator[bytes]:
    place, entry = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if left < _HEADER or kind == 0:  # the rest of a block
            place += left
            continue
        entry += data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (_FULL, _LAST):
            yield entry
            entry = b""


def of_kind(output_dir: Path, kind: str) -> list[Any]:
    """The content of the records of one kind, such as run or history."""
    return [
        getattr(record, kind)
        for record in records(output_dir)
        if record.WhichOneof("record_type") == kind
    ]


def history(output_dir: Path) -> list[dict[str, Any]]:
    """What was logged, one dictionary per call."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in of_kind(output_dir, "history")
    ]
