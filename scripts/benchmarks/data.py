"""`benchmark.py data`: chat rows to packed tokens with masks, and packing alone, beside TRL's SFTTrainer.

It also says what the index and the order of packed rows cost. Every run starts with empty caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pydoc_data.topics
import random
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.config import DataConfig
from data.embedded import build_tokenizer
from data.packing import pack, sample_to_pack
from data.prepare import join_parts, new_task, write_parts
from data.sources import load_rows
from data.store import open_packed, prepare_packs
from scripts.benchmarks.common import (
    Result,
    Side,
    machine,
    on_cores,
    setting,
    stopwatch,
    take_turns,
    versions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0
SEQ_LEN = 4096
ROWS = 6144
HELP = "chat rows to packed tokens with masks; packing"
PROCESSES = (1, 2)
PACKED_DOCUMENTS = 1_000_000
ORDERED_PACKS = 100_000_000
VISITED_SAMPLES = 1000
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "trl")
NO_TRL = "TRL is not installed, so its rows are missing: pip install -e '.[bench]'"
UNICODE = (
    "Естественный язык обрабатывают по частям, и длина предложения заранее неизвестна. ",
    "机器学习模型把文字切成词元。再把词元变成向量。今天的天气很好。我们去公园散步吧。",
    "日本語の文章では、単語の間に空白がありません。それでも読むことができます。",
    "¿Cuántos años tiene el niño? Él cumplió diez; mañana iremos a la montaña. ",
    "Größere Übungen für Anfänger: naïve Äpfel, süße Öle, zwölf € fertig! ",
    "شكرا جزيلا على المساعدة، إلى اللقاء. नमस्ते, आप कैसे हैं? 👩‍💻🚀✨ ",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=ROWS, help="chat rows (%(default)s)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        default=os.environ.get("QWEN3_TOKENIZER_DIR") or None,
        help="Hugging Face folder ($QWEN3_TOKENIZER_DIR, else the built-in tokenizer)",
    )


def run(arguments: argparse.Namespace) -> Result:
    """All numbers; raises DataError or ModelError."""
    tokenizer_folder, rows, repeats = arguments.tokenizer, arguments.rows, arguments.repeats
    # As in training: a process tokenises on one core, so that equal numbers of them are compared.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with_trl = importlib.util.find_spec("trl") is not None
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        tokenizer = open_tokenizer(tokenizer_folder, Path(folder), with_trl=with_trl)
        file = Path(folder, "chat.parquet")
        write_rows(file, rows)
        preparing = {
            str(count): compare_preparing(file, tokenizer, count, repeats, with_trl=with_trl)
            for count in PROCESSES
        }
    return {
        "machine": machine(),
        "versions": versions(*PACKAGES[: None if with_trl else -1]),
        "tokenizer": str(tokenizer_folder or "built-in"),
        "rows": rows,
        "seq_len": SEQ_LEN,
        "repeats": repeats,
        "preparing": preparing,
        "packing": compare_packing(repeats, with_trl=with_trl),
        "order": order_cost(),
    }


# -------------------------------------------------------------------------------------- preparing


def write_rows(file: Path, count: int) -> None:
    """Write chat rows of 1 to 8 exchanges, of prose, code and other scripts; lengths are log-normal."""
    import datasets

    prose = " ".join(" ".join(text.split()) for text in pydoc_data.topics.topics.values())
    code = Path(argparse.__file__).read_text()
    pools = [prose, code, "".join(UNICODE) * 40]
    rng = random.Random(SEED)

    def text(typical_length: int, sigma: float) -> str:
        (pool,) = rng.choices(pools, weights=(75, 15, 10))
        length = min(20_000, max(8, int(typical_length * rng.lognormvariate(0, sigma))))
        start = rng.randrange(max(1, len(pool) - length))
        return f"{rng.randrange(1000)}: {pool[start : start + length].strip()}"

    rows = []
    for _ in range(count):
        messages = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        for _ in range(min(8, 1 + int(rng.expovariate(1)))):
            messages.append({"role": "user", "content": text(100, 1.0)})
            messages.append({"role": "assistant", "content": text(400, 1.2)})
        rows.append({"messages": messages})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(file)


def open_tokenizer(
    folder: Path | None, cache_dir: Path, *, with_trl: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of both sides; raises ModelError.

    TRL derives masks only from templates with generation markers, so beside it both sides take the one
    that it ships for Qwen3: the tokens are then the same on both.
    """
    from models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, cache_dir=cache_dir) if folder else build_tokenizer()
    if with_trl:
        from trl.chat_template_utils import qwen3_training_chat_template

        tokenizer.chat_template = qwen3_training_chat_template
    return tokenizer


