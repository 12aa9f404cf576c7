"""Flags and YAML files in, one frozen config dataclass out; a mistake is one line and its remedy.

Order of precedence: dataclass default < embedded recipe < `--config` files, in order < flags,
wherever they stand. jsonargparse holds the flags and checks the types. Names are checked here,
because argparse cannot say what a wrong one should have been; YAML is read here, because the usual
loader keeps the last of two equal keys and forgets line numbers.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import os
import re
import shutil
import sys
import traceback
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import (
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from data.config import source_configs
from data.errors import DataError
from models.config import LoraConfig
from scripts.config import LASTING, TrainConfig
from scripts.foreign_names import FOREIGN_NAMES

EMBEDDED_RECIPE = Path(__file__).parent / "recipes" / "embedded.yaml"

Config = TypeVar("Config")
RunConfig = TypeVar("RunConfig", bound=TrainConfig)

# A function's name, package.module.function.
_FUNCTION = r"\w+(\.\w+)+"
_SHOWN_CHOICES = 60  # characters of a flag's choices that --help has room for

# Inclusive lower bounds. The types are already right when these are checked.
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "steps": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "model.train_last_layers": 0,
    "lora.rank": 0,
    "lora.alpha": 1,
    "data.seq_len": 2,
    "data.stream_buffer_rows": 1,
    "data.prepare_workers": 0,
    "data.workers": 0,
    "parallel.dp_replicate": 1,
    "parallel.cp": 1,
    "parallel.tp": 1,
    "parallel.min_wrap_params": 1,
    "parallel.checkpoint_every": 1,
    "parallel.prefetch_layers": 0,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.embedding_lr_ratio": 0,
    "optimizer.head_lr_ratio": 0,
    "optimizer.max_grad_norm": 0,
    "optimizer.max_skipped_steps": 0,
    "schedule.warmup_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 0,
    "checkpoint.keep_every": 0,
    "evaluation.every": 0,
    "evaluation.max_rows": 1,
    "evaluation.generate_rows": 0,
    "evaluation.max_new_tokens": 1,
    "log.every": 1,
    "guards.check_every": 0,
    "guards.slow_rank_ratio": 0,
    "guards.spike_window": 0,
    "guards.spike_deviations": 0,
    "guards.hang_seconds": 0,
    "guards.collective_timeout_seconds": 1,
}


def printable(text: str) -> str:
    """The text with every character escaped that would not show, or would move the cursor.

    Names, values and data come from files: none of their control characters may reach a terminal.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """`printable` text that keeps its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """In place of `sys.excepthook`: the message of an error that nobody expected may hold data."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(printable_lines(text), file=sys.stderr, end="", flush=True)


class CommandLineError(ValueError):
    """One printable line: what is wrong, where, the remedy. Scripts print it and exit with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Leaf(NamedTuple):
    """One flag: its dotted name, type, default and help, and the help of its group."""

    name: str
    hint: Any
    default: Any
    doc: str
    group_doc: str


class _Help(argparse.HelpFormatter):
    """Two columns, never wider than 100 characters."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=width)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Unquoted, some line separators would be read back as spaces.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_train_config(argv: list[str] | None = None) -> TrainConfig:
    """The configuration of one run of train.py; see `parse_run_config`."""
    return parse_run_config(TrainConfig, "train.py", argv)


