"""What must hold, as numbers: how far two ways to compute the same thing are apart, and how far they may be.

Shapes: S tokens a row, V vocabulary.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.loader import assemble
from data.mixture import Mixture
from models.layers import linear_attention_layers
from scripts.dry_run import prove_checkpoint
from scripts.job import Job
from scripts.modelling import export
from scripts.verifying.copy import STEPS
from scripts.verifying.runs import Bench, Record, sample
from scripts.wiring import Pieces
from trainer.loop import to_device

# Relative, in fp32: what adding up in another order may do, with room to spare.
LOSS, GRADIENT, LOGITS = 1e-5, 1e-4, 1e-5
# Compiled kernels and transformers' own attention compute in another order too.
OTHER_KERNELS = 10

Document = tuple[np.ndarray, np.ndarray]
"""(input_ids, supervised), both [length]."""


@dataclass(frozen=True)
class Measure:
    """How far one thing is from what it must be."""

    what: str
    difference: float
    tolerance: float

    @property
    def excess(self) -> float:
        """Above 1 is too much; also what is no number."""
        if math.isnan(self.difference):
            return math.inf
        if self.tolerance == 0:
            return math.inf if self.difference else 0.0
        return self.difference / self.tolerance


@dataclass(frozen=True)
class Result:
    """One check: the measure that is worst, or why it was not made."""

    name: str
    worst: Measure | None
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.worst is not None and self.worst.excess > 1


def make(name: str, measure: Callable[[], Sequence[Measure]]) -> Result:
    """The result of a check; one that ends with an error has failed."""
    try:
        worst = max(measure(), key=lambda found: found.excess)
    except Skipped as reason:
        return Result(name, None, str(reason))
    except Exception as error:  # whatever a user's code does
        reason = " ".join(str(error).split())
        worst = Measure(f"{type(error).__name__}: {reason}"[:300], math.inf, 0.0)
    return Result(name, worst, worst.what if worst.excess > 1 else "")


Check = tuple[str, Callable[[], Sequence[Measure]]]
"""Its name, and what makes it."""


class Skipped(Exception):
    """Raised with the reason by a check that cannot be made here."""


def compare_runs(found: Record, expected: Record, *, looser: int = 1) -> list[Measure]:
    """Losses of all steps, and the gradients of the first one."""
    measures = []
    for step, loss in expected.losses.items():
        other = found.losses.get(step, math.nan)
        apart = abs(other - loss) / max(1.0, abs(loss))
        measures.append(
            Measure(f"loss of step {step} is {other:.6f}, not {loss:.6f}", apart, LOSS * looser)
        )
    return measures + compare_gradients(found.gradients, expected.gradients, looser=looser)


def compare_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, looser: int = 1
) -> list[Measure]:
    """Distances relative to the length of each gradient, and of a small one to the longest."""
    floor = 1e-3 * max((float(gradient.norm()) for gradient in expected.values()), default=0.0)
    measures = []
    for name, gradient in expected.items():
        other = found.get(name, torch.empty(0))
        if gradient.numel() == 0:
            measures.append(Measure(f"{name} has no gradient", math.inf, 0.0))
            continue
        if other.shape != gradient.shape:
            measures.append(Measure(f"gradient of {name} is missing", math.inf, 0.0))
            continue
        apart = float((other - gradient).norm()) / max(float(gradient.norm()), floor, 1e-30)
        measures.append(Measure(f"gradient of {name}", apart, GRADIENT * looser))
    return measures


def one_rank(
    bench: Bench, expected: Callable[[Record], None], *, recompute: str
) -> Iterator[Check]:
    """All checks that one process makes; `expected` is given the run that the others are compared with.

    The run itself, the whole batch at once and nothing recomputed or compiled, must work: its errors are raised.
    """
    rows, parallel = bench.config.global_batch_size, bench.config.parallel
    job = bench.job("whole", micro_batch_size=rows)
    with bench.trained(job) as (run, whole):
        expected(whole)
        yield from _documents(job, run)
        yield "tied weights are one", lambda: _tie(run)
        yield "reload = memory", lambda: _reload(run)
        yield "export = live", lambda: _export(job, run)

    def varied(name: str, *, looser: int = 1, **changes: Any) -> list[Measure]:
        changed = bench.job(name, **{"micro_batch_size": rows, **changes})
        return compare_runs(bench.record(changed), whole, looser=looser)

    def resumed() -> list[Measure]:
        middle = job.output_dir / "checkpoints" / f"step-{STEPS // 2:08d}"
        again = bench.job("resumed", micro_batch_size=rows, resume=str(middle))
        return _compare_ends(bench.record(again), whole)

    def compiled() -> list[Measure]:
        if bench.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise Skipped("no C++ compiler here (g++, or CXX)")
        return varied("compiled", looser=OTHER_KERNELS, parallel=replace(parallel, compile=True))

    recomputed = replace(parallel, activation_checkpointing=recompute)
    yield "accumulation = big batch", lambda: varied("accumulated", micro_batch_size=1)
    yield "recomputed = kept", lambda: varied("recomputed", parallel=recomputed)
    yield "resume = uninterrupted", resumed
    yield "compiled = plain", compiled


def _compare_ends(found: Record, whole: Record) -> list[Measure]:
    """The steps behind the checkpoint in the middle, and the state at the end, bit for bit."""
    measures = [
        Measure(
            f"loss of step {step} is {found.losses.get(step, math.nan):.6f}, not {loss:.6f}",
            abs(found.losses.get(step, math.nan) - loss),
            0.0,
        )
        for step, loss in whole.losses.items()
        if step > STEPS // 2
    ]
    names = found.fingerprints | whole.fingerprints
    changed = [n for n in names if found.fingerprints.get(n) != whole.fingerprints.get(n)]
    line = f"{len(changed)} tensors differ at the end, the first is {''.join(changed[:1])}"
    return [*measures, Measure(line, float(len(changed)), 0.0)]


def _tie(run: Pieces) -> list[Measure]:
    model = run.model
    if not model.hf.config.tie_word_embeddings:
        raise Skipped("head and embedding are two weights")
    apart = model.head.weight is not model.embedding.weight
    return [Measure("head and embedding are two weights, and config.json ties them", apart, 0.0)]


def _reload(run: Pieces) -> list[Measure]:
    prove_checkpoint(run.checkpointer, run.model, run.optimizer)
    return [Measure("every bit", 0.0, 0.0)]


def _export(job: Job, run: Pieces) -> list[Measure]:
    export(job, run.model, run.tokenizer, step=STEPS)
    loaded = AutoModelForCausalLM.from_pretrained(job.output_dir / "export", dtype=torch.float32)
    loaded.to(job.device).eval()
    measures = []
    documents = (document for group in _some_groups(job, run) for document in group)
    for number, document in enumerate(documents):
        live = _logits(job, run, _batch(job, run, [[document]]))[: len(document[0])]
        ids = torch.from_numpy(document[0].astype(np.int64)).unsqueeze(0).to(job.device)
        with torch.no_grad():
            exported = loaded(input_ids=ids).logits[0]
        apart = _apart(live, exported)
        measures.append(Measure(f"logits of document {number}", apart, LOGITS * OTHER_KERNELS))
    return measures


# --------------------------------------------------------------------------------------- documents


def _documents(job: Job, run: Pieces) -> Iterator[Check]:
    """What shares a row, and what is masked."""
    groups = _some_groups(job, run)
    documents = [document for group in groups for document in group]
    ends = np.cumsum([len(ids) for ids, _ in documents])
    places = [slice(end - len(ids), end) for end, (ids, _) in zip(ends, documents, strict=True)]
    loss_fn = run.loss

    def several() -> Tensor:
        """Logits of one row that holds all documents."""
        if job.config.data.packing == "none" and linear_attention_layers(run.model.hf.config):
            raise Skipped("data.packing none: no documents share a row")
        return _logits(job, run, _batch(job, run, [documents]))

    def packed() -> list[Measure]:
        together = several()
        measures = []
        for number, (document, place) in enumerate(zip(documents, places, strict=True)):
            alone = _logits(job, run, _batch(job, run, [[document]]))[: len(document[0])]
            measures.append(
                Measure(f"logits of document {number}", _apart(together[place], alone), LOGITS)
            )
        loss, _ = _loss(job, run, loss_fn, [documents])
        each = sum(_loss(job, run, loss_fn, [group])[0] for group in groups)
        line = f"loss of the row is {loss:.6f}, of its documents {each:.6f}"
        return [*measures, Measure(line, abs(loss - each) / max(1.0, abs(each)), LOSS)]

    def apart() -> list[Measure]:
        before = several()
        ids, supervised = documents[0]
        changed = [((ids + 1) % len(run.tokenizer), supervised), *documents[1:]]
        after = _logits(job, run, _batch(job, run, [changed]))
        return [
            Measure(
                f"logits of document {n} follow document 0", _apart(after[p], before[p]), LOGITS
            )
            for n, p in enumerate(places)
            if n > 0
        ]

    def causal() -> list[Measure]:
        ids, supervised = documents[-1]
        other = np.append(ids[:-1], (ids[-1:] + 1) % len(run.tokenizer)).astype(ids.dtype)
        before, after = (
            _logits(job, run, _batch(job, run, [[document]]))[: len(ids) - 1]
            for document in ((ids, supervised), (other, supervised))
        )
        return [Measure("logits follow the last token", _apart(after, before), LOGITS)]

    def masked() -> list[Measure]:
        # A loss over whole documents has no use for labels: there only padding counts nothing.
        by_label = getattr(loss_fn, "units", "labels") == "labels"
        silent = [(ids, np.zeros_like(supervised)) for ids, supervised in documents[2:]] * by_label
        with_row, gradients = _loss(job, run, loss_fn, [documents[:2], silent], backward=True)
        without, expected = _loss(job, run, loss_fn, [documents[:2], []], backward=True)
        alone, _ = _loss(job, run, loss_fn, [silent], backward=True)
        line = f"loss with a masked row is {with_row:.6f}, without {without:.6f}"
        return [
            Measure(line, abs(with_row - without) / max(1.0, abs(without)), LOSS),
            Measure(f"loss of a masked row is {alone:.6f}, not 0", abs(alone), LOSS),
            *compare_gradients(gradients, expected),
        ]

    yield "packed = unpacked", packed
    yield "document A leaves B alone", apart
    yield "no token sees a later one", causal
    yield "masked rows count nothing", masked


def _some_groups(job: Job, run: Pieces, count: int = 4) -> list[list[Document]]:
    """`count` documents with labels that fit into one row, or else the ends of such; of pairs those of each together."""
    mixture, length = run.mixture, job.config.data.seq_len // count
    assert isinstance(mixture, Mixture)
    stores = [source.documents for source in mixture.sources]
    group = stores[0].group
    found: list[list[Document]] = []
    for whole in (True, False):
        found = []
        for store in stores:
            for first in range(0, len(store), group):
                documents = [store.example(number) for number in range(first, first + group)]
                if whole and any(len(ids) > length for ids, _ in documents):
                    continue
                cut = [_end(ids, supervised, length) for ids, supervised in documents]
                if all(supervised[1:].any() for _, supervised in cut):
                    found.append(cut)
                if len(found) * group == count:
                    return found
    raise ValueError(
        f"{len(found) * group} documents have labels, {count} are needed: give more rows"
    )


def _end(ids: np.ndarray, supervised: np.ndarray, length: int) -> Document:
    """A document, or the part of `length` tokens that ends with its last label."""
    last = int(np.flatnonzero(supervised).max(initial=0)) + 1
    part = slice(max(0, last - length), last) if len(ids) > length else slice(None)
    return np.array(ids[part]), np.array(supervised[part])


def _batch(job: Job, run: Pieces, rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
    batch = assemble(
        rows,
        np.arange(len(rows)),
        seq_len=job.config.data.seq_len,
        pad_token_id=run.tokenizer.pad_token_id,
        max_documents=sum(len(documents) + 1 for documents in rows),
    )
    return to_device(batch, job.device)


@torch.no_grad()
def _logits(job: Job, run: Pieces, batch: dict[str, Tensor]) -> Tensor:
    """[S, V] of the first row."""
    logits = run.model(batch)[0]
    run.model.reshard()  # type: ignore[operator]  # a method of FSDP modules
    return logits


def _loss(
    job: Job,
    run: Pieces,
    loss_fn: Callable[..., Any],
    rows: Sequence[Sequence[Document]],
    *,
    backward: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """The loss that is logged; with `backward` the one that is differentiated, and its gradients."""
    with torch.set_grad_enabled(backward):
        loss, metrics = loss_fn(run.model, _batch(job, run, rows))
    if not backward:
        run.model.reshard()  # type: ignore[operator]
        return float(metrics.get("loss", loss)), {}
    loss.backward()
    named = run.model.named_parameters()
    gradients = {name: sample(p.grad) for name, p in named if p.requires_grad}
    run.optimizer.zero_grad()
    return float(loss.detach()), gradients


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
