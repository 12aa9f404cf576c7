"""The documents of a packed micro-batch, for losses that have one value for each, or for each pair of them.

Shapes: B rows, S tokens a row, N labels, M the most documents a micro-batch can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """In the order of the rows, at shapes that the number of documents does not change: no host waits for a device."""

    exists: Tensor
    """bool [M]: true for as many as there are, padding not counted, then false."""
    last: Tensor
    """int64 [M]: place of a document's last token in the B * S flattened tokens; some place where there is none."""
    of_label: Tensor
    """int64 [N]: the document of each of `label_positions`."""

    def sums(self, values: Tensor) -> Tensor:
        """[M]: of values [N], one for each label, the sum over every document; 0 where there is none."""
        return values.new_zeros(len(self.exists)).index_add(0, self.of_label, values)


def documents(batch: Mapping[str, Tensor]) -> Documents:
    """The documents of a batch, on its device.

    Args:
        batch: `input_ids` [B, S], `row_tokens` [B], `label_positions` [N] and `document_offsets` [M + 1] of whole rows:
            ranks of context parallelism, which hold a slice of each, cannot sum over documents.
    """
    offsets = batch["document_offsets"].long()
    rows, length = batch["input_ids"].shape
    begins, ends = offsets[:-1], offsets[1:]
    row = (begins // length).clamp(max=rows - 1)
    # Behind a row's tokens comes its padding, as one more; behind the last border of all it repeats.
    real = (begins - row * length < batch["row_tokens"][row]) & (begins < ends)
    order = torch.argsort((~real).int(), stable=True)
    number = real.long().cumsum(0) - 1
    of_label = torch.searchsorted(offsets, batch["label_positions"], right=True) - 1
    return Documents(real[order], (ends - 1)[order], number[of_label])


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [M] by document those of the first and of the second of each pair, both [M // 2]."""
    first, second = values[: len(values) // 2 * 2].view(-1, 2).unbind(1)
    return first, second
