"""Look at training data as the model will see it: packed rows of tokens, which of them are predicted, the ledger.

python scripts/inspect_data.py [the flags of train.py] [--rows N] [--json] [--html FILE]

One process, no weights and no process group. What it tokenises stays in --cache_dir, where train.py
finds it again.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# This repository's `data`, `models` and `trainer` must win over anything installed by those names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import DataError
from models.errors import ModelError
from scripts.command_line import CommandLineError, parse_run_config, printable, printable_lines
from scripts.config import TrainConfig
from scripts.environment import use_cache_dir
from scripts.process import run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data.mixture import Mixture

# A packed row without its padding: {"source": str, "tokens": [{"token", "id", "label", "document"}]}.
Row = dict[str, Any]

_SUPERVISED, _MASKED, _BORDER, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
_UTF8_MOST_BYTES = 4

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem }}
pre, .document {{ font: 13px/1.7 ui-monospace, monospace; overflow-x: auto }}
.document {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #4a90a4;
  margin: .5rem 0; padding: .2rem .8rem }}
.document span {{ border-radius: 2px; box-shadow: inset -1px 0 #8886 }}
.masked {{ opacity: .65 }}
.supervised {{ background: #3a9d5d40 }}
</style>
<h1>{title}</h1>
<p><span class="supervised">supervised</span>: the model learns to predict this token.
<span class="masked">masked</span>: it only reads it. A bar on the left is one document; documents
of a row do not see each other. Point at a token for its id.</p>
<pre>{ledger}</pre>
{rows}
</html>
"""


@dataclass(frozen=True)
class InspectConfig(TrainConfig):
    """The flags of train.py, so that its command line and files can be given as they are, and three more."""

    rows: int = 3
    """Packed rows to show: the first that training with this seed would visit."""

    json: bool = False
    """Print the rows as JSON and nothing else."""

    html: str | None = None
    """Write rows and ledger to this file, as a page that needs nothing else."""


