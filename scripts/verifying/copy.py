"""A tiny copy of a configuration: the same family, tokenizer, rows and flags, small enough for seconds on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data.config import DataConfig, source_configs
from data.errors import DataError
from data.sources import Row, load_rows, stream_rows
from models.build import build_model, read_model_config
from models.layers import linear_attention_layers
from scripts.config import TrainConfig
from scripts.preparation import open_mixture, prepare, prepare_model, read_tokenizer
from trainer.config import CheckpointConfig, EvaluationConfig, LogConfig

ROWS = 200
"""Of each source; with --full as many as make its packed rows if they have so many tokens:"""
_TOKENS_OF_A_ROW = 16
STEPS = 4
SEQ_LEN = 256
"""Tokens of a packed row, more where the rows have no labels in so few."""
_PACKED_ROWS = 8
Overlong = Literal["drop", "truncate", "split", "error"]
# Large enough that what leaks or is missing moves the loss far beyond rounding.
_INITIALIZER_RANGE = 0.1


def copy_of(
    config: TrainConfig, cache_dir: Path, folder: Path, *, full: bool, global_batch_size: int
) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration to prove in the place of `config`, and what `prepare` returned for it.

    It computes in fp32 and runs `STEPS` steps. Rows, model and tokens are in `folder`; the cache gets what train.py
    would fetch.

    Args:
        config: of train.py.
        cache_dir: where models and data are fetched to.
        folder: exists, for what is written.
        full: keep the model and the length of packed rows.
        global_batch_size: packed rows in a step.

    Raises:
        DataError, ModelError: what the user can mend.
    """
    rows_read = ROWS
    if full:
        rows_read = max(ROWS, global_batch_size * config.data.seq_len // _TOKENS_OF_A_ROW)
    config = replace(
        config,
        data=_few_rows(config.data, cache_dir, folder, rows_read),
        steps=STEPS,
        global_batch_size=global_batch_size,
        resume="auto",
        dry_run=False,
        device="cuda" if config.device == "cuda" else "cpu",
        lora=replace(config.lora, dropout=0.0) if config.lora.rank else config.lora,
        parallel=replace(
            config.parallel,
            dp_shard=-1,
            param_dtype="float32",
            reduce_dtype="float32",
            master_dtype="float32",
            float8="none",
            compile=False,
            activation_checkpointing="none",
            cpu_offload=False,
        ),
        optimizer=replace(config.optimizer, state_dtype="float32"),
        checkpoint=CheckpointConfig(every=STEPS // 2, keep_last=0),
        evaluation=EvaluationConfig(),
        log=LogConfig(every=1, tensorboard=False, progress=False),
        guards=replace(config.guards, hang_seconds=0, collective_timeout_seconds=120),
    )
    source = prepare_model(config, cache_dir)
    tokenizer = read_tokenizer(config, cache_dir, source["tokenizer"])
    if full:
        place = {"path": source["model"], "name": None, "revision": None} if source["model"] else {}
        model = replace(
            config.model,
            **place,
            tokenizer=source["tokenizer"],
            verify_hash=False,
            check_first_loss="never",
            dtype="float32",
        )
        config = replace(config, model=model)
        attempts = [(config.data.seq_len, config.data.overlong)]
    else:
        config = _with_tiny_model(config, tokenizer, source, folder / "tiny")
        attempts = list(_attempts(config.data, cp=config.parallel.cp))
    for seq_len, overlong in attempts:
        chosen = replace(config, data=replace(config.data, seq_len=seq_len, overlong=overlong))
        try:
            # Tokens of a few rows are of no use to a run: they are not kept in the cache.
            prepared = prepare(chosen, folder, device_type=config.device)
            rows = len(open_mixture(chosen.data, prepared))
        except DataError:
            if (seq_len, overlong) == attempts[-1]:
                raise
            continue
        if rows >= _PACKED_ROWS:
            break
    if rows < global_batch_size:
        raise DataError(
            f"the first {rows_read} rows of each source make {rows} packed rows, and a step takes {global_batch_size}; "
            "give more data, or a smaller data.seq_len"
        )
    return chosen, {**prepared, "evaluation": []}


def _attempts(config: DataConfig, *, cp: int) -> Iterator[tuple[int, Overlong]]:
    """Lengths of rows, 256, 512, ... rounded up to what `cp` divides, each with what to do with longer examples; at last
    what is configured.
    """
    length = SEQ_LEN
    while (rounded := -(-length // cp) * cp) < config.seq_len:
        yield rounded, "truncate"
        yield rounded, "drop"  # pairs of answers are not cut
        length *= 2
    yield config.seq_len, config.overlong


def _few_rows(config: DataConfig, cache_dir: Path, folder: Path, count: int) -> DataConfig:
    """The same options for files that hold the first `count` rows of each source; what is prepared stays."""
    entries, files = [], []
    for number, source in enumerate(source_configs(config)):
        if source.data.prepared is not None:
            files.append({"prepared": source.data.prepared, "split": source.data.split})
        else:
            file = folder / f"rows-{number}.jsonl"
            lines = (
                json.dumps(row, default=str) + "\n"
                for row in _first_rows(source.data, cache_dir, count)
            )
            file.write_text("".join(lines), encoding="utf-8")
            files.append({"path": str(file)})
        options = {
            key: getattr(source.data, key)
            for key in ("format", "transform", "train_on", "expand_turns")
            if getattr(source.data, key) is not None
        }
        weight = {} if source.weight is None else {"weight": source.weight}
        entries.append({**files[-1], **options, **weight})
    plain = replace(
        config,
        name=None,
        path=None,
        prepared=None,
        sources=(),
        subset=None,
        split="train",
        revision=None,
        streaming=False,
        workers=0,
        prepare_workers=1,
        max_bad_rows_pct=100.0,
    )
    return replace(plain, sources=tuple(entries)) if config.sources else replace(plain, **files[0])


def _first_rows(config: DataConfig, cache_dir: Path, count: int) -> list[Row]:
    if config.streaming:
        rows = islice(stream_rows(config, config.split, cache_dir=cache_dir), count)
        return [row for row in rows if row]
    rows = load_rows(config, config.split, cache_dir=cache_dir).rows
    return [row for row in (rows[i] for i in range(min(count, len(rows)))) if row]


def _with_tiny_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, source: dict[str, Any], folder: Path
) -> TrainConfig:
    """The configuration of a run that loads a shrunken model of the same family from `folder`."""
    original = read_model_config(
        config.model, Path(source["model"]) if source["model"] else None, tokenizer
    )
    model = build_model(
        tiny_config(original, tp=config.parallel.tp), attention="sdpa", seed=config.seed
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.hf.save_pretrained(folder)
    layers = min(config.model.train_last_layers, model.hf.config.num_hidden_layers - 1)
    return replace(
        config,
        model=replace(
            config.model,
            name=None,
            revision=None,
            path=str(folder),
            tokenizer=source["tokenizer"],
            init="pretrained",
            verify_hash=False,
            check_first_loss="never",
            overrides={},
            dtype="float32",
            train_last_layers=layers,
        ),
        optimizer=replace(config.optimizer, learning_rate=1e-3),
        schedule=replace(config.schedule, warmup_steps=0),
    )


def tiny_config(original: PreTrainedConfig, *, tp: int = 1) -> PreTrainedConfig:
    """The same architecture and vocabulary in two narrow layers, which `tp` ranks can split."""
    values = original.to_dict()
    values.pop("layer_types", None)  # as many as there are layers: derived anew
    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32 * tp,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 * tp,
        "num_key_value_heads": 2 * tp,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "initializer_range": _INITIALIZER_RANGE,
    }
    if "mrope_section" in str(values.get("rope_parameters")):
        del small["head_dim"]  # the sections add up to it
    values |= {key: value for key, value in small.items() if values.get(key) is not None}
    if linear_attention_layers(original):
        values["layer_types"] = ["linear_attention", "full_attention"]
    return type(original).from_dict(values)
