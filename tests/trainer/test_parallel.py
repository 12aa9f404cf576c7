"""Which modules become groups, and that sharding changes no number."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    lambda_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.build import decoder_layer_classes
from models.causal_lm import PackedCausalLM
from tests.support.models import full, packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.errors import TrainError
from trainer.loss import causal_lm_loss
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.parallel import (
    PlanRow,
    build_mesh,
    checkpoint_activations,
    data_rank,
    describe_plan,
    mesh_sizes,
    parallelise,
    select_groups,
    set_gradient_sync,
    set_prefetch,
    wrap_policy,
)


def _names(model: PackedCausalLM, policy: Any) -> list[str]:
    """Names of the groups below the root, as `select_groups` orders them."""
    name_of = {module: name for name, module in model.named_modules()}
    return [
        name_of[group]
        for group in select_groups(model, policy, root_parameters=[model.head.weight])
    ]


def _policy(model: PackedCausalLM, **config: Any) -> Any:
    return wrap_policy(
        ParallelConfig(**config), model=model, layer_classes=decoder_layer_classes(model)
    )


LAYERS = ["hf.model.layers.0", "hf.model.layers.1"]


def by_name_policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """A user's own: every MLP."""
    return recurse or type(module).__name__.endswith("MLP")


def test_transformer_policy_takes_the_layers_and_an_untied_embedding() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    assert _names(tied, _policy(tied)) == LAYERS
    assert _names(untied, _policy(untied)) == ["hf.model.embed_tokens", *LAYERS]


def test_size_policy_counts_what_children_have_not_taken() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    mlp = sum(p.numel() for p in tied.hf.base_model.layers[0].mlp.parameters())
    # Attention is smaller than the MLP, and so is a layer without it.
    names = _names(tied, _policy(tied, wrap_policy="size", min_wrap_params=mlp))
    assert names == [f"{layer}.mlp" for layer in LAYERS]
    # Children come before parents; the backbone is left to the root, which holds the tied embedding.
    names = _names(tied, _policy(tied, wrap_policy="size", min_wrap_params=1500))
    for layer in LAYERS:
        children = [i for i, name in enumerate(names) if name.startswith(f"{layer}.")]
        assert children and (layer not in names or max(children) < names.index(layer))
    assert "hf.model" not in names and "hf.model.embed_tokens" not in names
    names = _names(untied, _policy(untied, wrap_policy="size", min_wrap_params=97 * 32))
    assert "hf.model.embed_tokens" in names and "hf.lm_head" not in names
    assert _names(tied, _policy(tied, wrap_policy="size", min_wrap_params=10**9)) == []


def test_policies_of_torch_are_taken_as_they_are() -> None:
    model = tiny_model()
    (layer,) = decoder_layer_classes(model)
    mlp = type(model.hf.base_model.layers[0].mlp)
    for policy in (
        ModuleWrapPolicy({layer}),
        CustomPolicy(lambda module: isinstance(module, layer)),
        partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, layer)),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={layer}),
    ):
        assert _names(model, policy) == LAYERS, policy
    both = [f"hf.model.layers.{i}{part}" for i in (0, 1) for part in (".mlp", "")]
    assert _names(model, ModuleWrapPolicy({layer, mlp})) == both
    name = f"callable:{__name__}.by_name_policy"
    assert _names(model, _policy(model, wrap_policy=name)) == both[::2]


def test_classes_of_the_model_are_chosen_by_name() -> None:
    model = tiny_model(tied=False)
    both = [f"hf.model.layers.{i}{part}" for i in (0, 1) for part in (".mlp", "")]
    chosen = _policy(model, wrap_policy="module:Qwen3MLP, Qwen3DecoderLayer")
    assert _names(model, chosen) == both
    chosen = _policy(model, wrap_policy="module:Embedding")
    assert _names(model, chosen) == ["hf.model.embed_tokens"]
    assert _names(tiny_model(tied=True), chosen) == []  # tied: it stays with the head
    line = (
        "no module of class Qwen2MLP, Qwen3RotaryEmbedding; it has Embedding, Linear, "
        "Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP, Qwen3Model, Qwen3RMSNorm"
    )
    with pytest.raises(TrainError, match=line):
        _policy(model, wrap_policy="module:Qwen2MLP,Qwen3MLP,Qwen3RotaryEmbedding")


