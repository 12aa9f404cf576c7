"""What a loss of whole documents knows of a packed batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.models import packed_batch, random_documents
from trainer.documents import documents, pairs
from trainer.errors import TrainError
from trainer.loop import units_of


def test_documents_are_counted_without_padding_in_the_order_of_the_rows() -> None:
    first, second, third, fourth, fifth = random_documents([5, 3, 8, 2, 6])
    batch = packed_batch([[first, second], [third], [], [fourth, fifth]], 8, max_documents=12)
    found = documents(batch)
    assert found.exists.tolist() == [True] * 5 + [False] * 7
    ends = [4, 7, 15, 25, 31]  # the third row is padding, and the fourth begins at 24
    assert found.last[:5].tolist() == ends
    # Every token but a document's last one is a label.
    assert found.of_label.tolist() == [0] * 4 + [1] * 2 + [2] * 7 + [3] + [4] * 5
    values = torch.arange(len(found.of_label), dtype=torch.float32, requires_grad=True)
    sums = found.sums(values)
    expected = [values[found.of_label == number].sum().item() for number in range(5)]
    assert sums.tolist() == expected + [0.0] * 7
    sums[1].backward()
    assert (
        values.grad is not None and values.grad.tolist() == (found.of_label == 1).float().tolist()
    )


def test_pairs_are_neighbours() -> None:
    one, other = pairs(torch.arange(7))
    assert (one.tolist(), other.tolist()) == ([0, 2, 4], [1, 3, 5])


def test_a_loss_is_over_labels_documents_or_pairs() -> None:
    batch = packed_batch([random_documents([5, 3]), random_documents([4, 2])], 12)
    count = {unit: units_of(SimpleNamespace(units=unit), batch) for unit in ("documents", "pairs")}  # type: ignore[arg-type]
    assert count == {"documents": 4, "pairs": 2}
    assert units_of(lambda model, batch: None, batch) == 4 + 2 + 3 + 1  # type: ignore[arg-type, return-value]
    with pytest.raises(TrainError, match="units 'rows'; they must be one of labels, documents, pa"):
        units_of(SimpleNamespace(units="rows"), batch)  # type: ignore[arg-type]
