"""Every command that README.md and docs/ show is given, page by page, as a reader would who follows the page.

Commands that only other machines can run (az, sbatch, sky) or that take long (benchmarks, make) are checked for the
files and flags they name. All others run: on models and data of the documented names that a hub on the loopback
interface serves, for one step and on two ranks at most. A command that no rule here knows fails the test of its page:
add its script to SCRIPTS, or its program to PROGRAMS.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from torch.distributed.run import parse_args

from scripts.batching import batch_sizes
from scripts.command_line import parse_run_config, parse_train_config
from scripts.launch import DEFAULTS
from scripts.plan import PlanConfig
from tests.support.command import ROOT, clean_environment, run_command
from tests.support.documented import PAGES, Command, commands
from tests.support.hub import LoopbackHub
from tests.support.job import run_script
from tests.support.ranks import free_port
from tests.support.tiny import write_chat, write_model
from trainer.parallel import data_rank

pytestmark = pytest.mark.distributed

MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B")
DATASETS = ("org/chat", "org/name")
# Run only with the slow tests.
SLOW = (r"--engine ray",)
# Pages whose commands take longest.
LONG = ("doctor", "launch", "watching")
# What is added to every training: it must not take long.
SMALL = [
    *("--steps=1", "--data.seq_len=128", "--micro_batch_size=1", "--log.tensorboard=false"),
    *("--evaluation.max_rows=2", "--evaluation.generate_rows=0"),
]


class Reader:
    """Somebody in a clone of the repository, with a cache and a hub, who gives one command after the other."""

    def __init__(self, folder: Path, shared: Path, hub: LoopbackHub, *, literally: bool) -> None:
        self.folder, self.hub, self.literally = folder, hub, literally
        self.cache_dir = shared / "cache"
        self.output_dir = shared / "output"
        """Of the last training; before the first, of one that was made before."""
        for name in (
            "scripts",
            "trainer",
            "data",
            "models",
            "docs",
            "setup.cfg",
            "constraints.txt",
        ):
            (folder / name).symlink_to(ROOT / name)
        for place in ("cache", "data-disk/cache", "local-disk/cache", "shared-disk/cache"):
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).symlink_to(self.cache_dir)
        for name in ("chat.jsonl", "code.jsonl"):
            write_chat(folder / name, count=20)
        self.of_examples()
        write_chat(folder / "corpus" / "train.jsonl", count=20)
        write_chat(folder / "bucket" / "set" / "train.jsonl", count=20)
        (folder / "job.yaml").write_text("model:\n  name: Qwen/Qwen3-8B\ndata:\n  name: org/chat\n")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
        (folder / "my_loss.py").write_text(code, encoding="utf-8")
        (folder / "my_project").mkdir()
        (folder / "my_project" / "losses.py").write_text(
            code.replace("z_loss", "focal_loss"), encoding="utf-8"
        )

    def of_examples(self) -> None:
        """What the pages of docs/examples name: articles, texts to watch, and the model that `make demo` trains."""
        body = (
            "Words of an article that has more than twenty of them, so that it is long enough. " * 2
        )
        rows = [{"title": f"Day {number}", "body": body} for number in range(20)]
        for name, lines in (("articles", rows), ("texts/new", [{"text": body}])):
            file = self.folder / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        model = self.hub.repositories["models", MODELS[0]]["main"]
        (self.folder / "outputs" / "demo").mkdir(parents=True)
        (self.folder / "outputs" / "demo" / "export").symlink_to(model)

    # --------------------------------------------------------------------------------- our scripts

    def script(self, command: Command) -> None:
        """python or torchrun with one of our scripts."""
        program, *words = command.words
        script = next((word for word in words if re.fullmatch(r"scripts/[\w/]+\.py", word)), "")
        name = script.removeprefix("scripts/")
        assert (ROOT / script).is_file(), f"{command.page}: {command.text}: no script of ours"
        launcher: list[str] = []
        if program == "torchrun" or name == "launch.py":
            words = words[name == "launch.py" :]
            if not words:
                return self.help(name)
            border = words.index(next(word for word in words if word.startswith("scripts/")))
            launcher, (script, *words) = words[:border], words[border:]
            name = script.removeprefix("scripts/")
        else:
            words = words[words.index(script) + 1 :]
            if not words and name != "train.py":
                return self.help(name)  # the script is named, and its flags are elsewhere
        assert name in SCRIPTS, f"{command.page}: {command.text}: add a rule for it to SCRIPTS"
        ranks = self.ranks(launcher)
        SCRIPTS[name](self, Call(command, name, [self.place(word) for word in words], ranks))

    def ranks(self, launcher: list[str]) -> int:
        """Ranks of a launch, over all nodes, as torchrun reads its flags."""
        if not launcher:
            return 1
        arguments = parse_args([*DEFAULTS, *launcher, "train.py"])
        assert arguments.rdzv_backend in ("static", "c10d")
        return int(arguments.nnodes.rpartition(":")[2]) * int(arguments.nproc_per_node)

    def place(self, word: str) -> str:
        """A word with the names that stand for something replaced by it."""
        word = re.sub(r"(^|=)/(data|local|shared)/", rf"\1{self.folder}/\2-disk/", word)
        word = word.replace("s3://bucket/", f"file://{self.folder}/bucket/")
        word = word.replace("$SLURM_ARRAY_TASK_ID", "1")
        if word.startswith("OUTPUT_DIR"):
            word = word.replace("OUTPUT_DIR", str(self.output_dir), 1)
            steps = sorted(path.name for path in self.output_dir.glob("checkpoints/step-*"))
            word = re.sub(r"step-\d{8}", steps[-1], word)
        return str(self.folder / "DIR") if word == "DIR" else word

    def run(self, call: Call, *more: str, ranks: int | None = None) -> str:
        """Run it with the flags of the page and `more`; returns what it prints. It must succeed."""
        ranks = call.ranks if ranks is None else ranks
        words = [*call.words, *more]
        env = {"HF_ENDPOINT": self.hub.url, **call.command.environment}
        if self.literally:
            launch = ["python"]
            if ranks > 1:
                launch = ["torchrun", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
                launch.append(f"--master_port={free_port()}")
            private = clean_environment(self.folder / "private")
            path = f"{Path(sys.executable).parent}{os.pathsep}{private['PATH']}"
            command = [*launch, f"scripts/{call.script}", *words]
            result = run_command(
                ["bash", "-c", shlex.join(command)],
                timeout=280, env={**private, **env, "PATH": path}, cwd=self.folder,
            )  # fmt: skip
        else:
            given = [
                following if flag == "--cache_dir" else flag.partition("=")[2]
                for flag, following in pairwise([*words, ""])
                if flag.startswith("--cache_dir")
            ]
            cache_dir = self.folder / (given or ["cache"])[-1]
            log = self.folder / "log"
            result = run_script(call.script, words, ranks, cache_dir=cache_dir, log=log, env=env)
        assert result.returncode == 0, f"{call.command.page}: {call.command.text}: {result.output}"
        return result.stdout

    def help(self, name: str) -> str:
        call = Call(Command("", "", {}, []), name, ["--help"], 1)
        return self.run(call)


class Call(NamedTuple):
    """A script with the arguments of a page."""

    command: Command
    script: str
    words: list[str]
    ranks: int


def train(reader: Reader, call: Call) -> None:
    """As it stands it is read and its batch divides over the ranks it names; then it runs, smaller, on one or two."""
    words = [word for word in call.words if word != "..."]
    config = parse_train_config(words)
    batch_sizes(config, data_rank(config.parallel, rank=0, world_size=call.ranks).size)
    ranks = min(call.ranks, 2)
    rows = data_rank(config.parallel, rank=0, world_size=ranks).size
    output = reader.folder / f"output-{len(list(reader.folder.glob('output-*')))}"
    more = [*SMALL, f"--global_batch_size={rows}", f"--output_dir={output}"]
    assert "1 step" in reader.run(call._replace(words=words), *more, ranks=ranks)
    reader.output_dir = output


def with_flags(*more: str) -> Callable[[Reader, Call], None]:
    """A rule: run it, with these flags added."""

    def run(reader: Reader, call: Call) -> None:
        reader.run(call, *more)

    return run


def export(reader: Reader, call: Call) -> None:
    (folder,) = {str(reader.folder / "DIR")} & {*call.words}
    subprocess.run(["rm", "-rf", folder], check=True)
    reader.run(call)
    assert list(Path(folder).glob("*.safetensors"))


def generate(reader: Reader, call: Call) -> None:
    assert call.words[-1] in reader.run(call, "--max_new_tokens=4")


def plan(reader: Reader, call: Call) -> None:
    """It is read; what it prints without a model takes no time. (--fit would write constants of the repository, and
    --matrix takes minutes.)
    """
    words = ["published.csv" if word == "CSV" else word for word in call.words]
    config = parse_run_config(PlanConfig, call.script, words)
    if config.fit is None and not config.matrix and (reader.literally or config.model.name is None):
        assert reader.run(call)


def flags_only(reader: Reader, call: Call) -> None:
    """The script takes these flags: tests of its own run it."""
    border = call.words.index("--") if "--" in call.words else len(call.words)
    own, of_training = call.words[:border], call.words[border + 1 :]
    groups = [word for word in own[:1] if re.fullmatch(r"[a-z]+", word)]
    text = reader.run(call._replace(words=[*groups, "--help"]))
    flags = {word.partition("=")[0] for word in own if word.startswith("--")}
    assert flags <= {*re.findall(r"--\w+", text)}, call.command
    assert parse_train_config(of_training)


def inspect(reader: Reader, call: Call) -> None:
    assert "tokens" in reader.run(call)


SCRIPTS: dict[str, Callable[[Reader, Call], None]] = {
    "train.py": train,
    "inspect_data.py": inspect,
    "prefetch.py": with_flags("--data.seq_len=128"),
    "prepare_data.py": with_flags("--data.seq_len=128", "--data.prepare_workers=1"),
    "export.py": export,
    "generate.py": generate,
    "doctor.py": with_flags(),
    "plan.py": plan,
    "report.py": with_flags(),
    "verify.py": with_flags("--only=[tied]"),
    "benchmark.py": flags_only,
    "chaos.py": flags_only,
    "examples/own_loop.py": with_flags(*SMALL, "--global_batch_size=2"),
}
"""Script -> what is done with a command of it."""


# ------------------------------------------------------------------------------- other programs


def make(reader: Reader, command: Command) -> None:
    """The target exists."""
    for target in command.words[1:]:
        subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=30
        )


def pip(reader: Reader, command: Command) -> None:
    """Files, extras and packages are those of setup.cfg."""
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for word in command.words[2:]:
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert re.search(rf"^{extra[1]} =$", setup, re.M), command
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), command
        elif re.fullmatch(r"[a-z]\w+", word):
            assert re.search(rf"^ +{word}\b", setup, re.M), command
        else:
            assert word in ("-c", "-e", "lm_eval[hf]"), command


def azure(reader: Reader, command: Command) -> None:
    """The job is there and takes the inputs that are set."""
    words = command.words
    files = [words[index + 1] for index, word in enumerate(words) if word == "-f"]
    for file in files or ["scripts/azureml/one-node.yaml"] * (words[1:3] == ["ml", "job"]):
        job = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        for name in re.findall(r"inputs\.(\w+)=", command.text):
            assert name in job["inputs"], command


def slurm(reader: Reader, command: Command) -> None:
    """The script is there, and what follows its output folder are flags of train.py."""
    script, _output_dir, *flags = command.words[1:]
    assert (ROOT / script).is_file()
    assert {*command.environment} <= {"CACHE_DIR"}
    parse_train_config(flags)


def sky(reader: Reader, command: Command) -> None:
    assert (ROOT / command.words[-1]).is_file()


def lm_eval(reader: Reader, command: Command) -> None:
    """Flags of lm-evaluation-harness 0.4.13, which is no dependency; the folder is a run's."""
    flags = {word for word in command.words if word.startswith("--")}
    known = {"--model", "--model_args", "--tasks", "--apply_chat_template", "--batch_size"}
    assert flags <= known | {"--output_path"}, command
    (arguments,) = re.findall(r"--model_args (\S+)", command.text)
    values = dict(part.split("=") for part in arguments.split(","))
    assert values["pretrained"] == "OUTPUT_DIR/export" and values["dtype"] in (
        "bfloat16",
        "float32",
    )


