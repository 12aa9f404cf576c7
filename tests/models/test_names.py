"""Every family's tensors under their names on the hub: loaded, missed and exported as transformers does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5VisionConfig,
)

from data.embedded import build_tokenizer
from models.build import CONFIG_CLASSES, build_model, decoder_layer_classes, materialise
from models.causal_lm import PackedCausalLM
from models.errors import ModelError
from models.export import export_model, staged, write_model_files
from models.layers import sparse_layers
from models.names import stored_parts
from models.weights import LoadReport, export_tensors, init_weights, load_weights
from scripts import export
from tests.support.models import full, save_checkpoint, tiny_config
from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, ParallelConfig
from trainer.parallel import build_mesh, parallelise

CPU = torch.device("cpu")
FP32 = ParallelConfig(param_dtype="float32")
FAMILIES = [kind for kind in CONFIG_CLASSES if kind not in ("qwen2", "qwen3")]  # test_sharded.py
EXPERTS = [kind for kind in CONFIG_CLASSES if sparse_layers(tiny_config(kind))]
TOKENS = torch.arange(2, 14)[None]


def _empty(kind: str, **changes: Any) -> PackedCausalLM:
    return build_model(tiny_config(kind, **changes), attention="sdpa", seed=None)


def _random(kind: str) -> PackedCausalLM:
    return build_model(tiny_config(kind, vocab_size=512), attention="sdpa", seed=5)


def _load(model: PackedCausalLM, folder: Path) -> LoadReport:
    materialise(model, CPU)
    return load_weights(model, folder)


def _stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = _stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _assert_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def _load_and_write(folders: dict[str, Path], tokenizer_folder: Path, out: Path) -> Any:
    """Load each family sharded; give back all parameters, an export of each and a checkpoint of the last.

    In between random weights are drawn, which are those of one process.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    is_writer = dist.get_rank() == 0
    found = {}
    for kind, folder in folders.items():
        model = _empty(kind, vocab_size=512)
        parallelise(
            model,
            FP32,
            build_mesh(FP32, world_size=dist.get_world_size(), device_type="cpu"),
            layer_classes=decoder_layer_classes(model),
            root_parameters=[model.head.weight],
        )
        _load(model, folder)
        found[kind] = {name: full(tensor) for name, tensor in model.hf.named_parameters()}
        export_model(
            model, tokenizer, out / kind, dtype=torch.float32, is_writer=is_writer, source=folder
        )
        init_weights(model, 5)
        drawn = {name: full(tensor) for name, tensor in model.hf.named_parameters()}
        _assert_equal(drawn, dict(_random(kind).hf.named_parameters()))
        load_weights(model, folder)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(
        out / "run" / "checkpoints", model, optimizer, CheckpointConfig(), save_frozen=True
    )
    checkpointer.save(1, {})
    checkpointer.wait()
    if is_writer:
        with staged(out / "run" / "model") as staging:
            write_model_files(staging, model, tokenizer, dtype=torch.float32, source=None)
    return found if is_writer else None


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size, kinds", [(2, EXPERTS[-1:]), pytest.param(3, FAMILIES, marks=pytest.mark.slow)]
)
def test_every_family_goes_through_shards_unchanged(
    tmp_path: Path, world_size: int, kinds: list[str]
) -> None:
    """From transformers' files into shards (5 experts, so uneven ones), and back into the same files."""
    build_tokenizer(tmp_path / "tokenizer")
    references = {
        kind: save_checkpoint(tmp_path / kind, kind, vocab_size=512, shard_size="50KB")
        for kind in kinds
    }
    folders = {kind: tmp_path / kind for kind in kinds}
    arguments = folders, tmp_path / "tokenizer", tmp_path / "out"
    found, *_ = run_ranks(_load_and_write, world_size, *arguments)
    for kind, reference in references.items():
        _assert_equal(found[kind], dict(reference.named_parameters()))
        _assert_equal(_stored(tmp_path / "out" / kind), _stored(tmp_path / kind))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / kind)
        with torch.no_grad():
            logits = loaded(input_ids=TOKENS).logits
            assert torch.equal(logits, reference(input_ids=TOKENS).logits)
    # The checkpoint of the last family, with its experts in parts of several ranks.
    exported = tmp_path / "exported"
    assert export.main([str(tmp_path / "out" / "run"), str(exported), "--dtype=float32"]) == 0
    _assert_equal(_stored(exported), _stored(tmp_path / kind))


