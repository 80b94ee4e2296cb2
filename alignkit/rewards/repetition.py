"""A reward for not saying the same thing again."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample
from alignkit.rewards._words import distinct_share, words_of


@dataclass(frozen=True, kw_only=True)
class Repetition(Reward):
    """R3's repetition penalty as a reward of its own: distinct runs of ``n`` words over all of them.

    ``RP = |set of n-grams| / |n-grams|``, in (0, 1], and 1 where there are fewer than ``n`` words. Words are those of
    nltk's ``wordpunct_tokenize``, marks included. Short completions repeat little: alone, it rewards saying nothing.
    """

    name = "repetition"
    summary = "Share of distinct trigrams among all, 1 where nothing is repeated."
    fidelity = "author's code (naver-ai/rethinking-proxy-reward), as a reward of its own; n is an option of ours"

    n: int = option(3, ge=1, le=20, help="Words of a run.", source="R3 (arXiv 2402.03469)")

    def score(self, sample: Sample) -> float:
        """The share."""
        return distinct_share(words_of(sample.text), self.n)


REWARDS = (Repetition,)
