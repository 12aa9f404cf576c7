"""train.py with adapters and with frozen layers: from a folder to exports, stopped and continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.embedded import build_tokenizer
from scripts import generate
from scripts.export import main as export
from scripts.partial import check_part
from tests.support.command import CommandResult
from tests.support.job import EXACT, checkpoint_steps, losses, train
from tests.support.tiny import write_chat, write_model
from trainer.errors import TrainError
from trainer.stored import StoredTensors

pytestmark = pytest.mark.distributed

KNOWN = len(build_tokenizer())  # all its rows are taken: an added token needs a new one
LORA = [
    "--lora.rank=4",
    "--lora.alpha=8",
    "--lora.dropout=0.1",
    "--checkpoint.export=both",
    "--model.add_special_tokens=[<|tool|>]",
]
FROZEN = ["--model.train_last_layers=1"]


@dataclass(frozen=True)
class Job:
    """A command, and two finished runs of it: adapters with dropout, and the last layer alone."""

    folder: Path
    args: list[str]

    def run(self, output_dir: Path, *more: str) -> CommandResult:
        args = [*self.args, *more]
        return train(args, cache_dir=self.folder / "cache", output_dir=output_dir)

    def continued(self, name: str, to: Path) -> Path:
        """What is left of a run that was stopped after step 2."""
        shutil.copytree(self.folder / name, to)
        for part in ("checkpoints/step-00000004", "export", "adapter"):
            shutil.rmtree(to / part, ignore_errors=True)
        return to


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("partial")
    args = [
        f"--model.path={write_model(folder / 'base', tied=False, vocab_size=KNOWN)}",
        f"--data.path={write_chat(folder / 'chat.jsonl', count=60)}",
        "--data.seq_len=128",
        "--micro_batch_size=1",
        "--steps=4",
        "--checkpoint.every=2",
        *EXACT,
    ]
    job = Job(folder, args)
    for name, flags in (("lora", LORA), ("frozen", FROZEN)):
        result = job.run(folder / name, *flags)
        assert result.returncode == 0, result.output
        assert result.stderr == ""
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("trained ")]
        part = {
            "lora": "LoRA of rank 4 on down_proj",
            "frozen": "decoder layers 2 to 2, final norm, head",
        }
        assert part[name] in line
    return job


def _facts(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "run.json").read_text())["model"]


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_adapters_are_exported_merged_and_alone(job: Job) -> None:
    output_dir, base = job.folder / "lora", job.folder / "base"
    merged = AutoModelForCausalLM.from_pretrained(output_dir / "export")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = _logits(plain)
    plain.resize_token_embeddings(KNOWN + 1, mean_resizing=False)
    adapted = PeftModel.from_pretrained(plain, str(output_dir / "adapter"))
    found, expected = _logits(adapted), _logits(merged)[..., : KNOWN + 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected[..., :KNOWN] - before).abs().max() > 1e-3
    config = json.loads((output_dir / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["base_model_name_or_path"] == str(base)
    assert "library_name: peft" in (output_dir / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("name", ["lora", "frozen"])
def test_a_checkpoint_holds_what_is_trained(job: Job, name: str) -> None:
    output_dir, base = job.folder / name, load_file(job.folder / "base" / "model.safetensors")
    held = StoredTensors(output_dir / "checkpoints" / "step-00000004").shapes()
    facts = _facts(output_dir)
    assert sum(shape.numel() for shape in held.values()) == facts["trained_parameters"]
    assert facts["trained_parameters"] < facts["parameters"]
    exported = load_file(output_dir / "export" / "model.safetensors")
    assert exported.keys() == base.keys()
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    changed = {
        key
        for key in base
        if not torch.equal(base[key], exported[key][:KNOWN] if key in grown else exported[key])
    }
    if name == "lora":
        assert all(".lora_" in key or key.endswith(".token_rows") for key in held)
        assert {key.split(".")[-2] for key in changed} >= {"q_proj", "down_proj"}
        assert not changed & {*grown, "model.norm.weight"}
        tokenizer = AutoTokenizer.from_pretrained(output_dir / "adapter")
        assert tokenizer.convert_tokens_to_ids("<|tool|>") == KNOWN
        # The new row is trained, in the embedding if the data had it; the padding is the mean that it was.
        for key in grown:
            assert exported[key].shape[0] % 64 == 0
            mean = base[key].double().mean(0).float()
            rows = (exported[key][KNOWN:] - mean).abs().amax(dim=1) > 1e-6
            assert rows.tolist() == [key == "lm_head.weight"] + [False] * (len(rows) - 1)
    else:
        assert {f"hf.{key}" for key in changed} == held.keys()
        assert {key.split(".")[2] for key in changed if ".layers." in key} == {"1"}
        assert {"lm_head.weight", "model.norm.weight"} < changed


@pytest.mark.parametrize(
    ("name", "flags"),
    [("lora", LORA), pytest.param("frozen", FROZEN, marks=pytest.mark.slow)],
)
def test_resuming_is_bit_exact(job: Job, tmp_path: Path, name: str, flags: list[str]) -> None:
    output_dir, whole = job.continued(name, tmp_path / "out"), job.folder / name
    result = job.run(output_dir, *flags)
    assert result.returncode == 0, result.output
    assert "after step 2 of 4" in result.stdout
    assert losses(output_dir) == losses(whole)
    for file in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (output_dir / file).exists() == (whole / file).exists()
        if (whole / file).exists():
            assert (output_dir / file).read_bytes() == (whole / file).read_bytes()
    files = [
        json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())[
            "files"
        ]
        for folder in (output_dir, whole)
    ]
    assert files[0]["tensors/__1_0.distcp"] == files[1]["tensors/__1_0.distcp"]


def test_another_base_is_refused(job: Job, tmp_path: Path) -> None:
    output_dir = job.continued("lora", tmp_path / "out")
    other = write_model(tmp_path / "other", tied=False, seed=1, trained=False, vocab_size=KNOWN)
    result = job.run(output_dir, *LORA, f"--model.path={other}")
    assert result.returncode == 1
    assert "give the base model it began with" in result.stderr
    assert result.stderr.count("\n") == 1
    assert checkpoint_steps(output_dir) == [2]


def test_another_part_is_refused(job: Job) -> None:
    checkpoints = [
        job.folder / name / "checkpoints" / "step-00000004" for name in ("lora", "frozen")
    ]
    lora, frozen = (
        json.loads((folder / "state.json").read_text())["partial"] for folder in checkpoints
    )
    for was, now, message in (
        (lora, {**lora, "lora": {**lora["lora"], "alpha": 16}}, "lora.alpha was 8, is 16"),
        (lora, frozen, "lora.rank was 4, is 0"),
        (frozen, None, "model.train_last_layers was 1, is all"),
        (None, lora, "lora.rank was all, is 4"),
    ):
        with pytest.raises(TrainError, match=message):
            check_part(checkpoints[0], was, now)
    check_part(checkpoints[0], lora, {**lora, "lora": {**lora["lora"], "dropout": 0.0}})


def test_export_and_generate_find_the_base(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flag, place in (
        ("lora", "--adapter=false", "export"),
        ("lora", "--adapter=true", "adapter"),
        ("frozen", "--adapter=false", "export"),
    ):
        folder = tmp_path / f"{name}-{place}"
        assert export([str(job.folder / name), str(folder), "--dtype=float32", flag]) == 0
        expected = {path.name: path.read_bytes() for path in (job.folder / name / place).iterdir()}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert export([str(job.folder / "frozen"), str(tmp_path / "no"), "--adapter=true"]) == 1
    assert "has no adapters" in capsys.readouterr().err

    shutil.copytree(job.folder / "lora", tmp_path / "moved")
    state = tmp_path / "moved" / "checkpoints" / "step-00000004" / "state.json"
    record = json.loads(state.read_text())
    record["partial"]["base"]["folder"] = str(tmp_path / "gone")
    state.write_text(json.dumps(record))
    checkpoint = state.parent
    (checkpoint / "manifest.json").write_text(_manifest(checkpoint))
    assert export([str(checkpoint), str(tmp_path / "no")]) == 1
    assert "give --base DIR" in capsys.readouterr().err
    where = [f"--base={job.folder / 'base'}"]
    assert export([str(checkpoint), str(tmp_path / "again"), "--dtype=float32", *where]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "lora-export" / "model.safetensors"
    ).read_bytes()

    answers = []
    capsys.readouterr()
    for folder in (tmp_path / "lora-export", tmp_path / "lora-adapter", checkpoint):
        arguments = [str(folder), "What is 1 + 1?", "--max_new_tokens=3"]
        assert generate.main([*arguments, *(where if folder == checkpoint else [])]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def _manifest(checkpoint: Path) -> str:
    import hashlib

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / "state.json").read_bytes()
    manifest["files"]["state.json"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return json.dumps(manifest)


@pytest.mark.slow
def test_a_rehearsal_with_adapters(job: Job, tmp_path: Path) -> None:
    result = job.run(tmp_path / "dry", *LORA, "--dry_run=true", "--parallel.param_dtype=bfloat16")
    assert result.returncode == 0, result.output
    assert "frozen weights bfloat16" in result.stdout
    assert "equal in every bit" in result.stdout


def test_a_misspelt_target_is_one_line(job: Job, tmp_path: Path) -> None:
    result = job.run(tmp_path / "out", "--lora.rank=4", "--lora.targets=[q_porj]")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert "no linear layer q_porj; there are down_proj, gate_proj, k_proj, o_proj" in result.stderr
