"""verify.py: correct configurations pass, and each planted bug is caught by the check that is named after it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.embedded import build_tokenizer
from scripts.environment import cache_settings
from scripts.verifying.checks import Measure, Result, compare_gradients, compare_runs, make
from scripts.verifying.runs import Record
from scripts.verifying.table import line, ranks_of
from tests.support.command import ROOT, CommandResult, clean_environment, run_command
from tests.support.models import tiny_model
from tests.support.ranks import run_ranks
from tests.support.tiny import write_chat, write_model
from trainer.config import ParallelConfig

OWN = __name__
SCRIPT = str(ROOT / "scripts" / "verify.py")
MOST = "--only=[packed, document, later, masked, tied, reload, export, accum, kept, resume, ranks]"
ALONE = "--only=[packed, document, later, masked, tied, reload, export, accumulation, kept, resume]"


# -------------------------------------------------------------------------------------------- bugs


def leak(model: Any) -> None:
    """A mask that forgets where documents end."""
    run = model.hf.base_model.forward

    def forward(*args: Any, document_offsets: Tensor, **kwargs: Any) -> Any:
        whole = torch.tensor([0, int(document_offsets[-1])], dtype=torch.int32)
        return run(*args, document_offsets=whole, **kwargs)

    model.hf.base_model.forward = forward


def look_ahead(model: Any) -> None:
    """A layer that sees the next token."""
    layer = model.hf.base_model.layers[0]
    run = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: run(
        hidden + hidden.roll(-1, dims=1), *args, **kwargs
    )


def forget_tie(model: Any) -> None:
    """A head that is filled like the embedding it should be, and then goes its own way."""
    import models.build
    from scripts import modelling

    load = modelling.load_weights

    def load_both(model: Any, folder: Path, **_: Any) -> Any:
        report = load(model, folder, initialised=["lm_head.weight"])
        with torch.no_grad():
            model.head.weight.copy_(model.embedding.weight)
        return report

    model.head.weight = nn.Parameter(torch.empty_like(model.embedding.weight))
    models.build.tie_head = lambda model: None
    modelling.load_weights = load_both


def stale_cursor(model: Any) -> None:
    """A run that goes on with the first samples again."""
    from scripts import wiring
    from trainer.loop import Progress

    resume = wiring.resume

    def from_the_start(*args: Any) -> Any:
        progress, states = resume(*args)
        return Progress(step=progress.step, samples=0), states

    wiring.resume = from_the_start


def mean_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A mean over the micro-batch where a sum is asked for."""
    from trainer.loss import causal_lm_loss

    loss, metrics = causal_lm_loss(model, batch)
    return loss / len(batch["label_positions"]), metrics


def mean_per_rank(model: Any, optimizer: Any, micro_batches: Any, loss_fn: Any) -> float:
    """Every rank divides by its own tokens."""
    return _step(model, optimizer, micro_batches, loss_fn, together=False)


def unsynchronised(model: Any, optimizer: Any, micro_batches: Any, loss_fn: Any) -> float:
    """The last backward does not reduce gradients either."""
    return _step(model, optimizer, micro_batches, loss_fn, synchronise=False)


def _step(
    model: Any,
    optimizer: Any,
    micro_batches: Any,
    loss_fn: Any,
    *,
    together: bool = True,
    synchronise: bool = True,
) -> float:
    import torch.distributed as dist

    from trainer.distributed import sum_over_ranks

    own = sum(float(batch["counts"][2]) for batch in micro_batches)
    (tokens,) = sum_over_ranks([own])
    total = 0.0
    for number, batch in enumerate(micro_batches, 1):
        model.set_requires_gradient_sync(synchronise and number == len(micro_batches))
        loss, _ = loss_fn(model, batch)
        (loss / own if not together else loss * dist.get_world_size() / tokens).backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    (total,) = sum_over_ranks([total])
    return total / tokens


# ------------------------------------------------------------------------------------------- tests


def verify(tmp_path: Path, *flags: str) -> CommandResult:
    """verify.py in a forked process, without ranks of its own."""
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    argv = [f"--cache_dir={cache}", *flags]
    env = cache_settings(cache)
    ((code, out, err),) = run_ranks(_main, 1, argv, env=env, init_group=False)
    return CommandResult(code, out, err, 0.0)


