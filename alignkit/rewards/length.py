"""Rewards for how long a completion is, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.errors import ConfigError
from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample


@dataclass(frozen=True, kw_only=True)
class Length(Reward):
    """RL-Struct's fifth part: 1 up to a soft limit, then falling in a straight line to 0 at a hard one.

    ``R = clip(1 - max(0, n - L_soft) / (L_hard - L_soft), 0, 1)`` for n tokens.
    """

    name = "length"
    summary = "1 up to soft_limit tokens, 0 from hard_limit on, a straight line between."
    fidelity = "reconstruction: RL-Struct (arXiv 2512.00319) has a length part, its formula and weight are not known"
    weight = 0.1
    counts_tokens = True

    soft_limit: int = option(256, ge=0, help="Tokens up to which the reward is 1.")
    hard_limit: int = option(512, ge=1, help="Tokens from which on it is 0.")

    def __post_init__(self) -> None:
        if self.hard_limit <= self.soft_limit:
            limits = f"hard_limit {self.hard_limit} must be above soft_limit {self.soft_limit}"
            raise ConfigError(self.name, [limits])

    def score(self, sample: Sample) -> float:
        """The reward of so many tokens."""
        over = len(sample.token_ids) - self.soft_limit
        return min(1.0, max(0.0, 1 - over / (self.hard_limit - self.soft_limit)))


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Reward):
    """DAPO's soft punishment of answers that are nearly too long.

    0 up to ``max_length - buffer`` tokens, then falling in a straight line to -1 at ``max_length``, and -1 beyond it.
    """

    name = "soft_overlong"
    summary = "0, and within the last buffer tokens before max_length falling to -1."
    fidelity = "paper text: DAPO (arXiv 2503.14476), soft overlong punishment; its limits were 20,480 and 4,096 tokens"
    counts_tokens = True

    max_length: int = option(512, ge=1, help="Tokens at which the punishment is whole; write max_completion_length.")
    buffer: int = option(128, ge=1, help="Tokens before max_length over which it grows.")

    def __post_init__(self) -> None:
        if self.buffer > self.max_length:
            limits = f"buffer {self.buffer} must not be above max_length {self.max_length}"
            raise ConfigError(self.name, [limits])

    def score(self, sample: Sample) -> float:
        """The punishment of so many tokens, from -1 to 0."""
        over = len(sample.token_ids) - (self.max_length - self.buffer)
        return -min(1.0, max(0, over) / self.buffer)


REWARDS = (Length, SoftOverlong)
