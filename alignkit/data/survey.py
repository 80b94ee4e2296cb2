"""What rows are as text: lengths, labels, whether the longer answer is the better one, languages, and rows alike.

Beside the report of a run (:mod:`alignkit.data.report`), which is about tokens. It goes through the rows once, or twice
where near-duplicates are looked for, and keeps numbers of them: 600 bytes a row at most, 500 of them a signature.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from numpy.typing import NDArray

from alignkit.data import languages, similar
from alignkit.data.candidate_report import EQUAL_AFTER_CUT, NO_ROOM
from alignkit.data.plain_rows import PlainRow, answer_length, plain_row
from alignkit.data.prompts_report import TOO_LONG
from alignkit.data.report import QUANTILES
from alignkit.data.supervised_report import CUT_AWAY

SAMPLED = 2000
"""Rows of which the language is told, spread over all of them."""
LIKENESS = 0.8
SHOWN_PAIRS = 3
SHOWN_CHARACTERS = 160
BIASED = 0.65
"""Share of the pairs above which the better answer being the longer one is said to be a bias."""
FOR_LENGTH = ("", NO_ROOM, EQUAL_AFTER_CUT, CUT_AWAY, TOO_LONG)
"""Why rows are kept or dropped at one max_length and not at another."""
_Z = 1.96
_WHO = re.compile(r"^(system|developer|user|assistant|tool): ", re.MULTILINE)
"""How a message begins as text."""


@dataclass(frozen=True)
class LengthBias:
    """Whether the better of two answers is the longer one.

    Attributes:
        num_compared: Rows whose best and worst answer differ in score and in length.
        num_longer: Those of them whose best answer is the longer one.
        low, high: The interval of 95 % (Wilson) of their share.
    """

    num_compared: int
    num_longer: int
    low: float
    high: float


@dataclass(frozen=True)
class Alike:
    """A row and an earlier one that is like it, by their numbers, with how they begin."""

    row: int
    earlier: int
    shown: str
    shown_earlier: str


@dataclass(frozen=True)
class Survey:
    """What the rows of a split are as text.

    Attributes:
        num_rows: Rows looked at.
        lengths: Quantiles of the lengths of prompts and answers, characters; answers of rows that say how good they are
            by what they say.
        labels: Rows by what they say of their answers: how many there are, or their label.
        scores: Quantiles of all scores, where they are more than an order of two.
        bias: None where rows do not compare answers.
        scripts, languages: Rows of a sample by script, and by language, of the prompt and the best answer together;
            None where no package tells it.
        num_alike: Rows that are like an earlier one (``LIKENESS``) but not equal to one; None where not looked for.
        alike: Some of them.
    """

    num_rows: int
    lengths: dict[str, dict[str, int]]
    labels: dict[str, int]
    scores: dict[str, float]
    bias: LengthBias | None
    scripts: dict[str, int]
    languages: dict[str, int] | None
    num_alike: int | None
    alike: tuple[Alike, ...]

    def to_dict(self) -> dict[str, Any]:
        """The survey as plain data."""
        return asdict(self)


def survey_rows(rows: Dataset, *, repeats_earlier: NDArray[np.bool_]) -> tuple[Survey, NDArray[np.bool_]]:
    """Look at rows as text.

    Args:
        rows: Well-formed rows as loaded, under our column names.
        repeats_earlier: Whether each row repeats an earlier one [N].

    Returns:
        What they are, and whether each row is like an earlier one without repeating one [N].
    """
    tally = _Tally()
    for row in rows:
        tally.count(plain_row(row))
    num_alike, alike, is_like = None, (), np.zeros(len(rows), dtype=bool)
    if similar.can_compare():
        earlier = similar.earlier_like(similar.signatures_of(plain_row(row).text for row in rows), LIKENESS)
        is_like = (earlier >= 0) & ~repeats_earlier
        num_alike, alike = int(is_like.sum()), _shown_pairs(rows, earlier, is_like)
    sample = [_told(plain_row(rows[index])) for index in spread(len(rows), SAMPLED)]
    survey = Survey(
        num_rows=len(rows),
        lengths=tally.quantiles(),
        labels=dict(sorted(tally.labels.items())),
        scores=tally.score_quantiles(),
        bias=tally.bias(),
        scripts=languages.scripts_of(sample),
        languages=languages.languages_of(sample) if languages.can_tell_languages() else None,
        num_alike=num_alike,
        alike=alike,
    )
    return survey, is_like


@dataclass(frozen=True)
class Cut:
    """What one ``max_length`` does: rows cut, and rows dropped for their length."""

    max_length: int
    num_cut: int
    num_dropped: int


def row_lengths(counts: pd.DataFrame) -> NDArray[np.int64]:
    """Tokens of every row, with its longest completion [N].

    Args:
        counts: What a conversion counted.
    """
    if "completion_lengths" in counts:
        longest = counts["completion_lengths"].map(lambda lengths: max(lengths, default=0))
        return np.asarray(counts["prompt_length"] + longest, dtype=np.int64)
    return np.asarray(counts["length"], dtype=np.int64)


def cuts(counts: pd.DataFrame, max_length: int) -> list[Cut]:
    """What ``max_length`` does, and what halves and multiples of it would do.

    Args:
        counts: What a conversion counted.
    """
    usable = counts[counts["cause"].isin(FOR_LENGTH)]
    total = row_lengths(usable)
    is_cut = "needed_length" in usable
    needed = np.asarray(usable["needed_length"], dtype=np.int64) if is_cut else total
    limits = sorted({limit for factor in (0.25, 0.5, 1, 2, 4, 8) if (limit := int(max_length * factor)) >= 2})
    return [
        Cut(limit, int(((total > limit) & (needed <= limit)).sum()), int((needed > limit).sum())) for limit in limits
    ]


def histogram(lengths: NDArray[np.int64]) -> list[tuple[str, int]]:
    """Rows by length, in steps that double.

    Args:
        lengths: One a row, tokens.
    """
    top = max(int(lengths.max(initial=0)), 16)
    edges = [0, *(2**power for power in range(4, math.ceil(math.log2(top + 1)) + 1))]
    counts, _ = np.histogram(lengths, bins=edges)
    return [(f"{low} to {high - 1}", int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)]


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, the first and the last among them."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(count, most))}) if count else []


def _told(row: PlainRow) -> str:
    """What the language of a row is told by: the beginnings of what is asked and of the best answer."""
    parts = [part for part in (row.prompt, *row.answers[:1]) if part]
    return "\n".join(_WHO.sub("", part)[: languages.MAX_CHARACTERS // len(parts)] for part in parts)


def _shown_pairs(rows: Dataset, earlier: NDArray[np.int64], is_like: NDArray[np.bool_]) -> tuple[Alike, ...]:
    found = np.flatnonzero(is_like)[:SHOWN_PAIRS]

    def shown(index: int) -> str:
        return plain_row(rows[index]).text[:SHOWN_CHARACTERS]

    return tuple(Alike(int(i), int(earlier[i]), shown(int(i)), shown(int(earlier[i]))) for i in found)


class _Tally:
    """What is counted of the rows as they go by."""

    def __init__(self) -> None:
        self.lengths: dict[str, array[int]] = {}
        self.labels: Counter[str] = Counter()
        self.scores = array("d")
        self.num_compared = self.num_longer = 0

    def count(self, row: PlainRow) -> None:
        if row.prompt:
            self._add("prompt", len(row.prompt))
        lengths = [answer_length(answer) for answer in row.answers]
        if row.scores is None:
            for length in lengths:
                self._add("answer", length)
        elif len(lengths) == 1:
            self.labels[f"label {row.scores[0]:g}"] += 1
            self._add(f"answer of label {row.scores[0]:g}", lengths[0])
        else:
            self._compare(row.scores, lengths)

    def _add(self, what: str, length: int) -> None:
        self.lengths.setdefault(what, array("q")).append(length)

    def _compare(self, scores: tuple[float, ...], lengths: list[int]) -> None:
        self.labels[f"{len(scores)} answers"] += 1
        self._add("best answer", lengths[0])
        self._add("worst answer", lengths[-1])
        self.scores.extend(scores)
        if scores[0] > scores[-1] and lengths[0] != lengths[-1]:
            self.num_compared += 1
            self.num_longer += lengths[0] > lengths[-1]

    def quantiles(self) -> dict[str, dict[str, int]]:
        return {
            what: {name: int(np.quantile(values, q, method="higher")) for name, q in QUANTILES.items()}
            for what, values in self.lengths.items()
        }

    def score_quantiles(self) -> dict[str, float]:
        if not set(self.scores) - {0.0, 1.0}:
            return {}
        return {name: float(np.quantile(self.scores, q)) for name, q in QUANTILES.items()}

    def bias(self) -> LengthBias | None:
        if not self.num_compared:
            return None
        n, share = self.num_compared, self.num_longer / self.num_compared
        centre, scale = share + _Z**2 / (2 * n), 1 + _Z**2 / n
        half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        low, high = max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)  # rounding may leave them
        return LengthBias(n, self.num_longer, low, high)