def test_no_policy_can_take_the_tied_embedding_from_the_root() -> None:
    model = tiny_model(tied=True)
    everything = _names(model, lambda module, recurse, nonwrapped_numel: True)
    held = {"hf", "hf.model", "hf.model.embed_tokens", "hf.lm_head", ""}
    assert not held & set(everything)
    assert "hf.model.layers.1.mlp.up_proj" in everything
    assert "hf.model.rotary_emb" not in everything  # nothing in it to shard


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("layers", "'layers' is unknown; use transformer, size, module:ClassA,ClassB or"),
        ("callable:nowhere.policy", "there is no module nowhere; give"),
        ("callable:trainer.parallel.nothing", "trainer.parallel has no nothing"),
        ("callable:policy", "give package.module.function"),
    ],
)
def test_a_policy_that_is_not_there_is_an_error(name: str, line: str) -> None:
    with pytest.raises(TrainError, match=line) as error:
        wrap_policy(ParallelConfig(wrap_policy=name), model=nn.Linear(1, 1), layer_classes=[])
    assert "parallel.wrap_policy" in str(error.value)


@pytest.mark.parametrize(
    ("replicate", "shard"), [(1, 3), (3, -1), (2, 1), (0, -1), (8, -1), (1, 0), (-1, -1), (1, -2)]
)
def test_a_mesh_that_is_not_the_world_is_an_error(replicate: int, shard: int) -> None:
    config = ParallelConfig(dp_replicate=replicate, dp_shard=shard)
    with pytest.raises(
        TrainError, match=rf"dp_replicate {replicate} x .*dp_shard {shard} .* 4 ranks"
    ):
        build_mesh(config, world_size=4, device_type="cpu")


def test_ranks_that_compute_together_have_the_same_data() -> None:
    config = ParallelConfig(dp_replicate=2, cp=2, tp=2)
    assert mesh_sizes(config, world_size=16) == {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2}
    places = [data_rank(config, rank=rank, world_size=16) for rank in range(16)]
    assert [place.rank for place in places] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert {place.size for place in places} == {4}
    with pytest.raises(TrainError, match=r"dp_shard -1 x parallel.cp 3 x parallel.tp 1 .* 4 ranks"):
        mesh_sizes(ParallelConfig(cp=3), world_size=4)
    with pytest.raises(TrainError, match=r"2 ranks of .*dp_shard; use true or false"):
        mesh_sizes(ParallelConfig(tp=2, reshard_after_forward=4), world_size=4)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(3, "2, 4, true or false"), (1, "2, 4, true or false"), (16, "2, 4, true")],
)
def test_a_share_that_does_not_divide_the_ranks_is_an_error(number: int, remedy: str) -> None:
    config = ParallelConfig(reshard_after_forward=number)
    with pytest.raises(TrainError, match=rf"{number} does not divide the 8 ranks .*use {remedy}"):
        build_mesh(config, world_size=8, device_type="cpu")


def _rows() -> list[list[Tensor]]:
    """Eight packed rows with very different numbers of labels: from none to all."""
    lengths = [[24], [1], [2, 1], [12, 12], [1, 1, 1], [5], [3, 20], [2]]
    return [random_documents(row, seed=seed) for seed, row in enumerate(lengths)]


def _gradients(grad_accum_steps: int, config: ParallelConfig, tied: bool) -> dict[str, Any]:
    """Loss per token, gradient norm and whole gradients of one step over all of `_rows`."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model = tiny_model(tied=tied)
    groups = parallelise(
        model,
        config,
        build_mesh(config, world_size=world_size, device_type="cpu"),
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
    )
    assert groups[-1] is model and all(isinstance(group, FSDPModule) for group in groups)
    rows = _rows()
    per_micro_batch = len(rows) // world_size // grad_accum_steps
    batches = [
        packed_batch(rows[start : start + per_micro_batch], 24)
        for start in range(rank * per_micro_batch, len(rows), world_size * per_micro_batch)
    ]
    assert len(batches) == grad_accum_steps
    valid = sum(len(document) - 1 for row in rows for document in row)
    total = torch.zeros(())
    for index, batch in enumerate(batches):
        last = index == grad_accum_steps - 1
        set_gradient_sync(model, last, config)
        loss_sum, _ = causal_lm_loss(model, batch)
        (loss_sum * (world_size / valid)).backward()
        # Shards that replicas have not reduced yet are FSDP's own.
        reduced = [isinstance(parameter.grad, DTensor) for parameter in model.parameters()]
        at_once = config.accumulation == "sharded" and config.dp_replicate == 1
        if world_size > 1:
            assert all(reduced) if last or at_once else not any(reduced)
        total += loss_sum.detach()
    dist.all_reduce(total)
    norm = clip_gradients(model.parameters(), 0.0)
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    return {"loss": float(total) / valid, "norm": norm, "gradients": gradients}


def _many(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [_gradients(*case) for case in cases]


FP32 = {"param_dtype": "float32"}


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_loss_and_gradients_do_not_depend_on_the_ranks(tied: bool) -> None:
    plain = tiny_model(tied=tied)
    batch = packed_batch(_rows(), 24)
    loss_sum, _ = causal_lm_loss(plain, batch)
    loss = loss_sum / len(batch["label_positions"])
    loss.backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in plain.parameters()]))

    fp32 = ParallelConfig(**FP32)
    more = ParallelConfig(
        **FP32, wrap_policy="size", min_wrap_params=500, activation_checkpointing="full"
    )
    kept = ParallelConfig(**FP32, reshard_after_forward=False)
    offloaded = ParallelConfig(**FP32, cpu_offload=True, activation_checkpointing="op")
    inside = ParallelConfig(**FP32, wrap_policy="module:Qwen3MLP", activation_checkpointing="op")
    alternating = ParallelConfig(
        **FP32, wrap_policy="module:Qwen3MLP", activation_checkpointing="selective"
    )
    share = ParallelConfig(**FP32, reshard_after_forward=2)
    shards = ParallelConfig(**FP32, accumulation="sharded")
    hybrid = ParallelConfig(**FP32, dp_replicate=2)
    hybrid_shards = ParallelConfig(**FP32, dp_replicate=2, accumulation="sharded")
    replicated = ParallelConfig(**FP32, dp_replicate=2, dp_shard=1)
    # To FSDP the ranks of cp are more ranks of dp_shard; what they compute is not its business.
    context = ParallelConfig(**FP32, cp=2)
    hybrid_context = ParallelConfig(**FP32, dp_replicate=2, cp=2)
    cases = {
        1: [(1, fp32, tied), (4, fp32, tied)],
        2: [
            (1, fp32, tied),
            (4, fp32, tied),
            (4, shards, tied),
            (2, more, tied),
            (2, kept, tied),
            (1, replicated, tied),
            (2, offloaded, tied),
            (2, inside, tied),
            (2, alternating, tied),
        ],
        4: [
            (1, fp32, tied),
            (1, hybrid, tied),
            (1, context, tied),
            (1, hybrid_context, tied),
            (2, hybrid, tied),
            (2, hybrid_shards, tied),
            (1, share, tied),
            (2, share, tied),
        ],
    }
    for world_size, wanted in cases.items():
        for results in run_ranks(_many, world_size, wanted):
            for case, result in zip(wanted, results, strict=True):
                assert result["loss"] == pytest.approx(loss.item(), rel=5e-6), case
                assert result["norm"] == pytest.approx(norm, rel=2e-5), case
                assert set(result["gradients"]) == {name for name, _ in plain.named_parameters()}
                for name, parameter in plain.named_parameters():
                    error = (result["gradients"][name] - parameter.grad).norm()
                    assert error < 5e-6 * norm, (case, name)


@pytest.mark.distributed
def test_bf16_parameters_compute_close_to_fp32_and_keep_fp32_masters() -> None:
    bf16 = (2, ParallelConfig(param_dtype="bfloat16"), True)
    fp32 = (2, ParallelConfig(**FP32), True)
    close, exact = run_ranks(_many, 2, [bf16, fp32])[0]
    assert close["loss"] == pytest.approx(exact["loss"], rel=1e-2)
    assert close["loss"] != exact["loss"]
    assert {g.dtype for g in close["gradients"].values()} == {torch.float32}
    assert close["norm"] == pytest.approx(exact["norm"], rel=3e-2)


class _Count(TorchDispatchMode):
    """Counts operations by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _recomputation(kind: str, attention: str, **config: Any) -> dict[str, Any]:
    """One step of a model of four layers: loss, gradients, operations in backward, bytes autograd keeps."""
    model = tiny_model(kind, attention=attention, num_hidden_layers=4)
    layers = [m for m in model.modules() if isinstance(m, decoder_layer_classes(model))]
    checkpoint_activations(layers, ParallelConfig(**config))
    batch = packed_batch(_rows()[:4], 24)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = causal_lm_loss(model, batch)
    with _Count() as backward:
        loss.backward()
    calls = backward.calls
    return {
        "loss": loss.item(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "products": calls["mm"] + calls["addmm"] + calls["bmm"],
        "attention": calls["_scaled_dot_product_flash_attention_for_cpu"]
        + calls["tiled_attention"],
        "powers": calls["pow"],
        "kept": sum(kept.values()),
    }


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_each_mode_recomputes_what_it_says_and_changes_no_gradient(
    kind: str, attention: str
) -> None:
    none = _recomputation(kind, attention)
    full = _recomputation(kind, attention, activation_checkpointing="full")
    half = _recomputation(kind, attention, activation_checkpointing="selective")
    third = _recomputation(
        kind, attention, activation_checkpointing="selective", checkpoint_every=3
    )
    op = _recomputation(kind, attention, activation_checkpointing="op")
    for found in (full, half, third, op):
        assert found["loss"] == none["loss"]
        for name, gradient in none["gradients"].items():
            assert torch.equal(found["gradients"][name], gradient), name
    attend = full["attention"] - none["attention"]
    products = full["products"] - none["products"]
    norms = full["powers"] - none["powers"]
    # Layers 0 and 2 of four; layers 0 and 3.
    for found in (half, third):
        assert found["attention"] - none["attention"] == attend / 2
        assert found["products"] - none["products"] == products / 2
        assert found["powers"] - none["powers"] == norms / 2
    assert attend >= 4 and products >= 4 * 6 and norms >= 4 * 2
    # What is cheap is computed again, what is costly is not.
    assert op["attention"] == none["attention"]
    assert op["products"] == none["products"]
    assert op["powers"] - none["powers"] == norms
    assert full["kept"] < third["kept"] == half["kept"] < none["kept"]


def _plan(config: ParallelConfig, tied: bool) -> tuple[list[PlanRow], int, int]:
    """The plan of a tiny model, and this rank's bytes of parameters; the layers a layer gathers ahead."""
    model = tiny_model(tied=tied, num_hidden_layers=4)
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    parallelise(
        model,
        config,
        mesh,
        layer_classes=decoder_layer_classes(model),
        root_parameters=[model.head.weight],
    )
    return (
        describe_plan(model, config),
        sum(p.to_local().nbytes for p in model.parameters()),
        sum(p.numel() for p in model.parameters()),
    )


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_every_parameter_once(tied: bool) -> None:
    ranks = run_ranks(_plan, 2, ParallelConfig(param_dtype="bfloat16"), tied)
    plan, held, parameters = ranks[0]  # the first rank holds the most of an odd number of rows
    layers = [f"hf.model.layers.{i}" for i in range(4)]
    assert [row.group for row in plan] == ["(root)", *["hf.model.embed_tokens"][tied:], *layers]
    assert sum(row.parameters for row in plan) == parameters
    assert sum(row.master_bytes for row in plan) == held > ranks[1][1]
    assert all(row.gathered_bytes == 2 * row.parameters for row in plan)
    assert len({row.parameters for row in plan[-4:]}) == 1


def _ahead(depth: int) -> dict[str, Any]:
    """Gradients with layers gathered `depth` ahead, and which layers the second one gathers."""
    model = tiny_model(num_hidden_layers=4)
    config = ParallelConfig(**FP32)
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    classes = decoder_layer_classes(model)
    parallelise(model, config, mesh, layer_classes=classes, root_parameters=[model.head.weight])
    layers = [m for m in model.modules() if isinstance(m, classes)]
    set_prefetch(layers, depth)
    causal_lm_loss(model, packed_batch(_rows()[:4], 24))[0].backward()
    states = [layer._get_fsdp_state() for layer in layers]
    number = {id(state): index for index, state in enumerate(states)}
    return {
        "forward": [number[id(s)] for s in states[1]._states_to_forward_prefetch],
        "backward": [number[id(s)] for s in states[2]._states_to_backward_prefetch],
        "gradients": {name: full(p.grad) for name, p in model.named_parameters()},
    }


def _all_depths() -> list[dict[str, Any]]:
    return [_ahead(depth) for depth in (0, 1, 2, 9)]


@pytest.mark.distributed
def test_layers_are_gathered_as_many_ahead_as_asked() -> None:
    none, one, two, many = run_ranks(_all_depths, 2)[0]
    assert (none["forward"], none["backward"]) == ([], [])
    assert (one["forward"], one["backward"]) == ([2], [1])
    assert (two["forward"], two["backward"]) == ([2, 3], [1, 0])
    assert (many["forward"], many["backward"]) == ([2, 3], [1, 0])
    for found in (one, two, many):
        for name, gradient in none["gradients"].items():
            assert torch.equal(found["gradients"][name], gradient), name


def _train_around_an_evaluation(config: ParallelConfig) -> dict[str, Any]:
    """Two steps of AdamW with clipping and an evaluation between them: where a state could be stale."""
    model = tiny_model()
    mesh = build_mesh(config, world_size=dist.get_world_size(), device_type="cpu")
    classes = decoder_layer_classes(model)
    parallelise(model, config, mesh, layer_classes=classes, root_parameters=[model.head.weight])
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    batch = packed_batch([_rows()[dist.get_rank()]], 24)
    losses, norms, states = [], [], []
    for _ in range(2):
        loss, _ = causal_lm_loss(model, batch)
        loss.backward()
        norms.append(clip_gradients(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses += [loss.item(), causal_lm_loss(model, batch)[0].item()]
        model.reshard()
        states.append({name: full(tensor) for name, tensor in model.state_dict().items()})
    return {"losses": losses, "norms": norms, "states": states}


def _trained_around_evaluations(configs: list[ParallelConfig]) -> list[dict[str, Any]]:
    return [_train_around_an_evaluation(config) for config in configs]


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluation_between_steps_changes_nothing_however_parameters_are_kept() -> None:
    configs = [
        ParallelConfig(**FP32),
        ParallelConfig(**FP32, reshard_after_forward=False),
        ParallelConfig(**FP32, reshard_after_forward=2),
        ParallelConfig(**FP32, cpu_offload=True),
        ParallelConfig(**FP32, cpu_offload=True, reshard_after_forward=2),
    ]
    expected, *others = run_ranks(_trained_around_evaluations, 4, configs)[0]
    assert expected["norms"][0] > 1.0  # it is clipped
    for config, found in zip(configs[1:], others, strict=True):
        assert found["losses"] == expected["losses"], config
        assert found["norms"] == expected["norms"], config
        for before, after in zip(expected["states"], found["states"], strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before), config
