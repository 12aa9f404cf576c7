"""train.py on a mixture of experts with linear attention: what is refused, and a run from files to export."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.embedded import build_tokenizer
from scripts import export
from tests.support.job import EXACT, load_export, losses, read_rows, train
from tests.support.models import save_checkpoint
from tests.support.tiny import VOCABULARY, write_chat

pytestmark = pytest.mark.distributed


def _write_model(folder: Path, kind: str) -> Path:
    save_checkpoint(
        folder, kind, vocab_size=VOCABULARY, max_position_embeddings=256, moe_intermediate_size=16
    )
    build_tokenizer(folder)
    return folder


def _flags(model: Path, chat: Path, *more: str) -> list[str]:
    return [
        f"--model.path={model}",
        f"--data.path={chat}",
        "--data.seq_len=128",
        "--global_batch_size=4",
        "--steps=3",
        *EXACT,
        *more,
    ]


@pytest.mark.slow
def test_linear_attention_and_experts_from_a_vision_language_folder_to_an_export(
    tmp_path: Path, cache_dir: Path
) -> None:
    chat = write_chat(
        tmp_path / "chat" / "train.jsonl", count=4
    ).parent  # every step sees all of it
    write_chat(chat / "test.jsonl", count=3, split="test")
    model = _write_model(tmp_path / "model", "qwen3_5_moe_text")
    text = json.loads((model / "config.json").read_text())
    values = {"model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(values))

    result = train(_flags(model, chat), cache_dir=cache_dir, output_dir=tmp_path / "packed")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "would carry one document of a packed row into the next; use --data.packing none" in line
    assert not (cache_dir / "tokens").exists() and not (tmp_path / "packed" / "run.json").exists()

    flags = _flags(model, chat, "--data.packing=none", "--model.router_aux_loss_coef=0.1")
    flags += ["--evaluation.split=test", "--evaluation.max_new_tokens=3"]
    found, answers = {}, []
    for world_size, micro in ((1, 4), (2, 1)):
        out = tmp_path / f"out-{world_size}"
        result = train(
            [*flags, f"--micro_batch_size={micro}"],
            world_size,
            cache_dir=cache_dir,
            output_dir=out,
        )
        assert result.returncode == 0, result.output
        found[world_size] = [row for row in read_rows(out) if "loss" in row]
        answers.append((out / "samples.jsonl").read_text())
        assert losses(out)[-1] < losses(out)[0]
    for one, two in zip(found[1], found[2], strict=True):
        for name in ("loss", "router_aux_loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["expert_load_max_ratio"] == pytest.approx(one["expert_load_max_ratio"], abs=0.02)
        assert one["loss"] > one["router_aux_loss"] > 2
    assert answers[0] == answers[1] and answers[0].count("\n") == 6
    exported = load_export(tmp_path / "out-2")
    config = json.loads((tmp_path / "out-2" / "export" / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe_text" and config["router_aux_loss_coef"] == 0.1
    with torch.no_grad():
        assert bool(exported(input_ids=torch.arange(5, 30)[None]).logits.isfinite().all())


@pytest.mark.slow
def test_an_indexer_stays_as_it_was_in_checkpoints_and_exports(
    tmp_path: Path, cache_dir: Path
) -> None:
    """Qwen4-Exp: refused packed; Muon, recomputed layers, dry run, resume and both ways to an export."""
    chat = write_chat(tmp_path / "chat" / "train.jsonl", count=8).parent
    write_chat(chat / "test.jsonl", count=2, split="test")
    model = _write_model(tmp_path / "model", "qwen4_exp_text")
    run = partial(train, cache_dir=cache_dir)
    for flags, line in (
        ([], "which needs --model.attention sdpa --data.packing none"),
        (["--model.attention=sdpa"], "next; use --data.packing none"),
        (
            ["--model.attention=sdpa", "--data.packing=none", "--parallel.compile"],
            "with the indexers of qwen4_exp_text; leave it out",
        ),
    ):
        result = run(_flags(model, chat, *flags), output_dir=tmp_path / "refused")
        assert result.returncode == 1 and result.stderr.strip().endswith(line)

    flags = _flags(
        model,
        chat,
        "--model.attention=sdpa",
        "--data.packing=none",
        "--optimizer.name=muon",
        "--parallel.activation_checkpointing=full",
        "--checkpoint.every=2",
        "--evaluation.split=test",
        "--evaluation.max_new_tokens=3",
    )
    tried = run([*flags, "--dry_run"], output_dir=tmp_path / "tried")
    assert tried.returncode == 0 and "equal in every bit" in tried.stdout, tried.output
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = run(flags, output_dir=whole)
    assert result.returncode == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("frozen ")]
    assert "the indexers of 1 attention layers (784 parameters)" in line
    resumed = run([*flags, f"--resume={whole}/checkpoints/step-00000002"], output_dir=again)
    assert resumed.returncode == 0, resumed.output
    assert losses(again) == losses(whole)[-1:]
    assert export.main([str(again), str(tmp_path / "exported"), "--dtype=float32"]) == 0

    before = load_file(model / "model.safetensors")
    after = [load_file(f / "model.safetensors") for f in (whole / "export", tmp_path / "exported")]
    assert before.keys() == after[0].keys() == after[1].keys()
    for name, tensor in before.items():
        assert torch.equal(after[0][name], after[1][name])
        kept = "indexer" in name or tensor.dtype == torch.int64
        assert torch.equal(after[0][name], tensor) == kept, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_experts_on_packed_rows(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    chat = write_chat(tmp_path / "chat.jsonl", count=40)
    model = _write_model(tmp_path / "model", kind)
    flags = _flags(model, chat, "--parallel.activation_checkpointing=full")
    rows = {}
    for world_size in (1, 2):
        out = tmp_path / f"out-{world_size}"
        result = train(
            [*flags, "--micro_batch_size=1"], world_size, cache_dir=cache_dir, output_dir=out
        )
        assert result.returncode == 0, result.output
        rows[world_size] = read_rows(out)
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["router_aux_loss"] == pytest.approx(one["router_aux_loss"], rel=1e-4)


@pytest.mark.slow
def test_an_indexer_goes_with_gradients_kept_as_shards(tmp_path: Path, cache_dir: Path) -> None:
    """Qwen4-Exp, two micro-batches a step: the losses are those of gradients kept whole."""
    chat = write_chat(tmp_path / "chat.jsonl", count=8)
    model = _write_model(tmp_path / "model", "qwen4_exp_text")
    flags = _flags(
        model, chat, "--model.attention=sdpa", "--data.packing=none", "--micro_batch_size=1"
    )
    rows = {}
    for name, more in {
        "plain": [],
        "sharded": ["--parallel.accumulation=sharded"],
    }.items():
        out = tmp_path / name
        result = train([*flags, *more], cache_dir=cache_dir, output_dir=out, timeout=280)
        assert result.returncode == 0, result.output
        rows[name] = read_rows(out)
    for plain, sharded in zip(rows["plain"], rows["sharded"], strict=True):
        assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert sharded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