def parse_run_config(
    config_class: type[RunConfig], prog: str, argv: list[str] | None = None
) -> RunConfig:
    """The configuration of a script that reads train.py's flags, and maybe some of its own.

    Args:
        config_class: `TrainConfig`, or a dataclass that adds fields to it.
        prog: the script's name in its help.
        argv: the arguments without the program's name; default: those of this process.

    Raises:
        CommandLineError: for any mistake in the flags or in a file.
        SystemExit: with 0 after `--help` or `--print_config`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(config_class, prog)
    if "--help" in argv or "-h" in argv:
        print_and_exit(parser.format_help())
    given = [argument for argument in argv if argument != "--print_config"]
    values = read_values(parser, config_class, given)
    if values.get("model.name") is None and values.get("model.path") is None:
        values = read_yaml(parser, config_class, EMBEDDED_RECIPE) | values
    config = build_config(config_class, values)
    validate(config)
    if len(given) < len(argv):
        print_and_exit(to_yaml(config))
    return config


def build_parser(config_class: type, prog: str) -> ArgumentParser:
    """A parser with one flag for each leaf of the config dataclass; its docstrings are the help."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml ...] [--FLAG VALUE ...]",
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("general")
    group.add_argument("-h", "--help", action="store_true", help="Show this help and exit.")
    group.add_argument(
        "--config",
        metavar="FILE.yaml",
        action="append",
        help="YAML file with values for these flags; a later file wins over an earlier one, a flag "
        "over any file. Can be repeated. (default: none)",
    )
    group.add_argument(
        "--print_config",
        action="store_true",
        help="Print the resolved configuration as YAML for --config, and exit.",
    )
    title = ""
    for leaf in _leaves(config_class):
        if leaf.name.rpartition(".")[0] != title:
            title = leaf.name.rpartition(".")[0]
            group = parser.add_argument_group(title, leaf.group_doc)
        group.add_argument(
            f"--{leaf.name}",
            type=leaf.hint,
            default=leaf.default,
            metavar=_placeholder(leaf.hint),
            help=f"{leaf.doc} (default: {_shown(leaf.default)})".replace("%", "%%"),
        )
    return parser


def read_values(parser: ArgumentParser, config_class: type, argv: list[str]) -> dict[str, Any]:
    """What a user gave, as {"optimizer.learning_rate": 1e-05, ...}: files first, flags over them.

    Raises:
        CommandLineError: unknown or misspelt name, missing or wrong value, unreadable file.
    """
    hints = {leaf.name: leaf.hint for leaf in _leaves(config_class)}
    files: list[str] = []
    flags: dict[str, Any] = {}
    for name, text in _split_arguments(argv, hints):
        if name == "config":
            files.append(text)
        else:
            flags[name] = _checked(parser, name, hints[name], text, f"--{name}", is_flag=True)
    values: dict[str, Any] = {}
    for file in files:
        values.update(read_yaml(parser, config_class, Path(file)))
    return values | flags