def _placed(folders: dict[str, Path]) -> Any:
    """Load with parameters sharded over two dimensions of a mesh, by hand and as tensor parallelism does it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    choices: list[list[Placement]] = [
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(2), Shard(1)],
    ]
    found = {}
    for kind, folder in folders.items():
        model = _empty(kind, vocab_size=101)
        for module in [m for m in model.modules() if "experts" in type(m).__name__.lower()]:
            for number, (name, parameter) in enumerate(module.named_parameters(recurse=False)):
                placements = choices[(number + len(found)) % 4]
                placed = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
                module.register_parameter(name, nn.Parameter(placed))
        for layer in [m for m in model.modules() if isinstance(m, decoder_layer_classes(model))]:
            plan = {"self_attn.q_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
            if not any(p.ndim == 3 for p in layer.parameters()):
                fully_shard(layer, mesh=mesh["dp"])
        _load(model, folder)
        found[kind] = {
            name: (full(p), p.placements if isinstance(p, DTensor) else None)
            for name, p in model.hf.named_parameters()
        }
    return found


@pytest.mark.distributed
def test_parameters_sharded_over_two_dimensions(tmp_path: Path) -> None:
    kinds = ["qwen2", "qwen2_moe", "qwen3_moe", "qwen3"]
    folders = {kind: tmp_path / kind for kind in kinds}
    references = {kind: save_checkpoint(tmp_path / kind, kind) for kind in kinds}
    for found in run_ranks(_placed, 4, folders):
        kept = set()
        for kind, reference in references.items():
            for name, expected in reference.named_parameters():
                tensor, placements = found[kind][name]
                kept.add(str(placements))
                assert torch.equal(tensor[: expected.shape[0]], expected), (name, placements)
        assert len(kept) >= 7, kept


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_fused_experts_on_disk_are_taken_as_they_are(tmp_path: Path, kind: str) -> None:
    reference = save_checkpoint(tmp_path, kind)
    prefix = "model.language_model." if kind == "qwen3_5_moe_text" else "model."
    tensors = {
        name.replace("model.", prefix, 1): tensor.detach()
        for name, tensor in reference.named_parameters()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = _empty(kind)
    report = _load(model, tmp_path)
    _assert_equal(dict(model.hf.named_parameters()), dict(reference.named_parameters()))
    assert report.converted == {} and sorted(report.loaded) == sorted(tensors)


def test_the_language_part_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    text = tiny_config("qwen3_5_text", tied=False)
    vision = Qwen3_5VisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32
    )
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    _rewrite(tmp_path, lambda t: t.update({"mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}))
    names = _stored(tmp_path).keys()
    model = _empty("qwen3_5_text", tied=False)
    report = _load(model, tmp_path)
    reference = Qwen3_5ForCausalLM.from_pretrained(tmp_path, config=text)
    _assert_equal(dict(model.hf.named_parameters()), dict(reference.named_parameters()))
    assert sorted(report.loaded + report.unused) == sorted(names)
    assert {name.split(".")[0] for name in report.loaded} == {"model", "lm_head"}
    assert {".".join(name.split(".")[:2]) for name in report.unused} == {
        "model.visual",
        "mtp.layers",
    }

    def break_it(tensors: dict[str, Tensor]) -> None:
        del tensors["model.language_model.norm.weight"]
        tensors["model.vision.extra"] = torch.ones(2)

    _rewrite(tmp_path, break_it)
    message = (
        "missing model.language_model.norm.weight; unexpected model.vision.extra"  # as in the files
    )
    with pytest.raises(ModelError, match=message):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_missing_expert_is_named(tmp_path: Path, kind: str) -> None:
    save_checkpoint(tmp_path, kind)
    experts = "model.layers.1.mlp.experts"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{experts}.3.up_proj.weight"]
        tensors[f"{experts}.5.up_proj.weight"] = torch.zeros(12, 32)
        tensors[f"{experts}.0.down_proj.weight"] = torch.zeros(12, 32)
        tensors[f"{experts}.1.down_proj.weight"] = torch.zeros(32, 12, dtype=torch.int8)

    _rewrite(tmp_path, change)
    with pytest.raises(ModelError) as error:
        _load(_empty(kind), tmp_path)
    assert str(error.value).endswith(
        f"missing {experts}.3.up_proj.weight; unexpected {experts}.5.up_proj.weight; "
        f"tensors of another shape: {experts}.0.down_proj.weight is [12, 32], the model has [32, 12]; "
        f"quantised, which cannot be trained: {experts}.1.down_proj.weight is I8"
    )


def test_the_report_counts_experts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3_moe", dtype=torch.bfloat16)
    report = _load(_empty("qwen3_moe"), tmp_path)
    experts = "model.layers.0.mlp.experts"
    assert report.converted[f"{experts}.gate_up_proj"] == 10
    assert report.converted[f"{experts}.down_proj"] == 5
    stored = _stored(tmp_path)
    assert len(report.loaded) + sum(report.converted.values()) == len(stored)
    assert str(report).startswith(
        f"{len(stored)} tensors loaded (bfloat16); 30 of them fused into 4; lm_head.weight tied"
    )
    assert json.loads(json.dumps(report.summary()))["converted"] == report.converted


def test_what_a_caller_initialises_is_not_missed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen3")
    model = _empty("qwen3")
    materialise(model, CPU)
    model.hf.register_parameter("adapter", nn.Parameter(torch.ones(2)))
    with pytest.raises(ModelError, match="missing adapter"):
        load_weights(model, tmp_path)
    report = load_weights(model, tmp_path, initialised=["adapter"])
    assert report.initialised == ["adapter"] and "1 initialised on purpose" in str(report)
    assert torch.equal(model.hf.get_parameter("adapter"), torch.ones(2))


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_parts_cover_every_parameter_once(kind: str) -> None:
    model = _empty(kind, tied=False)
    tensors = export_tensors(model)
    covered = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    for part in stored_parts(model.hf, tensors).values():
        part.of(covered[part.parameter]).add_(1)
    assert all(bool((cover == 1).all()) for cover in covered.values())
