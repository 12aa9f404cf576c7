"""What a user can say about the model. Plain dataclasses only: no import here may cost a `--help` any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which Qwen model is trained, and how its code runs."""

    name: str | None = None
    """Model on the Hugging Face hub, as org/name. With neither name nor path a small built-in Qwen3 is trained."""

    path: str | None = None
    """Local folder with config.json, safetensors and a tokenizer."""

    revision: str | None = None
    """Branch, tag or commit of the hub model; it is resolved to a commit once and recorded in run.json."""

    tokenizer: str | None = None
    """Local folder or hub model to take the tokenizer from; default: the model's own."""

    chat_template: str = "native"
    """native: the tokenizer's own; chatml: a plain ChatML, for models without one; or the path of a .jinja file."""

    add_special_tokens: tuple[str, ...] = ()
    """Special tokens the tokenizer is given where it lacks them, as a list; they get trained embedding rows."""

    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads the safetensors; random initialises the weights from the configuration and the seed."""

    verify_hash: bool = False
    """Compare the SHA-256 of every file of a hub model with what the hub listed, before it is loaded."""

    check_first_loss: Literal["auto", "always", "never"] = "auto"
    """Stop before the first step if pretrained weights do no better on the first batch than guessing; auto: models of 10 million parameters and more, since smaller ones may well know nothing."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's config.json, for example {"num_hidden_layers": 2}; only with random weights."""

    attention: Literal["packed", "sdpa"] = "packed"
    """packed: variable-length kernel on CUDA, document by document on CPU; sdpa: PyTorch SDPA with a dense mask."""

    flash_attention: Literal["auto", "FA2", "FA3", "FA4"] = "auto"
    """FlashAttention behind torch's attention on GPUs: FA2 is torch's own; FA3 (Hopper) and FA4 (Blackwell) need their package; auto takes the GPU's where it is installed."""

    function: str | None = None
    """Own change of the model, as package.function: a function of (model), called before it is sharded and filled with weights (docs/extend.md)."""

    router_aux_loss_coef: float | None = None
    """Weight of the loss that balances the experts of a mixture of experts; default: config.json's."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Floating-point type of the exported safetensors."""

    train_last_layers: int = 0
    """Train only this many decoder layers, counted from the end, with the final norm and a head that is not tied to the embedding; with lora.rank, the layers that get adapters. 0 trains all."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) on frozen pretrained weights, through peft."""

    rank: int = 0
    """Width of an adapter; with 0 there are none and the weights themselves are trained."""

    alpha: int = 32
    """What an adapter adds is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Probability with which an adapter's inputs are dropped while training."""

    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter, by the last part of their names, for example [q_proj, v_proj]; all-linear is every one in the decoder layers."""

    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""

    dora: bool = False
    """Also train the norm of each row of an adapted matrix (https://arxiv.org/abs/2402.09353); a forward costs more."""
