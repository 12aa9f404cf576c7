"""Pairs of answers made of the built-in conversations: the right one is preferred to a wrong one.

For `--data.transform`, to try what learns from preferences where there are none:

torchrun --nproc_per_node=2 scripts/train.py --data.transform scripts.examples.preferences.right_and_wrong \
    --loss scripts.examples.dpo.DPO
"""

from __future__ import annotations

import re
from typing import Any


def right_and_wrong(row: dict[str, Any]) -> dict[str, Any]:
    """{"messages"} -> {"prompt", "chosen", "rejected"}: the last answer, and one like it that is wrong."""
    *prompt, answer = row["messages"]
    return {
        "prompt": prompt,
        "chosen": [answer],
        "rejected": [{**answer, "content": spoilt(answer["content"])}],
    }


def spoilt(text: str) -> str:
    """Another text of the same kind: every digit is one more, or where there is none the letters are turned around."""
    for other in (re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), text), text[::-1]):
        if other != text:
            return other
    return f"{text} {text}"
