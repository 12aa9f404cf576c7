"""Write the computed tables of the docs anew.

python -m scripts.planner.documents [bytes] [recipes] [matrix] [sample] [network]

Without names all of them; the matrix takes a quarter of an hour on two cores, the others minutes. Each stands between two comments that name it.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

from models.build import parse_model_config
from scripts.command_line import parse_train_config
from scripts.config import TrainConfig
from scripts.planner.facts import GPUS, Gpu, find_model
from scripts.planner.matrix import as_markdown, matrix
from scripts.planner.planning import Plan, make_plan
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.precision import bytes_per_parameter

_ROOT = Path(__file__).resolve().parents[2]
_RECIPES = _ROOT / "scripts" / "recipes"
SAMPLE = "--model.name Qwen/Qwen3-8B --gpus 2 --gpu h100-nvl --data.seq_len 4096 --steps 1000"


def bytes_table() -> str:
    """Bytes of each trained parameter, by what the flags say."""
    lines = [
        "| flags | masters | gradients | AdamW's state | sum | Muon's state | sum |",
        "|---|---|---|---|---|---|---|",
    ]
    for masters in ("float32", "bfloat16"):
        for state in ("float32", "bfloat16"):
            case = ParallelConfig(master_dtype=masters), OptimizerConfig(state_dtype=state)
            adamw, muon = bytes_per_parameter(*case), bytes_per_parameter(*case, muon=True)
            shown = [*adamw.values(), sum(adamw.values())]
            shown += [muon["optimizer state"], sum(muon.values())]
            flags = f"`master_dtype {masters}`, `state_dtype {state}`"
            lines.append(f"| {flags} | {' | '.join(f'{size:.3g}' for size in shown)} |")
    return "\n".join(lines)


def recipes() -> Iterator[tuple[Path, int, Gpu, TrainConfig]]:
    """Every recipe that names its machine in its first line, with GPUs and their kind."""
    for file in sorted(_RECIPES.glob("*.yaml"), key=lambda file: _in_order(file.name)):
        line = file.read_text(encoding="utf-8").partition("\n")[0]
        if found := re.match(r"# Machine: (\d+)x ([\w-]+)", line):
            config = parse_train_config(["--config", str(file)])
            yield file, int(found[1]), GPUS[found[2]], config


def _in_order(name: str) -> list[float | str]:
    """Numbers by their value."""
    return [float(part) if part[:1].isdigit() else part for part in re.split(r"(\d+\.?\d*)", name)]


def plan_recipe(config: TrainConfig, gpus: int, gpu: Gpu) -> Plan:
    name = config.model.name or ""
    hf_config = parse_model_config(find_model(name), config.model, name)
    return make_plan(config, name, hf_config, gpu=gpu, gpus=gpus)


def recipe_row(file: Path, gpus: int, gpu: Gpu, config: TrainConfig) -> str:
    """What a recipe trains, where, how much of a step is done at once, and what its plan says."""
    plan = plan_recipe(config, gpus, gpu)
    _, rows, accumulated = plan.batch
    how = f"LoRA, rank {config.lora.rank}" if config.lora.rank else "all"
    return (
        f"| [{file.name}](../scripts/recipes/{file.name}) | {plan.model.partition('/')[2]} "
        f"| {gpus} x {gpu.name} | {how} | {rows * config.data.seq_len:,} | {accumulated} "
        f"| {plan.room.needed:.0f} | {plan.room.there:.0f} | {plan.time.tokens_per_second_per_gpu:,.0f} |"
    )


def recipes_table() -> str:
    lines = [
        "| recipe | model | GPUs | trains | tokens a step | accumulates | GiB a GPU needs | of | tokens/s/GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(recipe_row(*recipe) for recipe in recipes())])


def sample(flags: str = SAMPLE) -> str:
    """What plan.py prints for the command in docs/planning.md."""
    from scripts.plan import main

    out = io.StringIO()
    with redirect_stdout(out):
        main(shlex.split(flags))
    return f"```bash\npython scripts/plan.py {flags}\n```\n\n```\n{out.getvalue()}```"


def network() -> str:
    """What it says of two machines joined by Ethernet."""
    said = sample(SAMPLE.replace("--gpus 2", "--gpus 4"))
    lines = [line for line in said.splitlines() if re.match("(speed|step|note|remedy) ", line)]
    return "\n".join(["```", *lines, "```"])


def matrix_tables() -> str:
    return as_markdown(matrix(TrainConfig())).strip()


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "bytes": ("precision", bytes_table),
    "recipes": ("recipes", recipes_table),
    "matrix": ("what-fits", matrix_tables),
    "sample": ("planning", sample),
    "network": ("planning", network),
}


def written(name: str) -> str:
    """What stands in the docs."""
    return _split(name)[1].strip()


def write(name: str) -> None:
    """Put there what is computed now."""
    before, _, after = _split(name)
    page, make = PARTS[name]
    text = f"{before}\n{make()}\n{after}"
    (_ROOT / "docs" / f"{page}.md").write_text(text, encoding="utf-8")


def _split(name: str) -> tuple[str, str, str]:
    page = (_ROOT / "docs" / f"{PARTS[name][0]}.md").read_text(encoding="utf-8")
    begin, end = f"<!-- computed: {name} -->", "<!-- end -->"
    if page.count(begin) != 1 or end not in page.partition(begin)[2]:
        raise ValueError(f"docs/{PARTS[name][0]}.md has no place for it between {begin} and {end}")
    before, _, rest = page.partition(begin)
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PARTS:
        write(chosen)
        print(f"docs/{PARTS[chosen][0]}.md: {chosen}")
