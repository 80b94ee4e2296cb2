"""A report in blocks, as text for a terminal and as a page that stands alone.

The page asks for nothing elsewhere, and what rows hold is only ever text in it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.plain_text import visible, without_secrets
from alignkit.reports.table import render_table

MARKS = ("[[", "]]")
BAR = 40
"""Characters of the longest bar."""
Spans = Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Block:
    """One part of a report; what it does not have is empty.

    Attributes:
        title: What it is about.
        lines: Sentences.
        header, rows: A table.
        bars: Labels with counts.
        parts: Labels with pieces of text, each with whether it is marked.
        text: Text that is laid out already.
    """

    title: str
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    bars: Sequence[tuple[str, int]] = ()
    parts: Sequence[tuple[str, Spans]] = ()
    text: str = ""


def as_text(blocks: Sequence[Block]) -> str:
    """The blocks one below the other."""
    return "\n\n".join(map(_text_of, blocks))


def as_page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page.

    Args:
        title: Of the page.
    """
    sections = "\n".join(map(_section_of, blocks))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_escaped(title)}</h1>
{sections}
</body>
</html>
"""


def _text_of(block: Block) -> str:
    lines = [block.title, *(f"  {line}" for line in block.lines)]
    if block.text:
        lines.append(block.text)
    if block.header:
        lines.append(render_table(block.header, block.rows))
    if block.bars:
        most, width = max(count for _, count in block.bars), max(len(label) for label, _ in block.bars)
        lines += [
            f"  {label:>{width}}  {'#' * -(-count * BAR // max(most, 1)):<{BAR}}  {count}"
            for label, count in block.bars
        ]
    width = max((len(label) for label, _ in block.parts), default=0) + 2
    for label, spans in block.parts:
        first, *rest = "".join(MARKS[0] + text + MARKS[1] if marked else text for text, marked in spans).split("\n")
        lines += [f"  {label:<{width}}{first}", *(" " * (width + 2) + line for line in rest)]
    return "\n".join(lines)


def _section_of(block: Block) -> str:
    inner = [f"<p>{_escaped(line)}</p>" for line in block.lines]
    if block.text:
        inner.append(f"<pre>{_STATUS.sub(_coloured, _escaped(block.text))}</pre>")
    if block.header:
        rows = [_row("th", block.header), *(_row("td", row) for row in block.rows)]
        inner.append(f"<table>{''.join(rows)}</table>")
    if block.bars:
        most = max(1, *(count for _, count in block.bars))
        inner.append(
            "<table>"
            + "".join(
                f'<tr><th>{_escaped(label)}</th><td class="bar"><i style="width:{24 * count / most:.2f}em"></i>'
                f"{count:,}</td></tr>"
                for label, count in block.bars
            )
            + "</table>"
        )
    for label, spans in block.parts:
        shown = "".join(f"<mark>{_escaped(text)}</mark>" if marked else _escaped(text) for text, marked in spans)
        inner.append(f"<h3>{_escaped(label)}</h3><pre>{shown}</pre>")
    return f"<section><h2>{_escaped(block.title)}</h2>{''.join(inner)}</section>"


def _coloured(status: re.Match[str]) -> str:
    return f'<b class="{status[1]}">{status[0]}</b>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    return html.escape(visible(without_secrets(text)))


_STATUS = re.compile(r"^ *(ok|warn|fail)(?= +\S)", re.MULTILINE)
"""How a line of a check begins."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 0.9em; margin: 1em 0 0.2em; color: #666; font-weight: 600; }
p { margin: 0.3em 0; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #eee; font-weight: 400; }
tr > :first-child { text-align: left; } th { color: #555; }
td.bar { text-align: left; white-space: nowrap; }
td.bar i { display: inline-block; height: 0.8em; background: #4477aa; margin-right: 0.5em; }
pre { background: #f6f6f6; padding: 0.7em; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 13px/1.45 ui-monospace, monospace; }
mark { background: #ffe9a8; }
b.ok { color: #2a7d2a; } b.warn { color: #a86400; } b.fail { color: #b3261e; }
"""
