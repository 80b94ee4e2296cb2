"""How near a prompt is to those that were trained on: near ones can be answered by memory, far ones cannot.

With word counts n_w of a text and N training prompts, of which d_w hold the word w::

    e_w = n_w (ln((1 + N) / (1 + d_w)) + 1),      s = max over training prompts t of cos(e, e_t)

which is TF-IDF as scikit-learn weighs it with ``smooth_idf``, by the training prompts alone. Words are runs of letters
and digits, in lower case. A word that no training prompt holds has d_w = 0 and counts: it makes a prompt farther, not
nearer. Nothing is downloaded, and no model is asked.

The idea of evaluating both parts apart: Zhan et al., Evaluating Interpolation and Extrapolation Performance of Neural
Retrieval Models (arXiv 2204.11447), whose own measure of overlap is another.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

PARTS = ("far", "middle", "near")
MOST_TRAINING = 200_000
"""Different training prompts that are looked at, the first ones: their words are held in memory."""
_WORD = re.compile(r"\w+")

Floats = NDArray[np.float64]


def similarities(texts: Sequence[str], training: Sequence[str]) -> Floats:
    """s of every text, between 0 and 1; 1 where a training prompt has the same words as often, in any order.

    Args:
        texts: Held-out prompts.
        training: Training prompts, at least one.
    """
    counted = [_words(text) for text in training]
    held = Counter(word for words in counted for word in words)
    count = len(counted)

    def embed(words: Mapping[str, int]) -> dict[str, float]:
        raw = {w: n * (math.log((1 + count) / (1 + held[w])) + 1) for w, n in words.items()}
        norm = math.sqrt(math.fsum(x * x for x in raw.values())) or 1.0
        return {word: x / norm for word, x in raw.items()}

    places = {word: array("i") for word in held}
    weights = {word: array("d") for word in held}
    for index, words in enumerate(counted):
        for word, weight in embed(words).items():
            places[word].append(index)
            weights[word].append(weight)
    index_of = {word: (np.frombuffer(places[word], "i"), np.frombuffer(weights[word])) for word in held}
    found = np.empty(len(texts))
    for number, text in enumerate(texts):
        products = np.zeros(count)
        for word, weight in embed(_words(text)).items():
            if word in index_of:
                where, theirs = index_of[word]
                products[where] += weight * theirs
        found[number] = min(1.0, products.max())
    return found


def parts_of(similarity: Floats) -> list[NDArray[np.int64]]:
    """Indices of the far, the middle and the near third, whose sizes differ by at most one.

    Args:
        similarity: What :func:`similarities` returned; equal ones stay in their order.
    """
    return [np.sort(part) for part in np.array_split(np.argsort(similarity, kind="stable"), len(PARTS))]


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's correlation, with mean ranks for equal values; NaN where one of them never changes."""
    one, other = _ranks(first), _ranks(second)
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale else math.nan


def prompt_text(prompt: object) -> str:
    """The words of a prompt: itself, or the contents of its messages.

    Args:
        prompt: Text, or a list of messages.
    """
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, Iterable)
    return "\n".join(str(message.get("content") or "") for message in prompt)


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _ranks(values: Floats) -> Floats:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = ((ends - counts + 1 + ends) / 2)[index]
    return ranks