def _main(argv: list[str]) -> tuple[int, str, str]:
    del os.environ["RANK"]
    from scripts.verify import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def command(tmp_path: Path, *flags: str) -> CommandResult:
    """The real command, which starts its own ranks."""
    args = [sys.executable, SCRIPT, f"--cache_dir={tmp_path / 'cache'}", *flags]
    env = clean_environment(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parent)}
    return run_command(args, timeout=280, env=env)


def failed(result: CommandResult) -> set[str]:
    """Names of the checks that have failed."""
    found = {text[:27].strip() for text in result.stdout.splitlines() if text[27:33] == "FAILED"}
    assert result.returncode == (1 if found else 0), result.output
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_the_embedded_default_holds_and_leaves_nothing(tmp_path: Path) -> None:
    result = verify(tmp_path, ALONE)
    assert failed(result) == set(), result.output
    assert re.search(r"^all 10 checks hold, in \d+ s$", result.stdout, re.M)
    assert not list((tmp_path / "cache").glob(".verify-*"))
    assert not (tmp_path / "cache" / "tokens").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "only", "expected"),
    [
        (
            [f"--model={OWN}.leak"],
            "[packed, document, tied]",
            {"packed = unpacked", "document A leaves B alone"},
        ),
        ([f"--model={OWN}.forget_tie"], "[packed, tied, reload]", {"tied weights are one"}),
        ([f"--model={OWN}.stale_cursor"], "[reload, resume]", {"resume = uninterrupted"}),
    ],
    ids=["leaking-mask", "forgotten-tie", "stale-cursor"],
)
def test_a_planted_bug_is_caught_by_name(
    tmp_path: Path, flags: list[str], only: str, expected: set[str]
) -> None:
    result = verify(tmp_path, *flags, f"--only={only}")
    assert failed(result) == expected, result.output
    assert re.search(rf"^{len(expected)} of \d checks FAILED in \d+ s: ", result.stdout, re.M)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "only", "expected"),
    [
        ([f"--step={OWN}.mean_per_rank"], "[ranks, resume, accum]", {"2 ranks = 1 rank"}),
        ([f"--step={OWN}.unsynchronised"], "[ranks]", {"2 ranks = 1 rank"}),
        (
            [f"--loss={OWN}.mean_loss"],
            "[ranks, accum, packed]",
            {"packed = unpacked", "accumulation = big batch", "2 ranks = 1 rank"},
        ),
        (
            [f"--model={OWN}.look_ahead"],
            "[later, packed]",
            {"packed = unpacked", "no token sees a later one"},
        ),
        (["--step=scripts.examples.own_loop.step"], "[ranks, resume, accum, kept]", set()),
        (["--loss=scripts.examples.losses.focal_loss"], "[ranks, accum, masked, packed]", set()),
    ],
    ids=["mean-per-rank", "unsynchronised", "mean-loss", "look-ahead", "own-loop", "focal"],
)
def test_a_bug_is_caught_on_ranks(
    tmp_path: Path, flags: list[str], only: str, expected: set[str]
) -> None:
    result = command(tmp_path, *flags, f"--only={only}")
    assert failed(result) == expected, result.output


@pytest.mark.slow
@pytest.mark.distributed
def test_a_configuration_of_its_own_holds(tmp_path: Path) -> None:
    flags = [
        f"--model.path={write_model(tmp_path / 'model', 'qwen2', trained=False)}",
        f"--data.path={write_chat(tmp_path / 'chat.jsonl')}",
        "--data.seq_len=512",
        "--parallel.dp_replicate=2",
        "--parallel.activation_checkpointing=op",
        "--optimizer.name=muon",
    ]
    result = command(tmp_path, *flags)
    assert failed(result) == set(), result.output
    assert "4 ranks = 1 rank" in result.stdout


