"""Parts of an HTML page that needs nothing beside it. Whatever they are given is escaped, but for `content`, which they made."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from scripts.command_line import printable_lines

# The policy allows no script and no request, whatever a text of the page holds.
_HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1b1f24; --soft: #5b6672; --line: #dde1e6;
  --c0: #1f6fd6; --c1: #d1570b; --c2: #16865c; --c3: #8d4bc4; --c4: #b38600; --c5: #c0316f; --c6: #3f8a99; --c7: #7b8794 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #14171b; --card: #1d2126; --text: #e6e9ed; --soft: #9aa5b1; --line: #323941;
    --c0: #6aa9ff; --c1: #ff9d5c; --c2: #4cc596; --c3: #c79bf2; --c4: #e0bb4d; --c5: #f583b2; --c6: #73c3d2; --c7: #8c98a5 }}
}}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; background: var(--back); color: var(--text); max-width: 62rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem }}
h1 {{ font-size: 1.4rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.05rem; margin: 2.2rem 0 .6rem }}
h3 {{ font-size: .95rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere }}
p {{ margin: .3rem 0 }}
.soft {{ color: var(--soft) }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin-top: 1rem }}
.cards div {{ background: var(--card); border-radius: 8px; padding: .55rem .75rem }}
.cards b {{ display: block; font-size: 1.1rem; font-weight: 600; font-variant-numeric: tabular-nums }}
.cards span {{ color: var(--soft); font-size: .85rem }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.2rem 1.6rem }}
figure {{ margin: 0; min-width: 0 }}
figcaption {{ font-size: .88rem; margin-bottom: .3rem }}
.legend {{ display: inline-flex; flex-wrap: wrap; gap: 0 .9rem; margin-left: .8rem; color: var(--soft) }}
.legend span {{ display: inline-flex; align-items: center; gap: .35rem }}
svg.key {{ width: .7rem; height: .7rem; flex: none }}
svg.bar {{ height: 1.5rem; border-radius: 4px }}
table {{ border-collapse: collapse; font-size: .88rem; min-width: min(24rem, 100%) }}
th {{ text-align: left; font-weight: 500; color: var(--soft) }}
td, th {{ padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top }}
td:last-child {{ overflow-wrap: anywhere }}
.sample table {{ width: 100% }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; overflow-wrap: normal }}
.scroll {{ overflow-x: auto }}
pre {{ font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  max-height: 18rem; overflow-y: auto }}
.sample {{ background: var(--card); border-radius: 8px; padding: .7rem .9rem; margin: .7rem 0 }}
.sample th {{ width: 6.5rem; white-space: nowrap }}
.sample tr:last-child > * {{ border-bottom: 0 }}
.right {{ color: var(--c2) }}
details {{ margin: .6rem 0 }}
summary {{ cursor: pointer; color: var(--soft) }}
{style}</style>
"""


def head(title: str, *, style: str) -> str:
    """All that comes before the first heading; `style` is CSS beside that of the parts."""
    return _HEAD.format(title=text(title), style=style)


def section(title: str, content: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n{content}</section>" if content else ""


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def table(
    names: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    numbers: int = 0,
    first: int | None = None,
) -> str:
    """`numbers` columns from `first` on, by default the one after a name or else the first, are right-aligned."""
    start = (0 if names[0] else 1) if first is None else first
    classes = [
        ' class="number"' if start <= place < start + numbers else "" for place in range(len(names))
    ]
    head = ""
    if any(names):
        head = "".join(
            f"<th{kind}>{text(name)}</th>" for name, kind in zip(names, classes, strict=True)
        )
        head = f"<tr>{head}</tr>"
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(line, classes, strict=True))
        + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def text(value: Any) -> str:
    """For HTML, with what would be invisible or turn text around shown as escapes."""
    return escape(printable_lines(str(value)))
