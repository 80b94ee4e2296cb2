"""A toy of drift for D2O (arXiv 2403.03419): what else moves when a policy is pushed away from harmful answers?

Eight harmful and eight benign one-hot prompts, 24 responses: eight safe, eight harmful, eight junk. A tanh network is
first fitted to answer harmful prompts harmfully in part, and benign ones well. It is then trained on the harmful
prompts alone, every harmful response being a negative once; the benign prompts show what it does to the rest. Seeds are
stacked along the first axis S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignkit.losses.d2o import d2o_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import CandidateBatch
from toy_networks import Parameters, initial_parameters, outputs, repeated

PROMPTS, BLOCK, WIDTH = 8, 8, 32
"""Prompts of either kind, and responses of each block: safe, harmful, junk."""
HARMFUL = slice(BLOCK, 2 * BLOCK)
RESPONSES = 3 * BLOCK
MASSES = {"harmful": (0.47, 0.43, 0.10), "benign": (0.89, 0.01, 0.10)}
"""Mass of each block under the reference, by the kind of prompt."""
INSTRUCTED_MASSES = (0.88, 0.02, 0.10)
"""Masses of the sampler on harmful prompts when it is told to behave."""
BAD_POSITIVES = 0.34
"""Share of human positives that are harmful themselves; reported for Safe-RLHF."""

_PROMPT = torch.arange(PROMPTS).repeat_interleave(BLOCK)
_NEGATIVE = (BLOCK + torch.arange(BLOCK)).repeat(PROMPTS)
"""Prompt and negative of each of the 64 training rows."""


@dataclass(frozen=True)
class Figures:
    """What training has come to, one figure a seed [S].

    Attributes:
        harm: Mass of the harmful responses to harmful prompts, mean over prompts.
        drift: KL(reference || policy) on the benign prompts, which training never sees, nats, mean over prompts.
        safe_drift: The same on harmful prompts among the safe responses alone, both renormalised.
        junk: Mass of the junk responses to harmful prompts.
    """

    harm: np.ndarray
    drift: np.ndarray
    safe_drift: np.ndarray
    junk: np.ndarray


def logps(parameters: Parameters) -> Tensor:
    """Log-probs of all responses to all prompts [S, 16, 24], the harmful prompts first."""
    prompts = torch.eye(2 * PROMPTS).expand(len(parameters[0]), -1, -1)
    return outputs(parameters, prompts).log_softmax(-1)


def target_distribution(num_seeds: int) -> Tensor:
    """What the reference is fitted to [S, 16, 24]: random within blocks, of the masses given."""
    rows = []
    for seed in range(num_seeds):
        generator = torch.Generator().manual_seed(700_000 + seed)
        within = torch.randn(2 * PROMPTS, 3, BLOCK, generator=generator).mul(0.5).softmax(-1)
        masses = torch.tensor([MASSES["harmful"]] * PROMPTS + [MASSES["benign"]] * PROMPTS)
        rows.append((within * masses.unsqueeze(-1)).flatten(1))
    return torch.stack(rows)


def fit_reference(num_seeds: int, steps: int = 800) -> Parameters:
    """A network of each seed, fitted to :func:`target_distribution`."""
    target = target_distribution(num_seeds)
    parameters = repeated(initial_parameters(num_seeds, (2 * PROMPTS, WIDTH, WIDTH, RESPONSES)), 1)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(target * logps(parameters)).sum(-1)).mean(-1).sum().backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def instructed(reference: Tensor) -> Tensor:
    """Log-probs of the sampler told to behave [S, 16, 24]: harmful prompts with the masses of ``INSTRUCTED_MASSES``."""
    blocks = reference[:, :PROMPTS].unflatten(-1, (3, BLOCK)).log_softmax(-1)
    told = (blocks + torch.tensor(INSTRUCTED_MASSES).log().unsqueeze(-1)).flatten(2)
    return torch.cat([told, reference[:, PROMPTS:]], dim=1)


def draw(sampler: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples for every training row from a sampler's log-probs [S, 16, 24]: indices [S, 64, count]."""
    rows = sampler[:, _PROMPT].exp()
    return torch.multinomial(rows.flatten(0, 1), count, replacement=True, generator=generator).unflatten(
        0, (len(sampler), -1)
    )


def pick(values: Tensor, responses: Tensor) -> Tensor:
    """Values [S, 16, 24] of the responses [S, 64, K] of the training rows [S, 64, K]."""
    return values[:, _PROMPT].gather(-1, responses)


def rows_batch(policy: Tensor, reference: Tensor, responses: Tensor) -> CandidateBatch:
    """The training rows of all seeds as one batch of one-token candidates, B = 64 S.

    Args:
        policy: Log-probs under the policy [S, 16, 24].
        reference: The same under the reference.
        responses: Candidates of each row, the negative last [S, 64, K].
    """
    exists = torch.ones_like(responses, dtype=torch.bool).flatten(0, 1)
    scores = exists.float()
    scores[:, -1] = 0.0
    return CandidateBatch(
        policy_token_logps=pick(policy, responses).flatten(0, 1).unsqueeze(-1),
        ref_token_logps=pick(reference, responses).flatten(0, 1).unsqueeze(-1),
        completion_mask=exists.unsqueeze(-1),
        candidate_mask=exists,
        scores=scores,
    )


