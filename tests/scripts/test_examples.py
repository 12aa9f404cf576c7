"""The examples: each is right by hand, the same on two ranks as on one, and learns what it is for."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.environment import cache_settings
from scripts.examples.distillation import divergence
from scripts.examples.dpo import answer_log_probabilities, dpo_loss
from scripts.examples.losses import focal_loss
from scripts.examples.preferences import right_and_wrong, spoilt
from scripts.examples.pretraining import article
from tests.support.command import ROOT
from tests.support.job import EXACT, losses, read_rows, train
from tests.support.models import packed_batch, random_documents, tiny_model
from tests.support.ranks import run_ranks
from tests.support.tiny import write_chat, write_model
from trainer.documents import documents

EXAMPLES = ROOT / "scripts" / "examples"
PAGES = ROOT / "docs" / "examples"
QUICK = [
    *EXACT,
    "--evaluation.max_rows=16",
    "--evaluation.generate_rows=0",
    "--data.seq_len=128",
    "--checkpoint.export=false",
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"--data.path={file}"


def pairs_of_words(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs that are told apart by a word: the better answer says yes."""
    draw = random.Random(seed)
    return [
        {"prompt": f"Is {draw.randint(0, 999)} right?", "chosen": "yes, it is", "rejected": "no"}
        for _ in range(count)
    ]


def train_on_one_and_two(
    flags: list[str], tmp_path: Path, *, names: tuple[str, ...] = ("loss",)
) -> list[dict[str, Any]]:
    """The rows of a run on two ranks with two micro-batches each, after comparing `names` with those of one process."""
    runs = []
    for ranks, more in ((2, ["--micro_batch_size=1"]), (1, ["--micro_batch_size=4"])):
        output = tmp_path / f"on-{ranks}"
        result = train(
            [*flags, "--global_batch_size=4", *more],
            ranks,
            cache_dir=tmp_path / "cache",
            output_dir=output,
        )
        assert result.returncode == 0, result.output
        runs.append(read_rows(output))
    for two, one in zip(*runs, strict=True):
        assert two["step"] == one["step"]
        for name in names:
            assert (name in two) == (name in one)
            assert (two.get(name) is None) == (one.get(name) is None)
            if two.get(name) is not None:
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (two, one)
    return runs[0]


def steps(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if "loss" in row]


# --------------------------------------------------------------------------------------- the files


def test_every_example_is_short_and_has_a_page_in_the_index() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\| \[([\w-]+\.md)\]\(\1\) \|", index)
    assert sorted(listed) == sorted(p.name for p in PAGES.glob("*.md") if p.name != "README.md")
    # The pairs of answers are no example of their own: they are data for two of them.
    files = [f for f in EXAMPLES.glob("*.py") if f.stem not in ("__init__", "preferences")]
    assert sorted(file.stem for file in files) == sorted(
        name.removesuffix(".md") for name in listed
    )
    assert [f.name for f in files if len(f.read_text("utf-8").splitlines()) >= 120] == []


# -------------------------------------------------------------------------------------- preferences


def _alone(model: Any, document: Tensor) -> float:
    """Log-probability of all tokens but the first, from logits of the document alone."""
    batch = packed_batch([[document]], len(document))
    logits = model(batch)[0, :-1].double()
    return float(logits.log_softmax(-1).gather(1, document[1:].unsqueeze(1)).sum())


def test_dpo_is_the_formula_of_the_paper_on_answers_alone() -> None:
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    answers = random_documents([7, 4, 5, 9, 3, 6])
    # Two pairs share a row, one is alone, and one row is padding.
    batch = packed_batch([answers[:4], [], answers[4:]], 28, max_documents=9)
    with torch.no_grad():
        loss, metrics = dpo_loss(
            answer_log_probabilities(policy, batch),
            answer_log_probabilities(reference, batch),
            documents(batch).exists,
            beta=0.3,
        )
        ratios = [_alone(policy, d) - _alone(reference, d) for d in answers]
    margins = [0.3 * (a - b) for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
    assert float(loss) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins), rel=1e-5)
    assert float(metrics["reward_chosen"]) == pytest.approx(0.3 * sum(ratios[::2]), rel=1e-5)
    assert float(metrics["reward_rejected"]) == pytest.approx(0.3 * sum(ratios[1::2]), rel=1e-5)
    assert float(metrics["preferred_pct"]) == 100 * sum(m > 0 for m in margins)


