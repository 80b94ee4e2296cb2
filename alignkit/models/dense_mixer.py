"""DenseMixer: routers learn from every expert, while only the chosen ones answer.

A router of a mixture of experts picks the k best experts of a token. What it did not pick has no part in the output, so
the router is never told whether it should have: where the weights of the chosen are divided by their sum, the scores of
the others get no gradient of the language-modelling loss at all. DenseMixer keeps the output and repairs the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignkit.errors import ModelError
from alignkit.models._routers import Router
from alignkit.models.wrapping import base_model

_EXPERTS = {
    "DeepseekV2TopkRouter": "DeepseekV2Experts",
    "DeepseekV32TopkRouter": "DeepseekV32Experts",
    "DeepseekV3TopkRouter": "DeepseekV3Experts",
    "Dots1TopkRouter": "Dots1Experts",
    "Ernie4_5_MoeTopKRouter": "Ernie4_5_MoeExperts",
    "ExaoneMoeTopkRouter": "ExaoneMoeExperts",
    "FlexOlmoTopKRouter": "FlexOlmoExperts",
    "Glm4MoeLiteTopkRouter": "Glm4MoeLiteExperts",
    "Glm4MoeTopkRouter": "Glm4MoeExperts",
    "GlmMoeDsaTopkRouter": "GlmMoeDsaExperts",
    "GptOssTopKRouter": "GptOssExperts",
    "GraniteMoeHybridTopKRouter": "GraniteMoeHybridExperts",
    "GraniteMoeSharedTopKRouter": "GraniteMoeSharedExperts",
    "GraniteMoeTopKRouter": "GraniteMoeExperts",
    "HunYuanMoEV1Gate": "HunYuanMoEV1Experts",
    "JambaTopKRouter": "JambaExperts",
    "KimiLinearTopkRouter": "KimiLinearExperts",
    "Lfm2MoeTopKRouter": "Lfm2MoeExperts",
    "MiMoV2FlashTopkRouter": "MiMoV2FlashExperts",
    "MiniMaxM2TopKRouter": "MiniMaxM2Experts",
    "MiniMaxTopKRouter": "MiniMaxExperts",
    "MixtralTopKRouter": "MixtralExperts",
    "OlmoeTopKRouter": "OlmoeExperts",
    "Qwen2MoeTopKRouter": "Qwen2MoeExperts",
    "Qwen3MoeTopKRouter": "Qwen3MoeExperts",
    "Qwen3NextTopKRouter": "Qwen3NextExperts",
    "Qwen3_5MoeTopKRouter": "Qwen3_5MoeExperts",
    "SolarOpenTopkRouter": "SolarOpenExperts",
}
"""Routers whose gradient was compared with a plain loop over all experts, and the class of the experts beside them.

