"""Adapters and last layers: what is trained, on how many ranks, and what other programs make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.embedded import build_tokenizer
from models.build import CONFIG_CLASSES, build_model, decoder_layer_classes, materialise
from models.causal_lm import PackedCausalLM
from models.config import LoraConfig
from models.errors import ModelError
from models.export import export_adapter, export_model
from models.flops import training_flops
from models.partial import (
    adapter_targets,
    decoder_layers,
    fingerprint,
    freeze,
    init_adapters,
    peft_config,
)
from models.weights import load_weights
from tests.support.models import (
    attention_of,
    full,
    packed_batch,
    random_documents,
    save_checkpoint,
    tiny_config,
)
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.parallel import DTYPES, build_mesh, parallelise

NONE = LoraConfig()
LORA = LoraConfig(rank=4, alpha=8)
STEPS, SEQ_LEN = 3, 24
ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.0)


def _empty(kind: str = "qwen3", **changes: Any) -> PackedCausalLM:
    return build_model(tiny_config(kind, **changes), attention=attention_of(kind), seed=None)


def test_targets_are_the_linear_layers_by_name() -> None:
    attention, mlp = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]
    assert adapter_targets(_empty(), LORA) == sorted(attention + mlp)
    some = replace(LORA, targets=("v_proj", "q_proj"))
    model = _empty()
    freeze(model, some, last_layers=1, dtype=torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[5] for name in trained} == {"q_proj", "v_proj"}
    assert {name.split(".")[3] for name in trained} == {"1"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_experts_are_no_targets() -> None:
    for kind in ("qwen2_moe", "qwen3_moe"):
        model = _empty(kind)
        assert adapter_targets(model, LORA) == ["k_proj", "o_proj", "q_proj", "v_proj"]
        with pytest.raises(ModelError, match=r"attention has no linear layer down_proj; .*experts"):
            adapter_targets(model, replace(LORA, targets=("down_proj",)))


@pytest.mark.parametrize(
    ("lora", "last_layers", "message"),
    [
        (
            replace(LORA, targets=("q_porj",)),
            0,
            "lora.targets: the decoder layers have no linear layer q_porj; there are down_proj, gate_proj, "
            "k_proj, o_proj, q_proj, up_proj, v_proj; [all-linear] takes them all",
        ),
        (NONE, 3, "model.train_last_layers 3: the model has 2 decoder layers"),
    ],
)
def test_what_the_model_lacks_is_refused(lora: LoraConfig, last_layers: int, message: str) -> None:
    with pytest.raises(ModelError) as error:
        freeze(_empty(), lora, last_layers=last_layers, dtype=torch.float32)
    assert str(error.value) == message


def test_another_model_has_another_fingerprint(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        save_checkpoint(folder, seed=seed)
    one, same, other = map(fingerprint, folders)
    assert one == same != other
    (folders[1] / "config.json").write_text("{}")
    assert fingerprint(folders[1]) != one


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("lora", "last_layers"), [(LORA, 0), (NONE, 2), (LORA, 2)])
def test_only_what_is_trained_costs_a_gradient(
    lora: LoraConfig, last_layers: int, tied: bool
) -> None:
    """The operations that PyTorch counts: no weight gradient of what is frozen, the head's among them, and no backward at all
    in front of the first trained layer."""
    layers = 8
    model = _empty(tied=tied, num_hidden_layers=layers)
    freeze(model, lora, last_layers=last_layers, dtype=torch.float32)
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    model.hf.set_attn_implementation("sdpa")
    batch = packed_batch([random_documents([SEQ_LEN])], SEQ_LEN)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        causal_lm_loss(model, batch)[0].backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = training_flops(
        model.hf.config,
        SEQ_LEN,
        SEQ_LEN - 1,
        2 * SEQ_LEN**2,
        front_layers=layers - last_layers if last_layers else 0,
        frozen=lora.rank > 0,
        adapter_parameters=trained if lora.rank else 0,
    )
    # The closed form counts the gradient of the first trained layer's own input, which nobody needs.
    assert 0.93 * expected < counter.get_total_flops() <= 1.001 * expected
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


QUICK = ["lora, tokens", "dora", "last layer"]
# Family, adapters, last layers, changes to the configuration.
CASES: dict[str, tuple[str, LoraConfig, int, dict[str, Any]]] = {
    "lora": ("qwen3", LORA, 0, {}),
    "lora, tokens": ("qwen3", LORA, 0, {}),
    "lora, tokens, untied": ("qwen2", replace(LORA, targets=("v_proj",)), 0, {"tied": False}),
    "rslora, some targets": (
        "qwen2",
        replace(LORA, rslora=True, targets=("q_proj", "down_proj")),
        0,
        {"tied": False},
    ),
    "dora": ("qwen2", replace(LORA, dora=True), 0, {}),
    "lora, last layer": ("qwen3", LORA, 1, {"tied": False}),
    "last layer": ("qwen3", NONE, 1, {"tied": False}),
    "last layer, tied": ("qwen2", NONE, 1, {}),
    **{f"family {kind}": (kind, LORA, 0, {}) for kind in CONFIG_CLASSES},
}


TOKENS = [5, 50, 100]  # two in the documents, and one that the checkpoint lacks
GROWN = 128


def _tokens(name: str) -> list[int]:
    return TOKENS if "tokens" in name else []


def _rows(name: str = "") -> list[list[Tensor]]:
    """Of the families one document in each, since linear attention needs a library for more."""
    first = [20] if name.startswith("family") else [9, 14]
    return [random_documents(first, seed=1), random_documents([20], seed=2)]


def _targets(folder: Path, lora: LoraConfig) -> list[str]:
    hf_config = AutoConfig.from_pretrained(folder)
    return adapter_targets(build_model(hf_config, attention="sdpa", seed=None), lora)


def _open(
    folder: Path, lora: LoraConfig, last_layers: int, config: ParallelConfig
) -> PackedCausalLM:
    hf_config, tokens = AutoConfig.from_pretrained(folder), _tokens(folder.name)
    hf_config.vocab_size = GROWN if tokens else hf_config.vocab_size
    attention = attention_of(hf_config.model_type)
    model = build_model(hf_config, attention=attention, seed=None)
    dtype = DTYPES[config.param_dtype]
    freeze(model, lora, last_layers=last_layers, dtype=dtype, tokens=tokens)
    parallelise(
        model,
        config,
        build_mesh(config, world_size=dist.get_world_size(), device_type="cpu"),
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
    )
    materialise(model, torch.device("cpu"))
    load_weights(model, folder)
    init_adapters(model, seed=5)
    return model


def _trained(model: PackedCausalLM, *, wanted: bool = True) -> dict[str, Tensor]:
    return {
        name.removeprefix("hf."): full(p)
        for name, p in model.named_parameters()
        if p.requires_grad == wanted
    }


def _train(
    folder: Path, lora: LoraConfig, last_layers: int, config: ParallelConfig, steps: int = STEPS
) -> dict[str, Any]:
    """A few steps on two rows, which the ranks share; every rank returns the same."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = _open(folder, lora, last_layers, config)
    begin, frozen = _trained(model), _trained(model, wanted=False)
    inputs_need: list[bool] = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: inputs_need.append(args[0].requires_grad))
    optimizer = build_optimizer(model, ADAMW)
    rows = _rows(folder.name)
    batch = packed_batch(rows[rank::world_size], SEQ_LEN)
    (valid,) = packed_batch(rows, SEQ_LEN)["counts"][2:3].tolist()
    losses, norms = [], []
    for _ in range(steps):
        loss, _ = causal_lm_loss(model, batch)
        (loss * world_size / valid).backward()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / valid)
        norms.append(clip_gradients(model.parameters(), 0.0))
        optimizer.step()
        optimizer.zero_grad()
    after = _trained(model, wanted=False)
    return {
        "begin": begin,
        "end": _trained(model),
        "losses": losses,
        "norms": norms,
        "frozen": all(torch.equal(after[name], frozen[name]) for name in frozen),
        "inputs_need": inputs_need[:2],
        "model": model,
    }


