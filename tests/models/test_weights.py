"""Every tensor of a checkpoint is accounted for, or the run does not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.build import build_model, materialise
from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.weights import INDEX_FILE, SINGLE_FILE, export_tensors, load_weights
from tests.support.models import VOCABULARY, save_checkpoint, tiny_config


def _empty(kind: str = "qwen3", **changes: object) -> PackedCausalLM:
    model = build_model(tiny_config(kind, **changes), attention="packed", seed=None)
    materialise(model, torch.device("cpu"))
    return model


def _rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def _refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        load_weights(_empty(), folder)
    line = str(error.value)
    assert "\n" not in line and str(folder) in line
    assert [part for part in parts if part not in line] == [], line


def test_several_files_through_an_index(tmp_path: Path) -> None:
    reference = save_checkpoint(tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = _empty()
    load_weights(model, tmp_path)
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.hf.get_parameter(name), parameter)


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)

    _rewrite(tmp_path, change)
    _refused(tmp_path, "missing model.norm.weight", "unexpected model.extra.weight")


def test_a_long_list_is_cut_with_a_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    _rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if "layers" in name])
    _refused(tmp_path, "and 17 more")


def test_tensors_of_another_shape_are_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(3, 32)
        tensors["model.embed_tokens.weight"] = torch.zeros(VOCABULARY + 1, 32)

    _rewrite(tmp_path, change)
    _refused(tmp_path, f"{name} is [3, 32], the model has [56, 32]", "[98, 32]", "[97, 32]")


def test_every_fault_is_told_and_nothing_is_copied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["visual.patch.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(56, 32, dtype=torch.int8)

    _rewrite(tmp_path, change)
    _refused(
        tmp_path,
        "not the model's: missing model.norm.weight; unexpected visual.patch.weight; "
        "tensors of another shape: model.layers.0.mlp.up_proj.weight is [3, 32], the model has [56, 32]; "
        "quantised, which cannot be trained: model.layers.1.mlp.up_proj.weight is I8",
    )
    model = _empty()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    with pytest.raises(ModelError):
        load_weights(model, tmp_path)
    assert all(bool((parameter == 7.0).all()) for parameter in model.parameters())


def test_the_report_accounts_for_every_tensor(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, dtype=torch.bfloat16)
    rotary = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors.update({name: torch.zeros(4) for name in rotary})

    _rewrite(tmp_path, change)
    report = load_weights(_empty(vocab_size=128), tmp_path)
    stored = load_file(tmp_path / SINGLE_FILE)
    accounted = report.loaded + report.tied + report.grown + report.unused
    assert sorted(accounted) == sorted(stored)
    count = len(stored) - 3
    summary = report.summary()
    assert (
        summary
        == json.loads(json.dumps(summary))
        == {
            "loaded": count - 1,
            "converted": {},
            "initialised": [],
            "tied": ["lm_head.weight"],
            "grown": ["model.embed_tokens.weight"],
            "unused": rotary,
            "dtypes": {"bfloat16": count - 1, "float32": 1},
            "files": 1,
        }
    )
    assert str(report).startswith(
        f"{count} tensors loaded (bfloat16, float32); lm_head.weight tied; "
    )
    assert str(report).endswith("; 2 unused on purpose")


def test_what_a_model_s_own_code_leaves_out_is_unused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"mtp.norm.weight": torch.zeros(2)}))
    _refused(tmp_path, "unexpected mtp.norm.weight")
    model = _empty()
    model.hf._keys_to_ignore_on_load_unexpected = [r"^mtp.*"]  # as Qwen3-Next's class has it
    assert load_weights(model, tmp_path).unused == ["mtp.norm.weight"]


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    _rewrite(tmp_path, change)
    _refused(tmp_path, "lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings")


def test_stored_hashes_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen4_exp_text")
    report = load_weights(_empty("qwen4_exp_text"), tmp_path)
    hashes = "model.layers.0.ple.ple_embedding"
    assert report.converted[f"{hashes}.ngram_embedding.weight"] == 3
    assert len(report.unused) == 3 and all(name.startswith(hashes) for name in report.unused)
    with pytest.raises(ModelError, match=rf"than config.json gives: {hashes}.layer_multipliers$"):
        load_weights(_empty("qwen4_exp_text", seed=5), tmp_path)


def test_a_file_with_more_than_its_header_says_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with (tmp_path / SINGLE_FILE).open("ab") as file:
        file.write(b"\0" * 64)
    _refused(tmp_path, SINGLE_FILE, "download it again")


def test_a_tensor_that_the_index_does_not_know_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shard_size="20KB")
    (shard, *_) = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = {**load_file(shard), "model.extra.weight": torch.zeros(2)}
    save_file(tensors, shard, metadata={"format": "pt"})
    _refused(tmp_path, shard.name, "model.extra.weight", "download the model again")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    _refused(tmp_path, SINGLE_FILE, "download it again")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shard_size="20KB")
    (shard, *_) = sorted(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    _refused(tmp_path, shard.name, "download the model again")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "a/../../b"])
def test_S08_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    save_checkpoint(folder)
    (folder / SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    _refused(folder, repr(shard), "refusing")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    _refused(tmp_path, INDEX_FILE, "download the model again")


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    names = load_file(tmp_path / SINGLE_FILE)
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)})
    )
    _rewrite(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    _refused(tmp_path, SINGLE_FILE, "model.norm.weight")


def test_S02_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save(save_checkpoint(tmp_path).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / SINGLE_FILE).unlink()
    _refused(tmp_path, "only safetensors are read")


def test_a_tied_head_on_disk_is_no_surprise(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    _rewrite(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    assert load_weights(_empty(), tmp_path).tied == ["lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_new_vocabulary_rows_are_the_mean_of_the_known(tmp_path: Path, tied: bool) -> None:
    reference = save_checkpoint(tmp_path, tied=tied)
    model = _empty(tied=tied, vocab_size=128)
    report = load_weights(model, tmp_path)
    grown = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert sorted(report.grown) == sorted(grown)
    assert "new rows of" in str(report)
    for name in grown:
        ours, known = model.hf.get_parameter(name), reference.get_parameter(name)
        assert torch.equal(ours[:VOCABULARY], known)
        mean = known.double().mean(0).float().expand(128 - VOCABULARY, -1)
        torch.testing.assert_close(ours[VOCABULARY:], mean, rtol=1e-6, atol=1e-7)


def test_only_the_vocabulary_may_grow(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"mlp.up_proj.weight is \[56, 32\]"):
        load_weights(_empty(intermediate_size=64), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_names_on_disk_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    save_checkpoint(tmp_path, tied=tied)
    assert set(export_tensors(_empty(tied=tied))) == set(load_file(tmp_path / SINGLE_FILE))
