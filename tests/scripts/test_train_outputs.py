"""What a run leaves in --output_dir is a contract: other programs read it."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from tests.support.command import CommandResult, clean_environment, run_command
from tests.support.job import EXACT, TRAIN, load_export, losses, read_rows, train
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed

_STEPS = 4
_ROW = {
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "valid_tokens",
    "tokens",
    "padding_tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu_pct",
    "step_seconds",
    "data_wait_seconds",
    "memory_peak_gib",
}


@dataclass(frozen=True)
class Run:
    """A finished run of two ranks on an untied Qwen2 and its held-out data."""

    folder: Path
    result: CommandResult

    @property
    def output_dir(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("outputs")
    data = folder / "data"
    write_chat(data / "train.parquet", count=120)
    write_chat(data / "test.parquet", count=40, split="test")
    result = train(
        [
            f"--model.path={write_model(folder / 'model', 'qwen2', tied=False)}",
            f"--data.path={data}",
            "--evaluation.split=test",
            "--evaluation.every=2",
            "--data.seq_len=128",
            "--micro_batch_size=2",
            f"--steps={_STEPS}",
            *EXACT,
            "--log.tensorboard=true",
            "--log.profile=2-3",
        ],
        cache_dir=folder / "cache",
        output_dir=folder / "out",
    )
    assert result.returncode == 0, result.output
    return Run(folder, result)


def test_the_terminal_is_calm(run: Run) -> None:
    assert run.result.stderr == ""
    lines = run.result.stdout.splitlines()
    assert all(lines), "no empty lines"
    assert len(lines) < 25
    assert max(map(len, lines)) < 200
    assert f"exported to {run.output_dir / 'export'}" in lines
    assert f"report in {run.output_dir / 'report.html'}" in lines


def test_the_folder_holds_what_was_promised(run: Run) -> None:
    assert sorted(path.name for path in run.output_dir.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "export",
        "goodput.jsonl",
        "metrics.jsonl",
        "model",
        "profile",
        "report.html",
        "run.json",
        "samples.jsonl",
        "tensorboard",
    ]
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step-00000004"]
    described = json.loads((run.output_dir / "run.json").read_text())
    assert {"torch", "transformers", "datasets"} <= set(described["versions"])
    assert described["world_size"] == 2
    assert described["mesh"] == {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    assert described["precision"]["compute and all-gather"] == "float32"
    assert described["model"]["commit"] is None


def test_the_chosen_steps_were_traced_on_every_rank(run: Run) -> None:
    folder = run.output_dir / "profile"
    names = [f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for rank in (0, 1):
        trace = json.loads(gzip.decompress((folder / f"rank-{rank}.json.gz").read_bytes()))
        events = [event.get("name", "") for event in trace["traceEvents"]]
        assert sum(name.startswith("Optimizer.step") for name in events) == 2
        assert any(name.startswith("FSDP::all_gather") for name in events)
        assert "aten::mm" in (folder / f"rank-{rank}.txt").read_text()


def test_metrics_have_every_key(run: Run) -> None:
    rows = read_rows(run.output_dir)
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "eval_loss" in row]

    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    for row in trained:
        assert set(row) >= _ROW
        assert row["tokens"] + row["padding_tokens"] == 4 * 128
        assert 0 < row["valid_tokens"] < row["tokens"]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2)
        assert 0 <= row["data_wait_seconds"] < row["step_seconds"]
        assert 0 < row["mfu_pct"] < 100
        assert 0.05 < row["memory_peak_gib"] < 8
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]


def test_tensorboard_reads_the_same_numbers(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.output_dir / "tensorboard")).Reload()

    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        losses(run.output_dir)
    )
    assert [event.step for event in events.Scalars("evaluation/eval_loss")] == [0, 2, 4]


def test_config_yaml_can_be_given_back(run: Run, tmp_path: Path) -> None:
    file = run.output_dir / "config.yaml"
    again = train(
        [f"--config={file}", "--steps=2", "--schedule.name=constant"],
        cache_dir=run.folder / "cache",
        output_dir=tmp_path / "again",
    )
    printed = run_command(
        [sys.executable, TRAIN, f"--config={file}", "--print_config"],
        timeout=60,
        env=clean_environment(tmp_path / "private"),
    )

    assert again.returncode == 0, again.output
    assert losses(tmp_path / "again")[0] == losses(run.output_dir)[0]
    assert printed.returncode == 0, printed.output
    assert printed.stdout == file.read_text()


def test_the_export_is_the_trained_model(run: Run) -> None:
    """Its loss on the held-out rows, by transformers alone, is the one the run logged at its end."""
    export = run.output_dir / "export"
    model = load_export(run.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(export)
    loss, count = 0.0, 0
    starts = tokenizer.encode("<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    import pyarrow.parquet as pq

    for row in pq.read_table(run.folder / "data" / "test.parquet").to_pylist():
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        labels, inside = [], False
        for place, token in enumerate(ids):
            before = ids[max(0, place - len(starts)) : place]
            inside = inside or before == starts
            labels.append(token if inside else -100)
            inside = inside and token != end
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        targets = torch.tensor(labels[1:])
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())

    logged = [row["eval_loss"] for row in read_rows(run.output_dir) if "eval_loss" in row]
    assert loss / count == pytest.approx(logged[-1], abs=2e-6)


def test_the_export_stops_where_a_turn_ends(run: Run) -> None:
    export = run.output_dir / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = GenerationConfig.from_pretrained(export)
    stops = generation.eos_token_id
    config = json.loads((export / "config.json").read_text())

    assert end in (stops if isinstance(stops, list) else [stops])
    assert config["eos_token_id"] == end
    assert tokenizer.eos_token == "<|im_end|>"
    assert config["pad_token_id"] == generation.pad_token_id == tokenizer.pad_token_id != end
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    with safe_open(export / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118  # no mapping


def test_added_tokens_grow_a_full_vocabulary(tmp_path: Path) -> None:
    """A tied model without a row to spare; bfloat16 on disk, without the head."""
    tokenizer_size = len(AutoTokenizer.from_pretrained(write_model(tmp_path / "spare")))
    model = write_model(tmp_path / "model", vocab_size=tokenizer_size)

    result = train(
        [
            f"--model.path={model}",
            f"--data.path={write_chat(tmp_path / 'chat.jsonl', count=60)}",
            '--model.add_special_tokens=["<|tool|>", "<|/tool|>"]',
            "--data.seq_len=128",
            "--micro_batch_size=2",
            "--steps=1",
            "--log.tensorboard=false",
        ],
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "out",
    )

    assert result.returncode == 0, result.output
    assert "new rows of model.embed_tokens.weight" in result.stdout
    with safe_open(tmp_path / "out" / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        embedding = file.get_tensor("model.embed_tokens.weight")
    assert "lm_head.weight" not in names
    assert embedding.dtype == torch.bfloat16
    assert embedding.shape[0] == -(-(tokenizer_size + 2) // 64) * 64
    exported = load_export(tmp_path / "out")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "export")) == tokenizer_size + 2


@pytest.mark.slow
def test_real_qwen3_tokenizer(qwen3_tokenizer_dir: Path, tmp_path: Path) -> None:
    """A vocabulary of 151,936 rows, thinking template and all."""
    result = train(
        [
            f"--model.tokenizer={qwen3_tokenizer_dir}",
            '--model.overrides={"hidden_size": 64, "intermediate_size": 128, '
            '"num_hidden_layers": 2, "vocab_size": 151936}',
            f"--data.path={write_chat(tmp_path / 'chat.jsonl', count=100)}",
            "--data.seq_len=128",
            "--micro_batch_size=2",
            "--steps=3",
            *EXACT,
        ],
        cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "out",
        timeout=240,
    )

    assert result.returncode == 0, result.output
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(11.93, abs=0.3)  # ln(151936): random weights know nothing
    assert found[-1] < found[0]
    export = tmp_path / "out" / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((export / "config.json").read_text())["eos_token_id"] == 151645
    assert GenerationConfig.from_pretrained(export).eos_token_id == [151645, 151643]
    assert load_export(tmp_path / "out").config.vocab_size == 151936