def _run_cases(root: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    results = {}
    for name in names:
        _, lora, last_layers, _ = CASES[name]
        result = _train(root / name, lora, last_layers, ParallelConfig(param_dtype="float32"))
        model = result.pop("model")
        model.eval()
        with torch.no_grad():
            result["logits"] = model(packed_batch(_rows(name), SEQ_LEN))
        model.reshard()
        is_writer = dist.get_rank() == 0
        tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer") if is_writer else None
        where = root / f"{name}-{dist.get_world_size()}"
        export_model(
            model,
            tokenizer,  # type: ignore[arg-type]  # only the writer needs it
            where / "export",
            dtype=torch.float32,
            is_writer=is_writer,
            lora=lora,
        )
        if lora.rank:
            config = peft_config(
                lora,
                _targets(root / name, lora),
                layers=2,
                last=last_layers,
                tokens=_token_layers(name),
                base=str(root / name),
            )
            export_adapter(
                model,
                tokenizer,  # type: ignore[arg-type]
                where / "adapter",
                config=config,
                is_writer=is_writer,
            )
        results[name] = result
    return results


def _token_layers(name: str) -> dict[str, list[int]]:
    layers = ["embed_tokens", "lm_head"] if "untied" in name else ["embed_tokens"]
    return dict.fromkeys(layers, _tokens(name)) if _tokens(name) else {}


def _grown(model: Any, name: str) -> Any:
    """With new rows of the mean, where there are tokens to train."""
    if _tokens(name):
        means = [layer.weight.mean(0) for layer in _layers(model)]
        known = model.config.vocab_size
        model.resize_token_embeddings(GROWN, mean_resizing=False)
        with torch.no_grad():
            for layer, mean in zip(_layers(model), means, strict=True):
                layer.weight[known:] = mean
    return model


def _layers(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _reference(folder: Path, lora: LoraConfig, last_layers: int, begin: dict[str, Tensor]) -> Any:
    """The same steps by transformers, peft and one plain AdamW; returns losses, gradient norms and what was trained."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora.rank:
        config = peft_config(
            lora,
            _targets(folder, lora),
            layers=2,
            last=last_layers,
            tokens=_token_layers(folder.name),
        )
        model = peft.get_peft_model(_grown(model, folder.name), config)
    trained = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        name = name.replace("token_adapter.trainable_tokens_delta.default", "token_rows")
        if name in begin:
            trained[name] = parameter
    assert trained.keys() == begin.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            if "magnitude" in name or "rows" in name:  # peft has made them from the base itself
                torch.testing.assert_close(parameter, begin[name])
            parameter.copy_(begin[name])
    optimizer = torch.optim.AdamW(
        trained.values(), lr=ADAMW.learning_rate, betas=ADAMW.betas, weight_decay=0.0
    )
    losses, norms = [], []
    for _ in range(STEPS):
        total, valid = torch.zeros(()), 0
        for document in (document for row in _rows(folder.name) for document in row):
            logits = model(input_ids=document[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
            valid += len(document) - 1
        (total / valid).backward()
        losses.append(float(total.detach()) / valid)
        grads = [p.grad for p in trained.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        optimizer.step()
        model.zero_grad()
    return losses, norms, trained


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (QUICK, [2]),
        pytest.param([name for name in CASES if name not in QUICK], [1, 2], marks=pytest.mark.slow),
    ],
)
def test_ranks_train_what_peft_trains_alone(
    tmp_path: Path, names: list[str], sizes: list[int]
) -> None:
    """Losses, gradient norms and trained weights; logits of both exports, in transformers and in peft."""
    build_tokenizer(tmp_path / "tokenizer")
    for name in names:
        kind, _, _, changes = CASES[name]
        save_checkpoint(tmp_path / name, kind, **changes)
    runs = [run_ranks(_run_cases, size, tmp_path, names)[0] for size in sizes]
    for name in names:
        _, lora, last_layers, _ = CASES[name]
        results = [run[name] for run in runs]
        begin = results[0]["begin"]
        losses, norms, trained = _reference(tmp_path / name, lora, last_layers, begin)
        assert losses[-1] < losses[0] - 0.01
        for result in results:
            assert all(torch.equal(result["begin"][key], begin[key]) for key in begin)
            torch.testing.assert_close(result["losses"], losses, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result["norms"], norms, rtol=1e-4, atol=1e-6)
            for key, parameter in trained.items():
                torch.testing.assert_close(
                    result["end"][key], full(parameter), rtol=1e-3, atol=2e-4
                )
            assert result["frozen"], name
            # Where nothing is trained in front, no gradient goes.
            assert result["inputs_need"] == [bool(_tokens(name)), last_layers == 0], name
        where = tmp_path / f"{name}-2"
        plain = AutoModelForCausalLM.from_pretrained(where / "export").eval()
        loaded = [plain]
        if lora.rank:
            base = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            base = _grown(base, name)
            loaded.append(PeftModel.from_pretrained(base, str(where / "adapter")).eval())
        start = 0
        for document in _rows(name)[0]:
            end = start + len(document)
            for other in loaded:
                with torch.no_grad():
                    logits = other(input_ids=document[None]).logits[0]
                torch.testing.assert_close(
                    results[-1]["logits"][0, start:end], logits, rtol=1e-5, atol=2e-5
                )
            start = end


def _bfloat16(folder: Path) -> dict[str, Any]:
    """Frozen weights in bf16 and adapters in fp32 within one group."""
    result = _train(folder, LORA, 0, ParallelConfig(param_dtype="bfloat16"))
    model = result.pop("model")
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    optimizer = build_optimizer(model, ADAMW)
    causal_lm_loss(model, packed_batch(_rows(), SEQ_LEN))[0].backward()
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    optimizer.step()
    states = {t.dtype for state in optimizer.state.values() for t in state.values()}
    return {**result, "dtypes": dtypes, "grads": grads, "states": states}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_bf16_base_trains_fp32_adapters(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base")
    exact = run_ranks(_fp32_losses, 1, tmp_path / "base")[0]
    for result in run_ranks(_bfloat16, 2, tmp_path / "base"):
        assert result["dtypes"] == {(False, torch.bfloat16), (True, torch.float32)}
        assert result["grads"] == result["states"] == {torch.float32}
        assert result["frozen"]
        torch.testing.assert_close(result["losses"], exact, rtol=1e-2, atol=1e-2)
        assert result["losses"] != exact


def _fp32_losses(folder: Path) -> list[float]:
    return _train(folder, LORA, 0, ParallelConfig(param_dtype="float32"))["losses"]
