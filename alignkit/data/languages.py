"""The scripts and languages of texts; nothing is downloaded, and no model of ours is asked.

Scripts are told from the names of the characters. Languages are told by ``py3langid``, which brings its model with it
and is not installed by default (``pip install 'alignkit[data]'``).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec

MAX_CHARACTERS = 1000
"""Of a text, of which the beginning is looked at."""
NONE = "no letters"
MISSING = "languages are not told: install the Python package py3langid, pip install 'alignkit[data]'"


def can_tell_languages() -> bool:
    """Whether the package that tells them is there."""
    return find_spec("py3langid") is not None


def languages_of(texts: Iterable[str]) -> dict[str, int]:
    """Texts by language, as ISO 639-1 codes, the most frequent first; those without letters have none.

    Args:
        texts: Texts of any length; of short ones the language is a guess.
    """
    from py3langid import classify

    found = Counter(
        str(classify(text[:MAX_CHARACTERS])[0]) if any(map(str.isalpha, text[:MAX_CHARACTERS])) else NONE
        for text in texts
    )
    return dict(found.most_common())


def scripts_of(texts: Iterable[str]) -> dict[str, int]:
    """Texts by the script that most of their letters are of, the most frequent first."""
    found = Counter(_script_of(text[:MAX_CHARACTERS]) for text in texts)
    return dict(found.most_common())


def _script_of(text: str) -> str:
    letters = Counter(_script_of_letter(letter) for letter in text if letter.isalpha())
    return letters.most_common(1)[0][0] if letters else NONE


@lru_cache(maxsize=1 << 14)
def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].lower()
