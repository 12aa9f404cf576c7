"""What the server of the ranks has imported before it forks the first one.

Everything costly to import that reads nothing of a rank's own environment, which the libraries of
the hub do: `datasets` is missing for that reason, and what it imports itself is here.
"""

from __future__ import annotations

import gc
import os

import jsonargparse  # noqa: F401
import pandas  # noqa: F401
import peft  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import scripts.train
import scripts.wiring  # noqa: F401

SERVER_PID = os.getpid()

# Ranks never collect what the server made: that would copy its pages into each of them.
gc.collect()
gc.freeze()
