"""The loop's decisions: skipping, stopping, saving, evaluating, and the rows it logs."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.support.models import full
from tests.support.ranks import run_ranks
from trainer.config import GuardConfig, OptimizerConfig
from trainer.errors import TrainError
from trainer.guards import Guards
from trainer.loop import LossFunction, Progress, Speedometer, evaluate_loss, train
from trainer.optimizer import build_optimizer
from trainer.preemption import StopRequest

pytestmark = pytest.mark.distributed

GLOBAL_BATCH_SIZE = 12
CPU = torch.device("cpu")


def _sample(index: int) -> tuple[Tensor, int]:
    """[4] features of a sample, and how many tokens of it are valid: very uneven, often none."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, generator=generator), (index * 7) % 5


def _batches(
    first: int, accumulate: int, broken: tuple[int, ...] = ()
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches; a `broken` sample is infinite."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = GLOBAL_BATCH_SIZE // accumulate // world_size
    for number in itertools.count():
        begin = first + (number * world_size + rank) * size
        x, valid = zip(*(_sample(i) for i in range(begin, begin + size)), strict=True)
        x = torch.stack(x)
        for index in range(size):
            if begin + index in broken:
                x[index] = math.inf
        yield {
            "x": x,
            "valid": torch.tensor(valid),
            "sample_index": torch.arange(begin, begin + size),
            "counts": torch.tensor([5 * size, size, sum(valid), 25 * size]),
        }


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss per sample, once for each of its valid tokens."""
    return (model(batch["x"]).pow(2).sum(1) * batch["valid"]).sum(), {}


def _loss_with_metrics(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Twice the loss, of which half is to be logged; a sum over valid tokens; counts of two layers."""
    loss, valid = _loss(model, batch)[0], batch["valid"]
    counts = torch.stack([torch.bincount(valid, minlength=6)[:6].float(), torch.ones(6)])
    return 2 * loss, {"loss": loss, "penalty": 3.0 * valid.sum(), "load": counts}


class _Recorder:
    """A run of the loop over a tiny sharded model, and everything it called."""

    def __init__(self, *, loss_fn: LossFunction = _loss, **options: Any) -> None:
        self.loss_fn = loss_fn
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        fully_shard(self.model)
        self.optimizer_config = OptimizerConfig(learning_rate=0.05)
        self.optimizer = build_optimizer(self.model, self.optimizer_config)
        self.progress = Progress()
        self.calls: list[tuple[str, int]] = []
        self.rows: list[dict[str, Any]] = []
        self.advanced = 0
        self.stop = StopRequest()
        self.events: list[tuple[Any, ...]] = []
        self.guards = Guards(
            GuardConfig(),
            max_skipped_steps=2,
            model=self.model,
            optimizer=self.optimizer,
            device=CPU,
            tell=lambda *event, **details: self.events.append((*event, details)),
        )
        self.options = options

    def run(
        self, steps: int, *, accumulate: int = 1, broken: tuple[int, ...] = (), **options: Any
    ) -> bool:
        return train(
            self.model,
            self.optimizer,
            _batches(self.progress.samples, accumulate, broken),
            loss_fn=self.loss_fn,
            learning_rate=lambda step: 0.05 / step,
            optimizer_config=self.optimizer_config,
            progress=self.progress,
            steps=steps,
            global_batch_size=GLOBAL_BATCH_SIZE,
            grad_accum_steps=accumulate,
            samples_per_epoch=24,
            device=CPU,
            evaluate=lambda step: self.calls.append(("evaluate", step)),
            save=lambda progress: self.calls.append(("save", progress.step)),
            log=self.rows.append,
            advance=self._advance,
            stop=self.stop,
            guards=self.guards,
            speedometer=Speedometer(
                lambda tokens, labels, squares: tokens + labels + squares, 1000.0
            ),
            **{"evaluate_every": 0, "save_every": 0, "log_every": 1, **self.options, **options},
        )

    def _advance(self, step: int, seconds: float, data_wait_seconds: float) -> None:
        assert 0 <= data_wait_seconds <= seconds
        self.advanced += 1

    def weights(self) -> list[Tensor]:
        return [full(p) for p in self.model.parameters()]


def _calls(save_every: int, evaluate_every: int, steps: int) -> Any:
    run = _Recorder(save_every=save_every, evaluate_every=evaluate_every, log_every=3)
    assert run.run(steps)
    progress = run.progress
    return (
        run.calls,
        [row["step"] for row in run.rows],
        run.advanced,
        (progress.step, progress.samples),
    )


def _all_calls() -> Any:
    return _calls(2, 3, 7), _calls(0, 0, 4), _calls(3, 3, 3)


def test_saves_evaluations_and_rows_come_at_their_steps() -> None:
    for mixed, rare, together in run_ranks(_all_calls, 2):
        save, evaluate = "save", "evaluate"
        assert mixed == (
            [
                (save, 2),
                (evaluate, 3),
                (save, 4),
                (save, 6),
                (evaluate, 6),
                (save, 7),
                (evaluate, 7),
            ],
            [3, 6, 7],
            7,
            (7, 7 * GLOBAL_BATCH_SIZE),
        )
        assert rare[:2] == ([(save, 4), (evaluate, 4)], [3, 4])
        assert together[0] == [(save, 3), (evaluate, 3)]  # each once


def _twenty_steps(accumulate: int) -> Any:
    run = _Recorder()
    run.run(20, accumulate=accumulate)
    batches = itertools.islice(_batches(0, 1), 3)
    evaluation = evaluate_loss(run.model, batches, loss_fn=_loss, device=CPU)
    again = _Recorder(log_every=5)
    again.run(20, accumulate=accumulate)
    return run.rows, run.weights(), evaluation, run.model.training, again.rows


def test_losses_and_weights_are_the_same_for_any_ranks_and_accumulation() -> None:
    rows, weights, evaluation, training, windows = run_ranks(_twenty_steps, 1, 1)[0]
    losses = [row["loss"] for row in rows]
    assert losses[-1] < 0.7 * losses[0] and training
    for world_size, accumulate in ((1, 4), (2, 1), (3, 2)):
        for result in run_ranks(_twenty_steps, world_size, accumulate):
            other, other_weights, other_evaluation, _, other_windows = result
            for a, b in ((rows, other), (windows, other_windows)):
                for name in ("loss", "grad_norm"):
                    assert [r[name] for r in b] == pytest.approx([r[name] for r in a], rel=1e-5)
                for name in ("step", "epoch", "tokens", "padding_tokens", "valid_tokens"):
                    assert [r[name] for r in b] == [r[name] for r in a]
            assert other_evaluation == pytest.approx(evaluation, rel=1e-5)
            for a, b in zip(weights, other_weights, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_row_is_the_mean_of_its_window_over_valid_tokens() -> None:
    rows, _, _, _, windows = run_ranks(_twenty_steps, 2, 1)[0]
    assert [row["step"] for row in windows] == [5, 10, 15, 20]
    for index, window in enumerate(windows):
        part = rows[5 * index : 5 * index + 5]
        valid = sum(row["valid_tokens"] for row in part)
        mean = sum(row["loss"] * row["valid_tokens"] for row in part) / valid
        assert window["loss"] == pytest.approx(mean, rel=1e-6)
        assert window["valid_tokens"] == valid
        assert (window["tokens"], window["padding_tokens"]) == (5 * 60, 5 * 12)
        assert window["learning_rate"] == 0.05 / window["step"]
        assert window["epoch"] == window["step"] / 2
        seconds = 5 * window["step_seconds"]
        assert window["tokens_per_second"] == pytest.approx(300 / seconds)
        assert window["tokens_per_second_per_gpu"] == pytest.approx(150 / seconds)
        assert window["mfu_pct"] == pytest.approx(100 * (300 + valid + 1500) / seconds / 1000)
        assert 0 <= window["data_wait_seconds"] < window["step_seconds"]
        assert 0.05 < window["memory_peak_gib"] < 64


def _broken_steps() -> Any:
    # Steps 2 and 3 hold an infinite sample on one rank only; step 5 to 7 too.
    def sample(step: int, index: int) -> int:
        return (step - 1) * GLOBAL_BATCH_SIZE + index

    run = _Recorder()
    run.run(1)
    before = run.weights()
    broken = (sample(2, 1), sample(3, 11))
    assert run.run(3, broken=broken)
    same = all(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True))
    assert run.run(4)
    moved = not any(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True))
    error = None
    run.calls.clear()
    try:
        run.run(9, broken=(sample(5, 1), sample(6, 11), sample(7, 1)), save_every=1)
    except TrainError as reason:
        error = str(reason)
    skips = [(row["step"], row["grad_norm"] is None, row["skipped_steps"]) for row in run.rows]
    return (
        same,
        moved,
        skips,
        error,
        [event[:2] for event in run.events],
        run.calls,
        run.progress.step,
        [bool(w.isfinite().all()) for w in run.weights()],
    )


