"""From what the user said to a Qwen module: configuration, checks, empty or initialised weights."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen4ExpTextConfig,
)

from models.attention import PACKED_ATTENTION
from models.causal_lm import PackedCausalLM
from models.config import ModelConfig
from models.errors import ModelError
from models.layers import (
    has_sliding_window,
    indexed_layers,
    linear_attention_layers,
    ngram_layers,
    sparse_layers,
)
from models.token_rows import HeadWithRows
from models.weights import init_weights

INDEXER = "self_attn.indexer."  # in the names of its parameters
JUDGED_PARAMETERS = 10_000_000  # the smallest Qwen has some 500 million
FIRST_LOSS_MARGIN = 0.5
"""Nats a token by which pretrained weights must beat a uniform guess on the first batch."""

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    config_class.model_type: config_class
    for config_class in (
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
        Qwen3NextConfig,
        Qwen3_5TextConfig,
        Qwen3_5MoeTextConfig,
        Qwen4ExpTextConfig,
    )
}

# The built-in model: small enough to learn the embedded chat data on two CPU cores in minutes.
EMBEDDED_QWEN3: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


def read_model_config(
    config: ModelConfig, folder: Path | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """transformers' configuration of the model that will be trained.

    Args:
        config: the user's choices.
        folder: where the model's files are; None for the built-in Qwen3, whose vocabulary is the tokenizer's.
        tokenizer: gives the number of embedding rows that are needed.

    Raises:
        ModelError: the files or the overrides do not describe a Qwen model this trainer knows.
    """
    if folder is None:
        values = EMBEDDED_QWEN3 | {"vocab_size": _padded(len(tokenizer))}
        return _parsed(Qwen3Config, values, config, "the built-in model")
    file = folder / "config.json"
    values = read_config_values(file)
    hf_config = parse_model_config(values, config, str(file))
    if config.add_special_tokens:
        grow_vocabulary(hf_config, tokenizer)
    return hf_config


def read_config_values(file: Path) -> dict[str, Any]:
    """What a model's config.json says; raises as `read_model_config`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["model_type"]
    except FileNotFoundError:
        raise ModelError(
            f"{file.parent} has no config.json; --model.path takes a folder with a Hugging Face model"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} is not a model configuration ({error}); download it again"
        ) from None
    return values


def parse_model_config(values: dict[str, Any], config: ModelConfig, where: str) -> PreTrainedConfig:
    """transformers' configuration from the values of a config.json, which `where` names; raises as `read_model_config`."""
    model_type = values["model_type"]
    if isinstance(values.get("text_config"), dict) and f"{model_type}_text" in CONFIG_CLASSES:
        model_type, values = f"{model_type}_text", _text_values(values)
    if model_type not in CONFIG_CLASSES:
        raise ModelError(
            f"{where} says model_type {model_type!r}; this trainer knows {', '.join(CONFIG_CLASSES)}"
        )
    if config.overrides and config.init != "random":
        raise ModelError(
            "model.overrides changes the architecture, so it needs --model.init random"
        )
    return _parsed(CONFIG_CLASSES[model_type], values, config, where)