def read_yaml(parser: ArgumentParser, config_class: type, path: Path) -> dict[str, Any]:
    """The values of one YAML file, as {"optimizer.learning_rate": 1e-05, ...}.

    Raises:
        CommandLineError: unreadable, not safe YAML, not a mapping, duplicate or unknown key, or
            wrong type; with the line.
    """
    hints = {leaf.name: leaf.hint for leaf in _leaves(config_class)}
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise CommandLineError(f"{path}: expected a mapping of flag names to values")
        values: dict[str, Any] = {}
        for name, node in _walk(root, "", hints, path, set()):
            place = f"{path}:{node.start_mark.line + 1}: {name}"
            try:
                value = loader.construct_object(node, deep=True)
            except ValueError as error:  # a date with month 13, an integer of 5,000 digits
                raise CommandLineError(f"{place}: {error}") from error
            values[name] = _checked(parser, name, hints[name], value, place)
    except OSError as error:
        raise CommandLineError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandLineError(f"--config {path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise CommandLineError(f"{path}{line}: {problem}; only plain YAML is read") from error
    except yaml.YAMLError as error:
        raise CommandLineError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise CommandLineError(f"{path}: nested too deeply") from error
    return values


def build_config(config_class: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """The dataclass with these dotted values and its own defaults for the rest."""
    hints = get_type_hints(config_class)
    arguments = {}
    for field in fields(config_class):  # type: ignore[arg-type]
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            arguments[field.name] = build_config(hints[field.name], values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return config_class(**arguments)


def to_yaml(config: Any) -> str:
    """The configuration as YAML; given back with `--config` it yields the equal dataclass."""
    plain = asdict(config, dict_factory=lambda items: {key: _plain(value) for key, value in items})
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def print_and_exit(text: str) -> NoReturn:
    """Print on rank 0 alone, then leave with exit code 0 on every rank."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text.rstrip(), flush=True)
        except BrokenPipeError:  # `--help | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def validate(config: TrainConfig) -> None:
    """Check what needs neither files nor the number of ranks.

    Raises:
        CommandLineError: a value out of range, or two values that contradict each other.
    """
    values = {leaf.name: attrgetter(leaf.name)(config) for leaf in _leaves(type(config))}
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise CommandLineError(f"--{name} must be a finite number, got {number}")
        if value == "":
            raise CommandLineError(f"--{name} is empty: give a value, or leave the flag out")
    for name, bound in _AT_LEAST.items():
        if values[name] is not None and values[name] < bound:
            raise CommandLineError(f"--{name} must be at least {bound}, got {values[name]}")
    _check_numbers(config, values)
    _check_sources(config)
    _check_model(config)
    _check_parallel(config)
    _check_functions(config)
    unknown = [key for key in config.allow_changed if key not in LASTING]
    _require(not unknown, f"--allow_changed takes {', '.join(LASTING)}; got {', '.join(unknown)}")
    for name in ("wandb", "mlflow"):
        _require(
            not getattr(config.log, name) or find_spec(name) is not None,
            f"--log.{name} needs {name}: pip install -c constraints.txt -e '.[{name}]'",
        )
    mirror = config.checkpoint.mirror
    _require(
        mirror is None or re.match(r"[a-z0-9]+://.", mirror) is not None,
        f"--checkpoint.mirror must be a URL such as s3://bucket/run, got {mirror!r}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CommandLineError(message)


def _check_numbers(config: TrainConfig, values: Mapping[str, Any]) -> None:
    """Single values."""
    _require(config.seed < 2**63, f"--seed must be below 2**63, got {config.seed}")
    shards = config.parallel.dp_shard
    _require(
        shards == -1 or shards >= 1, f"--parallel.dp_shard must be -1 or at least 1, got {shards}"
    )
    _require(config.epochs > 0, f"--epochs must be above 0, got {config.epochs}")
    _require(
        config.optimizer.eps > 0, f"--optimizer.eps must be above 0, got {config.optimizer.eps}"
    )
    _require(
        all(0 <= beta < 1 for beta in config.optimizer.betas),
        f"--optimizer.betas must be in [0, 1), got {_shown(config.optimizer.betas)}",
    )
    _require(
        0 <= config.optimizer.muon_momentum < 1,
        f"--optimizer.muon_momentum must be in [0, 1), got {config.optimizer.muon_momentum}",
    )
    _require(
        0 <= config.schedule.min_ratio <= 1,
        f"--schedule.min_ratio must be between 0 and 1, got {config.schedule.min_ratio}",
    )
    steps = config.log.profile
    _require(
        steps is None
        or (
            re.fullmatch(r"[1-9][0-9]*(-[1-9][0-9]*)?", steps) is not None
            and len(config.log.profiled_steps) > 0
        ),
        f"--log.profile must be a step or the first and the last of some, such as 10-12, got {steps!r}",
    )
    for name in ("schedule.decay_pct", "data.max_bad_rows_pct"):
        _require(
            0 <= values[name] <= 100, f"--{name} must be between 0 and 100, got {values[name]}"
        )


def _check_sources(config: TrainConfig) -> None:
    """Where model and data come from."""
    try:
        sources = [source.data for source in source_configs(config.data)]
    except DataError as error:
        raise CommandLineError(f"--{error}") from error
    for group, source in (("model", config.model), *(("data", source) for source in sources)):
        prepared = getattr(source, "prepared", None)
        given = [
            key for key in ("name", "path", "prepared") if getattr(source, key, None) is not None
        ]
        _require(
            len(given) < 2,
            f"{' and '.join(f'--{group}.{key}' for key in given)} are both given: keep one",
        )
        _require(
            source.revision is None or source.name is not None,
            f"--{group}.revision needs --{group}.name: a local path has no revision",
        )
        _require(
            source.name is None
            or re.fullmatch(r"(?!.*\.\.)(\w[\w.-]*/)?\w[\w.-]*", source.name) is not None,
            f"--{group}.name must be a hub name such as org/name, got {source.name!r}; "
            f"for a local file or folder use --{group}.path",
        )
        _require(
            prepared is None or getattr(source, "transform", None) is None,
            "--data.prepared holds tokens, and --data.transform changes rows: leave one out",
        )
        _require(
            not (config.data.streaming and prepared is not None),
            "--data.streaming reads rows: --data.prepared needs none, leave one out",
        )
    if config.data.streaming:
        _require(config.steps is not None, "--data.streaming has no end: give --steps")
        _require(not config.data.sources, "--data.streaming reads one source, not --data.sources")
        _require(
            config.data.workers <= 1,
            "--data.streaming has one place in the stream per rank: --data.workers 0 or 1",
        )


def _check_model(config: TrainConfig) -> None:
    """What of the model is trained, and what is written of it."""
    named = config.model.name is not None or config.model.path is not None
    _require(
        not (config.model.overrides and named and config.model.init == "pretrained"),
        "--model.overrides changes the shape of the weights: add --model.init random",
    )
    lora, partial = config.lora, config.lora.rank > 0 or config.model.train_last_layers > 0
    _require(
        lora.rank > 0 or lora == LoraConfig(),
        "--lora flags do nothing without --lora.rank: give one above 0",
    )
    _require(0 <= lora.dropout < 1, f"--lora.dropout must be in [0, 1), got {lora.dropout}")
    _require(
        len(lora.targets) > 0
        and (lora.targets == ("all-linear",) or "all-linear" not in lora.targets),
        "--lora.targets must be [all-linear] or names of linear layers, "
        f"got {_shown(lora.targets)}",
    )
    _require(
        lora.rank == 0 or find_spec("peft") is not None,
        "--lora.rank needs peft: pip install -c constraints.txt -e '.[lora]'",
    )
    _require(
        not partial or (named and config.model.init == "pretrained"),
        f"--{'lora.rank' if lora.rank else 'model.train_last_layers'} keeps pretrained weights: give "
        "--model.name or --model.path, and no --model.init random",
    )
    _require(
        not (lora.rank and config.parallel.float8 != "none"),
        "--parallel.float8 replaces the layers that adapters wrap: leave it out with --lora.rank",
    )
    _require(
        not (partial and config.parallel.tp > 1),
        "--parallel.tp splits the layers that adapters wrap, and is not proven with frozen ones: leave it out "
        "with --lora.rank and --model.train_last_layers",
    )
    _require(
        not (config.model.train_last_layers and config.model.add_special_tokens),
        "--model.train_last_layers freezes the embedding, of which --model.add_special_tokens trains "
        "rows: keep one of them",
    )
    _require(
        lora.rank > 0 or config.checkpoint.export not in ("adapter", "both"),
        f"--checkpoint.export {config.checkpoint.export} needs adapters: give --lora.rank, or true",
    )
    _require(
        all(isinstance(key, str) for key in config.model.overrides),
        "--model.overrides must have names from config.json as keys",
    )


def _check_parallel(config: TrainConfig) -> None:
    """How the model is spread, and what does not go with it."""
    _require(
        config.parallel.wrap_policy in ("transformer", "size")
        or re.fullmatch(rf"callable:{_FUNCTION}|module:\w+( *, *\w+)*", config.parallel.wrap_policy)
        is not None,
        "--parallel.wrap_policy must be transformer, size, module:ClassA,ClassB or "
        f"callable:package.function, got {config.parallel.wrap_policy!r}",
    )
    _require(
        not (config.parallel.compile and config.parallel.activation_checkpointing == "op"),
        "--parallel.compile hides from --parallel.activation_checkpointing op which operations to keep: "
        "use full or selective with it, or none",
    )
    cp = config.parallel.cp
    _require(
        config.data.seq_len % cp == 0,
        f"--data.seq_len {config.data.seq_len} is not divisible by --parallel.cp {cp}, the ranks that "
        f"share a row; use a multiple of it such as {-(-config.data.seq_len // cp) * cp}",
    )
    _require(
        cp == 1 or config.model.attention == "packed",
        "--parallel.cp needs --model.attention packed: a dense mask is of whole rows",
    )
    _require(
        config.parallel.float8 == "none" or importlib.util.find_spec("torchao") is not None,
        f"--parallel.float8 {config.parallel.float8} needs torchao: "
        "pip install -c constraints.txt -e '.[torchao]'",
    )
    _require(
        config.parallel.float8 == "none" or config.parallel.tp == 1,
        "--parallel.tp above 1 does not go with --parallel.float8: use one of them",
    )
    keep = config.parallel.reshard_after_forward
    _require(
        isinstance(keep, bool) or keep >= 2,
        f"--parallel.reshard_after_forward must be true, false or a number from 2 on, got {keep}",
    )


def _check_functions(config: TrainConfig) -> None:
    """Names of the user's own functions; they are imported later."""
    named = {
        "loss": [config.loss],
        "model.function": [config.model.function],
        "data.transform": [source.data.transform for source in source_configs(config.data)],
        "evaluation.functions": [*config.evaluation.functions],
    }
    for name, paths in named.items():
        for path in paths:
            _require(
                path is None or re.fullmatch(_FUNCTION, path) is not None,
                f"--{name} must be package.function, the name of a function in a module, got {path!r}",
            )
    _require(
        config.loss is not None or not config.loss_options,
        "--loss_options are arguments of an own loss: give --loss package.function too",
    )
    _require(
        all(isinstance(key, str) and key.isidentifier() for key in config.loss_options),
        "--loss_options must have names of arguments as keys",
    )
    for name, value, known in (
        ("optimizer.name", config.optimizer.name, ("adamw", "muon")),
        ("schedule.name", config.schedule.name, ("cosine", "linear", "constant", "wsd")),
    ):
        near = "".join(difflib.get_close_matches(value, known, n=1))
        _require(
            value in known or re.fullmatch(f"callable:{_FUNCTION}", value) is not None,
            f"--{name} must be {', '.join(known)} or callable:package.function, got {value!r}"
            + (f"; did you mean {near}?" if near else ""),
        )


@cache
def _leaves(config_class: type, prefix: str = "") -> tuple[_Leaf, ...]:
    """Every flag of the config dataclass, top-level flags first."""
    hints = get_type_hints(config_class)
    helps = {
        parameter.arg_name: parameter.description or ""
        for owner in config_class.__mro__
        if is_dataclass(owner)
        for parameter in parse_from_object(owner).params
    }
    group_doc = parse_from_object(config_class).short_description or ""
    leaves: list[_Leaf] = []
    nested: list[_Leaf] = []
    for field in fields(config_class):
        name, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            nested += _leaves(hint, f"{name}.")
        else:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            doc = " ".join(helps[field.name].split())
            leaves.append(_Leaf(name, hint, default, doc, group_doc))
    return (*leaves, *nested)


def _split_arguments(argv: list[str], hints: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name without dashes, text of the value) of each flag in argv; the names are checked.

    A flag that is true or false means true where no value follows.
    """
    known = {*hints, "config"}
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        if not argument.startswith("-"):
            raise CommandLineError(
                f"unexpected argument {argument!r}: every value follows its flag (see --help)"
            )
        flag, equals, text = argument.partition("=")
        name = flag.removeprefix("--")
        if flag != f"--{name}" or name not in known:
            raise CommandLineError(_explain_unknown(flag, known, "--"))
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.popleft()
            elif hints.get(name) is bool:
                text = "true"
            else:
                raise CommandLineError(f"--{name} needs a value (see --help)")
        yield name, text


def _walk(
    node: yaml.MappingNode, prefix: str, known: Iterable[str], path: Path, seen: set[str]
) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted name, node) of each leaf under a mapping; names are checked, none comes twice."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        place = f"{path}:{key.start_mark.line + 1}"
        if name in seen:
            raise CommandLineError(f"{place}: duplicate key {name}: keep one of them")
        seen.add(name)
        if name in known:
            _refuse_duplicates(value, path)
            yield name, value
        elif not any(other.startswith(f"{name}.") for other in known):
            raise CommandLineError(f"{place}: {_explain_unknown(name, known, '')}")
        elif isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{name}.", known, path, seen)
        elif value.tag != "tag:yaml.org,2002:null":
            raise CommandLineError(f"{place}: {name} is a group: indent its keys under it")


def _refuse_duplicates(node: yaml.Node, path: Path) -> None:
    """The same for mappings inside a value."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                place = f"{path}:{key.start_mark.line + 1}"
                raise CommandLineError(f"{place}: duplicate key {key.value}: keep one of them")
            seen.add(str(key.value))
            _refuse_duplicates(value, path)


def _explain_unknown(given: str, known: Iterable[str], dashes: str) -> str:
    """One line about a flag (dashes "--") or a YAML key (dashes "") that does not exist."""
    name = given.lstrip("-").replace("-", "_").lower()
    last = name.rpartition(".")[2]
    foreign = FOREIGN_NAMES.get(last)
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    if name in known:
        meant = [name]
    elif foreign is not None and "." not in name:
        answer = f"is {foreign} here" if foreign.startswith("--") else foreign
        return f"{given} {answer}".replace(" --", f" {dashes}")
    elif any(other.startswith(f"{name}.") for other in known):
        return f"{given} is a group: set {dashes}{name}.KEY for one of its keys (see --help)"
    elif same_end:
        meant = sorted(same_end)
    else:
        ends = {other.rpartition(".")[2]: other for other in known}
        meant = difflib.get_close_matches(name, known, n=1)
        meant = meant or [ends[end] for end in difflib.get_close_matches(last, ends, n=1)]
    kind = "flag" if dashes else "key"
    suggestion = " or ".join(f"{dashes}{other}" for other in meant)
    return (
        f"unknown {kind} {given}"
        + (f"; did you mean {suggestion}?" if meant else "")
        + " (see --help)"
    )


def _checked(
    parser: ArgumentParser, name: str, hint: Any, value: Any, place: str, *, is_flag: bool = False
) -> Any:
    """The value of a YAML key, or the text of a flag, converted to its type by jsonargparse."""
    members = [get_origin(member) or member for member in _alternatives(hint)]
    shown = repr(value) if isinstance(value, str) else _shown(value)
    wrong = CommandLineError(f"{place}: expected {_type_in_words(hint)}, got {shown}")
    try:
        mappings = any(
            get_origin((*get_args(member), None)[0]) is dict for member in _alternatives(hint)
        )
        if is_flag and (dict in members or mappings):
            value = yaml.load(value, Loader=_Loader)
            is_flag = False
        # A string or mapping of a file is final; jsonargparse would turn "3" inside it into 3.
        if not is_flag and type(value) in (str, dict, type(None)) and type(value) in members:
            return value
        if value is None:
            raise wrong
        if mappings:
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise wrong
            return tuple(value)
        if is_flag:
            return parser.parse_args([f"--{name}={value}"], defaults=False)[name]
        return parser.parse_object({name: value}, defaults=False)[name]
    except (argparse.ArgumentError, yaml.YAMLError, ValueError):
        raise wrong from None


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union; [hint] for any other type."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _placeholder(hint: Any) -> str:
    """What stands for the value in the help."""
    hint = _alternatives(hint)[0]
    if get_origin(hint) is Literal:
        names = ",".join(get_args(hint))
        # All of them are in the flag's text, and in the error about any other.
        return f"{{{names}}}" if len(names) <= _SHOWN_CHOICES else f"{{{get_args(hint)[0]},...}}"
    if get_origin(hint) is tuple:
        items = ("..." if item is ... else _placeholder(item) for item in get_args(hint))
        return "[" + ",".join(items) + "]"
    return {bool: "{true,false}", int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(
        hint, "{KEY: VALUE}"
    )


def _type_in_words(hint: Any) -> str:
    """What an error says was expected."""
    if len(members := _alternatives(hint)) > 1:
        return " or ".join(_type_in_words(member) for member in members)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list like " + _placeholder(hint)
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text (quote it)",
        type(None): "null",
    }
    return words.get(hint, "a mapping like {KEY: VALUE}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    """A value as the command line and YAML spell it."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
