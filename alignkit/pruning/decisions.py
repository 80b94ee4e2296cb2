"""ATP's decisions: which structures of a model are pruned, learnt by a small network beside the model.

All equations are those of the authors' released code (Lu et al. 2024, "All-in-One Tuning and Structural Pruning for
Domain-Specific LLMs", arXiv 2412.14426), version 1 unless said otherwise; the text of the paper was not at hand.

A *mask* is 1 where a structure is kept and 0 where it is pruned, a matrix [layers, structures in a layer].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, FEED_FORWARD = 64, 2, 4, 256
"""Of the generator's transformer."""


@dataclass(frozen=True)
class Structure:
    """One kind of structure that can be pruned, such as a feed-forward channel; every layer has as many.

    Attributes:
        name: ``ffn`` or ``kv_groups``.
        size: How many a layer has.
        kept: How many of them the exported model keeps.
        cost: Parameters of the model that go with one of them.
    """

    name: str
    size: int
    kept: int
    cost: int


class DecisionGenerator(nn.Module):
    """The network whose outputs say what to keep (the authors' PDG, version 1).

    Every layer of the model is one position of a sequence: a fixed vector ``z_l`` of 64 numbers, orthogonal to those of
    the others as far as 64 dimensions allow. A transformer encoder (2 layers, 4 heads, feed-forward width 256) and a
    LayerNorm look at all of them; a linear map of its own for each layer and kind of structure, without bias, gives one
    logit for each structure.

    Deviation: no dropout in the encoder, so that the Gumbel noise is all that is random. The released code does not say
    which it has.

    Args:
        layers: Layers of the model.
        structures: Kinds of structures.
        seed: Of its start; the global random state is left as it was.
    """

    def __init__(self, layers: int, structures: Sequence[Structure], *, seed: int) -> None:
        super().__init__()
        self.inputs: Tensor
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", nn.init.orthogonal_(torch.empty(layers, WIDTH)))
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(WIDTH)
            self.heads = nn.ModuleDict(
                {
                    structure.name: nn.ModuleList(nn.Linear(WIDTH, structure.size, bias=False) for _ in range(layers))
                    for structure in structures
                }
            )

    def forward(self) -> dict[str, Tensor]:
        """Logits [layers, structures in a layer] by kind of structure."""
        hidden = self.norm(self.encoder(self.inputs[None]))[0]
        logits = {}
        for name, heads in self.heads.items():
            assert isinstance(heads, nn.ModuleList)
            logits[name] = torch.stack([head(row) for head, row in zip(heads, hidden, strict=True)])
        return logits


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``g = -ln(-ln U)``, U uniform in (0, 1), drawn on the CPU whatever the device of the model.

    Args:
        shape: Of the noise.
        generator: Where the random numbers come from.
    """
    uniform = torch.rand(*shape, generator=generator)
    return -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()


def soft_masks(logits: Tensor, noise: Tensor, *, keep_bias: float, temperature: float) -> Tensor:
    r"""Gumbel-sigmoid: masks between 0 and 1 that have a gradient.

    Equation::

        p = sigma( (o + g + b) / T )

    Symbols: ``o`` is ``logits``, ``g`` is ``noise``, ``b`` is ``keep_bias`` (3: at the start next to nothing is
    pruned), ``T`` is ``temperature`` (0.4).

    Args:
        logits: From the generator.
        noise: From :func:`gumbel_noise`; zero for the mode.
        keep_bias: Added to every logit.
        temperature: > 0; the smaller, the closer to 0 and 1.
    """
    return ((logits + noise + keep_bias) / temperature).sigmoid()


class _Threshold(torch.autograd.Function):
    """``1(p >= 0.5)`` with the gradient of ``p``.

    The value is exactly 0 or 1, which that of the usual ``p + (s - p).detach()`` is only up to rounding.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        return (soft >= 0.5).to(soft.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def hard_masks(soft: Tensor) -> Tensor:
    """``s = 1(p >= 0.5)``, exactly 0 or 1, with the gradient of ``p`` passed straight through.

    Args:
        soft: From :func:`soft_masks`.
    """
    hard: Tensor = _Threshold.apply(soft)  # type: ignore[no-untyped-call]
    return hard


def keep_probability(logits: Tensor, *, keep_bias: float) -> Tensor:
    r"""How probable it is that a drawn mask keeps a structure: ``P(o + g + b >= 0) = 1 - exp(-exp(o + b))``.

    Args:
        logits: From the generator.
        keep_bias: As in :func:`soft_masks`.
    """
    return -torch.expm1(-(logits + keep_bias).exp())


def remaining_parameters(masks: Mapping[str, Tensor], structures: Sequence[Structure]) -> Tensor:
    """``P(s)``: parameters of these kinds of structures that masks leave, with the gradient of the masks.

    Args:
        masks: Mask by kind of structure.
        structures: The kinds that count.
    """
    return torch.stack([structure.cost * masks[structure.name].sum() for structure in structures]).sum()


def ratio_loss(remaining: Tensor, target: float) -> Tensor:
    r"""How far two shares are apart.

    Equation::

        R(a, b) = ln( max(a, b) / min(a, b) ) = | ln a - ln b |

    Symbols: ``a`` is ``remaining``, ``b`` is ``target``; both shares of the parameters that can be pruned.

    Args:
        remaining: Share that is left; > 0.
        target: Share that shall be left; > 0.
    """
    return (remaining.log() - math.log(target)).abs()


def structure_ratio_loss(masks: Mapping[str, Tensor], structures: Sequence[Structure]) -> Tensor:
    r"""How far masks are from the counts that the exported model has: one ratio loss for each kind of structure.

    Equation::

        sum over kinds k of R( P_k(s) / P_k,total , kept_k / size_k )

    Deviation: the released code takes one ratio over all kinds. Here each kind has a target of its own, and a sum over
    both would let one be spared at the expense of the other. With one kind it is the same.
    A drawn mask that prunes all of a kind has no logarithm; it counts as half a structure, and its gradient passes.

    Args:
        masks: Hard masks with a gradient, by kind.
        structures: The kinds, with what they shall keep.
    """
    losses = []
    for structure in structures:
        total = structure.cost * masks[structure.name].numel()
        share = remaining_parameters(masks, [structure]) / total
        least = 0.5 * structure.cost / total
        losses.append(ratio_loss(share + (least - share).clamp(min=0).detach(), structure.kept / structure.size))
    return torch.stack(losses).sum()


def equal_counts(logits: Tensor, kept: int) -> Tensor:
    """The mask that keeps as many structures in every layer: those of the largest logits, of equal ones the first.

    What stock models load has layers of one size, which drawn masks do not give.

    Args:
        logits: From the generator.
        kept: How many to keep in each layer.
    """
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)[:, :kept]
    return torch.zeros_like(logits, requires_grad=False).scatter_(-1, order, 1.0)