@pytest.mark.distributed
def test_dpo_learns_on_two_ranks_what_it_does_on_one(tmp_path: Path) -> None:
    flags = [
        *QUICK,
        f"--model.path={write_model(tmp_path / 'model')}",
        write_rows(tmp_path / "pairs.jsonl", pairs_of_words(64)),
        "--loss=scripts.examples.dpo.DPO",
        "--loss_options={beta: 0.2}",
        "--steps=8",
        "--checkpoint.every=4",
    ]
    names = ("loss", "grad_norm", "reward_chosen", "reward_rejected", "preferred_pct")
    rows = train_on_one_and_two(flags, tmp_path, names=names)
    # Before anything is learned, the model is its reference.
    assert steps(rows, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert steps(rows, "loss")[-1] < 0.4 and steps(rows, "preferred_pct")[-1] == 100
    assert steps(rows, "reward_chosen")[-1] > steps(rows, "reward_rejected")[-1]

    # Continued, the reference is still the model before the first step.
    middle = tmp_path / "on-2" / "checkpoints" / "step-00000004"
    more = ["--global_batch_size=4", "--micro_batch_size=1"]
    again = train(
        [*flags, *more, f"--resume={middle}"],
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "again",
    )
    assert again.returncode == 0, again.output
    assert losses(tmp_path / "again") == losses(tmp_path / "on-2")[4:]
    changed = [*flags, *more, f"--resume={middle}", "--loss_options={beta: 0.1}"]
    refused = train(changed, cache_dir=tmp_path / "cache", output_dir=tmp_path / "other")
    assert refused.returncode == 1 and "loss.beta was 0.2, is 0.1" in refused.stderr


def test_the_built_in_pairs_differ_in_their_last_answer() -> None:
    assert [spoilt(text) for text in ("41", "9 kg", "c b a", "aba")] == [
        "52",
        "0 kg",
        "a b c",
        "aba aba",
    ]
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert right_and_wrong({"messages": messages}) == {
        "prompt": messages[:1],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "3"}],
    }


