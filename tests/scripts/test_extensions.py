"""Functions of a user in the place of ours: a run that uses all of them, and what refuses them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.command_line import CommandLineError, parse_train_config
from tests.support.job import EXACT, read_rows, train
from tests.support.models import packed_batch, random_documents, tiny_model
from trainer.distributed import sum_over_ranks

OWN = __name__


def question_only(row: dict[str, Any]) -> dict[str, Any] | None:
    """The raw rows have a question and an answer; those without an answer are left out."""
    if not row["answer"]:
        return None
    turns = [("user", row["question"]), ("assistant", row["answer"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def twice(model: Any, batch: Any) -> Any:
    """Twice the cross-entropy, logged as it is."""
    from trainer.loss import causal_lm_loss

    loss, _ = causal_lm_loss(model, batch)
    return 2 * loss, {"loss": loss, "doubled": 2 * loss}


def momentum(model: Any, groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)


def half(model: Any, groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups[:1], lr=config.learning_rate)


def falling(step: int, *, steps: int, peak: float, schedule: Any) -> float:
    return peak / step


def ranks_that_evaluate(job: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    (ranks,) = sum_over_ranks([1])
    return {"evaluating_ranks": ranks, "training": float(model.training)}


def no_numbers(job: Any, model: Any, tokenizer: Any) -> Any:
    return {"text": "no number"}


def sink(model: Any) -> None:
    """Scales what the first layer returns, so that the run's loss differs."""
    layer = model.hf.base_model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


def _rows(file: Path) -> Path:
    rows = [{"question": f"What is {n}?", "answer": f"{n}" * (n % 5)} for n in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.distributed
def test_a_run_made_of_own_functions(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = [
        f"--data.path={_rows(tmp_path / 'rows.jsonl')}",
        f"--data.transform={OWN}.{question_only.__name__}",
        "--data.seq_len=64",
        "--global_batch_size=4",
        "--steps=3",
        *EXACT,
    ]
    own = [
        f"--loss={OWN}.{twice.__name__}",
        f"--optimizer.name=callable:{OWN}.{momentum.__name__}",
        f"--schedule.name=callable:{OWN}.{falling.__name__}",
        f"--evaluation.functions=[{OWN}.{ranks_that_evaluate.__name__}]",
        "--optimizer.max_grad_norm=0",
        "--checkpoint.every=2",
        "--checkpoint.export=false",
    ]
    result = train([*flags, *own], cache_dir=cache, output_dir=tmp_path / "own")
    assert result.returncode == 0, result.output
    assert "24  left out by data.transform (rows 0, 5, 10, 15, 20, ...)" in result.output

    rows = read_rows(tmp_path / "own")
    steps = [row for row in rows if "loss" in row]
    assert [row["learning_rate"] for row in steps] == [1e-3, 5e-4, pytest.approx(1e-3 / 3)]
    assert all(row["doubled"] == pytest.approx(2 * row["loss"]) for row in steps)
    evaluations = [row for row in rows if "evaluating_ranks" in row]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert all(row["evaluating_ranks"] == 2 and row["training"] == 0 for row in evaluations)

    # Continued on one rank, the own optimizer's momentum and all, the last step is the same.
    resume = [f"--resume={tmp_path / 'own' / 'checkpoints' / 'step-00000002'}"]
    train([*flags, *own, *resume], 1, cache_dir=cache, output_dir=tmp_path / "again")
    (last,) = [row for row in read_rows(tmp_path / "again") if "loss" in row]
    assert last["loss"] == pytest.approx(steps[-1]["loss"], abs=1e-6)
    assert last["grad_norm"] == pytest.approx(steps[-1]["grad_norm"], rel=1e-5)

    for changed, line in (
        (own[1:], f"loss was {OWN}.twice "),
        ([*own, f"--model.function={OWN}.{sink.__name__}"], f"model.function was None, is {OWN}."),
    ):
        result = train([*flags, *changed, *resume], 1, cache_dir=cache, output_dir=tmp_path / "c")
        assert result.returncode == 1 and line in result.stderr, result.output

    # The gradient of twice the loss is twice as long; the changed model has another loss.
    plain = train([*flags, "--checkpoint.export=false"], cache_dir=cache, output_dir=tmp_path / "p")
    assert plain.returncode == 0, plain.output
    (first, *_) = [row for row in read_rows(tmp_path / "p") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert steps[0]["grad_norm"] == pytest.approx(2 * first["grad_norm"], rel=1e-5)
    changed = [f"--model.function={OWN}.{sink.__name__}", "--checkpoint.export=false"]
    train([*flags, *changed], cache_dir=cache, output_dir=tmp_path / "m")
    (other, *_) = [row for row in read_rows(tmp_path / "m") if "loss" in row]
    assert not math.isclose(other["loss"], first["loss"], abs_tol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([f"--loss={OWN}.nothing"], f"train.py: error: --loss {OWN}.nothing: {OWN} has no nothing"),
        ([f"--loss={OWN}.sink"], "has the arguments (model: 'Any') -> 'None', and is called with"),
        (
            [f"--optimizer.name=callable:{OWN}.half"],
            f"--optimizer.name {OWN}.half leaves out",
        ),
        (
            [f"--evaluation.functions=[{OWN}.no_numbers]"],
            f"--evaluation.functions {OWN}.no_numbers returned {{'text': 'no number'}}; it must",
        ),
    ],
)
def test_what_cannot_be_used_ends_the_run_with_one_line(
    tmp_path: Path, flags: list[str], line: str
) -> None:
    flags = ["--steps=1", "--evaluation.generate_rows=0", "--evaluation.max_rows=8", *EXACT, *flags]
    result = train(flags, 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "run")
    assert result.returncode == 1, result.output
    (error,) = [text for text in result.stderr.splitlines() if "error" in text]
    assert line in error


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--loss=focal"], "--loss must be package.function, .* got 'focal'"),
        (["--data.transform=a b.c"], "--data.transform must be package.function"),
        (["--data.sources=[{path: x, transform: no}]"], "transform must be text"),
        (["--data.prepared=x", "--data.transform=a.b"], "--data.prepared holds tokens"),
        (["--optimizer.name=adam"], r"--optimizer.name must be .*; did you mean adamw\?"),
        (["--schedule.name=callable:x"], "--schedule.name must be .* or callable:package.function"),
        (["--evaluation.functions=[x]"], "--evaluation.functions must be package.function"),
    ],
)
def test_names_that_name_no_function_are_refused(flags: list[str], line: str) -> None:
    with pytest.raises(CommandLineError, match=line):
        parse_train_config(flags)


