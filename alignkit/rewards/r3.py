"""Regularized relevance (R3, arXiv 2402.03469): relevance, length and repetition in one product, no reward model."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample, prompt_text
from alignkit.rewards._files import file_function
from alignkit.rewards._words import distinct_share, words_of

HASHED = "hashed"
MOST_WORDS = 512
"""Words that the hashed embedding reads, the last ones, as Contriever reads its last 512 tokens."""
_BUCKETS = 2**20
_PAPER = "R3 (arXiv 2402.03469)"
_ROLE = re.compile(r"^[ \t]*###[^\n]*\n?", re.M)
_CUTS = ("\n\n\n\n", "\n\n--", "\n\n____")


@dataclass(frozen=True, kw_only=True)
class R3(Reward):
    """R3's mixture of relevance, length and repetition, with another rule where only one answer is right.

    With q the query, y the completion, y* the reference, n the words of y, and rel a dot product of embeddings::

        open-ended   R = rel(q, y) * LI * RP           LI = n / 100
        constrained  R = f(rel(y*, y)) * RP            f(v) = v / relevance_top * (length_top / 100)
                     RP = distinct trigrams / trigrams

    A switch that is off puts 1 in the place of its factor; without ``branching`` every row is open-ended. The
    completion is cut where another role begins (a line with ``###``), at three blank lines, or at a ruled line. The
    query is the last message of the user; of a text, what follows its first ``###`` line, or all of it.

    Nothing bounds LI: the longer an open-ended answer, the better, up to what generation allows. The embedding decides
    what relevance is. Without a model it is a hashed bag of words and word pairs of length 1, which sees shared words
    and no meaning. The authors' is facebook/contriever, mean-pooled and not normalised, for which relevance_top is 3.5:
    bring it as ``file.py:function``, from a list of texts to as many lists of numbers.
    """

    name = "r3"
    summary = "Relevance times length times absence of repetition; against a reference where one answer is right."
    fidelity = (
        "author's code for the mixture (naver-ai/rethinking-proxy-reward); the default embedding is ours, where theirs "
        "is Contriever"
    )

    embedder: str = option(HASHED, help="hashed, or file.py:function from a list of texts to lists of numbers.")
    relevance_top: float | None = option(
        None,
        gt=0,
        help="Relevance that f maps to length_top / 100; null is 1 for hashed, another embedder needs its own.",
    )
    length_top: int = option(512, ge=1, help="Words, see f.", source=_PAPER)
    qtype_column: str = option("qtype", help="Column that says which rows are constrained.")
    constrained: str = option("CONSTRAINED", help="What stands in it there, in any case of letters.", source=_PAPER)
    reference_column: str = option("reference", help="Column with y*, read of constrained rows.")
    query_column: str | None = option(None, help="Column with q; null takes it from the prompt.")
    relevance: bool = option(True, help="Relevance as a factor.")
    length_incentive: bool = option(True, help="LI as a factor of open-ended rows.")
    repetition_penalty: bool = option(True, help="RP as a factor.")
    branching: bool = option(True, help="The rule for constrained rows.")
    clamp: bool = option(False, help="Take a negative relevance for 0: below it, longer answers would be worse ones.")

    def __post_init__(self) -> None:
        if self.embedder != HASHED and self.relevance_top is None:
            advice = "take a high quantile of it between texts that belong together; for Contriever it is 3.5"
            raise ConfigError(self.name, [f"relevance_top: of {self.embedder} it is not known: {advice}"])
        if self.embedder != HASHED:
            file_function(self.embedder)
            # By its whole path: another process may stand in another folder.
            path, _, function = self.embedder.rpartition(":")
            object.__setattr__(self, "embedder", f"{Path(path).expanduser().absolute()}:{function}")

    def columns(self) -> tuple[str, ...]:
        """Those of the query, the kind and the reference, as far as they are read."""
        branched = (self.qtype_column, self.reference_column) if self.branching else ()
        return (*branched, *([self.query_column] if self.query_column is not None else []))

    def score(self, sample: Sample) -> float | None:
        """The product; None for a constrained row without a reference."""
        return self.scores([sample])[0]

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """The products of a batch, whose texts are embedded in one call."""
        answers = [stripped(sample.text) for sample in samples]
        anchors = [self._anchor(sample) for sample in samples]
        found = [1.0] * len(samples)
        if self.relevance:
            found = self._relevances([anchor or "" for anchor in anchors], answers)
        return [
            None if anchor is None else self._product(sample, answer, value)
            for sample, answer, anchor, value in zip(samples, answers, anchors, found, strict=True)
        ]

    def _product(self, sample: Sample, answer: str, relevance: float) -> float:
        words = words_of(answer)
        factors = [distinct_share(words, 3)] if self.repetition_penalty else []
        if self._is_constrained(sample):
            factors += [relevance / (self.relevance_top or 1.0) * self.length_top / 100] if self.relevance else []
        else:
            factors += [relevance, *([len(words) / 100] if self.length_incentive else [])]
        return math.prod(factors)

    def _is_constrained(self, sample: Sample) -> bool:
        return self.branching and str(sample.row[self.qtype_column]).lower() == self.constrained.lower()

    def _anchor(self, sample: Sample) -> str | None:
        """What the completion must be relevant to: the reference of a constrained row, the query of any other."""
        if self._is_constrained(sample):
            reference = sample.row[self.reference_column]
            return None if reference is None else str(reference)
        return query_of(sample.prompt) if self.query_column is None else str(sample.row[self.query_column])

    def _relevances(self, first: list[str], second: list[str]) -> list[float]:
        """Dot products of the embeddings of texts, pair by pair."""
        if self.embedder == HASHED:
            values = [_dot(hashed_embedding(a), hashed_embedding(b)) for a, b in zip(first, second, strict=True)]
        else:
            vectors: Sequence[Sequence[Any]] = file_function(self.embedder)([*first, *second])
            pairs = zip(vectors[: len(first)], vectors[len(first) :], strict=True)
            values = [float(sum(x * y for x, y in zip(a, b, strict=True))) for a, b in pairs]
        return [max(0.0, value) for value in values] if self.clamp else values


def _dot(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    return math.fsum(a[bucket] * b[bucket] for bucket in a.keys() & b.keys())


def stripped(text: str) -> str:
    """A completion up to where it goes on as somebody else, or rules a line.

    Args:
        text: A completion.
    """
    role = _ROLE.search(text)
    ends = [place for cut in _CUTS if (place := text.find(cut)) >= 0]
    return text[: min([*ends, *([role.start()] if role else []), len(text)])].strip()


def query_of(prompt: Any) -> str:
    """What a prompt asks, without template and system text, on one line.

    Args:
        prompt: A text, or messages.
    """
    text = prompt_text(prompt)
    if (first := _ROLE.search(text)) is not None:
        text = _ROLE.sub(" ", text[first.start() :])
    return " ".join(text.split())


def hashed_embedding(text: str) -> Mapping[int, float]:
    """Words and pairs of words, counted in buckets by their hash, as a vector of length 1; empty of a text without any.

    Args:
        text: Any text; its last ``MOST_WORDS`` words are read, in lower case.
    """
    words = words_of(text.lower())[-MOST_WORDS:]
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]
    counts = Counter(zlib.crc32(gram.encode("utf-8", "surrogatepass")) % _BUCKETS for gram in (*words, *pairs))
    length = math.sqrt(sum(count * count for count in counts.values()))
    return {bucket: count / length for bucket, count in counts.items()}


REWARDS = (R3,)
