"""Nearness to training prompts against sums over pairs in plain Python, on made texts."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from alignkit.data.novelty import parts_of, prompt_text, rank_correlation, similarities

TRAINING = ["Tom has 3 apples", "a train of 5 cars", "Tom, Tom and the train", "the apples of the tree"]
TEXTS = ["Tom has 3 apples!", "the car", "zebras only", "Tom saw the apples, the apples", "", "apples 3 has tom"]


def plain(text: str) -> float:
    """Cosine with every training prompt, word by word; a word that none holds counts in the norm."""
    bags = [Counter(re.findall(r"\w+", t.lower())) for t in TRAINING]

    def idf(word: str) -> float:
        return math.log(5 / (1 + sum(word in bag for bag in bags))) + 1

    own = Counter(re.findall(r"\w+", text.lower()))
    norm = math.sqrt(sum((n * idf(w)) ** 2 for w, n in own.items()))
    best = 0.0
    for bag in bags:
        other = math.sqrt(sum((n * idf(w)) ** 2 for w, n in bag.items()))
        product = sum(n * idf(w) * bag[w] * idf(w) for w, n in own.items())
        best = max(best, product / (norm * other) if norm else 0.0)
    return best


def test_similarities_are_those_of_plain_python() -> None:
    found = similarities(TEXTS, TRAINING)
    assert found == pytest.approx([plain(text) for text in TEXTS], abs=1e-12)
    # The same words in another order are as near as can be; words that were never seen, and no words, are far.
    assert found[0] == found[5] == pytest.approx(1.0, abs=1e-12)
    assert found[2] == found[4] == 0 and 0 < found[3] < 1


def test_training_prompts_themselves_and_their_order() -> None:
    assert similarities(TRAINING, TRAINING) == pytest.approx([1.0] * 4, abs=1e-12)
    assert similarities(TEXTS, TRAINING[::-1]) == pytest.approx(similarities(TEXTS, TRAINING), abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_parts_are_thirds(count: int) -> None:
    values = np.random.default_rng(0).permutation(count).astype(float)
    parts = parts_of(values)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for nearer, farther in zip(parts[1:], parts, strict=False):
        if len(nearer) and len(farther):
            assert values[farther].max() <= values[nearer].min()


def test_rank_correlation() -> None:
    """Against 1 - 6 sum d^2 / (n (n^2 - 1)), which holds without ties, and by hand with one."""
    one, other = np.array([3.0, 1, 2, 5, 4]), np.array([10.0, 30, 20, 0, 5])
    squares = sum((a - b) ** 2 for a, b in zip([3, 1, 2, 5, 4], [3, 5, 4, 1, 2], strict=True))
    assert rank_correlation(one, other) == pytest.approx(1 - 6 * squares / (5 * 24), abs=1e-12)
    # Ranks 1, 2.5, 2.5 and 1, 2, 3: deviations -1, .5, .5 and -1, 0, 1.
    assert rank_correlation(np.array([0.0, 1, 1]), np.array([1.0, 2, 3])) == pytest.approx(
        1.5 / math.sqrt(3), abs=1e-12
    )
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_the_text_of_messages() -> None:
    assert prompt_text("a b") == "a b"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "user", "content": None}]
    assert prompt_text(messages) == "s\nu\n"
