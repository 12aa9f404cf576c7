"""The table of families in docs/models.md, cell by cell: each family is loaded, trained, resumed and exported.

Two launches, of one rank and of two, take every family through its whole life; the tests look at what came out.
Several rows of one step go to a micro-batch each on one rank, and share one on two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.embedded import build_tokenizer
from models.build import (
    CONFIG_CLASSES,
    build_model,
    check_packing,
    decoder_layer_classes,
    materialise,
)
from models.causal_lm import PackedCausalLM
from models.config import LoraConfig
from models.context_parallel import check_context_parallel
from models.errors import ModelError
from models.export import export_model
from models.layers import indexed_layers, linear_attention_layers, sparse_layers
from models.partial import freeze
from models.tensor_parallel import tensor_parallel_plan
from models.weights import load_weights
from scripts.config import TrainConfig
from scripts.modelling import training_loss
from tests.models.test_partial import CASES as LORA_CASES
from tests.support.command import ROOT
from tests.support.guards import plain_guards
from tests.support.models import (
    attention_of,
    packed_batch,
    random_documents,
    save_checkpoint,
    tiny_config,
)
from tests.support.ranks import run_ranks
from trainer.checkpoint import Checkpointer
from trainer.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from trainer.loop import Progress, Speedometer, train
from trainer.optimizer import build_optimizer
from trainer.parallel import build_mesh, parallelise
from trainer.preemption import StopRequest

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
FAMILIES = list(CONFIG_CLASSES)
ATTENDING = [kind for kind in FAMILIES if not linear_attention_layers(tiny_config(kind))]
ROUTED = [kind for kind in FAMILIES if sparse_layers(tiny_config(kind))]
TABLE = {
    "loads": FAMILIES,
    "trains packed": ATTENDING,
    "trains unpacked": FAMILIES,
    "LoRA": FAMILIES,
    "tensor parallel": ["qwen2", "qwen3"],
    "context parallel": ["qwen2", "qwen3"],
    "resumes": FAMILIES,
    "exports": FAMILIES,
}
"""What each column of the table claims; the test of a column is parametrised by its list."""
QUICK = [
    "qwen3_moe",
    "qwen3_5_moe_text",
    "qwen4_exp_text",
]  # the others take as long again as all other tests of models

SEQ_LEN, ROWS, STEPS, SAVED = 24, 4, 4, 2
PACKED = [[9, 14], [24], [3, 3, 3], [20, 4]]  # lengths of the documents in each row of a step
UNPACKED = [[14], [24], [3], [20]]


def _each(column: str) -> list[Any]:
    return [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in TABLE[column]
    ]


def _changes(kind: str) -> dict[str, Any]:
    """Experts as wide as the grouped matrix product needs them, and a balancing loss that weighs."""
    routed = {"moe_intermediate_size": 16, "router_aux_loss_coef": 0.5}
    return {"vocab_size": 512} | (routed if kind in ROUTED else {})


def _is_packed(kind: str, step: int) -> bool:
    return kind in ATTENDING and step % 2 == 1


def _batches(kind: str, first: int) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches from step `first` on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = 1 if world_size == 1 else ROWS // world_size
    for step in range(first, STEPS + 1):
        lengths = PACKED if _is_packed(kind, step) else UNPACKED
        rows = [random_documents(row, seed=10 * step + i) for i, row in enumerate(lengths)]
        for begin in range(rank * size, ROWS, size * world_size):
            yield packed_batch(rows[begin : begin + size], SEQ_LEN)


def _logits(model: PackedCausalLM) -> Tensor:
    with torch.no_grad():
        logits = model(packed_batch([random_documents([SEQ_LEN])], SEQ_LEN))
    model.reshard()  # type: ignore[operator]
    return logits


class _Run:
    """A family in training, from its checkpoint folder."""

    def __init__(self, kind: str, folder: Path, out: Path) -> None:
        self.kind, self.rows = kind, []
        parallel = ParallelConfig(param_dtype="float32")
        hf_config = tiny_config(kind, **_changes(kind))
        self.model = build_model(hf_config, attention=attention_of(kind), seed=None)
        mesh = build_mesh(parallel, world_size=dist.get_world_size(), device_type="cpu")
        parallelise(
            self.model,
            parallel,
            mesh,
            layer_classes=decoder_layer_classes(self.model),
            root_parameters=[self.model.head.weight],
        )
        materialise(self.model, CPU)
        load_weights(self.model, folder)
        self.config = OptimizerConfig(learning_rate=1e-4)
        self.optimizer = build_optimizer(self.model, self.config)
        self.checkpointer = Checkpointer(
            out,
            self.model,
            self.optimizer,
            CheckpointConfig(asynchronous=False),
            save_frozen=True,
        )

    def train(self, progress: Progress) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        train(
            self.model,
            self.optimizer,
            _batches(self.kind, progress.step + 1),
            loss_fn=training_loss(TrainConfig(), self.model),
            learning_rate=lambda step: self.config.learning_rate / step,
            optimizer_config=self.config,
            progress=progress,
            steps=STEPS,
            global_batch_size=ROWS,
            grad_accum_steps=ROWS if dist.get_world_size() == 1 else 1,
            samples_per_epoch=ROWS,
            device=CPU,
            evaluate=lambda step: None,
            evaluate_every=0,
            save=self._save,
            save_every=SAVED,
            log=rows.append,
            log_every=1,
            advance=lambda *_: None,
            stop=StopRequest(),
            guards=plain_guards(self.model, self.optimizer),
            speedometer=Speedometer(lambda *counts: 0.0, None),
        )
        return rows

    def _save(self, now: Progress) -> None:
        if now.step == SAVED and dist.get_world_size() > 1:
            self.checkpointer.save(now.step, {})


def _lives(kinds: list[str], folder: Path, out: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found: dict[str, Any] = {}
    for kind in kinds:
        run = _Run(kind, folder / kind, out / kind / "checkpoints")
        found[kind] = {"loaded": _logits(run.model), "rows": run.train(Progress())}
        if dist.get_world_size() == 1:
            continue
        found[kind]["trained"] = _logits(run.model)
        is_writer = dist.get_rank() == 0
        export_model(
            run.model, tokenizer, out / kind / "export", dtype=torch.float32, is_writer=is_writer
        )
        again = _Run(kind, folder / kind, out / kind / "other")
        again.checkpointer.restore(out / kind / "checkpoints" / f"step-{SAVED:08}")
        found[kind]["resumed"] = again.train(Progress(step=SAVED))
    return found


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """transformers' model of each family, and what happened to it on one rank and on the first of two.

    Of the families that the chosen tests ask for.
    """
    kinds = {
        item.callspec.params["kind"]: None
        for item in request.session.items
        if isinstance(item, pytest.Function) and "lives" in item.fixturenames
    }
    folder = tmp_path_factory.mktemp("families")
    build_tokenizer(folder / "tokenizer")
    references = {kind: save_checkpoint(folder / kind, kind, **_changes(kind)) for kind in kinds}
    one, two = (run_ranks(_lives, n, list(kinds), folder, folder / f"of-{n}")[0] for n in (1, 2))
    return {"references": references, "one": one, "two": two, "exports": folder / "of-2"}


@pytest.mark.parametrize("kind", _each("loads"))
def test_loads(lives: dict[str, Any], kind: str) -> None:
    (document,) = random_documents([SEQ_LEN])
    with torch.no_grad():
        expected = lives["references"][kind](input_ids=document[None]).logits
    for ranks in ("one", "two"):
        torch.testing.assert_close(lives[ranks][kind]["loaded"], expected, rtol=0, atol=1e-5)


def _assert_same_training(lives: dict[str, Any], kind: str, *, packed: bool) -> None:
    one, two = lives["one"][kind]["rows"], lives["two"][kind]["rows"]
    steps = [i for i in range(STEPS) if _is_packed(kind, i + 1) == packed]
    assert steps
    for a, b in ((one[i], two[i]) for i in steps):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert ("router_aux_loss" in a) == (kind in ROUTED)
        if kind in ROUTED:
            assert b["router_aux_loss"] == pytest.approx(a["router_aux_loss"], rel=1e-5)
            # Two experts a token: 2 where the load is even.
            assert a["router_aux_loss"] > 2.001 and a["expert_load_max_ratio"] > 1.05
            for name in ("expert_load_max_ratio", "expert_load_idle_pct"):
                assert b[name] == a[name]


@pytest.mark.parametrize("kind", _each("trains packed"))
def test_trains_packed(lives: dict[str, Any], kind: str) -> None:
    check_packing(tiny_config(kind), packing="best_fit", device_type="cpu")
    _assert_same_training(lives, kind, packed=True)


@pytest.mark.parametrize("kind", _each("trains unpacked"))
def test_trains_unpacked(lives: dict[str, Any], kind: str) -> None:
    check_packing(tiny_config(kind), packing="none", device_type="cpu")
    _assert_same_training(lives, kind, packed=False)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(TABLE["trains packed"])))
def test_what_cannot_be_packed_is_refused_with_the_remedy(kind: str) -> None:
    hf_config = tiny_config(kind)
    kernels = not indexed_layers(hf_config)  # are there that keep documents apart
    cpu, gpu = ", or train on a GPU with", " and causal-conv1d" if kernels else "packing none"
    for packing in ("best_fit", "fixed"):
        with pytest.raises(ModelError, match="use --data.packing none" + (cpu if kernels else "$")):
            check_packing(hf_config, packing=packing, device_type="cpu")
    with pytest.raises(ModelError, match=f"{gpu}$"):
        check_packing(hf_config, packing="best_fit", device_type="cuda")
    # A batch of several documents a row that gets as far as the model is not trained on either.
    model = build_model(hf_config, attention=attention_of(kind), seed=0)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        model(packed_batch([random_documents([12, 12])], SEQ_LEN))


@pytest.mark.parametrize("kind", TABLE["LoRA"])
def test_takes_adapters(kind: str) -> None:
    """They are trained beside peft in test_partial.py."""
    assert f"family {kind}" in LORA_CASES
    model = build_model(tiny_config(kind), attention=attention_of(kind), seed=None)
    freeze(model, LoraConfig(rank=2), last_layers=0, dtype=torch.bfloat16)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_and_rows_are_split_or_refused(kind: str) -> None:
    """What is split is trained in test_tensor_parallel.py and test_context_parallel.py."""
    hf_config = tiny_config(kind)
    for column, split in (
        ("tensor parallel", partial(tensor_parallel_plan, hf_config, 2)),
        ("context parallel", partial(check_context_parallel, hf_config, cp=2)),
    ):
        with nullcontext() if kind in TABLE[column] else pytest.raises(ModelError, match=kind):
            split()


@pytest.mark.parametrize("kind", _each("resumes"))
def test_resumes(lives: dict[str, Any], kind: str) -> None:
    for row, again in zip(
        lives["two"][kind]["rows"][SAVED:], lives["two"][kind]["resumed"], strict=True
    ):
        for name in ("step", "loss", "grad_norm", "router_aux_loss", "expert_load_max_ratio"):
            assert again.get(name) == row.get(name)


@pytest.mark.parametrize("kind", _each("exports"))
def test_exports(lives: dict[str, Any], kind: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(lives["exports"] / kind / "export").eval()
    (document,) = random_documents([SEQ_LEN])
    with torch.no_grad():
        logits = loaded(input_ids=document[None]).logits
    trained = lives["two"][kind]["trained"]
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-5)
    assert (trained - lives["two"][kind]["loaded"]).abs().max() > 1e-4


def test_the_table_in_the_docs_claims_what_is_tested() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    head, rows = _table(text, first="model_type")
    claims = {
        column: [row[0].strip("`") for row in rows if row[number] == "yes"]
        for number, column in enumerate(head)
        if column in TABLE
    }
    assert claims == TABLE
    assert [row[0].strip("`") for row in rows] == FAMILIES


def _table(text: str, *, first: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the Markdown table whose first column is named `first`."""
    table = re.search(rf"^\| `?{first}`? \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table is not None
    lines = table[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]
