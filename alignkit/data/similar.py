"""Rows that are nearly the same text: MinHash over runs of words, in bounded memory.

A text is the set of its runs of ``RUN`` words. Two texts are as like as the share of runs they have in common
(Jaccard's coefficient), of which the share of equal entries in their MinHash signatures is an estimate with a standard
error of 0.045 at most. Signatures are compared where one of their bands is equal: texts that are alike to 0.8 share one
with a probability above 0.999, texts alike to 0.3 with one below 0.06. Within a band a row is compared with the first
that has it and with the one before it, so that what is found is a lower bound.

The signatures are those of ``datasketch``, which is not installed by default (``pip install 'alignkit[data]'``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import numpy as np
import xxhash
from numpy.typing import NDArray

RUN = 5
NUM_PERMUTATIONS = 125
NUM_BANDS = 25
MAX_CHARACTERS = 20_000
"""Of a text, of which the beginning is looked at."""
MISSING = "near-duplicates are not looked for: install the Python package datasketch, pip install 'alignkit[data]'"
_CHUNK = 1 << 14
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")

Signatures = NDArray[np.uint32]


def can_compare() -> bool:
    """Whether the package that signatures are made with is there."""
    return find_spec("datasketch") is not None


def runs_of_words(text: str) -> set[bytes]:
    """Every run of ``RUN`` words, or all words of a text that has fewer; signs of scripts without spaces are words.

    Args:
        text: Of any length; capital letters are small ones.
    """
    words = _WORD.findall(text[:MAX_CHARACTERS].lower())
    starts = range(max(len(words) - RUN, 0) + 1)
    return {" ".join(words[start : start + RUN]).encode("utf-8", "replace") for start in starts}


def signatures_of(texts: Iterable[str]) -> Signatures:
    """The MinHash signature of every text [N, NUM_PERMUTATIONS]."""
    from datasketch import MinHash

    empty = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)

    def rows() -> Iterator[Signatures]:
        for text in texts:
            found = empty.copy()
            found.update_batch(runs_of_words(text))
            yield np.asarray(found.hashvalues, dtype=np.uint32)

    made = np.fromiter(rows(), dtype=np.dtype((np.uint32, NUM_PERMUTATIONS)))
    return made.reshape(-1, NUM_PERMUTATIONS)


def earlier_like(signatures: Signatures, likeness: float) -> NDArray[np.int64]:
    """Of every row the number of an earlier one that it is like, -1 where none is found [N].

    Args:
        signatures: Of the rows, in their order.
        likeness: Least share of entries that two signatures have in common.
    """
    found = np.full(len(signatures), -1, dtype=np.int64)
    for band in np.split(signatures, NUM_BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * band.itemsize))).ravel()
        _, group = np.unique(keys, return_inverse=True)
        # Rows of a group stand together, in their order; a stable sort keeps it.
        order = np.argsort(group, kind="stable")
        is_first = np.diff(group[order], prepend=-1) > 0
        first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        for other in (first, np.r_[order[:1], order[:-1]]):
            _compare(signatures, order[~is_first], other[~is_first], likeness, found)
    return found


def _compare(
    signatures: Signatures,
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    likeness: float,
    found: NDArray[np.int64],
) -> None:
    """Note of each row, if it is like the other one beside it and nothing is noted yet, that one."""
    left = found[rows] < 0
    rows, others = rows[left], others[left]
    for start in range(0, len(rows), _CHUNK):
        here, there = rows[start : start + _CHUNK], others[start : start + _CHUNK]
        is_like = (signatures[here] == signatures[there]).mean(1) >= likeness
        found[here[is_like]] = there[is_like]
