"""The command line: precedence, types, round trips, and one helpful line for each mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from models.config import ModelConfig
from scripts.command_line import (
    EMBEDDED_RECIPE,
    CommandLineError,
    build_parser,
    parse_train_config,
    to_yaml,
)
from scripts.config import TrainConfig
from scripts.foreign_names import FOREIGN_NAMES
from tests.support.command import ROOT, clean_environment, run_command

NAMED = ["--model.name", "Qwen/Qwen3-0.6B"]


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """Every flag's name and value; `config` is a config or the dictionary of one."""
    items = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    flat: dict[str, object] = {}
    for key, value in items.items():
        if isinstance(value, dict) and key not in ("overrides", "loss_options"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


FLAGS = flatten(TrainConfig())


def error_of(*argv: str) -> str:
    """The line that these arguments are answered with."""
    with pytest.raises(CommandLineError) as caught:
        parse_train_config(list(argv))
    line = str(caught.value)
    assert line.isprintable()
    return line


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_named_model_gets_the_dataclass_defaults() -> None:
    config = parse_train_config(NAMED)
    assert config == TrainConfig(model=ModelConfig(name="Qwen/Qwen3-0.6B"))


def test_both_spellings_of_a_flag_and_scientific_notation() -> None:
    for spelling in (["--optimizer.learning_rate", "1e-4"], ["--optimizer.learning_rate=1e-4"]):
        rate = parse_train_config([*NAMED, *spelling]).optimizer.learning_rate
        assert rate == 1e-4 and isinstance(rate, float)


def test_values_of_every_type() -> None:
    config = parse_train_config(
        [
            "--model.path=/models/x",
            "--model.init=random",
            "--model.add_special_tokens=[<|tool|>, '3']",
            '--model.overrides={"num_hidden_layers": 2, "name": "3", "eps": 1e-6}',
            "--optimizer.betas=[0.8, 99e-2]",
            "--parallel.dp_shard",
            "-1",
            "--log.tensorboard",
            "false",
            "--steps=7",
            "--steps=null",
            "--epochs=2",
            "--data.revision=1234567",
            "--data.name=org/chat",
            "--output_dir=a=b",
        ]
    )
    assert config.model.overrides == {"num_hidden_layers": 2, "name": "3", "eps": 1e-6}
    assert config.model.add_special_tokens == ("<|tool|>", "3")
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.parallel.dp_shard == -1
    assert config.log.tensorboard is False
    assert config.steps is None
    assert config.epochs == 2.0 and isinstance(config.epochs, float)
    assert config.data.revision == "1234567"
    assert config.output_dir == "a=b"


def test_a_file_wins_over_defaults_a_later_file_over_it_and_a_flag_over_all(tmp_path: Path) -> None:
    first = write(tmp_path, "steps: 1\nseed: 1\nepochs: 3\noptimizer: {eps: 1e-4}\n", "first.yaml")
    second = write(tmp_path, "steps: 2\nseed: 2\noptimizer:\n  weight_decay: 0.5\n", "second.yaml")
    # The flag wins although it comes first.
    config = parse_train_config(["--steps=3", "--config", first, f"--config={second}", *NAMED])
    assert (config.steps, config.seed, config.epochs) == (3, 2, 3.0)
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-4, 0.5)


def test_without_a_model_the_embedded_recipe_is_under_the_users_values(tmp_path: Path) -> None:
    recipe = flatten(yaml.safe_load(EMBEDDED_RECIPE.read_text()))
    rate = recipe["optimizer.learning_rate"] = float(recipe["optimizer.learning_rate"])  # type: ignore[arg-type]
    assert rate != TrainConfig().optimizer.learning_rate
    assert recipe.items() <= flatten(parse_train_config([])).items()

    file = write(tmp_path, "micro_batch_size: 2\nmodel:\n  name: null\nschedule:\n")
    config = parse_train_config(["--config", file, "--steps=5"])
    assert (config.micro_batch_size, config.steps) == (2, 5)
    assert config.optimizer.learning_rate == rate
    # A value that equals the dataclass default is a value the user gave, too.
    assert parse_train_config(["--optimizer.learning_rate=1e-5"]).optimizer.learning_rate == 1e-5

    named = write(tmp_path, "model: {path: /models/x}\n", "named.yaml")
    assert parse_train_config(["--config", named]).optimizer.learning_rate == 1e-5