def test_a_stream_is_changed_row_by_row(tmp_path: Path) -> None:
    from data.config import DataConfig
    from scripts.preparation import open_stream, stream_rows_of_rank

    config = DataConfig(
        path=str(_rows(tmp_path / "rows.jsonl")),
        streaming=True,
        transform=f"{OWN}.{question_only.__name__}",
    )
    rows = list(stream_rows_of_rank(config, tmp_path, 2, 1, 3))  # 7, 9, ... 119
    assert len(rows) == 57
    assert rows[0]["messages"][0]["content"] == "What is 7?"
    assert [n for n, row in zip(range(7, 120, 2), rows, strict=True) if not row][:2] == [15, 25]
    opened = open_stream(config, tmp_path, 2)  # the first row is left out, and tells no format
    assert opened["format"] == "messages"
    assert opened["transform"].startswith(config.transform)


def test_the_example_of_a_z_loss_adds_its_penalty_and_logs_the_cross_entropy() -> None:
    from scripts.examples.losses import Z_WEIGHT, z_loss
    from trainer.loss import causal_lm_loss

    model, batch = tiny_model(), packed_batch([random_documents([7, 9])], 24)
    usual, _ = causal_lm_loss(model, batch)
    logits = model(batch).flatten(0, 1)[batch["label_positions"]]
    loss, metrics = z_loss(model, batch)
    torch.testing.assert_close(loss, usual + Z_WEIGHT * logits.logsumexp(-1).square().sum())
    torch.testing.assert_close(metrics["loss"], usual)