def compare_preparing(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    processes: int,
    repeats: int,
    *,
    with_trl: bool,
) -> Result:
    """Both sides with `processes` processes on as many cores."""
    sides: dict[str, Side] = {
        "shardloop": lambda: prepare_with_shardloop(file, tokenizer, processes)
    }
    if with_trl:
        sides["trl"] = lambda: prepare_with_trl(file, tokenizer, processes)
    with on_cores(processes):
        return take_turns(sides, repeats)


def prepare_with_shardloop(
    file: Path, tokenizer: PreTrainedTokenizerBase, processes: int
) -> Result:
    config = DataConfig(
        path=str(file), seq_len=SEQ_LEN, overlong="truncate", prepare_workers=processes
    )
    with tempfile.TemporaryDirectory(dir=file.parent) as cache_dir:
        source = load_rows(config, "train", cache_dir=cache_dir)
        share = -(-len(source.rows) // processes)  # opens the rows: TRL's data set is open too
        with stopwatch() as result:
            # What prepare_tokens does, in parts that give every process work, however few the rows.
            task = new_task(source, tokenizer, config, cache_dir=cache_dir)
            task = replace(task, part_rows=share)
            write_parts(task, range(task.parts))
            join_parts(task)
            packs = prepare_packs(task.folder, method="best_fit", seq_len=SEQ_LEN)
        ledger = open_packed(packs).ledger
    return result | {
        "tokens_per_second": ledger["tokens"] / result["seconds"],
        **{key: ledger[key] for key in ("tokens", "supervised_tokens", "packed_rows")},
    }


def prepare_with_trl(file: Path, tokenizer: PreTrainedTokenizerBase, processes: int) -> Result:
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoModelForCausalLM, Qwen3Config
    from trl import SFTConfig, SFTTrainer

    result: Result = {}

    class TimedTrainer(SFTTrainer):
        """Building the model and the rest of the trainer stays outside the measurement."""

        def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
            with stopwatch() as watch:
                prepared = super()._prepare_dataset(*arguments, **options)
            result.update(watch)
            return prepared

    tiny = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    with tempfile.TemporaryDirectory(dir=file.parent) as cache_dir:
        trainer = TimedTrainer(
            AutoModelForCausalLM.from_config(tiny),
            args=SFTConfig(
                output_dir=cache_dir,
                use_cpu=True,
                bf16=False,
                report_to="none",
                max_length=SEQ_LEN,
                packing=True,
                assistant_only_loss=True,
                dataset_num_proc=processes if processes > 1 else None,
            ),
            # map() keeps what it makes beside this, so no run finds what another has made.
            train_dataset=datasets.Dataset.from_parquet(str(file), cache_dir=cache_dir),
            processing_class=tokenizer,
        )
        packed = trainer.train_dataset
        labels = pc.list_flatten(packed.with_format("arrow")["labels"])
        result |= {
            "tokens_per_second": len(labels) / result["seconds"],
            "tokens": len(labels),
            "supervised_tokens": pc.sum(pc.not_equal(labels, -100)).as_py(),
            "packed_rows": len(packed),
        }
    return result


# --------------------------------------------------------------------------------- packing, order


def compare_packing(repeats: int, *, with_trl: bool) -> Result:
    """Best-fit packing of a million heavy-tailed lengths, and the memory of what it gives."""
    lengths = draw_lengths(PACKED_DOCUMENTS)
    sides: dict[str, Side] = {"shardloop": lambda: pack_lengths(lengths)}
    if with_trl:
        import datasets
        import pyarrow as pa
        from trl import pack_dataset

        # TRL packs tokens, not lengths: bytes, so that it has as little as possible to move.
        borders = np.append(0, np.cumsum(lengths)).astype(np.int32)
        tokens = pa.ListArray.from_arrays(borders, np.zeros(borders[-1], np.int8))
        documents = datasets.Dataset(pa.table({"input_ids": tokens}))

        def with_trl_packing() -> Result:
            datasets.disable_caching()
            with stopwatch() as result:
                packed = pack_dataset(documents, SEQ_LEN, "bfd")
            return result | _packed(lengths, len(packed), result["seconds"])

        sides["trl"] = with_trl_packing
    with on_cores(1):
        return take_turns(sides, repeats)


def draw_lengths(documents: int) -> np.ndarray:
    """Heavy-tailed, at most SEQ_LEN."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(250), 1.1, documents)
    return np.clip(drawn, 1, SEQ_LEN).astype(np.int32)


def pack_lengths(lengths: np.ndarray) -> Result:
    """Best-fit packing, and the size of its index: the packs, and where each document begins."""
    with stopwatch() as result:
        packs = pack(lengths, seq_len=SEQ_LEN)
    index = packs.document_ids.nbytes + packs.offsets.nbytes + 8 * (len(lengths) + 1)
    return result | _packed(lengths, len(packs), result["seconds"]) | {"index_mib": index / 2**20}


def _packed(lengths: np.ndarray, rows: int, seconds: float) -> Result:
    return {
        "documents_per_second": len(lengths) / seconds,
        "packed_rows": rows,
        "fill_pct": 100 * float(lengths.sum()) / (rows * SEQ_LEN),
    }


def order_cost() -> Result:
    """Time and memory of finding packed rows one by one in the shuffled order of many."""

    def visit() -> None:
        for sample in range(VISITED_SAMPLES):
            sample_to_pack(SEED, np.array([sample]), ORDERED_PACKS)

    with stopwatch() as result:
        visit()
    tracemalloc.start()
    visit()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result | {"peak_kib": peak / 2**10, "permutation_mib": 8 * ORDERED_PACKS / 2**20}


# ----------------------------------------------------------------------------------------- output


def as_markdown(result: Result) -> str:
    """The numbers as Markdown tables."""
    order = result["order"]
    lines = [
        setting(result),
        f"{result['rows']:,} chat rows, tokenizer {result['tokenizer']}, "
        f"rows of {result['seq_len']} tokens; medians of {result['repeats']} runs",
        "",
        "| rows to packed tokens with masks | tokens/s | seconds | CPU seconds | tokens | supervised "
        "| packed rows | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for processes, sides in result["preparing"].items():
        for name, side in _by_side(sides):
            lines.append(
                f"| {name}, processes: {processes} | {side['tokens_per_second']:,.0f} "
                f"| {side['seconds']:.2f} | {side['cpu_seconds']:.2f} | {side['tokens']:,} "
                f"| {side['supervised_tokens']:,} | {side['packed_rows']:,} | {_times(sides, name)} |"
            )
    lines += [
        "",
        f"| packing {PACKED_DOCUMENTS:,} documents | documents/s | seconds | fill % | times faster |",
        "|---|---|---|---|---|",
    ]
    for name, side in _by_side(result["packing"]):
        lines.append(
            f"| {name} | {side['documents_per_second']:,.0f} | {side['seconds']:.2f} "
            f"| {side['fill_pct']:.2f} | {_times(result['packing'], name)} |"
        )
    lines += [
        "",
        f"Index of these documents: {result['packing']['shardloop']['index_mib']:.1f} MiB, "
        "memory-mapped.",
        f"{VISITED_SAMPLES:,} samples, one by one, in the shuffled order of {ORDERED_PACKS:,} packed "
        f"rows: {order['seconds']:.2f} seconds, {order['peak_kib']:.0f} KiB at most (the order as a "
        f"list: {order['permutation_mib']:.0f} MiB).",
    ]
    return "\n".join(lines if "trl" in result["versions"] else [*lines, "", NO_TRL])


def _by_side(sides: Result) -> list[tuple[str, Result]]:
    return [(name, sides[name]) for name in ("shardloop", "trl") if name in sides]


def _times(sides: Result, name: str) -> str:
    return f"{sides['times_faster']:.1f}" if name == "shardloop" and "trl" in sides else ""