def test_yaml_may_be_dotted_or_nested_or_empty(tmp_path: Path) -> None:
    file = write(tmp_path, "optimizer.eps: 1e-4\nmodel: {name: a/b}\ndata: {revision: null}\n")
    config = parse_train_config(["--config", file, "--config", write(tmp_path, "", "empty.yaml")])
    assert config == replace(
        TrainConfig(), model=ModelConfig(name="a/b"), optimizer=config.optimizer
    )
    assert config.optimizer.eps == 1e-4


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(min_size=1, max_size=20)
    | st.sampled_from(
        ["null", "~", "true", "1e5", "12", "é", "1:30", "2024-01-01", "{a: b}", " x ", "a\x85b"]
    ),
    rate=st.floats(0, 1e300),
    overrides=st.dictionaries(
        st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text() | st.none()
    ),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
)
def test_to_yaml_given_back_yields_the_equal_config(
    tmp_path: Path, text: str, rate: float, overrides: dict, betas: tuple[float, float]
) -> None:
    config = TrainConfig(
        cache_dir=text,
        output_dir=text,
        model=ModelConfig(path=text, init="random", overrides=overrides),
        data=DataConfig(path=text, split=text),
    )
    optimizer = replace(config.optimizer, learning_rate=rate, betas=betas)
    config = replace(config, optimizer=optimizer)
    assert parse_train_config(["--config", write(tmp_path, to_yaml(config))]) == config


def test_print_config_of_the_embedded_run_yields_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--seed=3", "--log.every=1"]
    with pytest.raises(SystemExit) as caught:
        parse_train_config([*argv, "--print_config"])
    assert caught.value.code == 0
    file = write(tmp_path, capsys.readouterr().out)
    assert parse_train_config(["--config", file]) == parse_train_config(argv)