def test_T09_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all() -> None:
    for same, moved, skips, error, events, calls, step, finite in run_ranks(_broken_steps, 2):
        assert same and moved and all(finite)
        assert skips == [
            (1, False, 0),
            (2, True, 1),
            (3, True, 2),
            (4, False, 0),
            (5, True, 1),
            (6, True, 2),
        ]
        # Of each step the samples of the rank whose loss was not finite.
        assert "in 3 steps in a row, the last being step 7 (samples 48-53, 66-77)" in error
        assert events == [(step, "skipped_step") for step in (2, 3, 5, 6, 7)]
        assert calls == [("save", 5), ("save", 6)] and step == 6


def _with_metrics(accumulate: int) -> Any:
    plain, run = _Recorder(log_every=2), _Recorder(loss_fn=_loss_with_metrics, log_every=2)
    plain.run(2, accumulate=accumulate)
    run.run(2, accumulate=accumulate)
    batches = list(itertools.islice(_batches(0, 1), 3))
    losses = [
        evaluate_loss(run.model, batches, loss_fn=loss_fn, device=CPU)
        for loss_fn in (_loss, _loss_with_metrics)
    ]
    return plain.rows[0], run.rows[0], losses


def test_what_a_loss_says_beside_its_sum_is_logged_over_ranks_and_steps() -> None:
    for world_size, accumulate in ((1, 1), (2, 3)):
        for plain, row, losses in run_ranks(_with_metrics, world_size, accumulate):
            assert set(row) - set(plain) == {"penalty", "load_max_ratio", "load_idle_pct"}
            # The gradient is that of what is returned; what is logged as the loss is the half of it. The first
            # step is the same for both, and Adam's second does not see the factor.
            assert row["loss"] == pytest.approx(plain["loss"], rel=1e-4)
            assert row["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-3)
            assert row["penalty"] == pytest.approx(3)
            # 24 samples: 0, 2, 4, 1, 3 valid tokens in turn and never 5.
            counts = [sum(_sample(i)[1] == n for i in range(24)) for n in range(6)]
            assert row["load_max_ratio"] == pytest.approx(6 * max(counts) / 24)
            assert row["load_idle_pct"] == pytest.approx(100 / 12)
            assert losses[0] == losses[1]


def _stopped() -> Any:
    run = _Recorder(save_every=3)
    results = []
    with run.stop.listening(), run.stop.deferred():
        advance = run._advance

        def advance_and_signal(*timing: Any) -> None:
            advance(*timing)
            if run.advanced == 2 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run._advance = advance_and_signal  # type: ignore[method-assign]
        results.append(run.run(50))
    results += [run.calls, run.progress.step, run.progress.samples, run.stop.signal]
    return results, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_T01_a_signal_on_one_rank_stops_all_after_the_same_step() -> None:
    for rank, (results, restored) in enumerate(run_ranks(_stopped, 2)):
        finished, calls, step, samples, caught = results
        # The signal comes after step 2; step 3 learns of it, is finished, and is saved once.
        assert not finished
        assert calls == [("save", 3)]
        assert (step, samples) == (3, 3 * GLOBAL_BATCH_SIZE)
        assert caught == (signal.SIGTERM if rank else None)
        assert restored


def _stopped_in_the_last_step() -> Any:
    run = _Recorder()
    run.stop.signal = signal.SIGTERM
    return run.run(1), run.calls


def test_a_signal_in_the_last_step_saves_and_leaves_the_rest_to_the_next_run() -> None:
    for finished, calls in run_ranks(_stopped_in_the_last_step, 2):
        assert not finished and calls == [("save", 1)]


def _stopped_while_evaluating() -> Any:
    run = _Recorder()
    taken = 0

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal taken
        for taken, batch in enumerate(itertools.islice(_batches(0, 1), 9), 1):
            if taken == 3 and dist.get_rank() == 1:
                run.stop.signal = signal.SIGTERM
            yield batch

    evaluate_loss(run.model, batches(), loss_fn=_loss, device=CPU, stop=run.stop)
    run.run(1)  # the model is as it was
    return taken, run.calls


def test_T01_a_signal_ends_an_evaluation_on_all_ranks() -> None:
    assert run_ranks(_stopped_while_evaluating, 2) == [(3, [("save", 1)])] * 2


def test_a_second_interrupt_ends_the_process_as_usual() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def _resumed() -> Any:
    straight = _Recorder()
    straight.run(6)
    halves = _Recorder()
    halves.run(3)
    halves.run(6)  # new batches, from the cursor on
    same = all(torch.equal(a, b) for a, b in zip(straight.weights(), halves.weights(), strict=True))
    nothing_left = halves.run(6)
    losses = [[row["loss"] for row in run.rows] for run in (straight, halves)]
    return same, losses[0] == losses[1], nothing_left


def test_the_cursor_is_all_the_loop_needs_to_go_on() -> None:
    assert run_ranks(_resumed, 2) == [(True, True, True)] * 2
