"""Small networks of many seeds at once: parameters stacked along the first axis S, which never interact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Parameters = list[Tensor]
"""Weights [S, in, out] and biases [S, 1, out] of one layer after another."""


def initial_parameters(num_seeds: int, sizes: Sequence[int], first_seed: int = 0) -> Parameters:
    """Normal weights of variance 1 / fan-in and zero biases, seed s from generator ``first_seed`` + s.

    Args:
        num_seeds: S.
        sizes: Width of the input, of each hidden layer and of the output.
        first_seed: Seed of the first generator.
    """
    stacks: list[list[Tensor]] = []
    for seed in range(first_seed, first_seed + num_seeds):
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [torch.randn(fan_in, fan_out, generator=generator) / fan_in**0.5, torch.zeros(1, fan_out)]
        stacks.append(layers)
    return [torch.stack(tensors) for tensors in zip(*stacks, strict=True)]


def outputs(parameters: Parameters, inputs: Tensor) -> Tensor:
    """Outputs [S, N, out] for inputs [S, N, in], with tanh between layers."""
    hidden = inputs
    for weight, bias in zip(parameters[0:-2:2], parameters[1:-2:2], strict=True):
        hidden = torch.tanh(hidden @ weight + bias)
    return hidden @ parameters[-2] + parameters[-1]


def repeated(parameters: Parameters, times: int) -> Parameters:
    """Copies that can be trained: all seeds, then all seeds again, ``times`` over."""
    return [torch.cat([p.detach()] * times).requires_grad_() for p in parameters]