def _text_values(values: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a vision-language configuration; either may say that the head is tied."""
    text = values["text_config"]
    tied = any(part.get("tie_word_embeddings", False) for part in (values, text))
    return {**text, "tie_word_embeddings": tied}


def _parsed(
    config_class: type[PreTrainedConfig], values: dict[str, Any], config: ModelConfig, where: str
) -> PreTrainedConfig:
    """The configuration `values` with the user's overrides, validated by transformers."""
    for key in set(config.overrides) - set(values) - set(config_class().to_dict()):
        raise ModelError(f"model.overrides: {where} has no key {key!r}")
    values = values | config.overrides
    if "num_hidden_layers" in config.overrides and "layer_types" not in config.overrides:
        values.pop("layer_types", None)  # one per layer: transformers derives as many as are needed
    try:
        hf_config = config_class.from_dict(values)
    except StrictDataclassError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ModelError(
            f"{where}{' with model.overrides' * bool(config.overrides)} is not a valid configuration ({reason})"
        ) from None
    if has_sliding_window(hf_config) and config.attention == "packed":
        raise ModelError(
            f"{where} uses sliding-window attention, which needs --model.attention sdpa"
        )
    if indexed_layers(hf_config):
        if config.attention == "packed":
            raise ModelError(
                f"{where} has attention to tokens that an indexer chooses, which needs "
                "--model.attention sdpa --data.packing none"
            )
        if getattr(hf_config, "indexer_budget", None) is None:
            raise ModelError(
                f"{where} has layers of indexed_attention and no indexer_budget; download it again"
            )
    if config.router_aux_loss_coef is not None:
        if config.router_aux_loss_coef < 0:
            raise ModelError(
                f"model.router_aux_loss_coef {config.router_aux_loss_coef} is below 0, which would "
                "reward uneven experts; use 0 or more"
            )
        if not sparse_layers(hf_config):
            raise ModelError(
                f"model.router_aux_loss_coef is for mixtures of experts, and {where} is dense; leave it out"
            )
        hf_config.router_aux_loss_coef = config.router_aux_loss_coef
    return hf_config


def check_fits(
    hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, seq_len: int
) -> None:
    """Refuse what would only fail, or silently train garbage, later.

    Raises:
        ModelError: `seq_len` is beyond the model's positions, or a token id has no embedding row.
    """
    check_length(hf_config, seq_len=seq_len)
    highest = max(tokenizer.get_vocab().values())
    if highest >= hf_config.vocab_size:
        raise ModelError(
            f"the tokenizer's highest id is {highest}, but the model has {hf_config.vocab_size} embedding rows; "
            "they do not belong together (check --model.tokenizer)"
        )


def check_length(hf_config: PreTrainedConfig, *, seq_len: int) -> None:
    """Raises ModelError when `seq_len` is beyond the model's positions."""
    if seq_len > hf_config.max_position_embeddings:
        raise ModelError(
            f"data.seq_len {seq_len} is over the model's limit of {hf_config.max_position_embeddings} positions; "
            f"use --data.seq_len {hf_config.max_position_embeddings} or less"
        )


def check_compiling(hf_config: PreTrainedConfig, *, compiles: bool) -> None:
    """Refuse to compile an indexer: transformers runs it token by token, and the compiler has a kernel for each."""
    if compiles and indexed_layers(hf_config):
        raise ModelError(
            f"parallel.compile does not come to an end with the indexers of {hf_config.model_type}; leave it out"
        )


def check_packing(hf_config: PreTrainedConfig, *, packing: str, device_type: str) -> None:
    """Refuse rows of several documents where linear attention would carry one into the next.

    PyTorch's own version of Gated DeltaNet knows no document borders; the kernels of flash-linear-attention
    and causal-conv1d do, and run on GPUs only.

    Qwen4-Exp has no borders at all for its n-grams and its convolution over them.

    Args:
        hf_config: transformers' configuration.
        packing: `none` puts one document in a row, which every model can train on.
        device_type: where the model will run.

    Raises:
        ModelError: naming what would make it work.
    """
    if packing == "none" or not linear_attention_layers(hf_config):
        return
    carries = f"{hf_config.model_type} has linear attention, which would carry one document of a packed row into the next"
    if indexed_layers(hf_config):
        raise ModelError(f"{carries}; use --data.packing none")
    libraries = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
    missing = [name for module, name in libraries.items() if find_spec(module) is None]
    if device_type == "cuda" and not missing:
        return
    needed = "install" if device_type == "cuda" else "train on a GPU with"
    raise ModelError(
        f"{carries}; use --data.packing none, or {needed} "
        f"{' and '.join(missing or libraries.values())}"
    )


def grow_vocabulary(hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give added tokens a row where the vocabulary truly lacks it; Qwen's padded rows are used first.

    Raises:
        ModelError: the model hashes token ids by the size of the vocabulary, which must stay.
    """
    if len(tokenizer) > hf_config.vocab_size:
        if ngram_layers(hf_config):
            raise ModelError(
                f"model.add_special_tokens needs {len(tokenizer)} embedding rows, and the model has "
                f"{hf_config.vocab_size}, by which it hashes n-grams: others would find other "
                "embeddings; add no tokens"
            )
        hf_config.vocab_size = _padded(len(tokenizer))


def _padded(rows: int) -> int:
    return -(-rows // 64) * 64  # tensor cores like multiples of 64


def build_model(hf_config: PreTrainedConfig, *, attention: str, seed: int | None) -> PackedCausalLM:
    """The model in fp32, not yet sharded. An indexer is frozen: it hands on indices, which have no gradient.

    Args:
        hf_config: transformers' configuration.
        attention: `packed` or `sdpa`.
        seed: initialise the weights, on the CPU. None leaves them on the meta device: shard and `materialise` the
            model, then `models.weights.load_weights` or `init_weights` fills it with the same values.
    """
    implementation = PACKED_ATTENTION if attention == "packed" else "sdpa"
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=torch.float32,
            attn_implementation=implementation,
            experts_implementation=_experts_implementation(hf_config),
        )
    for name, parameter in hf.named_parameters():
        if INDEXER in name:
            parameter.requires_grad_(False)
    hf.config.use_cache = True  # for generation; training never asks for a cache
    hf.train()
    model = PackedCausalLM(hf)
    if seed is not None:
        materialise(model, torch.device("cpu"))
        init_weights(model, seed)
    return model


def _experts_implementation(hf_config: PreTrainedConfig) -> str | None:
    """transformers' default, one grouped matrix product for all experts; its rows must be whole 16 bytes in bf16."""
    widths = hf_config.hidden_size, getattr(hf_config, "moe_intermediate_size", 0)
    return "eager" if any(width % 8 for width in widths) else None


def materialise(model: PackedCausalLM, device: torch.device) -> None:
    """Allocate a model that was built on the meta device, and rebuild what is not in a checkpoint.

    Parameters are left uninitialised for `load_weights` or `init_weights`; buffers, of rotary positions and of hashes, are computed
    anew; the tie is renewed, since every parameter was replaced.
    """
    model.to_empty(device=device)
    for module in model.modules():
        if "inv_freq" in module._buffers:
            fresh = type(module)(module.config).to(device)  # type: ignore[call-arg]
            module._buffers.update(fresh._buffers)
        elif "layer_multipliers" in module._buffers:
            model.hf._init_weights(module)  # fills these buffers, and nothing else of the module
    tie_head(model)


def decoder_layer_classes(model: PackedCausalLM) -> tuple[type[nn.Module], ...]:
    """The classes transformers names as the units of its layers, also of a sharded model, where FSDP derives from them."""
    names = set(model.hf._no_split_modules or ())
    classes = (c for module in model.modules() for c in type(module).__mro__)
    return tuple({c: None for c in classes if c.__name__ in names})


def tie_head(model: PackedCausalLM) -> None:
    """Make the head's weight the embedding's parameter again where the configuration ties them."""
    if model.hf.config.tie_word_embeddings:
        embedding, head = model.embedding, model.head
        head.weight = cast(nn.Parameter, embedding.weight)
        if isinstance(head, HeadWithRows):
            head.token_rows = cast(nn.Parameter, embedding.token_rows)


def first_loss_counts(choice: str, parameters: int) -> bool:
    """Whether `model.check_first_loss` has a model of so many parameters judged by its first loss."""
    return choice == "always" or (choice == "auto" and parameters >= JUDGED_PARAMETERS)


def check_first_loss(loss: float, *, vocab_size: int) -> None:
    """Refuse pretrained weights that know no more of the first batch than a guess among all tokens.

    A uniform guess costs ln(V) a token, and random weights at least that: the spread of their logits
    only adds to it. Whatever a trained model has learned takes it far below, in any language: rare
    scripts and random characters still leave a Qwen (ln V = 11.9) several nats under its guess. Half
    a nat tells the two apart and leaves room for the noise of a small batch.

    Args:
        loss: mean over the valid tokens of the first global batch, before any step.
        vocab_size: V, the model's embedding rows.

    Raises:
        ModelError: the loss is not below ln(V) - 0.5, or is not a number.
    """
    guess = math.log(vocab_size)
    if not loss < guess - FIRST_LOSS_MARGIN:
        raise ModelError(
            f"the loss of the first batch is {loss:.2f} and guessing among {vocab_size} tokens costs "
            f"{guess:.2f}: these weights know nothing of this data, so they, the tokenizer or the chat "
            "template are not the model's own; mend that, or train all the same with "
            "--model.check_first_loss never"
        )
