"""Tables that a model wrote as text, HTML or LaTeX, as lists that can be compared.

Each reader takes any text, in time that grows with its length, and finds no table where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from alignkit.rewards._words import MOST_CELLS

MOST_CHARACTERS = 200_000
"""Characters of a text that are read."""


@dataclass(frozen=True)
class Table:
    """A table taken apart.

    Attributes:
        header: Cells of its first row.
        data: Cells of the other rows, row by row.
        num_rows: Rows, the header among them.
        num_columns: Cells of its longest row.
        alignment: Column specification of LaTeX.
        caption: Caption of LaTeX, "None" where there is none.
    """

    header: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    num_rows: int = 0
    num_columns: int = 0
    alignment: str = ""
    caption: str = "None"

    @property
    def is_empty(self) -> bool:
        """Whether it has no cell."""
        return self.num_rows == 0


@dataclass(frozen=True)
class Page:
    """HTML taken apart.

    Attributes:
        cells: Texts of its cells or items.
        tags: Its tags, each opened and closed, in order.
    """

    cells: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it has no cell."""
        return not self.cells


def read_text_table(text: str) -> Table:
    """A table of rows in lines, a ``|`` between cells; lines of ``-`` and ``=`` separate and are no rows.

    Args:
        text: A line ends at a newline or at ``<NEWLINE>``.
    """
    rows = []
    for line in text[:MOST_CHARACTERS].replace("<NEWLINE>", "\n").split("\n"):
        cells = [cell.strip() for cell in line.split("|")]
        # As Markdown writes them, separators may hold colons, and plus signs where columns meet.
        if any(cells) and not (set("".join(cells)) <= set("-=:+ ") and set("".join(cells)) & set("-=")):
            rows.append(cells)
    for edge in (0, -1):
        if rows and all(not row[edge] for row in rows):
            rows = [row[1:] if edge == 0 else row[:-1] for row in rows]
    return _table([row for row in rows if row])


def read_sections(text: str) -> tuple[Table, Table]:
    """The two tables of RotoWire, behind a line that says "team" and one that says "player"; empty where it is missing.

    Args:
        text: As for :func:`read_text_table`.
    """
    lines = text[:MOST_CHARACTERS].replace("<NEWLINE>", "\n").split("\n")
    titles = [line.strip(" :*#").lower() for line in lines]
    team = next((i for i, title in enumerate(titles) if title in ("team", "teams")), None)
    player = next((i for i, title in enumerate(titles) if title in ("player", "players")), None)
    parts = {}
    for name, start, other in (("team", team, player), ("player", player, team)):
        end = other if start is not None and other is not None and other > start else len(lines)
        parts[name] = Table() if start is None else read_text_table("\n".join(lines[start + 1 : end]))
    return parts["team"], parts["player"]


_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*+)[^<>]*+>")
_KNOWN = frozenset(
    "a b body caption col colgroup dd div dl dt em footer form h1 h2 h3 h4 h5 h6 head header html i img input label li "
    "main nav ol option p section select span strong table tbody td tfoot th thead title tr ul".split()
)
_CELLS = frozenset(("td", "th", "li"))


def read_html(text: str) -> Page:
    """Cells and tags of HTML.

    Cells are ``th``, ``td`` and ``li``; where there are none, every text between known tags. A cell ends where the next
    one begins, if nothing closes it. Attributes are passed over.

    Args:
        text: HTML, with anything around it.
    """
    cells: list[str] = []
    texts: list[str] = []
    tags: list[str] = []
    inside: list[str] | None = None
    for closing, name, words in _pieces(text[:MOST_CHARACTERS]):
        if name in _KNOWN:
            tags.append(closing + name)
            if inside is not None and (name in _CELLS or name in ("tr", "table", "ul", "ol")):
                cells.append(" ".join("".join(inside).split()))
                inside = None
            if name in _CELLS and not closing:
                inside = []
        if inside is not None:
            inside.append(words)
        elif tags and words.strip():
            texts.append(" ".join(words.split()))
    if inside is not None:
        cells.append(" ".join("".join(inside).split()))
    return Page(tuple((cells or texts)[:MOST_CELLS]), tuple(tags[:MOST_CELLS]))


def _pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """Each tag, as slash and name in lower case, with the text behind it; comments are left out."""
    first, *others = text.split("<!--")
    text = first + "".join(part.partition("-->")[2] for part in others)
    marks = list(_TAG.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):
        yield mark[1], mark[2].lower(), text[mark.end() : end]


_CAPTION = re.compile(r"\\caption\s*(?:\[[^\]\n]{0,500}\])?\s*\{")
_RULES = re.compile(
    r"\\(?:hline|toprule|midrule|bottomrule|cline|cmidrule)(?:\([^()\n]{0,50}\))?(?:\{[^{}\n]{0,50}\})?"
)
_MACRO = re.compile(r"\\[A-Za-z]+\*?")


def read_latex(text: str) -> Table:
    r"""The first ``tabular`` of LaTeX: cells between ``&``, rows between ``\\``, empty ones left out.

    Macros are taken away and braces too: ``\textbf{a}`` is the cell ``a``.

    Args:
        text: LaTeX, with anything around it.
    """
    text = text[:MOST_CHARACTERS]
    _, begin, rest = text.partition("\\begin{tabular}")
    if not begin or not rest.lstrip().startswith("{"):
        return Table()
    alignment, body = _braced(rest.lstrip())
    body = _RULES.sub(" ", body.partition("\\end{tabular}")[0])
    lines = ([_plain(cell) for cell in re.split(r"(?<!\\)&", row)] for row in body.split("\\\\"))
    table = _table([cells for line in lines if (cells := [cell for cell in line if cell])])
    found = _CAPTION.search(text)
    caption = "None" if found is None else _plain(_braced(text[found.end() - 1 :])[0])
    columns = re.sub(r"\s", "", _without_arguments(alignment))[:MOST_CELLS]
    return Table(table.header, table.data, table.num_rows, table.num_columns, columns, caption)


def _braced(text: str) -> tuple[str, str]:
    """What is between a brace at the beginning and the one that closes it, and what is behind that."""
    depth = 0
    for mark in re.finditer(r"[{}]", text):
        depth += 1 if mark[0] == "{" else -1
        if depth == 0:
            return text[1 : mark.start()], text[mark.end() :]
    return text[1:], ""


def _without_arguments(alignment: str) -> str:
    """A column specification without what its columns take as arguments: ``p{3cm}|c`` is ``p|c``."""
    kept, depth = [], 0
    for mark in alignment:
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
        elif depth <= 0:
            kept.append(mark)
    return "".join(kept)


def _plain(cell: str) -> str:
    """A cell without macros, braces and white space around it."""
    return " ".join(_MACRO.sub(" ", cell).replace("{", " ").replace("}", " ").replace("\\", " ").split())


def _table(rows: list[list[str]]) -> Table:
    """Rows as they are compared; cells beyond what is compared are left out."""
    if not rows:
        return Table()
    data = tuple(cell for row in rows[1:] for cell in row)[:MOST_CELLS]
    return Table(tuple(rows[0])[:MOST_CELLS], data, len(rows), max(map(len, rows)))