@pytest.mark.parametrize("flag", ["--help", "-h", "--print_config"])
def test_only_rank_0_prints(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            parse_train_config([flag])
        assert caught.value.code == 0
        printed[rank] = capsys.readouterr().out
    assert "cache_dir" in printed["0"]
    assert printed["1"] == ""


@pytest.mark.parametrize("columns", [80, 200])
def test_help_documents_every_flag_with_its_default(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = build_parser(TrainConfig, "train.py").format_help()
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    entries = re.split(r"\n  (?=--)", text)
    documented = {}
    for entry in entries[1:]:
        name, *_ = entry.split(maxsplit=1)
        documented[name.removeprefix("--")] = " ".join(entry.split("\n\n")[0].split())
    assert {*FLAGS, "config", "print_config"} == documented.keys()
    for name in FLAGS:
        help_text = re.sub(r"^\S+ (\{KEY: VALUE\}|\S+) ", "", documented[name])
        assert re.match(r"\w.{8,} \(default: .+\)$", help_text), (name, help_text)
    assert "(default: 1e-05)" in documented["optimizer.learning_rate"]
    assert "(default: [0.9, 0.95])" in documented["optimizer.betas"]
    assert "(default: true)" in documented["checkpoint.export"]
    assert "(default: null)" in documented["steps"]
    # Top-level flags first, then one section for each group.
    assert [name for name in documented if "." not in name] == list(documented)[
        : sum("." not in name for name in documented)
    ]
    assert "CONFIG" not in text and "type:" not in text and "Literal" not in text


@pytest.mark.parametrize(
    ("sources", "line"),
    [
        ("[{pth: a}]", "data.sources[0] has the unknown key pth: did you mean path?"),
        ("[{path: a, name: b/c}]", "data.sources[0] needs one of name, path and prepared"),
        ("[{path: a, weight: 0}]", "weight must be a number above 0, got 0"),
        ("[{path: a, weight: true}]", "weight must be a number above 0, got True"),
        ("[{path: a, weight: 1}, {path: b}]", "give every source a weight, or none of them"),
        ("[{path: a, train_on: some}]", "train_on must be one of all, last, got 'some'"),
        ("[{path: 3}]", "path must be text, got 3"),
        ("[a.jsonl]", "expected a list like [{KEY: VALUE},...], got '[a.jsonl]'"),
        ("a.jsonl", "expected a list like [{KEY: VALUE},...], got 'a.jsonl'"),
        ("[{path: a, revision: main}]", "--data.revision needs --data.name"),
    ],
)
def test_a_wrong_source_is_one_line(sources: str, line: str) -> None:
    with pytest.raises(CommandLineError) as raised:
        parse_train_config([f"--data.sources={sources}"])
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_sources_come_from_files_and_flags_and_are_given_back(tmp_path: Path) -> None:
    sources = ({"path": "3", "weight": 2}, {"name": "org/a", "weight": 0.5, "format": "text"})
    file = tmp_path / "mix.yaml"
    file.write_text(
        "data:\n  sources:\n  - {path: '3', weight: 2}\n"
        "  - {name: org/a, weight: 0.5, format: text}\n"
    )
    config = parse_train_config([f"--config={file}"])
    assert config.data.sources == sources
    assert parse_train_config([f"--data.sources={json.dumps(sources)}"]).data == config.data
    file.write_text(to_yaml(config))
    assert parse_train_config([f"--config={file}"]) == config
    with pytest.raises(CommandLineError, match=r"sources and data\.path are both given"):
        parse_train_config([f"--config={file}", "--data.path=x.jsonl"])


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--epochs=2", "--data.streaming has no end: give --steps"),
        ("--data.workers=2", "--data.workers 0 or 1"),
        ("--data.sources=[{path: a}]", "reads one source"),
        ("--data.prepared=x", "--data.prepared needs none"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(flag: str, line: str) -> None:
    steps = [] if "epochs" in flag else ["--steps=2"]
    with pytest.raises(CommandLineError, match=line):
        parse_train_config(["--data.streaming=true", flag, *steps])


def test_help_may_be_cut_off_by_who_reads_it() -> None:
    command = [sys.executable, ROOT / "scripts" / "train.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(30) == 0


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from scripts.command_line import parse_train_config\n"
        "try: parse_train_config(['--help'])\n"
        "finally: print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    result = run_command(
        [sys.executable, "-c", program], timeout=30, env=clean_environment(tmp_path)
    )
    assert result.returncode == 0 and result.stdout.endswith("set()\n"), result.output


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--optimizer.lerning_rate", "1"],
            "unknown flag --optimizer.lerning_rate; did you mean --optimizer.learning_rate? "
            "(see --help)",
        ),
        (
            ["--per_device_train_batch_size=4"],
            "--per_device_train_batch_size is --micro_batch_size here",
        ),
        (["--learning-rate=4"], "--learning-rate is --optimizer.learning_rate here"),
        (
            ["--gradient_accumulation_steps=4"],
            "--gradient_accumulation_steps is derived here: set --global_batch_size, rows per step",
        ),
    ],
)
def test_whole_lines(argv: list[str], line: str) -> None:
    assert error_of(*argv) == line


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--micro_batch_siz", "--micro_batch_size"),
        ("--micro-batch-size", "--micro_batch_size"),
        ("--optimizer-learning-rate", "--optimizer.learning_rate"),
        ("--optimizer.learning-rate", "--optimizer.learning_rate"),
        ("--train.learning_rate", "--optimizer.learning_rate"),
        ("--seqlen", "--data.seq_len"),
        ("--keep_last", "--checkpoint.keep_last"),
        ("--warmup_step", "--schedule.warmup_steps"),
        ("-seed", "--seed"),
        ("--micro_batch", "--micro_batch_size"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(given: str, meant: str) -> None:
    assert error_of(given, "1") == f"unknown flag {given}; did you mean {meant}? (see --help)"


def test_a_name_in_several_groups_is_answered_with_all() -> None:
    line = error_of("--name", "x")
    names = ("data", "model", "optimizer", "schedule")
    assert " or ".join(f"--{group}.name" for group in names) in line


def test_a_name_near_nothing_gets_no_guess() -> None:
    assert error_of("--xyzzy=1") == "unknown flag --xyzzy (see --help)"


def test_the_foreign_names_lead_to_real_flags_and_hide_none() -> None:
    required = """
        model_name_or_path dataset_name dataset_path dataset_config dataset_train_split
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        num_train_epochs max_steps learning_rate lr_scheduler_type warmup_ratio warmup_steps
        max_seq_length max_length packing bf16 fp16 tf32 gradient_checkpointing fsdp fsdp_config
        deepspeed save_steps save_total_limit logging_steps eval_steps eval_strategy
        resume_from_checkpoint report_to weight_decay adam_beta1 adam_beta2 max_grad_norm optim
        torch_dtype attn_implementation dataloader_num_workers use_peft lora_r
    """
    assert not set(required.split()) - FOREIGN_NAMES.keys()
    assert not FOREIGN_NAMES.keys() & FLAGS.keys()
    groups = {name.partition(".")[0] for name in FLAGS}
    for name, answer in FOREIGN_NAMES.items():
        for flag in re.findall(r"--([\w.]+)", answer):
            assert flag.rstrip(".") in FLAGS or (answer[:2] != "--" and flag in groups), name
        assert error_of(f"--{name}=1").startswith(f"--{name} ")


def test_every_argument_of_the_other_trainers_is_answered() -> None:
    from transformers import TrainingArguments

    classes = [TrainingArguments]
    if find_spec("trl") is not None:
        import trl

        classes += [trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments]
    names = {field.name for one in classes for field in fields(one)}
    assert len(names) > 100
    known = {name.rpartition(".")[2] for name in FLAGS} | FOREIGN_NAMES.keys()
    assert names - known == set()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--steps", "abc"], "--steps: expected an integer or null, got 'abc'"),
        (["--seed=1.5"], "--seed: expected an integer, got '1.5'"),
        ([f"--seed={'9' * 5000}"], "--seed: expected an integer"),
        (["--seed=true"], "--seed: expected an integer"),
        (["--seed=null"], "--seed: expected an integer"),
        (["--log.tensorboard=maybe"], "--log.tensorboard: expected true or false, got 'maybe'"),
        (["--device=tpu"], "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        (["--optimizer.betas=0.9"], "--optimizer.betas: expected a list like [NUMBER,NUMBER]"),
        (["--optimizer.betas=[1,2,3]"], "--optimizer.betas: expected a list like [NUMBER,NUMBER]"),
        (["--model.add_special_tokens=x"], "expected a list like [TEXT,...], got 'x'"),
        (["--model.overrides=3"], "--model.overrides: expected a mapping"),
        (["--model.overrides={x: !!python/name:os.system }"], "--model.overrides: expected a map"),
        (["--optimizer.eps=\x1b[31m"], r"got '\x1b[31m'"),
        (["--x\x1b[31m=1"], r"unknown flag --x\x1b[31m"),
        (["junk"], "unexpected argument 'junk'"),
        (["--steps", "3", "4"], "unexpected argument '4'"),
        (["--steps"], "--steps needs a value"),
        (["--parallel.reshard_after_forward"], "--parallel.reshard_after_forward needs a value"),
        (["--steps", "--seed", "1"], "--steps needs a value"),
        (["--"], "unknown flag --"),
        (["--model", "x"], "--model is a group: set --model.KEY"),
        (["--config", "/none.yaml"], "--config /none.yaml: No such file or directory"),
        (["--config", "/"], "--config /: Is a directory"),
    ],
)
def test_a_wrong_value_is_one_line(argv: list[str], part: str) -> None:
    assert part in error_of(*argv)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\noptimizer:\n  lerning_rate: 1\n", ":3: unknown key optimizer.lerning_rate; did"),
        ("seed: 1\nlearning_rate: 1\n", ":2: learning_rate is optimizer.learning_rate here"),
        ("gradient_accumulation_steps: 1\n", "is derived here: set global_batch_size, rows per"),
        ("steps: 1\nseed: 2\nsteps: 1\n", ":3: duplicate key steps"),
        ("optimizer: {eps: 1}\noptimizer.eps: 2\n", ":2: duplicate key optimizer.eps"),
        ("optimizer: {eps: 1}\noptimizer: {betas: [0, 0]}\n", ":2: duplicate key optimizer"),
        ("model:\n  overrides:\n    a: 1\n    a: 2\n", ":4: duplicate key a"),
        ("seed: 1\nsteps: many\n", ":2: steps: expected an integer or null, got 'many'"),
        ("model:\n  revision: 1234567\n", ":2: model.revision: expected text (quote it) or null"),
        ("data: {split: null}\n", ":1: data.split: expected text (quote it), got null"),
        ("steps: [1]\n", ":1: steps: expected an integer or null, got [1]"),
        ("model: Qwen/Qwen3-8B\n", ":1: model is a group: indent its keys under it"),
        ("- seed: 1\n", ": expected a mapping"),
        ("just words\n", ": expected a mapping"),
        ("seed: !!python/object/apply:os.system ['true']\n", ":1: could not determine a construct"),
        ("seed: [1\n", ":2: while parsing a flow sequence expected ',' or ']'"),
        ("seed: 1\n---\nseed: 2\n", "expected a single document"),
        ("model: {revision: 2024-13-01}\n", ":1: model.revision: month must be in 1..12"),
        (f"seed: {'9' * 5000}\n", ":1: seed: Exceeds the limit"),
        ("seed: 1\x00", "special characters are not allowed"),
        ("<<: {seed: 1}\n", ":1: unknown key <<"),
        ("1: 2\n", ":1: unknown key 1"),
        ("? [a, b]\n: 1\n", ":1: unknown key"),
        ("model: {overrides: &a {x: *a}}\n", "nested too deeply"),
        ("config: other.yaml\n", ":1: unknown key config"),
        ("print_config: true\n", ":1: unknown key print_config"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place(
    tmp_path: Path, text: str, part: str
) -> None:
    file = write(tmp_path, text)
    line = error_of("--config", file)
    assert line.startswith(file) and part in line


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "name:os.system", "module:os"])
def test_S07_tags_of_yaml_make_no_objects(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    value = f"!!python/{tag} [{canary}]" if "object" in tag else f"!!python/{tag} ''"
    for text in (f"seed: {value}\n", f"model: {{overrides: {{x: {value}}}}}\n"):
        line = error_of("--config", write(tmp_path, text))
        assert "could not determine a constructor" in line
    assert "expected a mapping" in error_of(f"--model.overrides={{x: {value}}}")
    assert not canary.exists()
    made = yaml.unsafe_load(value)  # a loader that is not safe makes it
    assert canary.exists() or made in (os, os.system)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"seed: 1 # \xff\n")
    assert "not UTF-8" in error_of("--config", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--seed=99999999999999999999"], "--seed must be below 2**63"),
        (["--steps=0"], "--steps must be at least 1, got 0"),
        (["--micro_batch_size=-1"], "--micro_batch_size must be at least 1, got -1"),
        (["--epochs=0"], "--epochs must be above 0"),
        (["--epochs=.inf"], "--epochs must be a finite number"),
        (["--optimizer.learning_rate=-1"], "--optimizer.learning_rate must be at least 0"),
        (["--optimizer.betas=[0.9, 1.0]"], "--optimizer.betas must be in [0, 1), got [0.9, 1.0]"),
        (["--optimizer.betas=[.nan, 0.9]"], "--optimizer.betas must be a finite number"),
        (["--optimizer.eps=0"], "--optimizer.eps must be above 0"),
        (["--optimizer.muon_momentum=1.0"], "--optimizer.muon_momentum must be in [0, 1), got 1.0"),
        (["--optimizer.head_lr_ratio=-0.1"], "--optimizer.head_lr_ratio must be at least 0"),
        (["--optimizer.embedding_lr_ratio=-1"], "--optimizer.embedding_lr_ratio must be at least"),
        (["--schedule.min_ratio=1.1"], "--schedule.min_ratio must be between 0 and 1"),
        (["--schedule.decay_pct=101"], "--schedule.decay_pct must be between 0 and 100"),
        (["--data.max_bad_rows_pct=-1"], "--data.max_bad_rows_pct must be between 0 and 100"),
        (["--parallel.dp_shard=0"], "--parallel.dp_shard must be -1 or at least 1, got 0"),
        (["--cache_dir="], "--cache_dir is empty"),
        (["--model.name=a/b", "--model.path=c"], "--model.name and --model.path are both given"),
        (["--data.name=a/b", "--data.path=c"], "--data.name and --data.path are both given"),
        (["--lora.alpha=8"], "--lora flags do nothing without --lora.rank"),
        (["--lora.rank=4"], "--lora.rank keeps pretrained weights: give --model.name"),
        (
            ["--model.train_last_layers=1", "--model.path=x", "--model.init=random"],
            "--model.train_last_layers keeps pretrained weights",
        ),
        (["--model.path=x", "--lora.rank=4", "--lora.dropout=1"], "must be in [0, 1), got 1.0"),
        (["--model.path=x", "--lora.rank=4", "--lora.targets=[]"], "--lora.targets must be"),
        (["--checkpoint.export=adapter"], "--checkpoint.export adapter needs adapters"),
        (
            ["--model.path=x", "--model.train_last_layers=1", "--model.add_special_tokens=[<|a|>]"],
            "--model.train_last_layers freezes the embedding",
        ),
        (["--model.revision=main"], "--model.revision needs --model.name"),
        (["--data.path=x", "--data.revision=main"], "--data.revision needs --data.name"),
        (["--model.name=../x"], "got '../x'; for a local file or folder use --model.path"),
        (["--model.name=a/.."], "--model.name must be a hub name such as org/name"),
        (["--data.name=/data/chat.jsonl"], "use --data.path"),
        ([*NAMED, "--model.overrides={a: 1}"], "add --model.init random"),
        (["--model.overrides={1: 1}"], "--model.overrides must have names"),
        (
            ["--parallel.wrap_policy=layers"],
            "size, module:ClassA,ClassB or callable:package.function",
        ),
        (["--parallel.wrap_policy=module:"], "must be transformer, size, module:ClassA,ClassB or"),
        (["--parallel.reshard_after_forward=1"], "true, false or a number from 2 on, got 1"),
        (
            ["--parallel.compile=true", "--parallel.activation_checkpointing=op"],
            "--parallel.compile hides from --parallel.activation_checkpointing op which operations",
        ),
        (["--allow_changed=[sed]"], "--allow_changed takes data, packing, seq_len"),
        (["--checkpoint.mirror=bucket/run"], "--checkpoint.mirror must be a URL such as s3://"),
        (["--checkpoint.keep_every=-1"], "--checkpoint.keep_every must be at least 0"),
        (
            ["--parallel.cp=3", "--data.seq_len=4096"],
            "--data.seq_len 4096 is not divisible by --parallel.cp 3, the ranks that share a row; "
            "use a multiple of it such as 4098",
        ),
        (
            ["--parallel.cp=2", "--model.attention=sdpa"],
            "--parallel.cp needs --model.attention packed",
        ),
        (["--parallel.checkpoint_every=0"], "--parallel.checkpoint_every must be at least 1"),
        (["--parallel.prefetch_layers=-1"], "--parallel.prefetch_layers must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_one_line(argv: list[str], part: str) -> None:
    assert part in error_of(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--optimizer.learning_rate=0", "--optimizer.max_grad_norm=0"],
        ["--model.overrides={num_hidden_layers: 1}"],
        [*NAMED, "--model.init=random", "--model.overrides={num_hidden_layers: 1}"],
        ["--model.name=Qwen/Qwen2.5-0.5B-Instruct", "--data.name=squad"],
        ["--parallel.wrap_policy=callable:my_package.policies.every_layer"],
        ["--parallel.wrap_policy=module:Qwen3MLP,Qwen3DecoderLayer"],
        ["--parallel.reshard_after_forward=8"],
        ["--parallel.cp=3", "--data.seq_len=96"],
        ["--parallel.reshard_after_forward=false"],
    ],
)
def test_values_at_the_edge_are_accepted(argv: list[str]) -> None:
    assert isinstance(parse_train_config(argv), TrainConfig)


@pytest.mark.parametrize("argv", [["--dry_run"], ["--dry_run", "--seed", "3"], ["--dry_run=true"]])
def test_a_switch_alone_is_true(argv: list[str]) -> None:
    config = parse_train_config(argv)
    assert config.dry_run and not parse_train_config(["--dry_run", "false"]).dry_run
    assert config.seed == (3 if "--seed" in argv else 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--loss_options={beta: 1}"], "--loss_options are arguments of an own loss: give --loss"),
        (["--loss=a.b", "--loss_options={a-b: 1}"], "--loss_options must have names of arguments"),
        (["--loss=a.b", "--loss_options=3"], "--loss_options: expected a mapping"),
    ],
)
def test_options_of_a_loss_are_its_arguments(flags: list[str], line: str) -> None:
    assert line in error_of(*flags)
    config = parse_train_config(["--loss=a.b", "--loss_options={beta: 0.1, names: [a, b]}"])
    assert config.loss_options == {"beta": 0.1, "names": ["a", "b"]}