@pytest.mark.distributed
def test_pairs_of_answers_are_proven_together(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n}?", "chosen": f"{n}.", "rejected": "no " * (n % 9 + 1)} for n in range(200)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [f"--data.path={file}", "--loss=scripts.examples.dpo.DPO"]
    result = verify(tmp_path, *flags, "--only=[packed, document, masked, accumulation]")
    assert failed(result) == set(), result.output
    assert "all 4 checks hold" in result.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (["--full=true", "--data.seq_len=1024"], 2),
        (["--data.streaming=true", "--steps=10"], 2),
        (["--lora.rank=4", "--lora.dropout=0.1"], 2),
        (["--model.train_last_layers=1"], 2),
        (["--parallel.tp=2"], 4),
        (["--parallel.cp=2"], 4),
    ],
    ids=["full", "streaming", "lora", "last-layers", "tp", "cp"],
)
def test_ways_to_train_hold(tmp_path: Path, flags: list[str], ranks: int) -> None:
    tiny = write_model(tmp_path / "model", trained=False, max_position_embeddings=4096)
    chat = write_chat(tmp_path / "chat.jsonl", count=1000)
    result = command(tmp_path, f"--model.path={tiny}", f"--data.path={chat}", *flags, MOST)
    assert failed(result) == set(), result.output
    assert f"{ranks} ranks = 1 rank" in result.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_a_mixture_of_experts_holds(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    model = tiny_model(kind, vocab_size=576, max_position_embeddings=512)
    build_tokenizer(folder)
    model.hf.save_pretrained(folder)
    flags = [f"--model.path={folder}", f"--data.path={write_chat(tmp_path / 'chat.jsonl')}"]
    result = command(tmp_path, *flags, "--data.seq_len=256", MOST)
    assert failed(result) == set(), result.output
    assert "2 ranks = 1 rank" in result.stdout


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--steps=x"], 2, "--steps: expected an integer"),
        (["--model=nowhere.fn"], 1, "--model.function nowhere.fn: there is no module nowhere"),
        (["--step=math.pi"], 1, "--step math.pi is a float, not a function"),
        (["--full=maybe"], 2, "--full: expected true or false"),
    ],
)
def test_what_cannot_be_verified_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, text: str
) -> None:
    from scripts.verify import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.verify.use_cache_dir", lambda _: tmp_path)
        assert main(flags) == code
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("verify.py: error: ") and text in error


def test_under_torchrun_it_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.verify import main

    monkeypatch.setenv("RANK", "0")
    assert main([]) == 2
    assert "run it with python, not torchrun" in capsys.readouterr().err


def test_the_ranks_cover_every_axis() -> None:
    assert ranks_of(ParallelConfig()) == 2
    assert ranks_of(ParallelConfig(dp_replicate=8, dp_shard=8)) == 4
    assert ranks_of(ParallelConfig(tp=2, cp=2)) == 8


def test_runs_differ_by_losses_gradients_or_what_is_missing() -> None:
    gradient = torch.ones(4)
    whole = Record({1: 2.0, 2: 1.0}, {"a": gradient, "b": 1e-9 * gradient}, {})
    cases = {
        "": whole,
        "loss of step 2 is 1.100000, not 1.000000": Record({1: 2.0, 2: 1.1}, whole.gradients),
        "loss of step 2 is nan": Record({1: 2.0}, whole.gradients),
        "gradient of a": Record(whole.losses, {**whole.gradients, "a": 1.01 * gradient}),
        "gradient of a is missing": Record(whole.losses, {"b": gradient}),
    }
    for expected, record in cases.items():
        result = make("name", lambda record=record: compare_runs(record, whole))
        assert result.failed == bool(expected)
        assert result.note.startswith(expected)
    # One that is far smaller than the others is judged by them.
    tiny = compare_gradients({"a": gradient, "b": 3e-9 * gradient}, whole.gradients)
    assert max(measure.excess for measure in tiny) < 1
    (nothing,) = compare_gradients({"a": torch.empty(0)}, {"a": torch.empty(0)})
    assert nothing.what == "a has no gradient" and nothing.excess > 1


def test_an_error_in_a_check_is_its_result() -> None:
    def raises() -> list[Measure]:
        raise ValueError("first\nsecond")

    result = make("name", raises)
    assert result.failed
    assert line(result).endswith("ValueError: first second")
    assert line(Result("name", None, "why")).split() == ["name", "skipped", "why"]
