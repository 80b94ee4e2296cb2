"""A causal language model of two layers and its LoRA adapters, as functions of lists of tensors.

Written by hand so that a training step costs milliseconds. The gradient rules are those of :mod:`alignkit.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention

from glad_domains import LENGTH, VOCABULARY, Domains, sample

WIDTH, HIDDEN, HEADS, LAYERS = 64, 128, 4, 2
RANK, SCALE = 8, 2.0
"""Of the adapters: r, and lora_alpha / r."""
LINEARS = ((WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
"""(out, in) of q, k, v, o, up and down."""

Weights = Sequence[Tensor]
"""Token embedding, position embedding, head, then q, k, v, o, up and down of each layer."""


def initial_weights(seed: int) -> list[Tensor]:
    """Normal weights of variance 1 / fan-in; embeddings of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(n, WIDTH, generator=generator) for n in (VOCABULARY, LENGTH)]
    shapes = [(VOCABULARY, WIDTH), *LINEARS * LAYERS]
    return embeddings + [torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for shape in shapes]


def initial_adapters(seed: int) -> list[Tensor]:
    """A [r, in] and B [out, r] of every linear layer, as PEFT draws them: A uniform, B zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters = []
    for fan_out, fan_in in LINEARS * LAYERS:
        bound = 1 / math.sqrt(fan_in)
        adapters += [torch.empty(RANK, fan_in).uniform_(-bound, bound, generator=generator), torch.zeros(fan_out, RANK)]
    return adapters


def adapted(weights: Weights, adapters: Weights) -> list[Tensor]:
    """The weights with ``SCALE * B A`` added to every linear layer but the head."""
    changes = [SCALE * (b @ a) for a, b in zip(adapters[0::2], adapters[1::2], strict=True)]
    return [*weights[:3], *(w + change for w, change in zip(weights[3:], changes, strict=True))]


def mean_loss(weights: Weights, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens [N, T] after the first, nats a token."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    embedding, positions, head = weights[:3]
    x = embedding[inputs] + positions[: inputs.shape[1]]
    for layer in range(LAYERS):
        q, k, v, o, up, down = weights[3 + 6 * layer : 9 + 6 * layer]
        normed = rms_norm(x, (WIDTH,))
        heads = [(normed @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (q, k, v)]
        attended = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + attended @ o.T
        x = x + torch.relu(rms_norm(x, (WIDTH,)) @ up.T) @ down.T
    scores = rms_norm(x, (WIDTH,)) @ head.T
    return cross_entropy(scores.flatten(0, 1), targets.flatten())


def pretrain(domains: Domains, seed: int, steps: int = 500, batch_size: int = 64) -> list[Tensor]:
    """A model of the pretraining domains, from fresh sequences in every step.

    Args:
        domains: Their ``sources`` are used, in equal parts.
        seed: Of the initial weights and the sequences.
        steps: Of AdamW at 3e-3, falling linearly to zero.
        batch_size: Sequences a step.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [w.requires_grad_() for w in initial_weights(seed)]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    # Drawn beforehand: drawing a hundred batches at once costs as much as drawing one.
    rows = steps * batch_size // len(domains.sources)
    drawn = torch.stack([sample(chain, rows, generator) for chain in domains.sources], 1).flatten(0, 1)
    for tokens in drawn.split(batch_size):
        optimizer.zero_grad()
        mean_loss(weights, tokens).backward()
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights]
