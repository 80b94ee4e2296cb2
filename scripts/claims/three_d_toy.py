"""The toy model of 3D-Properties (arXiv 2406.07327): a small shared-parameter policy over ten responses.

Four one-hot prompts; response i is chosen and response 4 + i rejected for prompt i; 8 and 9 never occur in a pair. All
seeds train at once: their parameters are stacked along the first axis S and never interact, since Adam is elementwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.types import CandidateBatch

PROMPTS, RESPONSES, WIDTH = 4, 10, 32
CHOSEN, REJECTED = torch.arange(PROMPTS), torch.arange(PROMPTS) + PROMPTS
OFF_POLICY_WEIGHT = 0.1
"""Initial probability of an off-policy response relative to an on-policy one."""

SCENARIOS: Mapping[str, tuple[bool, bool]] = {
    "S1": (True, True),
    "S2": (False, True),
    "S3": (True, False),
    "S4": (False, False),
}
"""Whether the (chosen, rejected) responses are on-policy, that is, likely under the initial policy."""

INITIALISATIONS = ("he", "linear")
"""``he``: normal weights of variance 2 / fan-in, zero biases; ``linear``: the default of ``torch.nn.Linear``."""

Parameters = list[Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What was seen before each step and after the last, one column a seed: arrays [steps + 1, S].

    Attributes:
        chosen: Probability of the chosen response, mean over prompts.
        other: Probability of all responses that are neither the chosen nor the rejected one of their prompt.
        log10_rejected: Decimal logarithm of the probability of the rejected response, mean over prompts.
        grad_ratio_log: Log of the rejected over the chosen gradient in probability space, nats; NaN without beta_neg.
        effective_weight: sigma(-z), mean over prompts.
    """

    chosen: np.ndarray
    other: np.ndarray
    log10_rejected: np.ndarray
    grad_ratio_log: np.ndarray
    effective_weight: np.ndarray

    @property
    def decline(self) -> np.ndarray:
        """The fraction of its highest chosen probability that each seed has lost by the end [S]."""
        return 1.0 - self.chosen[-1] / self.chosen.max(0)


def initial_parameters(num_seeds: int, initialisation: str = "he") -> Parameters:
    """Weights [S, in, out] and biases [S, 1, out] of the three layers, seed s from generator s."""
    sizes = [PROMPTS, WIDTH, WIDTH, RESPONSES]
    stacks: list[list[Tensor]] = []
    for seed in range(num_seeds):
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            weight, bias = torch.empty(fan_in, fan_out), torch.zeros(1, fan_out)
            if initialisation == "he":
                weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
            else:
                weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            layers += [weight.double(), bias.double()]
        stacks.append(layers)
    return [torch.stack(tensors) for tensors in zip(*stacks, strict=True)]


def response_logps(parameters: Parameters) -> Tensor:
    """Log-probabilities of all responses to all prompts [S, 4, 10]; the prompts are the rows of the identity."""
    weights, biases = parameters[0::2], parameters[1::2]
    hidden = torch.relu(weights[0] + biases[0])
    hidden = torch.relu(hidden @ weights[1] + biases[1])
    return (hidden @ weights[2] + biases[2]).log_softmax(-1)


def scenario_distribution(scenario: str) -> Tensor:
    """The initial distribution of a scenario [10]: blocks of chosen, rejected and unseen responses."""
    chosen_on, rejected_on = SCENARIOS[scenario]
    weights = torch.ones(RESPONSES, dtype=torch.float64)
    weights[:PROMPTS] = 1.0 if chosen_on else OFF_POLICY_WEIGHT
    weights[PROMPTS : 2 * PROMPTS] = 1.0 if rejected_on else OFF_POLICY_WEIGHT
    return weights / weights.sum()


def fit_initial_policies(parameters: Parameters, steps: int = 600) -> dict[str, Parameters]:
    """Train a copy of every seed towards each scenario's distribution, all at once, and return the copies."""
    num_seeds = len(parameters[0])
    targets = torch.stack([scenario_distribution(scenario) for scenario in SCENARIOS])
    targets = targets.repeat_interleave(num_seeds, dim=0).unsqueeze(1)
    fitted = [torch.cat([p] * len(SCENARIOS)).requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(fitted, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(targets * response_logps(fitted)).sum(-1)).mean(-1).sum().backward()
        optimizer.step()
    copies = zip(*(p.detach().split(num_seeds) for p in fitted), strict=True)
    return {scenario: list(tensors) for scenario, tensors in zip(SCENARIOS, copies, strict=True)}


def pair_batch(policy: Tensor, reference: Tensor) -> CandidateBatch:
    """One pair a prompt and seed, each response being a single token: B = 4 S, K = 2, T = 1."""
    prompts = torch.arange(PROMPTS)
    sides = torch.stack([CHOSEN, REJECTED], dim=-1)
    rows = policy.shape[0] * PROMPTS
    return CandidateBatch(
        policy_token_logps=policy[:, prompts[:, None], sides].reshape(rows, 2, 1),
        ref_token_logps=reference[:, prompts[:, None], sides].reshape(rows, 2, 1),
        completion_mask=torch.ones(rows, 2, 1, dtype=torch.bool),
        candidate_mask=torch.ones(rows, 2, dtype=torch.bool),
        scores=torch.tensor([1.0, 0.0], dtype=policy.dtype).expand(rows, 2),
    )


def train(start: Parameters, *, steps: int = 500, learning_rate: float = 1e-3, **options: float) -> Trajectory:
    """Train every seed on its four pairs, the whole set a step.

    Args:
        start: Fitted parameters; also the reference.
        steps: Number of Adam steps.
        learning_rate: Of Adam.
        **options: Options of :func:`alignkit.losses.flex_dpo.flex_dpo_loss`.
    """
    reference = response_logps(start)
    parameters = [p.clone().requires_grad_() for p in start]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    num_seeds, records = len(reference), []
    for _ in range(steps + 1):
        policy = response_logps(parameters)
        output = flex_dpo_loss(pair_batch(policy, reference), **options)
        records.append(_record(policy.detach(), output.metrics, num_seeds))
        optimizer.zero_grad()
        # The batch mean runs over all seeds; times S, each seed follows the gradient of its own mean.
        (num_seeds * output.mean()).backward()
        optimizer.step()
    return Trajectory(**{key: np.stack([record[key] for record in records]) for key in records[0]})


def _record(policy: Tensor, metrics: Mapping[str, object], num_seeds: int) -> dict[str, np.ndarray]:
    prompts = torch.arange(PROMPTS)
    chosen, rejected = policy[:, prompts, CHOSEN], policy[:, prompts, REJECTED]
    per_seed = {key: metric.values.view(num_seeds, PROMPTS).mean(-1) for key, metric in metrics.items()}
    return {
        "chosen": chosen.exp().mean(-1).numpy(),
        "other": (1.0 - chosen.exp() - rejected.exp()).mean(-1).numpy(),
        "log10_rejected": (rejected.mean(-1) / np.log(10.0)).numpy(),
        "grad_ratio_log": per_seed.get("grad_ratio_log", torch.full((num_seeds,), torch.nan)).numpy(),
        "effective_weight": per_seed["effective_weight"].numpy(),
    }