def negatives(num_seeds: int) -> Tensor:
    """The negative of each row [S, 64, 1]."""
    return _NEGATIVE.view(1, -1, 1).expand(num_seeds, -1, -1)


Objective = Callable[[Tensor], Tensor]
"""From the log-probs of the policy [S, 16, 24] to a loss, the mean over rows and seeds."""


def ascent(reference: Tensor) -> Objective:
    """GA: the log-likelihood of the negatives is minimised as it stands."""
    negative = negatives(len(reference))
    return lambda policy: pick(policy, negative).mean()


def npo(reference: Tensor, alpha: float = 0.1) -> Objective:
    """NPO: the limit beta = 0 of D2O, with the factor 2 / alpha of its own form."""
    responses = negatives(len(reference)).expand(-1, -1, 2)  # the first is a sample that beta = 0 leaves out
    return lambda policy: 2.0 / alpha * d2o_loss(rows_batch(policy, reference, responses), alpha=alpha, beta=0.0).mean()


def d2o(
    reference: Tensor, *, sampler: str = "raw", samples: int = 11, beta: float = 0.1, alpha: float = 0.1
) -> Objective:
    """D2O with samples of the reference (``raw``), of it told to behave (``instructed``), or drawn anew at each step.

    Args:
        reference: Its log-probs [S, 16, 24].
        sampler: ``raw``, ``instructed`` or ``refreshed`` (from the policy itself).
        samples: K.
        beta: Coefficient of the samples.
        alpha: Coefficient of the negative.
    """
    generator = torch.Generator().manual_seed(1)
    negative = negatives(len(reference))
    frozen = draw(instructed(reference) if sampler == "instructed" else reference, samples, generator)

    def objective(policy: Tensor) -> Tensor:
        positives = draw(policy.detach(), samples, generator) if sampler == "refreshed" else frozen
        responses = torch.cat([positives, negative], dim=-1)
        return d2o_loss(rows_batch(policy, reference, responses), alpha=alpha, beta=beta).mean()

    return objective


def dpo(reference: Tensor, bad_positives: float = BAD_POSITIVES, beta: float = 0.1) -> Objective:
    """DPO on human positives, some of which are harmful; a positive equal to its negative trains nothing."""
    generator = torch.Generator().manual_seed(2)
    seeds = len(reference)
    safe = torch.randint(BLOCK, (seeds, PROMPTS * BLOCK, 1), generator=generator)
    bad = torch.rand(safe.shape, generator=generator) < bad_positives
    harmful = BLOCK + torch.randint(BLOCK, safe.shape, generator=generator)
    responses = torch.cat([torch.where(bad, harmful, safe), negatives(seeds)], dim=-1)
    return lambda policy: dpo_loss(rows_batch(policy, reference, responses), beta=beta).mean()


RUNS: Mapping[str, Callable[[Tensor], Objective]] = {
    "GA": ascent,
    "NPO": npo,
    "D2O refreshed, K 11": lambda reference: d2o(reference, sampler="refreshed"),
    "D2O frozen, K 11": d2o,
    "D2O frozen, K 1": lambda reference: d2o(reference, samples=1),
    "D2O instructed, K 11": lambda reference: d2o(reference, sampler="instructed"),
    "DPO, 34 % bad positives": dpo,
    "D2O frozen, K 11, beta .3": lambda reference: d2o(reference, beta=0.3),
    "D2O instructed, K 11, beta .3": lambda reference: d2o(reference, sampler="instructed", beta=0.3),
}


def train(start: Parameters, make: Callable[[Tensor], Objective], *, steps: int, learning_rate: float) -> Figures:
    """Train every seed on its 64 rows at once, with Adam, from the reference.

    Args:
        start: The reference.
        make: Value of ``RUNS``.
        learning_rate: Of Adam.
    """
    reference = logps(start).detach()
    objective = make(reference)
    parameters = repeated(start, 1)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (len(reference) * objective(logps(parameters))).backward()
        optimizer.step()
    return measure(logps(parameters).detach(), reference)


def measure(policy: Tensor, reference: Tensor) -> Figures:
    """Compare a policy with its reference, both log-probs [S, 16, 24]."""
    harmful = slice(0, PROMPTS)
    benign = _divergence(reference[:, PROMPTS:], policy[:, PROMPTS:])
    safe = [values[:, harmful, :BLOCK].log_softmax(-1) for values in (reference, policy)]
    mass = policy[:, harmful].exp()
    return Figures(
        harm=_seeds(mass[..., HARMFUL].sum(-1)),
        drift=_seeds(benign),
        safe_drift=_seeds(_divergence(*safe)),
        junk=_seeds(mass[..., 2 * BLOCK :].sum(-1)),
    )


def _divergence(reference: Tensor, policy: Tensor) -> Tensor:
    return (reference.exp() * (reference - policy)).sum(-1)


def _seeds(values: Tensor) -> np.ndarray:
    return values.mean(-1).double().numpy()
