"""What a user did wrong is one line on the terminal, and every rank ends at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import CommandResult, clean_environment, torchrun
from tests.support.job import TRAIN, train
from tests.support.ranks import free_port
from tests.support.tiny import write_chat, write_model

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Inputs:
    """A model and data that would train, in a folder of this test's own."""

    folder: Path
    model: Path
    chat: Path


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_model(folder / "model")
    write_chat(folder / "chat.jsonl", count=40)
    return folder


@pytest.fixture
def inputs(originals: Path, tmp_path: Path) -> Inputs:
    shutil.copytree(originals, tmp_path / "inputs")
    return Inputs(
        tmp_path / "inputs", tmp_path / "inputs" / "model", tmp_path / "inputs" / "chat.jsonl"
    )


def _given(inputs: Inputs) -> list[str]:
    return [
        f"--model.path={inputs.model}",
        f"--data.path={inputs.chat}",
        "--data.seq_len=128",
        "--micro_batch_size=4",
        "--global_batch_size=8",
        "--steps=2",
    ]


def _change_config(inputs: Inputs, **values: object) -> None:
    file = inputs.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _unknown_model_type(inputs: Inputs) -> list[str]:
    _change_config(inputs, model_type="llama")
    return []


def _wider_model(inputs: Inputs) -> list[str]:
    _change_config(inputs, intermediate_size=192)
    return []