Each hands (logits [N, E], weights [N, k], chosen [N, k]) to its block, and that (hidden [N, H], chosen, weights) to the
experts. One with sigmoid scores divides the weights of the chosen by their sum, unless its ``norm_topk_prob`` says no.
"""

_REASONS = {
    "Llama4Router": "it multiplies what goes into an expert, not what comes out, so its output is no weighted sum of "
    "what the experts answer",
    "PhimoeTopKRouter": "it estimates the gradient of its choice in its own way (SparseMixer), which this would undo",
    "JetMoeTopKGating": "its block gathers the tokens of the chosen experts itself, so none of the others can be asked",
    "DbrxRouter": "its block, not its router, turns scores into weights, by a norm that is part of the configuration",
}
"""Why a family cannot be trained so, where it is known."""


class DenseMixer:
    r"""Straight-through dense gradients for chosen routers, in force until :meth:`remove`.

    Equation (Yao et al. 2025, "DenseMixer: Improving MoE Post-Training with Precise Router Gradient")::

        y           = sum_i TopK(pi)_i E_i(x),                    TopK(pi)_i = pi_i if i is among the k largest, else 0
        dy/dtheta  ~= sum_i E_i(x) dpi_i/dtheta  over all experts,          that is, dTopK(pi)_i/dpi_j ~= 1 if i = j

    Symbols: ``x`` is the hidden state of a token, ``E_i(x)`` what expert i answers, ``pi`` the router's scores and
    ``theta`` its weight. What comes out of the block is unchanged to the last bit. The scores get the gradient above,
    and whatever they were computed from gets it through them; the experts, and the hidden states through the experts,
    get the gradient of the chosen ones, as in the authors' code. Experts that answer every token (shared experts) stand
    beside the mixture and are left alone.

    Where the weights of the chosen are divided by their sum, the approximation is put in before the division::

        w_i = TopK(pi)_i / sum_j TopK(pi)_j        =>        dL/dpi_j = (g_j - sum_i w_i g_i) / sum_j TopK(pi)_j

    with ``g_i = <dL/dy, E_i(x)>``. For softmax scores this is, in the logits, exactly the gradient of the dense mixture
    ``sum_i pi_i E_i(x)`` divided by the chosen share. A softmax over the chosen logits alone (GPT-OSS, Granite) is such
    a division and is treated as one.

    Deviations: the experts are asked in the backward pass, k at a time, instead of being kept from the forward pass, so
    memory stays that of the sparse block. Sigmoid scores, limits on groups of experts, biases of the choice and scaling
    factors, of which the paper does not speak, follow from the same rule: the choice passes the gradient through.

    Fidelity: author's code for OLMoE and Qwen2-MoE as released, which do not divide. Where weights are divided
    (Qwen3-MoE, Mixtral and most others) the released code leaves out ``sum_i w_i g_i`` for the experts that were not
    chosen; the rule above is the one that it carries beside this, unused, as what should be. The rest: reconstruction.

    Args:
        model: A causal language model, plain or PEFT, the routers' own.
        routers: Those that get the dense gradient.

    Raises:
        ModelError: A router turns scores into weights in a way that this does not know; nothing was installed.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        blocks = [_Block(router, _experts_beside(model, router)) for router in routers]
        self._handles = [handle for block in blocks for handle in block.install()]

    def remove(self) -> None:
        """Give the routers their own gradient back."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def _experts_beside(model: nn.Module, router: Router) -> nn.Module:
    """The experts among which ``router`` chooses; refuses what is not understood."""
    kind = type(router.module).__name__
    if kind not in _EXPERTS:
        reason = _REASONS.get(kind, "how it turns scores into weights has not been checked here")
        known = ", ".join(_EXPERTS)
        raise ModelError(
            f"dense_mixer: true cannot be used with {router.name} ({kind}): {reason}. Remove dense_mixer, or take a "
            f"model with one of these routers: {known}."
        )
    block = base_model(model).get_submodule(router.name.rpartition(".")[0])
    experts = block.get_submodule("experts")
    if type(experts).__name__ != _EXPERTS[kind]:
        raise ModelError(
            f"dense_mixer: true cannot be used with {router.name}: the experts beside it are {type(experts).__name__}, "
            f"not {_EXPERTS[kind]}, so they cannot be asked one by one. Load the model with plain, unpacked experts, "
            "or remove dense_mixer."
        )
    return experts


class _Block:
    """One router and its experts, and the logits that go from one to the other in a forward pass."""

    def __init__(self, router: Router, experts: nn.Module) -> None:
        self.router, self.experts = router, experts
        self._logits: Tensor | None = None

    def install(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the two modules, which are otherwise left as they are."""
        return [
            self.router.module.register_forward_hook(self._keep_logits),
            self.experts.register_forward_pre_hook(self._detach_weights),
            self.experts.register_forward_hook(self._mix),
        ]

    def _keep_logits(self, router: nn.Module, args: Any, output: Any) -> None:
        # Only where a gradient will flow: an evaluation or a generation pays nothing.
        logits = output[self.router.logits_index]
        self._logits = logits if router.training and logits.requires_grad else None

    def _detach_weights(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> Any:
        if not self._in_force():
            return None
        hidden, chosen, weights = args
        return hidden, chosen, weights.detach()

    def _mix(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Any:
        if not self._in_force():
            return None
        logits, self._logits = self._logits, None
        hidden, chosen, weights = args
        score = self.router.score
        divides = score == "sigmoid" and vars(self.router.module).get("norm_topk_prob", True)
        dense_weights = straight_through_weights(logits, chosen, weights, score=score, divides=divides)
        return _AsIfDense.apply(output, dense_weights, hidden.detach(), experts, chosen.shape[-1])

    def _in_force(self) -> bool:
        # The backward pass asks the experts again, without gradients: these hooks must not act then.
        return self._logits is not None and torch.is_grad_enabled()


def straight_through_weights(
    logits: Tensor, chosen: Tensor, weights: Tensor, *, score: str, divides: bool = False
) -> Tensor:
    """Weights of all experts, of which the gradient counts: the choice of the best passes it through.

    Args:
        logits: The router's output before softmax or sigmoid [N, E].
        chosen: Experts of each token [N, k].
        weights: Their weights in the mixture [N, k], without gradient.
        score: ``softmax`` or ``sigmoid``.
        divides: Whether sigmoid scores are divided by the sum of the chosen. Softmax needs no such word: what the
            division adds to the gradient of a score is the same for every expert, and a softmax takes that away.

    Returns:
        Weights [N, E] in float32 or wider; in value those of the mixture for the chosen experts.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    total = weights.to(scores.dtype).sum(-1, keepdim=True)
    if not divides:
        # Whatever scales the chosen (their sum, a factor of the family) is the same number for all experts of a token.
        return scores * (total / scores.detach().gather(-1, chosen).sum(-1, keepdim=True))
    is_chosen = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    passed = scores.detach() * is_chosen + (scores - scores.detach())
    return total * passed / passed.sum(-1, keepdim=True)


class _AsIfDense(torch.autograd.Function):
    """The sparse mixture, whose gradient in the weights is that of the mixture of all experts."""

    @staticmethod
    def forward(
        ctx: Any, mixture: Tensor, dense_weights: Tensor, hidden: Tensor, experts: nn.Module, at_once: int
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.experts, ctx.at_once, ctx.shape, ctx.dtype = experts, at_once, dense_weights.shape, dense_weights.dtype
        device = hidden.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return mixture.view_as(mixture)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (hidden,) = ctx.saved_tensors
        tokens, num_experts = ctx.shape
        wide = gradient.reshape(tokens, -1).to(ctx.dtype)
        parts = []
        # As many experts at a time as a token has: no more memory than the sparse mixture took.
        for some in torch.arange(num_experts, device=hidden.device).split(ctx.at_once):
            each = some.repeat_interleave(tokens).unsqueeze(-1)
            with torch.autocast(**ctx.autocast):
                answers = ctx.experts(hidden.repeat(len(some), 1), each, torch.ones_like(each, dtype=hidden.dtype))
            parts.append(torch.einsum("enh,nh->ne", answers.to(ctx.dtype).view(len(some), tokens, -1), wide))
        return gradient, torch.cat(parts, dim=-1), None, None, None