@pytest.mark.distributed
def test_pairs_and_losses_of_pairs_need_each_other(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", pairs_of_words(8))
    dpo = "--loss=scripts.examples.dpo.DPO"
    for flags, line in (
        ([pairs], "the data are pairs of answers, and the usual loss would learn the rejected one"),
        ([dpo], "--loss scripts.examples.dpo.DPO is over pairs of answers, and the data have none"),
        ([pairs, dpo, "--loss_options={bet: 1}"], "got an unexpected keyword argument 'bet'"),
    ):
        args = [*QUICK, "--steps=1", *flags]
        result = train(args, 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "out")
        assert result.returncode == 1, result.output
        (error,) = [text for text in result.stderr.splitlines() if "error" in text]
        assert line in error


# ---------------------------------------------------------------------------------------- reward


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reward_head_ranks_what_can_be_told_apart_and_is_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = write_model(tmp_path / "model")
    flags = [
        *QUICK,
        write_rows(tmp_path / "pairs.jsonl", pairs_of_words(64)),
        "--model.function=scripts.examples.reward.add_score",
        "--loss=scripts.examples.reward.ranking_loss",
        "--optimizer.learning_rate=3e-3",
        "--steps=10",
        "--checkpoint.export=true",
    ]
    names = ("loss", "grad_norm", "score_margin", "ranked_right_pct")
    rows = train_on_one_and_two([*flags, f"--model.path={model}"], tmp_path, names=names)
    assert steps(rows, "loss")[0] == pytest.approx(math.log(2), abs=0.5)
    assert steps(rows, "loss")[-1] < 0.1 and steps(rows, "ranked_right_pct")[-1] == 100
    run = json.loads((tmp_path / "on-2" / "run.json").read_text())
    assert run["model"]["weights"]["initialised"] == ["score.weight"]

    export = tmp_path / "on-2" / "export"
    scorer = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    for row in pairs_of_words(8, seed=1):
        prompt = {"role": "user", "content": row["prompt"]}
        scores = []
        for answer in ("chosen", "rejected"):
            messages = [prompt, {"role": "assistant", "content": row[answer]}]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            with torch.no_grad():
                scores.append(float(scorer(input_ids=torch.tensor([ids])).logits))
        assert scores[0] > scores[1] + 1

    # The export has the layer: training goes on where it was.
    again = [*flags, f"--model.path={export}", "--global_batch_size=4", "--steps=1"]
    result = train(again, cache_dir=tmp_path / "cache", output_dir=tmp_path / "again")
    assert result.returncode == 0, result.output
    assert losses(tmp_path / "again")[0] < 0.1


@pytest.mark.distributed
def test_a_head_beside_adapters_is_refused(tmp_path: Path) -> None:
    flags = [
        *QUICK,
        f"--model.path={write_model(tmp_path / 'model', trained=False)}",
        write_rows(tmp_path / "pairs.jsonl", pairs_of_words(8)),
        "--model.function=scripts.examples.reward.add_score",
        "--loss=scripts.examples.reward.ranking_loss",
        "--lora.rank=4",
        "--steps=1",
    ]
    result = train(flags, 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "out")
    assert result.returncode == 1 and "adds score.weight, which is not trained" in result.stderr


# -------------------------------------------------------------------------------- classification


@pytest.mark.distributed
def test_classes_that_can_be_told_apart_are(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(96):
        good = draw.random() < 0.5
        word = draw.choice(["lovely", "great"] if good else ["dull", "awful"])
        rows.append({"prompt": f"It was {word}. {draw.randint(0, 99)}", "completion": "AB"[good]})
    rows[5]["completion"] = "C"
    flags = [
        *QUICK,
        write_rows(tmp_path / "reviews.jsonl", rows),
        "--loss=scripts.examples.classification.Classification",
        "--loss_options={classes: [A, B]}",
        "--optimizer.learning_rate=3e-3",
        "--steps=10",
    ]
    names = ("loss", "grad_norm", "accuracy_pct", "unknown_class_pct")
    found = train_on_one_and_two(flags, tmp_path, names=names)
    assert steps(found, "loss")[0] == pytest.approx(math.log(2), abs=0.1)
    assert steps(found, "accuracy_pct")[-1] > 95
    assert max(steps(found, "unknown_class_pct")) > 0
    same = ["--loss_options={classes: [A, A]}"]
    result = train([*flags, *same], 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "same")
    assert result.returncode == 1 and "two of the classes 'A', 'A' begin with" in result.stderr


# ---------------------------------------------------------------------------------- distillation


def test_the_divergence_is_that_of_the_distributions_both_know() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 11, generator=generator)
    teacher = torch.randn(5, 14, generator=generator)  # a larger vocabulary of the same family
    p = F.softmax(teacher[:, :11] / 2, 1).double()
    q = F.softmax(student / 2, 1).double()
    expected = 4 * (p * (p / q).log()).sum(1)
    found = divergence(student, teacher, temperature=2.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert divergence(student, student, temperature=1.0).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_a_student_learns_its_teacher_and_one_that_is_its_teacher_has_nothing_to_learn(
    tmp_path: Path,
) -> None:
    student = write_model(tmp_path / "student", trained=False)
    teacher = write_model(tmp_path / "teacher", seed=1, hidden_size=32)
    flags = [
        *QUICK,
        f"--data.path={write_chat(tmp_path / 'chat.jsonl')}",
        "--loss=scripts.examples.distillation.Distillation",
        "--model.check_first_loss=never",
        "--steps=6",
    ]
    own = [f"--model.path={teacher}", f"--loss_options={{teacher: {teacher}, teacher_share: 1}}"]
    result = train(
        [*flags, *own, "--steps=1", "--global_batch_size=4"],
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "own",
    )
    assert result.returncode == 0, result.output
    (row,) = [row for row in read_rows(tmp_path / "own") if "loss" in row]
    assert abs(row["divergence"]) < 1e-6 and row["grad_norm"] < 1e-3 and row["loss"] > 1

    options = f"{{teacher: {teacher}, temperature: 2, teacher_share: 0.8}}"
    rows = train_on_one_and_two(
        [
            *flags,
            f"--model.path={student}",
            f"--loss_options={options}",
            "--optimizer.learning_rate=3e-3",
        ],
        tmp_path,
        names=("loss", "grad_norm", "divergence"),
    )
    assert steps(rows, "divergence")[-1] < 0.8 * steps(rows, "divergence")[0]
    missing = train(flags, 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "missing")
    assert missing.returncode == 1 and "missing a required argument: 'teacher'" in missing.stderr


# ------------------------------------------------------------------------------------- pretraining


@pytest.mark.distributed
def test_pretraining_reads_articles_and_watches_perplexity(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    body = "The quick brown fox jumps over the lazy dog again and again until the evening comes and all is quiet."
    assert article({"title": " Fox ", "body": f"{body}  \n{body}\n"}) == {
        "text": f"# Fox\n\n{body}\n{body}"
    }
    assert article({"title": None, "body": body}) == {"text": body}
    assert article({"title": "Short", "body": "too few words"}) is None

    texts = tmp_path / "texts"
    texts.mkdir()
    kept = {"new": [body, body[::-1], "a"], "before": ["Sort: 3 1 2", "1 2 3"]}
    for name, lines in kept.items():
        write_rows(texts / f"{name}.jsonl", [{"text": text} for text in lines])
    rows = [{"title": f"Day {n}", "body": body if n % 4 else "short"} for n in range(80)]
    flags = [
        *QUICK,
        f"--model.path={write_model(tmp_path / 'model')}",
        write_rows(tmp_path / "articles.jsonl", rows),
        "--data.transform=scripts.examples.pretraining.article",
        "--data.packing=fixed",
        "--evaluation.functions=[scripts.examples.pretraining.perplexities]",
        "--checkpoint.export=true",
        "--steps=6",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERPLEXITY_TEXTS", str(texts))
        names = ("loss", "perplexity_new", "perplexity_before")
        found = train_on_one_and_two(flags, tmp_path, names=names)
    run = json.loads((tmp_path / "on-2" / "run.json").read_text())
    ledger = run["data"]["sources"][0]["ledger"]
    assert (
        ledger["rows_used"] == 60 and ledger["excluded"]["left out by data.transform"]["rows"] == 20
    )
    assert ledger["padding_tokens"] < 128 and ledger["supervised_tokens"] > 0.97 * ledger["tokens"]
    first, last = [row for row in found if "perplexity_new" in row]
    assert last["perplexity_new"] < 0.8 * first["perplexity_new"]

    # By transformers, on the export.
    export = tmp_path / "on-2" / "export"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(export),
        AutoTokenizer.from_pretrained(export),
    )
    for name, lines in kept.items():
        total, count = 0.0, 0
        for text in lines:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            if ids.shape[1] > 1:
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        assert last[f"perplexity_{name}"] == pytest.approx(math.exp(total / count), rel=1e-4)


# ----------------------------------------------------------------------------------------- mixture


@pytest.mark.slow
@pytest.mark.distributed
def test_the_losses_of_sources_are_those_of_their_own_tokens(tmp_path: Path) -> None:
    chat = write_chat(tmp_path / "chat.jsonl")
    write_rows(tmp_path / "words.jsonl", [{"text": f"word {n} " * 9} for n in range(60)])
    flags = [
        *QUICK,
        f"--data.sources=[{{path: {chat}, weight: 2}}, {{path: {tmp_path / 'words.jsonl'}, weight: 1}}]",
        "--steps=4",
    ]
    own = [*flags, "--loss=scripts.examples.mixture.LossBySource"]
    names = ("loss", "grad_norm", "loss_chat", "loss_words")
    rows = [row for row in train_on_one_and_two(own, tmp_path, names=names) if "loss" in row]
    plain = train(
        [*flags, "--global_batch_size=4", "--micro_batch_size=1"],
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "plain",
    )
    assert plain.returncode == 0, plain.output
    assert losses(tmp_path / "plain") == pytest.approx(steps(rows, "loss"), abs=1e-5)
    both = [row for row in rows if row["loss_chat"] is not None and row["loss_words"] is not None]
    assert both
    for row in both:
        low, high = sorted([row["loss_chat"], row["loss_words"]])
        assert low - 1e-6 <= row["loss"] <= high + 1e-6
    # A weight of 0 leaves a source out of the gradient, and a weight of 2 on all of them doubles it.
    norms = {}
    for weights in ("{chat: 0, words: 0}", "{chat: 2, words: 2}"):
        output = tmp_path / f"weights-{len(norms)}"
        args = [
            *own,
            "--global_batch_size=4",
            f"--loss_options={{weights: {weights}}}",
            "--steps=1",
        ]
        result = train(args, 1, cache_dir=tmp_path / "cache", output_dir=output)
        assert result.returncode == 0, result.output
        norms[weights] = steps(read_rows(output), "grad_norm")[0]
    assert [*norms.values()] == [0, pytest.approx(2 * rows[0]["grad_norm"], rel=1e-4)]
    unknown = [*own, "--loss_options={weights: {code: 2}}"]
    result = train(unknown, 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "unknown")
    assert (
        result.returncode == 1 and "no source is named code; there are chat, words" in result.stderr
    )


# ---------------------------------------------------------------------------------- gradient noise


@pytest.mark.slow
@pytest.mark.distributed
def test_the_noise_of_gradients_is_the_same_on_two_ranks_and_none_where_all_rows_are_alike(
    tmp_path: Path,
) -> None:
    noise = [*QUICK, "--evaluation.functions=[scripts.examples.gradient_noise.gradient_noise]"]
    flags = [*noise, f"--data.path={write_chat(tmp_path / 'chat.jsonl')}", "--steps=2"]
    layers = [f"gradient_norm_{part}" for part in ("layer_0", "layer_1", "layer_2", "rest")]
    rows = train_on_one_and_two(flags, tmp_path, names=("loss", "gradient_noise_rows", *layers))
    first, last = [row for row in rows if "gradient_norm_rest" in row]
    assert [row["step"] for row in (first, last)] == [0, 2]
    assert first["gradient_noise_rows"] > 0 and all(first[name] > 0 for name in layers)
    # Training is not touched.
    more = ["--global_batch_size=4", "--micro_batch_size=1", "--evaluation.functions=[]"]
    result = train([*flags, *more], cache_dir=tmp_path / "cache", output_dir=tmp_path / "plain")
    assert result.returncode == 0, result.output
    assert losses(tmp_path / "plain") == steps(rows, "loss")

    same = write_rows(tmp_path / "same.jsonl", [{"text": "the same " * 8}] * 16)
    args = [*noise, same, "--data.packing=none", "--global_batch_size=4", "--steps=1"]
    result = train(args, cache_dir=tmp_path / "cache", output_dir=tmp_path / "same")
    assert result.returncode == 0, result.output
    row = read_rows(tmp_path / "same")[0]
    assert row["gradient_noise_rows"] == pytest.approx(0, abs=1e-3)
    few = write_rows(tmp_path / "few.jsonl", [{"text": "few"}] * 8)
    result = train([*args, few], 1, cache_dir=tmp_path / "cache", output_dir=tmp_path / "few")
    assert result.returncode == 1
    assert "gradient_noise compares 4 steps of 4 packed rows, and there are 8" in result.stderr


# ------------------------------------------------------------------------------- losses, own loop


def test_the_focal_loss_is_the_formula_of_the_paper() -> None:
    model, batch = tiny_model(), packed_batch([random_documents([7, 9])], 24)
    positions = batch["label_positions"]
    logits = model(batch).flatten(0, 1)[positions].double()
    targets = batch["labels"].flatten()[positions]
    p = logits.softmax(-1).gather(1, targets.unsqueeze(1))
    expected = (-((1 - p) ** 1.5) * p.log()).sum()
    loss, metrics = focal_loss(model, batch, focus=1.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["loss"].double(), -p.log().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(focal_loss(model, batch, focus=0.0)[0], metrics["loss"])
    gradient = torch.autograd.grad(loss, model.embedding.weight)[0]
    exact = torch.autograd.grad(expected, model.embedding.weight)[0]
    assert (gradient - exact).norm() < 1e-4 * exact.norm()


def _run_own_loop(argv: list[str], log: str) -> int:
    with open(f"{log}.{os.environ['RANK']}", "w") as file:
        os.dup2(file.fileno(), 1)
    from scripts.examples.own_loop import main

    return main(argv)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_own_loop_trains_as_train_does_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = [
        *QUICK,
        f"--data.path={write_chat(tmp_path / 'chat.jsonl')}",
        "--global_batch_size=8",
        "--micro_batch_size=2",
        "--schedule.name=constant",
    ]
    result = train([*flags, "--steps=4"], cache_dir=cache, output_dir=tmp_path / "train")
    assert result.returncode == 0, result.output
    lines = []
    for count in (2, 4):
        args = [
            f"--cache_dir={cache}",
            f"--output_dir={tmp_path / 'own'}",
            *flags,
            f"--steps={count}",
        ]
        log = tmp_path / f"log-{count}"
        codes = run_ranks(
            _run_own_loop, 2, args, str(log), init_group=False, env=cache_settings(cache.absolute())
        )
        assert codes == [0, 0]
        lines += Path(f"{log}.0").read_text().splitlines()
        assert Path(f"{log}.1").read_text() == ""
    expected = [
        f"step {n}: loss {loss:.4f}" for n, loss in enumerate(losses(tmp_path / "train"), 1)
    ]
    assert [line for line in lines if line.startswith("step ")] == expected
    assert (tmp_path / "own" / "export" / "model.safetensors").is_file()
