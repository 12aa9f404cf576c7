"""How the layers of a dense Qwen are split over the ranks of tensor parallelism (https://arxiv.org/abs/1909.08053).

Every rank has whole hidden states. Of each layer it computes some heads and a part of the MLP's width: the first matrices
are split by columns, the last ones by rows, and the results are summed over the ranks: two all-reduces a layer in forward
and two in backward. Embedding, head and the norms of the hidden states are computed by every rank.
"""

from __future__ import annotations

from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from transformers import PreTrainedConfig

from models.errors import ModelError


def tensor_parallel_plan(hf_config: PreTrainedConfig, size: int) -> dict[str, ParallelStyle]:
    """What becomes of the modules of a decoder layer, by their name in it, on `size` ranks; {} on one.

    Raises:
        ModelError: another architecture than Qwen2 or Qwen3, or heads or widths that `size` does not divide.
    """
    if size == 1:
        return {}
    if hf_config.model_type not in ("qwen2", "qwen3"):
        raise ModelError(
            f"parallel.tp splits the layers of qwen2 and qwen3, the model is {hf_config.model_type}; "
            "use --parallel.tp 1"
        )
    counts = {
        name: getattr(hf_config, name)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    uneven = [f"{name} {count}" for name, count in counts.items() if count % size]
    if uneven:
        fitting = [n for n in range(1, size) if not any(c % n for c in counts.values())]
        raise ModelError(
            f"parallel.tp {size} does not divide {', '.join(uneven)} of the model; "
            f"use --parallel.tp {' or '.join(map(str, fitting))}"
        )
    plan: dict[str, ParallelStyle] = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    if hf_config.model_type == "qwen3":
        # One weight for all heads, [B, S, N, H] split in N: its gradient is the sum over the ranks' heads.
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            plan[norm] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan
