"""A run that trains a part of a model: what its checkpoints record of the rest, and what reads them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.causal_lm import PackedCausalLM
from models.config import LoraConfig
from models.errors import ModelError
from models.partial import adapted, fingerprint, freeze, peft_config, trained_tokens
from models.weights import open_parameters
from scripts.config import TrainConfig
from scripts.job import Job
from trainer.errors import TrainError
from trainer.parallel import DTYPES

if TYPE_CHECKING:
    import peft


def trains_part(config: TrainConfig) -> bool:
    return config.lora.rank > 0 or config.model.train_last_layers > 0


def added_tokens(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that the user adds, known to the tokenizer before or not."""
    return [tokenizer.get_vocab()[token] for token in config.model.add_special_tokens]


def freeze_rest(
    model: PackedCausalLM, config: TrainConfig, tokens: Sequence[int], dtype: torch.dtype
) -> None:
    """See `models.partial.freeze`; of `tokens`, which the user adds, rows are trained."""
    freeze(
        model,
        config.lora,
        last_layers=config.model.train_last_layers,
        dtype=dtype,
        tokens=tokens,
    )


def flops_of_part(config: TrainConfig, model: PackedCausalLM) -> dict[str, Any]:
    """The keywords of `models.flops.training_flops` that say what is trained."""
    last, adapters = config.model.train_last_layers, config.lora.rank > 0
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    return {
        "front_layers": model.hf.config.num_hidden_layers - last if last else 0,
        "frozen": adapters,
        "adapter_parameters": trained,
    }


def part_record(job: Job, model: PackedCausalLM) -> dict[str, Any] | None:
    """What a checkpoint that holds only the trained part says of itself and of its base; None where all is trained."""
    config = job.config
    if not trains_part(config):
        return None
    return {
        "lora": asdict(config.lora),
        "targets": adapted(model),
        "tokens": trained_tokens(model),
        "token_layers": ["embed_tokens"] + ["lm_head"] * (not model.hf.config.tie_word_embeddings),
        "train_last_layers": config.model.train_last_layers,
        "frozen_dtype": config.parallel.param_dtype,
        "base": {
            "name": config.model.name or config.model.path,
            "commit": job.prepared["model_commit"],
            "folder": job.prepared["model"],
            "fingerprint": fingerprint(Path(job.prepared["model"])),
        },
    }


def check_part(checkpoint: Path, was: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Refuse to continue a checkpoint that holds another part, or one of another base model, given both records.

    Raises:
        TrainError: naming what differs.
    """
    if was and now and was["base"]["fingerprint"] != now["base"]["fingerprint"]:
        raise TrainError(
            f"{checkpoint} was trained on {_named(was['base'])}, whose files are not those of "
            f"{_named(now['base'])}; give the base model it began with"
        )
    old, new = _settings(was), _settings(now)
    if changed := [
        f"{key} was {old.get(key, 'all')}, is {new.get(key, 'all')}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]:
        raise TrainError(
            f"{checkpoint} trained another part of the model ({'; '.join(changed)}); undo the change, "
            "or start anew with another --output_dir"
        )


def _settings(record: dict[str, Any] | None) -> dict[str, Any]:
    """What decides which parameters there are and what they compute, by flag."""
    if record is None:
        return {}
    lora = record["lora"]
    keys = ("rank", "alpha", "rslora", "dora") if lora["rank"] else ("rank",)
    return {
        **{f"lora.{key}": lora[key] for key in keys},
        "lora.targets": ", ".join(record["targets"]) or "none",
        "model.add_special_tokens": ", ".join(map(str, record["tokens"])) or "none",
        "model.train_last_layers": record["train_last_layers"],
    }


def _named(base: dict[str, Any]) -> str:
    return base["name"] + (f" at commit {base['commit']}" if base["commit"] else "")


def lora_of(record: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{**record["lora"], "targets": tuple(record["lora"]["targets"])})


def adapter_config(record: dict[str, Any], *, layers: int) -> peft.LoraConfig:
    """peft's configuration of a run's adapters, which names the base model by its hub name or folder."""
    base = record["base"]
    return peft_config(
        lora_of(record),
        record["targets"],
        layers=layers,
        last=record["train_last_layers"],
        tokens={name: record["tokens"] for name in record["token_layers"] if record["tokens"]},
        base=base["name"] if base["commit"] else base["folder"],
        revision=base["commit"],
    )


def open_base(
    record: dict[str, Any], folder: Path | None, model: PackedCausalLM
) -> Callable[[str], Tensor]:
    """A reader of the frozen weights by name, in the type the run held them in.

    Args:
        record: of the checkpoint.
        folder: where the base model is, if not where it was.
        model: what the run trained, without memory.

    Raises:
        ModelError: it is not there, or it is another model.
    """
    base = record["base"]
    folder = folder or Path(base["folder"])
    remedy = f"give --base DIR with {_named(base)}, which the checkpoint was trained on"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model; {remedy}")
    if fingerprint(folder) != base["fingerprint"]:
        raise ModelError(f"{folder} is another model than the checkpoint's; {remedy}")
    return open_parameters(model, folder, dtype=DTYPES[record["frozen_dtype"]])
