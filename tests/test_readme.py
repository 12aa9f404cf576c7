"""What the README shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from trainer.loss import IGNORE_INDEX, causal_lm_loss

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class OneLayer(nn.Module):
    """The smallest model that meets the loss contract."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, batch, head):
        return head(self.embedding(batch["input_ids"]), self.embedding.weight)


def test_the_loss_in_ten_lines_is_the_usual_loss_plus_its_penalty() -> None:
    code = re.search(
        r"```python\nimport torch.nn.functional as F\n\n(def z_loss.*?)```", README, re.S
    )
    assert code is not None
    assert len(code[1].splitlines()) <= 10
    namespace: dict = {"F": F}
    exec(code[1], namespace)
    torch.manual_seed(0)
    model = OneLayer()
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :3] = IGNORE_INDEX
    positions = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    batch = {
        "input_ids": torch.randint(0, 11, (2, 5)),
        "labels": labels,
        "label_positions": positions,
    }
    usual, _ = causal_lm_loss(model, batch)
    edited, _ = namespace["z_loss"](model, batch)
    logits = model.embedding(batch["input_ids"]).flatten(0, 1)[positions] @ model.embedding.weight.T
    penalty = 1e-4 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(edited, usual + penalty)
    assert penalty > 0


def test_files_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_flags_that_are_shown_exist() -> None:
    from scripts.command_line import build_parser
    from scripts.inspect_data import InspectConfig
    from scripts.prefetch import PrefetchConfig
    from scripts.prepare_data import PrepareConfig

    known = {
        option
        for config in (InspectConfig, PrefetchConfig, PrepareConfig)
        for action in build_parser(config, "script")._actions
        for option in action.option_strings
    }
    other = {
        "--nproc_per_node",
        "--array",
        "--model",
        "--data",
        "--adapter",
        "--base",
    }  # of other programs; groups
    for page in (
        "README",
        "docs/data",
        "docs/cache",
        "docs/prepare",
        "docs/streaming",
        "docs/lora",
        "docs/extend",
    ):
        text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
        shown = set(re.findall(r"(?<![\w-])--[a-z_]+(?:\.[a-z0-9_]+)*", text))
        assert shown - known - other == set(), page
