"""Markov domains for few-shot adaptation: four to pretrain on and a fifth of which a few noisy sequences are given.

Token v follows token u in domain d with logits ``TEMPERATURE * e_u^T M_d f_v / k``. The features e and f of the tokens
are shared by all domains and the core M_d [k, k] is each domain's own, so that what was learnt on four helps with a
fifth: without something shared, a few sequences would teach nothing that generalises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY, FEATURES, SOURCES, LENGTH = 64, 8, 4, 24
TEMPERATURE = 2.0
NOISE = 0.15
"""Share of the tokens of training and validation sequences that are replaced by a random one."""
SHIFT = 0.5
"""How far the core of the shifted domain lies from that of the new one, relative to the size of a core."""


@dataclass(frozen=True)
class Domains:
    """Transition matrices [V, V], rows of which sum to 1.

    Attributes:
        sources: Of the pretraining domains [4, V, V].
        new: Of the domain to adapt to.
        shifted: Of a domain near the new one.
    """

    sources: Tensor
    new: Tensor
    shifted: Tensor


@dataclass(frozen=True)
class FewShot:
    """Sequences of tokens [N, T].

    Attributes:
        train: A few of the new domain, with noise.
        validation: More like these, for the choice of a checkpoint.
        id: Of the new domain, without noise.
        ood: Of the shifted domain, without noise.
        old: Of the pretraining domains in equal parts, without noise.
    """

    train: Tensor
    validation: Tensor
    id: Tensor
    ood: Tensor
    old: Tensor


def make_domains(seed: int) -> Domains:
    """Domains with normally distributed features and cores; the pretraining domains are the same for every seed.

    Args:
        seed: Of the new domain and the one near it.
    """
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    before, after = (torch.randn(VOCABULARY, FEATURES, generator=fixed) for _ in range(2))
    cores = torch.randn(SOURCES, FEATURES, FEATURES, generator=fixed)
    new, other = torch.randn(2, FEATURES, FEATURES, generator=drawn)
    shifted = (new + SHIFT * other) / (1 + SHIFT**2) ** 0.5
    chains = (TEMPERATURE / FEATURES * before @ torch.stack([*cores, new, shifted]) @ after.T).softmax(-1)
    return Domains(chains[:SOURCES], chains[-2], chains[-1])


def sample(chain: Tensor, count: int, generator: torch.Generator, noise: float = 0.0) -> Tensor:
    """Sequences [N, T] of a chain from a uniformly drawn first token.

    Args:
        chain: Transition matrix [V, V].
        count: N.
        generator: Of all draws.
        noise: Probability that a token, once the sequence is drawn, is replaced by a uniformly drawn one.
    """
    tokens = [torch.randint(VOCABULARY, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator).squeeze(-1))
    clean = torch.stack(tokens, -1)
    replaced = torch.rand(clean.shape, generator=generator) < noise
    return torch.where(replaced, torch.randint(VOCABULARY, clean.shape, generator=generator), clean)


def few_shot(domains: Domains, seed: int, *, train: int = 48, validation: int = 96, test: int = 128) -> FewShot:
    """The sequences of one seed.

    Args:
        domains: Where they come from.
        seed: Of the draws.
        train: Number of training sequences.
        validation: Number of validation sequences.
        test: Number of sequences of each test.
    """
    generator = torch.Generator().manual_seed(seed)
    return FewShot(
        train=sample(domains.new, train, generator, NOISE),
        validation=sample(domains.new, validation, generator, NOISE),
        id=sample(domains.new, test, generator),
        ood=sample(domains.shifted, test, generator),
        old=torch.cat([sample(chain, test // SOURCES, generator) for chain in domains.sources]),
    )
