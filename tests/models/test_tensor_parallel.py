"""Tensor parallelism: the numbers of one process, in training, loading, generation, checkpoints and exports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from data.embedded import build_tokenizer, questions
from models.build import build_model, decoder_layer_classes, materialise
from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.export import export_model
from models.generation import generate_answers
from models.tensor_parallel import tensor_parallel_plan
from models.weights import load_weights
from tests.support.guards import plain_guards
from tests.support.models import (
    full,
    packed_batch,
    random_documents,
    save_checkpoint,
    tiny_config,
    tiny_model,
)
from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from trainer.loop import Progress, Speedometer, evaluate_loss, train
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.parallel import build_mesh, data_rank, describe_plan, parallelise
from trainer.preemption import StopRequest

CPU = torch.device("cpu")
ADAMW, MUON = OptimizerConfig(learning_rate=1e-2), OptimizerConfig(learning_rate=1e-2, name="muon")
STEPS, ROWS = 3, 8


def _config(**changes: Any) -> ParallelConfig:
    return ParallelConfig(**{"param_dtype": "float32", "tp": 2, **changes})


def _rows() -> list[list[Tensor]]:
    """From no label to all, most with padding."""
    lengths = [[24], [1], [2, 1], [12, 12], [1, 1, 1], [5], [3, 20], [2]]
    return [random_documents(row, seed=seed) for seed, row in enumerate(lengths)]


def _split(model: PackedCausalLM, config: ParallelConfig) -> PackedCausalLM:
    parallelise(
        model,
        config,
        build_mesh(config, world_size=dist.get_world_size(), device_type="cpu"),
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        forward_methods=["generate"],
        layer_plan=tensor_parallel_plan(model.hf.config, config.tp),
    )
    return model


def _optimizer(model: PackedCausalLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    return build_optimizer(model, config, layer_classes=decoder_layer_classes(model))


def _train(
    kind: str, tied: bool, config: ParallelConfig, optimizer_config: OptimizerConfig = ADAMW
) -> dict[str, Any]:
    """Logged rows of some steps with two micro-batches each, whole gradients of the first, an evaluation at the end."""
    model = _split(tiny_model(kind, tied=tied), config)
    place = data_rank(config, rank=dist.get_rank(), world_size=dist.get_world_size())
    per_batch = ROWS // place.size // 2
    micro_batches = [
        packed_batch(_rows()[start : start + per_batch], 24)
        for start in range(place.rank * per_batch, ROWS, place.size * per_batch)
    ]
    optimizer = _optimizer(model, optimizer_config)
    rows: list[dict[str, Any]] = []
    gradients: list[dict[str, Tensor]] = []

    def keep(*_: object) -> None:
        gradients.append({name: full(p.grad) for name, p in model.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    train(
        model,
        optimizer,
        itertools.cycle(micro_batches),
        loss_fn=causal_lm_loss,
        learning_rate=lambda step: 1e-2,
        optimizer_config=optimizer_config,
        progress=Progress(),
        steps=STEPS,
        global_batch_size=ROWS,
        grad_accum_steps=2,
        samples_per_epoch=ROWS,
        device=CPU,
        evaluate=lambda step: None,
        evaluate_every=0,
        save=lambda progress: None,
        save_every=0,
        log=rows.append,
        log_every=1,
        advance=lambda *_: None,
        stop=StopRequest(),
        guards=plain_guards(model, optimizer),
        speedometer=Speedometer(lambda tokens, labels, squares: tokens, None),
        parallel=config,
    )
    evaluated = evaluate_loss(
        model, micro_batches, loss_fn=causal_lm_loss, device=CPU, parallel=config
    )
    return {"rows": rows, "gradients": gradients[0], "evaluated": evaluated}


def _train_all(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [_train(*case) for case in cases]


def _alone(kind: str, tied: bool, optimizer_config: OptimizerConfig) -> dict[str, Any]:
    """The same with a plain model in one process and all rows in one batch."""
    model = tiny_model(kind, tied=tied)
    optimizer = _optimizer(model, optimizer_config)
    batch = packed_batch(_rows(), 24)
    real, padding, valid, _ = batch["counts"].tolist()
    rows, gradients = [], {}
    for _ in range(STEPS):
        loss = causal_lm_loss(model, batch)[0] / valid
        loss.backward()
        norm = clip_gradients(model.parameters(), optimizer_config.max_grad_norm)
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"loss": float(loss.detach()), "grad_norm": norm})
        rows[-1] |= {"tokens": real, "padding_tokens": padding, "valid_tokens": valid}
    with torch.no_grad():
        return {
            "rows": rows,
            "gradients": gradients,
            "evaluated": float(causal_lm_loss(model, batch)[0]) / valid,
        }


def _check(case: tuple[Any, ...], ranks: list[dict[str, Any]]) -> None:
    kind, tied, config, optimizer_config = (*case, ADAMW)[:4]
    expected = _alone(kind, tied, optimizer_config)
    found = ranks[0]
    for key in ("loss", "grad_norm", "valid_tokens", "tokens", "padding_tokens"):
        values = [[row[key] for row in rank["rows"]] for rank in ranks]
        assert all(value == values[0] for value in values)  # the same number on all ranks
    # Muon orthogonalises in bf16, which makes more of a last bit; bf16 parameters lose bits themselves.
    loss, norm, gradient = 1e-5, 1e-4, 1e-4
    if optimizer_config.name == "muon":
        loss, norm = 1e-3, 1e-3
    if config.param_dtype == "bfloat16":
        loss, norm, gradient = 0.1, 0.05, 0.3  # a bias of keys moves all scores alike: next to 0
    for row, right in zip(found["rows"], expected["rows"], strict=True):
        assert row["loss"] == pytest.approx(right["loss"], rel=0, abs=loss), case
        assert row["grad_norm"] == pytest.approx(right["grad_norm"], rel=norm), case
        for key in ("valid_tokens", "tokens", "padding_tokens"):
            assert row[key] == right[key]
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=0, abs=loss)
    assert found["rows"][0]["grad_norm"] > 1.0  # it is clipped
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, right in expected["gradients"].items():
        error = (found["gradients"][name] - right).norm() / right.norm()
        assert error < gradient, f"{case}: {name}"


def _check_all(cases: list[tuple[Any, ...]], world_size: int = 4) -> None:
    results = run_ranks(_train_all, world_size, cases, timeout=240)
    for case, ranks in zip(cases, zip(*results, strict=True), strict=True):
        _check(case, list(ranks))


@pytest.mark.distributed
def test_training_has_the_numbers_of_one_process() -> None:
    hybrid = _config(dp_replicate=2, activation_checkpointing="op")
    _check_all([("qwen2", False, _config()), ("qwen3", True, hybrid)])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen3", False)])
def test_training_has_the_numbers_of_one_process_however_it_is_spread(
    kind: str, tied: bool
) -> None:
    configs = [
        _config(),
        _config(dp_replicate=2, activation_checkpointing="full"),
        _config(cpu_offload=True, activation_checkpointing="selective"),
        _config(reshard_after_forward=2),
        _config(wrap_policy="size", min_wrap_params=500),
        _config(param_dtype="bfloat16"),
    ]
    _check_all([*((kind, tied, config) for config in configs), (kind, tied, _config(), MUON)])
    _check_all([(kind, tied, _config())], world_size=2)  # no data parallelism


def _loaded(folder: Path, config: ParallelConfig, kind: str, **changes: Any) -> PackedCausalLM:
    model = build_model(tiny_config(kind, **changes), attention="packed", seed=None)
    _split(model, config)
    materialise(model, CPU)
    load_weights(model, folder)
    return model


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield full(parameter)
        state = optimizer.state[parameter]
        yield from (full(state["exp_avg"]), full(state["exp_avg_sq"]))


def _live(checkpoint: Path, tokenizer_folder: Path, folder: Path, kind: str, changes: dict) -> Any:
    """A checkpoint is loaded, answers, learns, is saved, exported, and goes on on other meshes."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = _loaded(checkpoint, _config(), kind, **changes)
    loaded = {name: full(p) for name, p in model.hf.named_parameters()}
    prompts = [messages for messages, _ in questions("test", 3)]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=5, device=CPU, copies=2)
    model.reshard()
    optimizer = _optimizer(model, ADAMW)
    causal_lm_loss(model, packed_batch(_rows(), 24))[0].backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    saved = list(_tensors(model, optimizer))
    first = Checkpointer(folder / "checkpoints", model, optimizer, CheckpointConfig())
    first.save(1, {})
    first.wait()
    is_first = dist.get_rank() == 0
    export_model(model, tokenizer, folder / "export", dtype=torch.float32, is_writer=is_first)
    exported = {name: full(p) for name, p in model.hf.named_parameters()}
    # tensor parallel -> FSDP alone -> tensor parallel with replicas
    same = []
    for step, config in enumerate((_config(tp=1), _config(dp_replicate=2)), 2):
        other = _split(tiny_model(kind, seed=step, **changes), config)
        its = _optimizer(other, ADAMW)
        checkpointer = Checkpointer(folder / "checkpoints", other, its, CheckpointConfig())
        newest = checkpointer.newest()
        assert newest is not None and newest.name == f"step-{step - 1:08d}"
        checkpointer.restore(newest)
        same.append(
            all(torch.equal(a, b) for a, b in zip(saved, _tensors(other, its), strict=True))
        )
        checkpointer.save(step, {})
        checkpointer.wait()
    held = sum(p.to_local().numel() for p in model.parameters())
    return loaded, answers, exported, same, held, describe_plan(model, _config())


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen2", False)])
def test_from_loading_to_the_export(tmp_path: Path, kind: str, tied: bool) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    # A half of the MLP has 27 rows, and the vocabulary 513: no number of ranks divides them.
    odd = {"vocab_size": 513, "max_position_embeddings": 256, "intermediate_size": 54, "tied": tied}
    reference = save_checkpoint(tmp_path / "model", kind, **odd)
    expected = dict(reference.named_parameters())
    ranks = run_ranks(
        _live, 4, tmp_path / "model", tmp_path / "tokenizer", tmp_path / "out", kind, odd
    )
    _, answers, exported, _, _, plan = ranks[0]
    for loaded, its_answers, its_exported, same, *_ in ranks:
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], p) for name, p in expected.items())
        assert its_answers == answers
        assert all(torch.equal(exported[name], p) for name, p in its_exported.items())
        assert same == [True, True]
    assert not any(torch.equal(exported[name], p) for name, p in expected.items())
    on_disk = load_file(tmp_path / "out" / "export" / "model.safetensors")
    assert on_disk.keys() == expected.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in on_disk.items())
    for (messages, _), answer in zip(questions("test", 3), answers, strict=True):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = reference.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=5,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == answer
    assert sum(row.parameters for row in plan) == sum(p.numel() for p in expected.values())
    assert sum(row.master_bytes for row in plan) == 4 * max(held for *_, held, _ in ranks)
    # A layer is gathered over dp_shard only; tensor parallelism leaves nothing of it whole but its norms.
    for row in plan[-2:]:
        assert row.parameters / 2 < row.gathered_bytes / 4 < row.parameters * 0.53


def test_what_cannot_be_split_is_refused_with_the_numbers() -> None:
    assert tensor_parallel_plan(tiny_config(), 1) == {}
    with pytest.raises(ModelError, match=r"tp 4 .* num_key_value_heads 2 .* use .*tp 1 or 2"):
        tensor_parallel_plan(tiny_config("qwen2"), 4)
    with pytest.raises(
        ModelError, match=r"num_attention_heads 6, intermediate_size 58 .*tp 1 or 2"
    ):
        tensor_parallel_plan(
            tiny_config(num_attention_heads=6, num_key_value_heads=4, intermediate_size=58), 4
        )
    other = tiny_config()
    other.model_type = "qwen3_moe"
    with pytest.raises(ModelError, match=r"qwen2 and qwen3, the model is qwen3_moe; .*tp 1"):
        tensor_parallel_plan(other, 2)
