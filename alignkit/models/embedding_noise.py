"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

Each component of a token's embedding gets a draw of its own from the uniform distribution on [-m, m] with
m = alpha / sqrt(L d), where L is the length of the example in tokens and d the width of the embeddings. So the noise of
an example is as long, on average, however long the example is.

transformers' hook takes L to be the length of the tensor it sees. Of padded rows this is that of the longest, and of
packed ones that of all together, whose noise would all but vanish; here L is each example's own in every layout, and
the two agree where no row is padded. A packed row leaves out the last token of an example, which predicts nothing, and
does not count it. Where candidates share a prompt, its L is that of the longest of them with the prompt.

Nothing but the policy in training mode is disturbed: references, teachers and evaluations run in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignkit.data.prefix import Segments
from alignkit.models.wrapping import base_model


class EmbeddingNoise:
    """Hooks on a backbone and its embeddings; see the head of this file.

    Args:
        alpha: Size of the noise.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None

    def before(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the backbone: look at how long the examples are."""
        self._lengths = example_lengths(kwargs) if backbone.training else None

    def after(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the embedding: disturb what it has looked up."""
        if not embedding.training:
            return None
        lengths = torch.tensor(output.shape[1]) if self._lengths is None else self._lengths[..., None]
        size = self.alpha / (lengths.to(output.device, torch.float32) * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size.to(output.dtype)


def example_lengths(inputs: Mapping[str, Any]) -> Tensor | None:
    """By token of a batch, the length of the example it belongs to, [B, T] or [B, 1]; None where rows are as they are.

    Args:
        inputs: What a backbone is given: ``segments`` of a packed row, else ``attention_mask`` [B, T], else
            ``position_ids`` [1, T] that begin anew with each example.
    """
    segments: Segments | None = inputs.get("segments")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if segments is not None:
        parts = []
        for prefix, branches in segments.prompts:
            parts += [(prefix, prefix + max(branches, default=0)), *((branch, prefix + branch) for branch in branches)]
        counts, lengths = (torch.tensor(each) for each in zip(*parts, strict=True))
        return lengths.repeat_interleave(counts)[None]
    if mask is not None and mask.dim() == 2:
        return cast(Tensor, mask).sum(1, keepdim=True).clamp(min=1)
    if positions is not None and len(positions) == 1:
        example = (positions[0] == 0).cumsum(0) - 1
        return torch.bincount(example)[example][None]
    return None


def disturb_embeddings(model: nn.Module, alpha: float) -> EmbeddingNoise:
    """Add noise to the embeddings of a model whenever it is in training mode.

    Args:
        model: Plain or PEFT.
        alpha: Size of the noise.
    """
    base: Any = base_model(model)
    noise = EmbeddingNoise(alpha)
    # Before the hook of packed rows, which takes the segments away.
    base.base_model.register_forward_pre_hook(noise.before, with_kwargs=True, prepend=True)
    base.get_input_embeddings().register_forward_hook(noise.after)
    return noise