def _deeper_model(inputs: Inputs) -> list[str]:
    _change_config(inputs, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return []


def _truncated_weights(inputs: Inputs) -> list[str]:
    file = inputs.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return []


def _no_weights(inputs: Inputs) -> list[str]:
    (inputs.model / "model.safetensors").unlink()
    return []


def _no_tokenizer(inputs: Inputs) -> list[str]:
    for file in inputs.model.glob("tokenizer*"):
        file.unlink()
    return []


def _no_template(inputs: Inputs) -> list[str]:
    (inputs.model / "chat_template.jinja").unlink()
    return []


def _empty_data(inputs: Inputs) -> list[str]:
    inputs.chat.write_text("")
    return []


def _broken_line(inputs: Inputs) -> list[str]:
    with inputs.chat.open("a") as file:
        file.write('{"messages": [\n')
    return []


def _other_columns(inputs: Inputs) -> list[str]:
    inputs.chat.write_text(json.dumps({"body": "hello"}) + "\n")
    return []


def _few_rows(inputs: Inputs) -> list[str]:
    write_chat(inputs.chat, count=1)
    return []


def _file_as_output(inputs: Inputs) -> list[str]:
    return [f"--output_dir={inputs.chat / 'out'}"]


_MISTAKES: list[tuple[Callable[[Inputs], list[str]], str]] = [
    (
        _unknown_model_type,
        "model_type 'llama'; this trainer knows qwen2, qwen2_moe, qwen3, qwen3_moe",
    ),
    (_wider_model, "tensors of another shape: "),
    (_deeper_model, "missing model.layers.2."),
    (_truncated_weights, "model.safetensors cannot be read as safetensors"),
    (_no_weights, "holds no model.safetensors"),
    (_no_tokenizer, "--model.tokenizer"),
    (_no_template, "chat template"),
    (_empty_data, "chat.jsonl: empty"),
    (_broken_line, "chat.jsonl:41: broken JSON"),
    (_other_columns, "chat.jsonl: the columns body"),
    (_few_rows, "fewer than global_batch_size=8"),
    (_file_as_output, "--output_dir"),
]


@pytest.mark.parametrize(
    ("mistake", "said"), _MISTAKES, ids=[mistake.__name__.strip("_") for mistake, _ in _MISTAKES]
)
def test_wrong_files_are_one_line(
    inputs: Inputs, cache_dir: Path, mistake: Callable[[Inputs], list[str]], said: str
) -> None:
    args = [*_given(inputs), *mistake(inputs)]

    result = train(args, 2, cache_dir=cache_dir, output_dir=inputs.folder / "out")

    _check(result, said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.learning_rat=1e-4"], "--optimizer.learning_rate"),
        (["--learning_rate=1e-4"], "--optimizer.learning_rate"),
        (["--steps=many"], "--steps"),
        (["--data.seq_len=1024"], "over the model's limit of 512 positions"),
        (["--global_batch_size=9"], "use 8 or 16"),
        (["--micro_batch_size=0"], "micro_batch_size"),
        (["--global_batch_size=-8"], "global_batch_size"),
        (["--steps=0"], "steps"),
        (["--epochs=0", "--steps=null"], "epochs"),
        (["--data.seq_len=0"], "seq_len"),
        (["--log.every=0"], "log.every"),
        (["--checkpoint.every=-1"], "checkpoint.every"),
        (["--parallel.dp_replicate=3"], "dp_replicate 3"),
        (["--parallel.wrap_policy=layers"], "must be transformer, size, module:"),
        (["--parallel.wrap_policy=module:LlamaMLP"], "it has Embedding, Linear, Qwen3Attention"),
        (["--parallel.reshard_after_forward=3"], "3 does not divide the 2 ranks"),
        (
            ["--parallel.wrap_policy=callable:no.such.policy"],
            "no.such.policy: there is no module no",
        ),
        (["--data.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data.split=validation"], "split"),
        (["--evaluation.split=validation"], "split"),
        (["--model.path=nowhere"], "nowhere"),
        (["--model.tokenizer=nowhere/at/all"], "nowhere/at/all"),
        (["--model.name=org/model"], "--model.name and --model.path"),
        (["--data.name=org/chat"], "--data.name and --data.path"),
        (['--model.overrides={"hidden_size": 32}'], "--model.init random"),
        (['--model.overrides={"hiden_size": 32}', "--model.init=random"], "hiden_size"),
        (["--resume=nowhere"], "nowhere"),
        (["--device=cuda"], "--device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_one_line(
    inputs: Inputs, cache_dir: Path, flags: list[str], said: str
) -> None:
    result = train(
        [*_given(inputs), *flags], 2, cache_dir=cache_dir, output_dir=inputs.folder / "out"
    )

    _check(result, said)


@pytest.mark.slow
def test_torchrun_shows_the_line_once(inputs: Inputs, cache_dir: Path, tmp_path: Path) -> None:
    """A hub that is out of reach, found by one rank; and a typo, found by both."""
    env = clean_environment(tmp_path / "private")
    cold = {
        **env,
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    common = [TRAIN, f"--cache_dir={cache_dir}", f"--output_dir={tmp_path / 'out'}"]
    file = tmp_path / "file"
    file.touch()

    for args, said in (
        (["--model.name=org/model"], f"model org/model is not in the cache {cache_dir / 'hub'}"),
        ([f"--cache_dir={file / 'cache'}"], f"--cache_dir {file / 'cache'} cannot be written"),
        (["--optimiser.eps=1"], "--optimizer.eps"),
    ):
        result = torchrun([*common, *args], timeout=120, env=cold, cwd=tmp_path)

        # torchrun adds its own report that a process failed.
        ours = [line for line in result.output.splitlines() if "train.py: error:" in line]
        assert len(ours) == 1, result.output
        assert said in ours[0]
        before = result.stderr.split("train.py: error:")[0].splitlines()
        fetching = (
            [f"fetching org/model to {cache_dir}"] if "--model.name=org/model" in args else []
        )
        assert before == fetching, "noise before the message"
        assert "Traceback (most recent call last)" not in result.stderr.split("torch")[0]
        assert result.returncode != 0
    # Only who found the hub out of reach had come as far as the output folder.
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def _check(result: CommandResult, said: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr or f"nothing said, exit code {result.returncode}"
    assert lines[0].startswith("train.py: error: ")
    assert said in lines[0]
    assert result.returncode in (1, 2)
