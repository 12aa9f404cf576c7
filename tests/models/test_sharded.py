"""Models on several ranks: loading, ties, export and generation equal those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.embedded import build_tokenizer, questions
from models.build import build_model, decoder_layer_classes, materialise
from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.export import export_model
from models.generation import generate_answers
from models.weights import load_weights
from tests.support.models import (
    full,
    packed_batch,
    random_documents,
    save_checkpoint,
    tiny_config,
    tiny_model,
)
from tests.support.ranks import run_ranks
from trainer.config import ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.parallel import build_mesh, parallelise

FP32 = ParallelConfig(param_dtype="float32")
CPU = torch.device("cpu")


def _sharded(model: PackedCausalLM, config: ParallelConfig = FP32) -> PackedCausalLM:
    parallelise(
        model,
        config,
        build_mesh(config, world_size=dist.get_world_size(), device_type="cpu"),
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
        forward_methods=["generate"],
    )
    return model


def _loaded(folder: Path, config: ParallelConfig = FP32, **changes: Any) -> PackedCausalLM:
    values = json.loads((folder / "config.json").read_text())
    hf_config = tiny_config(values["model_type"], tied=values["tie_word_embeddings"], **changes)
    model = _sharded(build_model(hf_config, attention="packed", seed=None), config)
    materialise(model, CPU)
    load_weights(model, folder)
    return model


def _batch() -> dict[str, Tensor]:
    return packed_batch([random_documents([9, 14])], 24)


def _is_one_storage(model: PackedCausalLM) -> bool:
    embedding, head = model.hf.get_input_embeddings().weight, model.head.weight
    return embedding is head and (
        embedding.to_local().untyped_storage().data_ptr()
        == head.to_local().untyped_storage().data_ptr()
    )


def _load_and_step(folders: dict[str, Path]) -> dict[str, Any]:
    """Logits after loading, whether head and embedding are one before and after a step, and grown rows."""
    results: dict[str, Any] = {}
    for name, folder in folders.items():
        model = _loaded(folder)
        with torch.no_grad():
            logits = model(_batch())
        model.reshard()
        before = _is_one_storage(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        causal_lm_loss(model, _batch())[0].backward()
        optimizer.step()
        head = full(model.head.weight)
        embedding = full(model.hf.get_input_embeddings().weight)
        results[name] = (logits, before, _is_one_storage(model), head, embedding)
        grown = _loaded(folder, vocab_size=128)
        results[name] += (full(grown.head.weight), full(grown.hf.get_input_embeddings().weight))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_streamed_into_shards(tmp_path: Path, world_size: int) -> None:
    models, folders = {}, {}
    for kind in ("qwen2", "qwen3"):
        for tied in (True, False):
            name = f"{kind}-{'tied' if tied else 'untied'}"
            folders[name] = tmp_path / name
            models[name] = save_checkpoint(
                folders[name], kind, tied=tied, dtype=torch.bfloat16, shard_size="10KB"
            )
    for results in run_ranks(_load_and_step, world_size, folders):
        for name, reference in models.items():
            logits, before, after, head, embedding, grown_head, grown_embedding = results[name]
            tied = name.endswith("-tied")
            begin = 0
            for document in random_documents([9, 14]):
                with torch.no_grad():
                    expected = reference(input_ids=document[None]).logits[0]
                end = begin + len(document)
                torch.testing.assert_close(logits[0, begin:end], expected, rtol=0, atol=5e-6)
                begin = end
            assert (before, after) == (tied, tied), name
            assert torch.equal(head, embedding) == tied
            assert not torch.equal(head, reference.get_output_embeddings().weight)  # it has learned
            for grown, known in (
                (grown_embedding, reference.get_input_embeddings().weight),
                (grown_head, reference.get_output_embeddings().weight),
            ):
                assert torch.equal(grown[:97], known)
                mean = known.double().mean(0).float().expand(31, -1)
                torch.testing.assert_close(grown[97:], mean, rtol=1e-6, atol=1e-7)


def _export(
    checkpoint: Path, tokenizer_folder: Path, folder: Path, shard_bytes: int, dtype: torch.dtype
) -> Any:
    model = _loaded(checkpoint, vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    error = None
    try:
        export_model(
            model,
            tokenizer,
            folder,
            dtype=dtype,
            is_writer=dist.get_rank() == 0,
            max_shard_bytes=shard_bytes,
        )
    except ModelError as reason:
        error = str(reason)
    dist.barrier()
    with torch.no_grad():
        return model(_batch()), error


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False])
def test_export_is_a_hugging_face_model(tmp_path: Path, tied: bool) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "out" / "export"
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    save_checkpoint(checkpoint, tied=tied, vocab_size=512)
    folder.mkdir(parents=True)
    (folder / "left-over").write_text("of an earlier export")
    arguments = (checkpoint, tmp_path / "tokenizer", folder)
    (logits, error), (_, other_error) = run_ranks(_export, 2, *arguments, 20_000, torch.float32)
    assert (error, other_error) == (None, None)
    assert not (folder / "left-over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]

    files = sorted(folder.glob("*.safetensors"))
    assert (
        len(files) > 3
        and files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    )
    names = [name for file in files for name in load_file(file)]
    assert ("lm_head.weight" in names) != tied
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (first, _) = random_documents([9, 14])
    with torch.no_grad():
        torch.testing.assert_close(
            logits[0, :9], loaded(input_ids=first[None]).logits[0], rtol=0, atol=5e-6
        )

    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (end, pad)
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "float32"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == ([end, pad], pad)
    exported_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert exported_tokenizer.eos_token_id == end
    assert exported_tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.distributed
def test_export_in_bf16_and_what_cannot_be_written(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    build_tokenizer(tmp_path / "tokenizer")
    reference = save_checkpoint(checkpoint, vocab_size=512)
    arguments = (checkpoint, tmp_path / "tokenizer")
    folder = tmp_path / "export"
    run_ranks(_export, 2, *arguments, folder, 10**9, torch.bfloat16)
    (file,) = folder.glob("*.safetensors")
    assert file.name == "model.safetensors"
    for name, tensor in load_file(file).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, reference.get_parameter(name).bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

    (tmp_path / "file").write_text("")
    results = run_ranks(
        _export, 2, *arguments, tmp_path / "file" / "export", 10**9, torch.float32, timeout=60
    )
    assert "could not be written" in results[0][1] and str(tmp_path / "file") in results[0][1]
    assert results[1][1] is None


def _answers(checkpoint: Path, tokenizer_folder: Path, counts: list[int]) -> Any:
    model = _loaded(checkpoint, vocab_size=512, max_position_embeddings=256)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    implementation = model.hf.config._attn_implementation
    prompts = [messages for messages, _ in questions("test", max(counts))]
    answers = [
        generate_answers(
            model, tokenizer, prompts[:count], max_new_tokens=6, device=CPU, batch_size=2
        )
        for count in counts
    ]
    model.reshard()
    kept = (
        model.training,
        model.hf.config._attn_implementation == implementation,
        tokenizer.backend_tokenizer.padding is None,  # it would be exported
    )
    causal_lm_loss(model, _batch())[0].backward()  # training goes on
    return answers, kept


@pytest.mark.distributed
def test_greedy_answers_are_those_of_transformers_one_by_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    reference = save_checkpoint(checkpoint, vocab_size=512, max_position_embeddings=256)
    counts = [5, 1, 0]
    expected = []
    for messages, _ in questions("test", 5):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = reference.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert len(set(expected)) > 1
    for world_size in (1, 2):
        for answers, kept in run_ranks(
            _answers, world_size, checkpoint, tmp_path / "tokenizer", counts
        ):
            assert answers == [expected[:count] for count in counts]
            assert kept == (True, True, True)


def _end_after(model: PackedCausalLM, end: int, tokens: int) -> list[int]:
    """Let the model say token 300 over and over, and the end of the turn as token number `tokens`."""
    calls: list[int] = []

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        calls.append(output.shape[0])
        logits = torch.zeros_like(output)
        logits[..., end if len(calls) == tokens else 300] = 1.0
        return logits

    model.head.register_forward_hook(replace)
    return calls


def _answers_of_unequal_length(tokenizer_folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = _sharded(tiny_model(vocab_size=512, max_position_embeddings=256))
    _end_after(model, tokenizer.convert_tokens_to_ids("<|im_end|>"), 2 + 3 * dist.get_rank())
    prompts = [messages for messages, _ in questions("test", 3)]
    return generate_answers(model, tokenizer, prompts, max_new_tokens=20, device=CPU)


@pytest.mark.distributed
def test_a_rank_that_ends_early_waits_for_the_others(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    short, long = tokenizer.decode([300]), tokenizer.decode([300] * 4)
    results = run_ranks(_answers_of_unequal_length, 2, tmp_path, timeout=60)
    assert results == [[short, long, short]] * 2


def test_an_answer_ends_at_the_end_of_the_turn() -> None:
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=512, max_position_embeddings=256)
    calls = _end_after(model, tokenizer.convert_tokens_to_ids("<|im_end|>"), 3)
    prompts = [messages for messages, _ in questions("test", 3)]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=20, device=CPU)
    assert calls == [3, 3, 3]
    assert answers == [tokenizer.decode([300, 300])] * 3
    assert model.training
