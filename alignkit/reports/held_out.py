"""Held-out prompts of an online run in numbers: mean rewards and pass@k, each with an interval.

A prompt is one draw from the prompts there are, its completions are not: they share its difficulty. Intervals are
therefore over prompts. None of them is drawn at random, so that a report can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignkit.reports.estimates import row_sums

Z = 1.959964
"""Standard errors that 95 % of a normal distribution lie within."""

Interval = tuple[float, float]


def reward_interval(groups: Sequence[Sequence[float]]) -> Interval | None:
    """95 % interval of the mean reward over completions: normal, with the standard error of a ratio over prompts.

    Args:
        groups: Rewards of the completions of each prompt; a prompt may have none.

    Returns:
        Its two ends; None with fewer than two prompts.
    """
    found = row_sums([(math.fsum(rewards), float(len(rewards))) for rewards in groups]).estimate()
    if found is None or found.standard_error is None:
        return None
    return found.mean - Z * found.standard_error, found.mean + Z * found.standard_error


def passes(count: int, successes: int, k: int) -> float:
    """Probability that k of a prompt's completions, drawn without replacement, hold a success.

    This is the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1)::

        1 - C(n - c, k) / C(n, k)

    Args:
        count: n, completions of the prompt, at least k.
        successes: c, how many of them are right.
        k: Tries.
    """
    return 1.0 - math.comb(count - successes, k) / math.comb(count, k)


def pass_at_k(groups: Sequence[Sequence[bool]], k: int) -> tuple[float, Interval] | None:
    """Mean of :func:`passes` over the prompts with at least k completions, and a 95 % interval.

    The interval is Wilson's, with every prompt counted as one try. What is averaged lies between 0 and 1, and nothing
    there of the same mean varies more than a try that succeeds or fails; so the interval is, if anything, too wide.
    Unlike a bootstrap it is not empty where all prompts agree.

    Args:
        groups: Whether each completion of each prompt is a success.
        k: Tries.

    Returns:
        The mean and the two ends; None where no prompt has k completions.
    """
    values = [passes(len(group), sum(group), k) for group in groups if len(group) >= k]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return mean, wilson(mean, len(values))


def wilson(share: float, count: int) -> Interval:
    """95 % interval of a share that was found in ``count`` independent tries (Wilson 1927).

    Args:
        share: Between 0 and 1; need not be a whole number of tries.
        count: Tries, at least 1.
    """
    square = Z**2 / count
    middle = share + square / 2
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)
