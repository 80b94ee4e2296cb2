"""Words of a text, and how alike two texts or lists are."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Sequence

_WORDS = re.compile(r"\w+|[^\w\s]+")
MOST_CELLS = 1_000
"""Elements of a list that are compared; time grows with their square."""


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, and runs of other marks: what nltk calls ``wordpunct_tokenize``.

    Args:
        text: Any text.
    """
    return _WORDS.findall(text)


def distinct_share(words: Sequence[str], n: int) -> float:
    """Distinct runs of ``n`` words over all of them, in (0, 1]; 1 where there are fewer than ``n`` words."""
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def token_f1(predicted: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, lower-cased and counted as often as they are there.

    Two texts without a word are alike.
    """
    ours, theirs = words_of(predicted.lower()), words_of(reference.lower())
    if not ours or not theirs:
        return float(not ours and not theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions that make ``a`` into ``b``.

    A column of the usual table is kept as two whole numbers, a bit for each step up and each step down (Myers 1999,
    Hyyrö 2001), so that Python handles a column at a time.

    Args:
        a: Any list or text.
        b: Any list or text.
    """
    if not a:
        return len(b)
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    everywhere, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = everywhere, 0, len(a)
    for item in b:
        equal = places.get(item, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        rises, falls = down | (everywhere & ~(diagonal | up)), up & diagonal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & everywhere, falls << 1 & everywhere
        up, down = falls | (everywhere & ~(diagonal | rises)), rises & diagonal
    return distance


def lev(predicted: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Struc-Bench's first similarity: ``1 - Levenshtein / (2 |reference|)``, 0 for an empty reference.

    An empty prediction has 1/2. It is below 0 where the prediction is more than about twice as long as the reference.
    """
    return 1 - edit_distance(predicted, reference) / (2 * len(reference)) if reference else 0.0


def dl(predicted: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Struc-Bench's second similarity: ``2 M / (|predicted| + |reference|)`` of ``difflib``, M elements that match."""
    return difflib.SequenceMatcher(None, predicted, reference).ratio()