def tensorboard(reader: Reader, command: Command) -> None:
    assert command.words[1] == "--logdir"


PROGRAMS: dict[str, Callable[[Reader, Command], None]] = {
    "python": Reader.script,
    "torchrun": Reader.script,
    "make": make,
    "pip": pip,
    "az": azure,
    "sbatch": slurm,
    "sky": sky,
    "lm_eval": lm_eval,
    "tensorboard": tensorboard,
}
"""Program -> what is done with a command of it."""


# ------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("served")
    model = write_model(folder / "tiny", max_position_embeddings=32768)
    data = write_chat(folder / "chat" / "train.jsonl", count=40).parent
    with LoopbackHub(dict.fromkeys(MODELS, model), dict.fromkeys(DATASETS, data)) as served:
        yield served


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a run of one step in `output`."""
    folder = tmp_path_factory.mktemp("shared")
    flags = [f"--cache_dir={folder / 'cache'}", f"--output_dir={folder / 'output'}", *SMALL]
    result = run_script("train.py", flags, cache_dir=folder / "cache", log=folder / "log")
    assert result.returncode == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("page", "literally"),
    [
        *(
            pytest.param(
                page,
                False,
                id=page.relative_to(ROOT).as_posix(),
                marks=[pytest.mark.slow] * (page.stem in LONG),
            )
            for page in PAGES
        ),
        # In a shell, which a reader's first page and Ray take.
        *(
            pytest.param(ROOT / name, True, id=f"{name}, literally", marks=pytest.mark.slow)
            for name in ("README.md", "docs/prepare.md")
        ),
    ],
)
def test_every_command_of_a_page(
    page: Path,
    literally: bool,
    tmp_path: Path,
    shared: Path,
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = Reader(tmp_path, shared, hub, literally=literally)
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        program = command.words[0]
        assert program in PROGRAMS, f"{page.name}: {command.text}: add a rule for it to PROGRAMS"
        if literally or not any(re.search(part, command.text) for part in SLOW):
            PROGRAMS[program](reader, command)
