"""How much a layer does: Block Influence, by which the layers are found that a model can do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockInfluence:
    r"""Block Influence of decoder layers, summed over the tokens of all batches that pass while it watches.

    Equation (Men et al. 2024, "ShortGPT", arXiv 2403.03853)::

        BI_i = 1 - E_t [ X_{i,t} . X_{i+1,t} / ( ||X_{i,t}|| ||X_{i+1,t}|| ) ]

    Symbols: ``X_i`` is what enters layer i and ``X_{i+1}`` what leaves it; the expectation is the mean over all tokens
    that are not masked. A layer with a small value turns the hidden state little, and is dropped first. The paper
    scores all layers once and drops those of the smallest values, the last one among them where it is one of these;
    so do we.

    Fidelity: reconstruction: the abstract was at hand, and the formula as it is commonly quoted.

    Args:
        layers: The decoder layers, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.mask: Tensor
        self._sums = [0.0] * len(layers)
        self._tokens = [0] * len(layers)
        self._handles = [
            layer.register_forward_hook(self._hook(index), with_kwargs=True) for index, layer in enumerate(layers)
        ]

    def _hook(self, index: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(entered.double(), left.double(), dim=-1)
            self._sums[index] += float(cosines[self.mask.to(cosines.device)].sum())
            self._tokens[index] += int(self.mask.sum())

        return look

    def scores(self) -> Tensor:
        """One number from 0 to 2 for each layer, float64."""
        means = [total / tokens for total, tokens in zip(self._sums, self._tokens, strict=True)]
        return 1 - torch.tensor(means, dtype=torch.float64)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
