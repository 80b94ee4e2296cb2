"""Struc-Bench's H-score (arXiv 2309.08963) of a table against a reference: what it says, and how it is built.

Texts are compared by two similarities of lists, ``lev`` and ``dl`` of ``_words.py``. With ``rows``, ``columns`` 1 where
both tables have as many, else 0:

| format | content | structure |
|---|---|---|
| text | dataLev + dataDl | rows + columns + headerLev + headerDl |
| html | cellsLev + cellsDl | as many cells + tagsLev + tagsDl |
| latex | same caption + dataLev + dataDl | alignmentLev + alignmentDl + rows + columns |

The reward is the sum over the number of its terms, each held within [0, 1]; ``raw`` gives the sum itself, whose ``lev``
may be below 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample
from alignkit.rewards._table_text import Page, Table, read_html, read_latex, read_sections, read_text_table
from alignkit.rewards._words import dl, lev

Score = tuple[list[float], bool]
"""The terms of a score, and whether the prediction has anything to compare."""


@dataclass(frozen=True, kw_only=True)
class TableReward(Reward):
    """Compares the table of a completion with that of a column; see the module for the terms.

    ``lev`` is at least 1/2 for a list no longer than the reference, whatever is in it: rewards near 1/2 say little.

    Differences to the authors' code: a prediction without any cell to compare has the reward 0 unless ``raw`` (there an
    empty list has ``lev`` 1/2, which would pay for saying nothing); tags of HTML are taken once and in order, where
    theirs repeat those of nested ones; of a table and of a list of tags the first 1,000 cells are compared, of a text
    the first 200,000 characters read.
    """

    format: str = option(
        "text",
        choices=("text", "rotowire", "html", "latex"),
        help="How tables are written; rotowire is two text tables behind the lines Team: and Player:, scored apart and "
        "averaged.",
    )
    column: str = option("answer", help="Column with the table that is wanted, written the same way.")
    raw: bool = option(False, help="The sum of the paper in place of the reward between 0 and 1.")

    def columns(self) -> tuple[str, ...]:
        """That of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float | None:
        """The score; None where the row has no reference."""
        reference = sample.row[self.column]
        if reference is None:
            return None
        if self.format == "html":
            return self._judged(self.page_terms(read_html(sample.text), read_html(reference)))
        if self.format == "latex":
            return self._judged(self.latex_terms(read_latex(sample.text), read_latex(reference)))
        if self.format == "text":
            return self._judged(self.text_terms(read_text_table(sample.text), read_text_table(reference)))
        pairs = zip(read_sections(sample.text), read_sections(reference), strict=True)
        scores = [self._judged(self.text_terms(ours, theirs)) for ours, theirs in pairs]
        return sum(scores) / len(scores)

    def _judged(self, score: Score) -> float:
        terms, has_cells = score
        if self.raw:
            return sum(terms)
        return sum(max(0.0, term) for term in terms) / len(terms) if has_cells else 0.0

    def text_terms(self, ours: Table, theirs: Table) -> Score:
        """The terms of a table of text."""
        raise NotImplementedError

    def page_terms(self, ours: Page, theirs: Page) -> Score:
        """The terms of HTML."""
        raise NotImplementedError

    def latex_terms(self, ours: Table, theirs: Table) -> Score:
        """The terms of a table of LaTeX."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TableContent(TableReward):
    """What the cells say: the left column of the module's table."""

    name = "table_content"
    summary = "How alike the cells of a table are to those of the reference (content part of the H-score)."
    fidelity = "author's code (gersteinlab/Struc-Bench) as described to us; the scaling to [0, 1] is ours"

    def text_terms(self, ours: Table, theirs: Table) -> Score:
        """Data."""
        return _similar(ours.data, theirs.data), bool(ours.data) or not theirs.data

    def page_terms(self, ours: Page, theirs: Page) -> Score:
        """Cells."""
        return _similar(ours.cells, theirs.cells), not ours.is_empty

    def latex_terms(self, ours: Table, theirs: Table) -> Score:
        """Caption and data."""
        same = float(ours.caption == theirs.caption)
        return [same, *_similar(ours.data, theirs.data)], bool(ours.data) or not theirs.data


@dataclass(frozen=True, kw_only=True)
class TableStructure(TableReward):
    """How the table is built: the right column of the module's table."""

    name = "table_structure"
    summary = "How alike the build of a table is to that of the reference (structure part of the H-score)."
    fidelity = TableContent.fidelity

    def text_terms(self, ours: Table, theirs: Table) -> Score:
        """Size and header."""
        return [*_same_size(ours, theirs), *_similar(ours.header, theirs.header)], not ours.is_empty

    def page_terms(self, ours: Page, theirs: Page) -> Score:
        """Number of cells, and tags."""
        same = float(len(ours.cells) == len(theirs.cells))
        return [same, *_similar(ours.tags, theirs.tags)], not ours.is_empty

    def latex_terms(self, ours: Table, theirs: Table) -> Score:
        """Column specification and size."""
        return [*_similar(ours.alignment, theirs.alignment), *_same_size(ours, theirs)], not ours.is_empty


def _similar(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> list[float]:
    return [lev(ours, theirs), dl(ours, theirs)]


def _same_size(ours: Table, theirs: Table) -> list[float]:
    return [float(ours.num_rows == theirs.num_rows), float(ours.num_columns == theirs.num_columns)]


REWARDS = (TableContent, TableStructure)
