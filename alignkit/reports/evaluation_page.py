"""A page with the results of an evaluation. It stands alone, and what a model wrote is only ever text in it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.plain_text import visible

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""


def evaluation_page(
    title: str,
    tables: Mapping[str, Cells],
    *,
    note: str,
    diagram: bytes | None,
    examples: str,
    record: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        title: What was evaluated.
        tables: By title.
        note: How the figures are to be read.
        diagram: PNG of the calibration, or None.
        examples: What models answered, as text.
        record: What the figures depend on.
    """
    parts = [f"<h2>{_text(name)}</h2>\n{_table(*cells)}" for name, cells in tables.items()]
    parts.insert(1, f"<p>{_text(note)}</p>")
    if diagram is not None:
        image = base64.b64encode(diagram).decode()
        parts.append(f'<h2>calibration</h2>\n<img alt="reliability diagram" src="data:image/png;base64,{image}">')
    if examples:
        parts.append(f"<h2>answers</h2>\n<pre>{_text(examples)}</pre>")
    depends = json.dumps(record, indent=2, ensure_ascii=False)
    parts.append(f"<details><summary>what the figures depend on</summary>\n<pre>{_text(depends)}</pre></details>")
    return _PAGE.format(title=_text(title), body="\n".join(parts))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _text(text: str) -> str:
    """Text of the page: no tag, no control character."""
    return html.escape(visible(text))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>evaluation of {title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; }}
h2 {{ font-size: 1.1em; margin-top: 1.6em; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: right; padding: .25em .8em; border-top: 1px solid #eee; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f5f8; padding: .6em; font-size: 13px; }}
img {{ max-width: 100%; }}
summary {{ cursor: pointer; margin-top: 1.6em; }}
</style></head><body>
<h1>Evaluation of {title}</h1>
{body}
</body></html>
"""