def main(argv: list[str] | None = None) -> int:
    """Show the data; returns the process's exit code: 0, 1 for unusable data, 2 for a wrong command line."""
    try:
        config = parse_run_config(InspectConfig, "inspect_data.py", argv)
        if config.rows < 0:
            raise CommandLineError(f"--rows must be at least 0, got {config.rows}")
        cache_dir = use_cache_dir(config.cache_dir)
        _inspect(config, cache_dir)
        sys.stdout.flush()
        return 0
    except (CommandLineError, DataError, ModelError) as error:
        print(f"inspect_data.py: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _inspect(config: InspectConfig, cache_dir: Path) -> None:
    # Only now: these import libraries that read the cache variables when they are imported.
    from scripts.ledger import ledger_table
    from scripts.preparation import open_mixture, prepare, read_tokenizer

    seq_len = config.data.seq_len
    prepared = prepare(config, cache_dir, to_train=False)
    tokenizer = read_tokenizer(config, cache_dir, prepared["tokenizer"])
    mixture = open_mixture(config.data, prepared)
    rows = packed_rows(mixture, tokenizer, seed=config.seed, count=config.rows)
    ledger = "\n\n".join(
        ledger_table(source.documents.meta["source"], source.ledger, seq_len=seq_len)
        for source in mixture.sources
    )
    if config.html is not None:
        try:
            page = html_page(rows, ledger, seq_len=seq_len)
            Path(config.html).write_text(page, encoding="utf-8")
        except OSError as error:
            raise CommandLineError(
                f"--html {config.html} cannot be written ({error.strerror}); give another file"
            ) from error
    # A terminal that is not UTF-8 gets escapes for what it cannot show.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if config.json:
        print("[" + ",\n".join(map(json.dumps, rows)) + "]")
    elif config.html is not None:
        print(f"{ledger}\n\n{_count(len(rows), 'packed row')} in {printable(config.html)}")
    else:
        colours = use_colours()
        for number, row in enumerate(rows, 1):
            title = f"row {number} of {len(mixture):,}"
            print(row_as_text(row, title, seq_len=seq_len, colours=colours) + "\n")
        print(ledger)


def use_colours() -> bool:
    """Whether standard output is a terminal whose user has nothing against colours."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def packed_rows(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, *, seed: int, count: int
) -> list[Row]:
    """The first `count` rows that training with `seed` visits, fewer if there are fewer.

    A token's label is its own id where it is supervised, else None: unshifted, as the model learns
    to predict it from the tokens before it. The texts of a document's tokens make up its text.
    """
    import numpy as np

    _, sources, places = mixture.locate(seed, np.arange(min(count, len(mixture))))
    rows = []
    for source, place in zip(sources, places, strict=True):
        packed, entries = mixture.sources[source], []
        for number, document in enumerate(packed.packs.documents(place)):
            ids, supervised = packed.documents.example(document)
            for text, token_id, counts in zip(
                token_texts(tokenizer, ids.tolist()), ids.tolist(), supervised.tolist(), strict=True
            ):
                label = token_id if counts else None
                entries.append({"token": text, "id": token_id, "label": label, "document": number})
        rows.append({"source": packed.documents.meta["source"], "tokens": entries})
    return rows


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; "" for a token that begins a character the next one completes."""
    texts, waiting = [], []
    for number, token_id in enumerate(ids):
        waiting.append(token_id)
        text = tokenizer.backend_tokenizer.decode(waiting, skip_special_tokens=False)
        more = number + 1 < len(ids) and len(waiting) < _UTF8_MOST_BYTES
        if text.endswith("\ufffd") and more:
            texts.append("")
        else:
            texts.append(text)
            waiting = []
    return texts


def row_as_text(row: Row, title: str, *, seq_len: int, colours: bool) -> str:
    """A row for a terminal: supervised text in colour, or within ⟦ ⟧ where there is none."""

    def paint(colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if colours else text

    lines = [f"{title}: {_row_in_numbers(row, seq_len)}"]
    for number, document in _documents(row):
        lines.append(paint(_BORDER, f"── document {number}: {_document_in_numbers(document)}"))
        parts = []
        for supervised, run in itertools.groupby(
            document, lambda entry: entry["label"] is not None
        ):
            text = visible("".join(entry["token"] for entry in run))
            if supervised:
                parts.append(paint(_SUPERVISED, text) if colours else f"⟦{text}⟧")
            else:
                parts.append(paint(_MASKED, text))
        # Colours end with the line, which pagers need; and a last line break would show as a gap.
        lines.append("".join(parts).replace(f"\n{_RESET}", f"{_RESET}\n").removesuffix("\n"))
    return "\n".join(lines)


def html_page(rows: Sequence[Row], ledger: str, *, seq_len: int) -> str:
    """A page with the ledger and every token, its id in a tooltip; it loads nothing."""
    parts = []
    for number, row in enumerate(rows, 1):
        parts.append(f"<h2>Row {number}: {html.escape(_row_in_numbers(row, seq_len))}</h2>")
        for _, document in _documents(row):
            spans = (
                f'<span class="{"masked" if entry["label"] is None else "supervised"}" '
                f'title="{entry["id"]}">{html.escape(visible(entry["token"])) or "▯"}</span>'
                for entry in document
            )
            parts.append(f'<div class="document">{"".join(spans)}</div>')
    source = printable(rows[0]["source"]) if rows else "data"
    return _PAGE.format(
        title=html.escape(f"Training rows of {source}"),
        ledger=html.escape(ledger),
        rows="\n".join(parts),
    )


def visible(text: str) -> str:
    """`printable` text that keeps its line breaks, each shown as well."""
    return printable_lines(text).replace("\n", "\\n\n")


def _documents(row: Row) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for number, document in itertools.groupby(row["tokens"], lambda entry: entry["document"]):
        yield number, list(document)


def _row_in_numbers(row: Row, seq_len: int) -> str:
    entries = row["tokens"]
    documents = entries[-1]["document"] + 1
    return (
        f"{printable(row['source'])}, {_count(documents, 'document')}, {_document_in_numbers(entries)}, "
        f"{seq_len - len(entries):,} padding"
    )


def _document_in_numbers(entries: Sequence[dict[str, Any]]) -> str:
    supervised = sum(entry["label"] is not None for entry in entries)
    return f"{_count(len(entries), 'token')}, {supervised:,} supervised"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


if __name__ == "__main__":
    run_command(main)
