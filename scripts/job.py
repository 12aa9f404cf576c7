"""What the pieces of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.config import TrainConfig
from trainer.crashes import Attempt
from trainer.distributed import Ranks
from trainer.parallel import DataRank
from trainer.preemption import StopRequest


@dataclass(frozen=True)
class Job:
    """What the pieces of one run share."""

    config: TrainConfig
    cache_dir: Path
    output_dir: Path
    ranks: Ranks
    data_rank: DataRank
    stop: StopRequest
    attempt: Attempt
    device: torch.device
    micro_batch_size: int
    global_batch_size: int
    grad_accum_steps: int
    prepared: dict[str, Any]
    """What `prepare` returned on this node."""
