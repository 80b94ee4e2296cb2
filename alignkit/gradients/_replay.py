"""Drawing the random numbers of an earlier pass again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """State of the generators that a forward pass on ``device`` draws from."""
    accelerator = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *accelerator]


@contextlib.contextmanager
def replayed(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Draw from ``state`` on, so that dropout masks the same units again; afterwards go on as if never done.

    Args:
        state: What :func:`random_state` returned before the earlier pass.
        device: Where the pass runs.
    """
    after = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(after, device)


def _set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
