"""What is read from config.json, what is refused, and what is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.embedded import build_tokenizer
from models.build import (
    CONFIG_CLASSES,
    build_model,
    check_first_loss,
    check_fits,
    decoder_layer_classes,
    grow_vocabulary,
    materialise,
    read_model_config,
)
from models.config import ModelConfig
from models.errors import ModelError
from models.weights import load_weights
from tests.support.models import (
    VOCABULARY,
    attention_of,
    packed_batch,
    random_documents,
    save_checkpoint,
    tiny_config,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_the_built_in_model_fits_its_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = read_model_config(ModelConfig(), None, tokenizer)
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert len(tokenizer) <= config.vocab_size < len(tokenizer) + 64
    assert config.vocab_size % 64 == 0
    check_fits(config, tokenizer, seq_len=2048)


def test_overrides_change_the_built_in_model_and_a_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    built_in = read_model_config(ModelConfig(overrides={"num_hidden_layers": 1}), None, tokenizer)
    assert built_in.num_hidden_layers == 1
    save_checkpoint(tmp_path)
    for layers in (1, 3):  # fewer and more than the layer types in the file
        changed = ModelConfig(
            init="random", overrides={"num_hidden_layers": layers, "intermediate_size": 24}
        )
        config = read_model_config(changed, tmp_path, tokenizer)
        model = build_model(config, attention="packed", seed=0)
        assert len(model.hf.base_model.layers) == layers
        assert model.hf.base_model.layers[-1].mlp.up_proj.weight.shape == (24, 32)


def test_S04_a_value_of_the_wrong_type_is_refused_in_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = ModelConfig(init="random", overrides={"hidden_size": "wide"})
    with pytest.raises(ModelError, match=r"the built-in model with .* 'hidden_size' expected int"):
        read_model_config(config, None, tokenizer)
    save_checkpoint(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": "two"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"config.json is not .* 'num_hidden_layers'") as error:
        read_model_config(ModelConfig(), tmp_path, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inside_folder", [True, False])
def test_an_override_of_an_unknown_key_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, inside_folder: bool
) -> None:
    save_checkpoint(tmp_path)
    config = ModelConfig(init="random", overrides={"num_hidden_layer": 1})
    with pytest.raises(ModelError, match="num_hidden_layer'"):
        read_model_config(config, tmp_path if inside_folder else None, tokenizer)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no config.json; --model.path takes a folder"),
        ("{", "not a model configuration"),
        ("[1]", "not a model configuration"),
        ("{}", "not a model configuration"),
        ('{"model_type": "llama"}', "model_type 'llama'; this trainer knows qwen2, qwen2_moe, "),
    ],
)
def test_S04_a_folder_that_is_no_known_model_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: str | None, line: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=line) as error:
        read_model_config(ModelConfig(), tmp_path, tokenizer)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_overrides_need_random_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"--model\.init random"):
        read_model_config(ModelConfig(overrides={"num_hidden_layers": 1}), tmp_path, tokenizer)


def test_sliding_windows_need_sdpa(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding_attention" in config.layer_types
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"--model\.attention sdpa"):
        read_model_config(ModelConfig(), tmp_path, tokenizer)
    read = read_model_config(ModelConfig(attention="sdpa"), tmp_path, tokenizer)
    assert read.layer_types == config.layer_types


def test_a_window_without_layer_types_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_config("qwen3_moe", use_sliding_window=True, sliding_window=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"--model\.attention sdpa"):
        read_model_config(ModelConfig(), tmp_path, tokenizer)
    assert read_model_config(ModelConfig(attention="sdpa"), tmp_path, tokenizer).sliding_window == 4


def test_an_indexer_needs_sdpa_and_its_budget(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = tiny_config("qwen4_exp_text")
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"--model\.attention sdpa --data\.packing none$"):
        read_model_config(ModelConfig(), tmp_path, tokenizer)
    read = read_model_config(ModelConfig(attention="sdpa"), tmp_path, tokenizer)
    assert read.layer_types == ["linear_attention", "indexed_attention"]
    # transformers accepts a configuration without an indexer and cannot build its model.
    (tmp_path / "config.json").write_text('{"model_type": "qwen4_exp", "text_config": {}}')
    with pytest.raises(ModelError, match=r"config.json has layers .* and no indexer_budget"):
        read_model_config(ModelConfig(attention="sdpa"), tmp_path, tokenizer)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"])
def test_a_vision_language_configuration_gives_its_text_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    text, attention = tiny_config(kind, tied=False).to_dict(), attention_of(kind)
    for outside, inside in ((True, False), (False, True), (False, False), (None, True)):
        values = {"model_type": kind.removesuffix("_text"), "vision_config": {"depth": 1}}
        values["text_config"] = text | {"tie_word_embeddings": inside}
        if outside is not None:
            values["tie_word_embeddings"] = outside
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = read_model_config(ModelConfig(attention=attention), tmp_path, tokenizer)
        assert type(config) is CONFIG_CLASSES[kind]
        assert config.tie_word_embeddings == bool(outside or inside)
    assert config.layer_types == text["layer_types"] and config.hidden_size == 32
    deeper = ModelConfig(init="random", overrides={"num_hidden_layers": 5}, attention=attention)
    config = read_model_config(deeper, tmp_path, tokenizer)
    linear, (other,) = "linear_attention", set(text["layer_types"]) - {"linear_attention"}
    assert config.layer_types == [linear, linear, linear, other, linear]


def test_the_weight_of_the_balancing_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_config("qwen3_moe", router_aux_loss_coef=0.25).save_pretrained(tmp_path)
    read = [
        read_model_config(ModelConfig(router_aux_loss_coef=value), tmp_path, tokenizer)
        for value in (None, 0.0, 0.5)
    ]
    assert [config.router_aux_loss_coef for config in read] == [0.25, 0.0, 0.5]
    for value, line in ((-0.1, "below 0"), (0.5, "the built-in model is dense; leave it out")):
        with pytest.raises(ModelError, match=f"model.router_aux_loss_coef .*{line}"):
            read_model_config(ModelConfig(router_aux_loss_coef=value), None, tokenizer)


def test_what_does_not_fit_is_refused_with_both_numbers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = tiny_config(vocab_size=len(tokenizer))
    check_fits(config, tokenizer, seq_len=64)
    with pytest.raises(ModelError, match=r"seq_len 65 .* 64 positions; use --data.seq_len 64"):
        check_fits(config, tokenizer, seq_len=65)
    config.vocab_size -= 1
    with pytest.raises(
        ModelError, match=rf"id is {len(tokenizer) - 1}, .* {config.vocab_size} emb"
    ):
        check_fits(config, tokenizer, seq_len=64)


def test_the_vocabulary_grows_only_when_it_must(tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config(vocab_size=len(tokenizer))
    grow_vocabulary(config, tokenizer)
    assert config.vocab_size == len(tokenizer)
    config.vocab_size -= 1
    grow_vocabulary(config, tokenizer)
    assert config.vocab_size >= len(tokenizer) and config.vocab_size % 64 == 0
    hashed = tiny_config("qwen4_exp_text", vocab_size=len(tokenizer))
    grow_vocabulary(hashed, tokenizer)
    hashed.vocab_size -= 1
    with pytest.raises(ModelError, match=r"hashes n-grams: .* add no tokens$"):
        grow_vocabulary(hashed, tokenizer)


def test_what_gets_no_gradient_is_frozen_and_all_else_gets_one() -> None:
    for kind in CONFIG_CLASSES:
        model = build_model(tiny_config(kind), attention="sdpa", seed=0)
        model(packed_batch([random_documents([24])], 24)).logsumexp(-1).sum().backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
        assert bool(without) == (kind == "qwen4_exp_text")
        assert all("indexer" in name for name in without)


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = tiny_config()
    a, b, c = (build_model(config, attention="packed", seed=seed) for seed in (1, 1, 2))
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)
        assert x.ndim < 2 or not torch.equal(x, z)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_from_meta_to_loaded_on_one_process(tmp_path: Path, kind: str, tied: bool) -> None:
    reference = save_checkpoint(tmp_path, kind, tied=tied, dtype=torch.bfloat16)
    model = build_model(tiny_config(kind, tied=tied), attention="sdpa", seed=None)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialise(model, torch.device("cpu"))
    report = load_weights(model, tmp_path)
    assert report.tied == (["lm_head.weight"] if tied else [])
    assert len(report.loaded) == len(dict(reference.named_parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    embedding = model.hf.get_input_embeddings().weight
    assert (model.head.weight is embedding) == tied
    ours, theirs = (dict(m.named_buffers()) for m in (model.hf, reference))
    assert set(ours) == set(theirs) and "model.rotary_emb.inv_freq" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(model.eval().hf(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_a_materialised_model_has_every_buffer_of_a_built_one(kind: str) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    for changes in ({}, {"rope_parameters": scaled}):
        config = tiny_config(kind, **changes)
        model = build_model(config, attention="packed", seed=None)
        materialise(model, torch.device("cpu"))
        expected = dict(build_model(config, attention="packed", seed=0).named_buffers())
        buffers = dict(model.named_buffers())
        assert buffers.keys() == expected.keys() and buffers
        for name, buffer in buffers.items():
            assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_the_decoder_layers_are_found(kind: str) -> None:
    model = build_model(tiny_config(kind), attention="packed", seed=None)
    (layer,) = decoder_layer_classes(model)
    assert layer is type(model.hf.base_model.layers[0])


def test_experts_are_one_product_where_their_width_allows_it() -> None:
    for width, implementation in ((16, "grouped_mm"), (12, "eager")):
        model = build_model(
            tiny_config("qwen3_moe", moe_intermediate_size=width), attention="packed", seed=0
        )
        assert model.hf.config._experts_implementation == implementation
        batch = packed_batch([random_documents([9, 14])], 24)
        logits = model.bfloat16()(batch)
        assert bool(logits.isfinite().all())


def test_the_first_loss_of_weights_that_know_nothing() -> None:
    """Random weights cost the guess or more, in any width; a trained Qwen is far below it."""
    ids = torch.randint(0, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    for spread in (0.02, 0.2):
        model = build_model(tiny_config(initializer_range=spread), attention="sdpa", seed=0)
        with torch.no_grad():
            loss = float(model.hf(input_ids=ids, labels=ids).loss)
        with pytest.raises(ModelError, match=r"--model.check_first_loss never") as error:
            check_first_loss(loss, vocab_size=VOCABULARY)
        assert f"{loss:.2f}" in str(error.value) and "costs 4.57" in str(error.value)
    check_first_loss(8.0, vocab_size=151936)  # rare scripts, random characters
    check_first_loss(11.4, vocab_size=151936)
    for loss in (11.5, 11.93, float("inf"), float("nan")):
        with pytest.raises(ModelError):
            check_first_loss(loss, vocab_size=151936)
