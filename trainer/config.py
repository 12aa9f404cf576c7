"""What a user can say about training. Plain dataclasses only: no import here may cost a `--help` any time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """How parameters, gradients and optimizer state are spread over ranks, and in which precision."""

    dp_replicate: int = 1
    """Data-parallel replicas of the sharded model; above 1 with dp_shard above 1 is hybrid sharding (HSDP)."""

    dp_shard: int = -1
    """Data-parallel ranks that share one copy of the parameters; -1 takes all that the other axes leave."""

    cp: int = 1
    """Context parallelism: ranks that share the tokens of one packed row, and its copy of the parameters with the dp_shard ranks."""

    tp: int = 1
    """Tensor parallelism: neighbouring ranks that share the heads and the width of each layer and work on the same rows."""

    wrap_policy: str = "transformer"
    """Which modules FSDP shards as one group: transformer (the decoder layers), size, module:ClassA,ClassB (classes of the model), or callable:package.function."""

    min_wrap_params: int = 1_000_000
    """Parameter count from which the size policy makes a module a group."""

    reshard_after_forward: bool | int = True
    """Free a layer's gathered parameters after forward and gather them again in backward: less memory, more traffic. A number frees all but a share: backward gathers from that many ranks (of one node, if they are few) instead of from all."""

    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and run the optimizer there; a layer is on the GPU while it computes."""

    prefetch_layers: int = 2
    """All-gathers on GPUs start this many layers ahead, so that they hide behind compute; each layer ahead holds its gathered parameters. 0 leaves it to FSDP."""

    symmetric_memory: bool = False
    """On GPUs: all-gathers through NCCL's symmetric memory, which leaves the GPU's own units to computing. Not yet run on a GPU."""

    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which trained parameters and their gradients are kept, sharded; bfloat16 halves both, and every update is rounded (optimizer.rounding)."""

    param_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the gathered parameters and of the computation; auto: bfloat16, but float32 on a CPU that has no units for bfloat16 and takes several times as long with it."""

    reduce_dtype: Literal["bfloat16", "float32"] = "float32"
    """Type in which gradients are reduced over ranks."""

    accumulation: Literal["whole", "sharded"] = "whole"
    """With several micro-batches a step: keep their gradients whole on every rank and reduce them once, in the last; or reduce after each and keep shards, for less memory (6 bytes per parameter that no number of ranks divides) and more traffic."""

    activation_checkpointing: Literal["none", "full", "selective", "op"] = "none"
    """What backward recomputes instead of keeping it: full, every decoder layer; selective, every checkpoint_every-th; op, all in a layer but matrix products and attention, whose results are kept."""

    checkpoint_every: int = 2
    """With selective activation checkpointing: one decoder layer of this many is recomputed."""

    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Compute the linear layers of the decoder layers in float8 by torchao (the extra [torchao]), with one scale per tensor or per row; needs a GPU of capability 8.9 (H100: 9.0) or more."""

    compile: bool = False
    """Compile each decoder layer with torch.compile, and AdamW's update of what is kept in bf16."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (https://arxiv.org/abs/1711.05101) or Muon, and gradient clipping."""

    name: str = "adamw"
    """adamw; muon updates the matrices of the decoder layers by orthogonalised momentum, and the rest by AdamW; or callable:package.function, your own."""

    learning_rate: float = 1e-5
    """Peak learning rate."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms and biases get none."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the denominator."""

    muon_momentum: float = 0.95
    """Decay rate of the running average of the gradient that Muon orthogonalises, with Nesterov momentum."""

    muon_lr_adjustment: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on Muon's rate: 0.2 sqrt(max(rows, columns)), for rates known from AdamW; original sqrt(max(1, rows / columns))."""

    embedding_lr_ratio: float = 1.0
    """The embedding's learning rate as a multiple of learning_rate; also of the head it is tied to."""

    head_lr_ratio: float = 1.0
    """The learning rate of a head that is not tied to the embedding, as a multiple of learning_rate."""

    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which running averages are kept between steps; bfloat16 halves them."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How parameters and running averages that are kept in bfloat16 are rounded after a step; to nearest, small updates are lost."""

    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this value; 0 does not clip."""

    max_skipped_steps: int = 5
    """Stop when more steps than this in a row were skipped because a gradient was not finite; the error names their samples."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = "cosine"
    """Shape after warm-up: cosine, linear, constant, or wsd, constant with a linear decay at the end; or callable:package.function, your own, warm-up included."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""

    min_ratio: float = 0.0
    """Final learning rate as a fraction of the peak."""

    decay_pct: float = 20.0
    """Percentage of all steps in which wsd decays."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole training state is saved, and what is left at the end."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end and when the job is told to stop."""

    keep_last: int = 2
    """Checkpoints to keep; older ones are removed after a newer one is complete. 0 keeps all."""

    keep_every: int = 0
    """Keep the checkpoint of every step that is a multiple of this for ever; 0 keeps none but the last."""

    asynchronous: bool = True
    """Write checkpoints in the background while training goes on: the loop waits for a copy in host memory only. One at a time is under way."""

    verify: Literal["full", "sizes"] = "full"
    """What is compared before a checkpoint is loaded: the SHA-256 of every file, or the sizes only."""

    mirror: str | None = None
    """URL of a folder of any store that fsspec opens (s3://bucket/run) to which every checkpoint is copied; a run that finds a newer one there than in output_dir continues from it."""

    export: bool | Literal["adapter", "both"] = True
    """Write a Hugging Face model to OUTPUT_DIR/export at the end, adapters merged into it; adapter writes them alone, in peft's format, to OUTPUT_DIR/adapter; both writes both."""

    verify_export: bool = True
    """Read every file of the export again and compare it, by SHA-256, with what it should hold; costs one more read."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss, and exact-match answers where the data has checkable ones, on held-out rows."""

    every: int = 0
    """Steps between evaluations during training; 0 evaluates only before the first and after the last step."""

    split: str | None = None
    """Split of the dataset to evaluate on; default: test for the embedded data, otherwise no evaluation."""

    max_rows: int = 512
    """Conversations of the split to use."""

    functions: tuple[str, ...] = ()
    """Own evaluations, as a list of package.function; each is a function of (job, model, tokenizer) that returns numbers to log (docs/extend.md)."""

    generate_rows: int | None = None
    """Held-out prompts the model answers by greedy decoding at every evaluation, for exact match; 0 generates nothing; default: 128 of the embedded data, and of other data 4 to read, without exact match."""

    max_new_tokens: int = 48
    """Tokens an answer may have; a longer one, and what it is compared with, is cut there."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training runs."""

    every: int = 10
    """Steps between logged rows."""

    tensorboard: bool = True
    """Write TensorBoard events to OUTPUT_DIR/tensorboard."""

    wandb: bool = False
    """Send metrics, samples and configuration to Weights & Biases (the extra [wandb]), set up by its own variables: WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE."""

    mlflow: bool = False
    """Send them to MLflow (the extra [mlflow]) at MLFLOW_TRACKING_URI, which an Azure ML job has set."""

    progress: bool = True
    """Show a progress bar on rank 0."""

    profile: str | None = None
    """Steps to trace with torch's profiler, such as 10-12: OUTPUT_DIR/profile gets a trace, a table of operations and on a GPU the history of its memory, of each rank."""

    @property
    def profiled_steps(self) -> range:
        first, _, last = (self.profile or "1-0").partition("-")
        return range(int(first), int(last or first) + 1)


@dataclass(frozen=True)
class GuardConfig:
    """What watches over a run."""

    check_every: int = 100
    """Steps between checks that all ranks agree (step, samples, optimizer, checksums of replicated parameters) and that none is slow; 0 never checks."""

    slow_rank_ratio: float = 1.5
    """Warn of a rank that needs this many times the median rank's time for its own work (data, and the forward pass of its layers) since the last check; 0 never."""

    spike_window: int = 100
    """Losses a new one is compared with; 0 looks for no spikes."""

    spike_deviations: float = 8.0
    """Warn of a loss this many deviations (1.4826 times the median absolute deviation) above the median of the window."""

    hang_seconds: float = 600.0
    """A step that takes longer ends the rank, for the launcher to restart, with the stacks of all its threads in OUTPUT_DIR/stacks-rank-N.txt; 0 waits for ever."""

    collective_timeout_seconds: float = 1800.0
    """Time after which ranks give up waiting for another one in a collective operation, also while rank 0 saves or exports."""
