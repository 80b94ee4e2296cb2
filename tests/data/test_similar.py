"""Near-duplicates: what is found is alike, what is planted is found, and signatures estimate what they should."""

from __future__ import annotations

import numpy as np
import pytest

from alignkit.data import languages, similar
from alignkit.data.similar import NUM_PERMUTATIONS, earlier_like, runs_of_words, signatures_of


def test_runs_of_words_are_counted_by_hand() -> None:
    assert runs_of_words("One, two three: FOUR five six") == {b"one two three four five", b"two three four five six"}
    assert runs_of_words("one two") == {b"one two"} and runs_of_words("") == {b""}
    assert runs_of_words("東京は日本の") == {"東 京 は 日 本".encode(), "京 は 日 本 の".encode()}


def test_rows_alike_are_found_and_no_others() -> None:
    """Signatures with a known share of entries in common, beside others that share half of them at most."""
    draw = np.random.default_rng(0)
    signatures = draw.integers(0, 2**32, size=(400, NUM_PERMUTATIONS), dtype=np.uint32)
    planted = {}
    for place, row in enumerate(range(200, 260)):
        signatures[row] = signatures[place]
        changed = draw.permutation(NUM_PERMUTATIONS)[: (12, 20, 63)[place % 3]]  # 90 %, 84 % and half in common
        signatures[row, changed] += np.uint32(1)
        if place % 3 != 2:
            planted[row] = place
    found = earlier_like(signatures, 0.8)
    assert {int(row): int(found[row]) for row in np.flatnonzero(found >= 0)} == planted


def test_chains_and_equal_rows() -> None:
    draw = np.random.default_rng(1)
    first = draw.integers(0, 2**32, size=NUM_PERMUTATIONS, dtype=np.uint32)
    second, third = first.copy(), first.copy()
    second[:20] += np.uint32(1)
    third[:40] += np.uint32(1)  # like the second, not like the first
    third[:20] = second[:20]
    assert earlier_like(np.stack([first, first, second, third]), 0.8).tolist() == [-1, 0, 0, 2]
    assert earlier_like(np.zeros((0, NUM_PERMUTATIONS), np.uint32), 0.8).tolist() == []


@pytest.mark.skipif(not similar.can_compare(), reason="datasketch is not installed (pip install 'alignkit[data]')")
def test_signatures_estimate_the_share_of_runs_in_common() -> None:
    words = [f"w{index}" for index in range(300)]
    changed = [f"x{index}" if index % 60 == 30 else word for index, word in enumerate(words)]
    texts = [" ".join(words), " ".join(changed), " ".join(reversed(words))]
    runs = [runs_of_words(text) for text in texts]
    for other in (1, 2):
        exact = len(runs[0] & runs[other]) / len(runs[0] | runs[other])
        signatures = signatures_of([texts[0], texts[other]])
        assert (signatures[0] == signatures[1]).mean() == pytest.approx(exact, abs=0.14)
    assert earlier_like(signatures_of(texts), 0.7).tolist() == [-1, 0, -1]


def test_scripts_are_told_by_most_letters() -> None:
    texts = ["Hello, мир and all", "Привет", "你好, ok", "1 + 1 = 2", "", "Straße"]
    assert languages.scripts_of(texts) == {"latin": 2, "no letters": 2, "cyrillic": 1, "cjk": 1}


@pytest.mark.skipif(not languages.can_tell_languages(), reason="py3langid is not installed")
def test_languages_of_plain_sentences() -> None:
    texts = ["The cat sat on the mat and looked at the dog.", "Die Katze saß auf der Matte und sah den Hund an.", "12"]
    assert languages.languages_of(texts) == {"en": 1, "de": 1, languages.NONE: 1}