def thresholds(masks: Mapping[str, Tensor], *, step: int, total: int, strength: float, lr: float) -> dict[str, Tensor]:
    r"""What the norm of every pruned group of LoRA weights loses in a step (version 2 of the released code).

    Equation::

        t = beta(step) * lr * ratio,   beta(step) = beta * (e^{step / total} - 1) / (e - 1)
        ratio = (pruned in this mask of this layer) / (pruned in all masks of all layers)

    Symbols: ``beta`` is ``strength`` (50000).

    Args:
        masks: Hard masks by kind of structure.
        step: Steps made so far, this one included.
        total: Steps of the run.
        strength: What beta grows to.
        lr: Learning rate of the step.

    Returns:
        One threshold for each layer [layers, 1], by kind; 0 where nothing is pruned.
    """
    beta = strength * math.expm1(step / total) / math.expm1(1)
    pruned = {name: (1 - mask).sum(-1, keepdim=True) for name, mask in masks.items()}
    everything = torch.stack([count.sum() for count in pruned.values()]).sum().clamp(min=1)
    return {name: beta * lr * count / everything for name, count in pruned.items()}


def group_lasso(norms: Mapping[str, Sequence[Sequence[Tensor]]], masks: Mapping[str, Tensor]) -> Tensor:
    r"""The penalty of version 1: norms of the LoRA weights that belong to what is pruned.

    Equation (the released code has K = 3 kinds of masks: feed-forward, values, keys and queries)::

        GL = 1 / (K L) * sum over layers, kinds, structures j with m_j = 0, and factors w of j, of ||w_j||

    Each factor has a norm of its own, unlike in the proximal step, where all of a structure have one in common.

    Deviation: a structure of attention is a whole group of heads, so that K is 2 and a factor's norm is that of all its
    rows (columns, of the output projection) that belong to the group.

    Args:
        norms: By kind of structure, and by layer: the norms [structures] of each factor.
        masks: Hard masks by kind.
    """
    terms = [
        (norm * (1 - mask)).sum()
        for name, layers in norms.items()
        for mask, parts in zip(masks[name], layers, strict=True)
        for norm in parts
    ]
    layers = len(next(iter(masks.values())))
    return torch.stack(terms).sum() / (len(masks) * layers)


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of all structures on which two masks disagree.

    Args:
        before: Hard masks by kind.
        after: The same, later.
    """
    changed = sum(float((before[name] != mask).sum()) for name, mask in after.items())
    return changed / sum(mask.numel() for mask in after.values())


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of hard masks, the same wherever they are the same.

    Args:
        masks: By kind of structure.
    """
    found = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        found.update(f"{name} {tuple(mask.shape)} ".encode())
        found.update(bytes(mask.to("cpu", torch.uint8).flatten().tolist()))
    return found.hexdigest()
