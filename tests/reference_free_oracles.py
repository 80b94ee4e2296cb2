"""Losses on pairs without a reference, in plain Python: floats and loops; ``tests/oracles.py`` has those with one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.oracles import Pair, sigma


@dataclass(frozen=True)
class Outcome:
    """Of one pair, the loss being a function of z.

    Attributes:
        reward_w, reward_l: Implicit rewards.
        z: How far the chosen response is ahead.
        loss, slope: The loss and its derivative in z.
        rise_w, rise_l: By how much z rises with log pi(y_w), and falls with log pi(y_l).
    """

    reward_w: float
    reward_l: float
    z: float
    loss: float
    slope: float
    rise_w: float
    rise_l: float

    @property
    def slopes(self) -> tuple[float, float]:
        """Gradient in every token of the chosen and of the rejected response."""
        return self.slope * self.rise_w, -self.slope * self.rise_l


def mean_logp(response: list[float]) -> float:
    """1/|y| log pi(y|x)."""
    return math.fsum(response) / len(response)


def logistic(z: float, wrong: float) -> tuple[float, float]:
    """-(1 - e) log sigma(z) - e log sigma(-z), by probabilities, and its derivative in z."""
    loss = -(1 - wrong) * math.log(sigma(z)) - wrong * math.log(sigma(-z))
    return loss, wrong * sigma(z) - (1 - wrong) * sigma(-z)


def simpo(pair: Pair, beta: float, gamma: float, wrong: float = 0.0) -> Outcome:
    """arXiv 2405.14734, Eq. 6."""
    n_w, n_l = len(pair.policy_chosen), len(pair.policy_rejected)
    reward_w, reward_l = beta * mean_logp(pair.policy_chosen), beta * mean_logp(pair.policy_rejected)
    z = reward_w - reward_l - gamma
    loss, slope = logistic(z, wrong)
    return Outcome(reward_w, reward_l, z, loss, slope, beta / n_w, beta / n_l)


def alphapo(pair: Pair, alpha: float, beta: float, gamma: float, wrong: float = 0.0) -> Outcome:
    """arXiv 2501.03884: the reward (1 - p^-alpha) / alpha of p = exp(mean log-prob), whose slope in log p is p^-alpha.

    p^-alpha is at most e^50, beyond which it is constant.
    """

    def reward(response: list[float]) -> tuple[float, float]:
        power = math.exp(mean_logp(response)) ** -alpha if -alpha * mean_logp(response) < 50 else math.exp(50)
        moves = -alpha * mean_logp(response) < 50
        return beta * (1 - power) / alpha, beta * power / len(response) if moves else 0.0

    (reward_w, rise_w), (reward_l, rise_l) = reward(pair.policy_chosen), reward(pair.policy_rejected)
    z = reward_w - reward_l - gamma
    # Beyond the cut z is some 1e22, where a loss by probabilities would overflow.
    loss, slope = logistic(z, wrong) if abs(z) < 30 else (max(-z, 0.0) * (1 - wrong) + max(z, 0.0) * wrong, 0.0)
    slope = slope if abs(z) < 30 else wrong - (1.0 if z < 0 else 0.0)
    return Outcome(reward_w, reward_l, z, loss, slope, rise_w, rise_l)


def cpo(pair: Pair, beta: float, form: str, wrong: float = 0.0) -> Outcome:
    """arXiv 2401.08417, Eq. 3, without the term of the likelihood; or a hinge in place of the logistic loss."""
    reward_w, reward_l = beta * math.fsum(pair.policy_chosen), beta * math.fsum(pair.policy_rejected)
    z = reward_w - reward_l
    loss, slope = logistic(z, wrong)
    if form == "hinge":
        loss, slope = (1 - z, -1.0) if z < 1 else (0.0, 0.0)
    return Outcome(reward_w, reward_l, z, loss, slope, beta, beta)


def orpo(pair: Pair, beta: float) -> Outcome:
    """The odds term of arXiv 2403.07691, Eq. 7; the derivative of log odds in log p is 1 / (1 - p).

    A mean log-prob above -1e-7 counts as that, whatever it is.
    """

    def log_odds(response: list[float]) -> tuple[float, float]:
        m = min(mean_logp(response), -1e-7)
        rest = -math.expm1(m)
        return math.log(math.exp(m) / rest), 1 / rest / len(response) if mean_logp(response) < -1e-7 else 0.0

    (odds_w, rise_w), (odds_l, rise_l) = log_odds(pair.policy_chosen), log_odds(pair.policy_rejected)
    z = odds_w - odds_l
    loss, slope = logistic(z, 0.0)
    rewards = beta * mean_logp(pair.policy_chosen), beta * mean_logp(pair.policy_rejected)
    return Outcome(*rewards, z, loss, slope, rise_w, rise_l)
