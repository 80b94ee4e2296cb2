"""The routers of a mixture of experts: where they are, what they compute, and their logits with the graph.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers ``PreTrainedModel._can_record_outputs`` and ``OutputRecorder.target_class / index``: which module of a
  family computes the router logits, and which of its outputs they are
- the names of router classes below, the score that each computes from its logits, and ``top_k`` of it or of its block
- peft's ``ParamWrapper.base_layer``, which calls the router as it stands, with other weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.modes import evaluating
from alignkit.models.wrapping import base_model

Score = Literal["softmax", "sigmoid"]
ScoreKind = Literal["auto", "softmax", "sigmoid_norm", "topk"]

SOFTMAX_ROUTERS = frozenset(
    "AriaTextTopKRouter DbrxRouter DeepseekV2TopkRouter Ernie4_5_MoeTopKRouter FlexOlmoTopKRouter GptOssTopKRouter "
    "GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter GraniteMoeTopKRouter HunYuanMoEV1Gate JambaTopKRouter "
    "MiniMaxTopKRouter MixtralTopKRouter OlmoeTopKRouter PhimoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter "
    "Qwen3NextTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter".split()
)
"""Experts are weighed by a softmax of the logits: over all of them, or over the chosen ones alone."""

SIGMOID_ROUTERS = frozenset(
    "DeepseekV32TopkRouter DeepseekV3TopkRouter Dots1TopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter "
    "Glm4MoeTopkRouter GlmMoeDsaTopkRouter KimiLinearTopkRouter Lfm2MoeTopKRouter Llama4Router MiMoV2FlashTopkRouter "
    "MiniMaxM2TopKRouter NemotronHTopkRouter SolarOpenTopkRouter".split()
)
"""Every expert has a sigmoid of its own; their sum is not 1."""

REFUSED = {
    "DeepseekV4TopKRouter": "its first layers choose experts by a hash of the token, which nothing can train",
    "DiffusionGemmaTextRouter": "it puts out probabilities where other families put out logits",
    "Gemma4TextRouter": "it puts out probabilities where other families put out logits",
    **dict.fromkeys(
        ("JetMoeAttention", "JetMoeTopKGating"),  # Of these transformers records both, and from 5.24 on the second.
        "its attention chooses experts too, so each layer has two routers that are recorded alike",
    ),
    "ZayaRouter": "its router is a small network that hands states on from layer to layer, not one matrix",
}
"""Routers that do not fit, and why not; others that are in no list are not known."""

RETURNS_TENSOR = frozenset({"DbrxRouter"})
WEIGHT_NAMES = ("weight", "wg.weight", "layer.weight")
INSTEAD = (
    "Routers are known for OLMoE, Mixtral, Qwen2/3/3.5-MoE, DeepSeek-V2/V3, GLM-4-MoE, GPT-OSS, GraniteMoE, "
    "MiniMax-M2, ERNIE-4.5-MoE, HunYuan-MoE, Jamba, Llama-4, DBRX, PhiMoE and relatives of theirs in transformers: "
    "name such a model, or train this one with parametrization: lora."
)


@dataclass(frozen=True)
class Router:
    """One router of a mixture of experts.

    Attributes:
        name: Full name of the module in the base model, without what PEFT puts around it.
        module: The router itself, inside any wrapper.
        parameter: Name inside the module of its weight, one row an expert. A bias (GPT-OSS has one) is not meant.
        num_experts: Rows of the weight, E.
        top_k: How many experts a token gets.
        score: What the family makes of the logits before it mixes experts.
        logits_index: Which of the outputs of the module are the logits; None where they are the only one.
    """

    name: str
    module: nn.Module
    parameter: str
    num_experts: int
    top_k: int
    score: Score
    logits_index: int | None


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of ``model``, in the order of their layers; layers without experts are not counted.

    Args:
        model: Plain or PEFT, also inside the wrapper of DistributedDataParallel or DeepSpeed.

    Raises:
        ModelError: There are none, or what they compute is not known.
    """
    base = base_model(extract_model_from_parallel(model))
    name = type(base).__name__
    classes = _router_classes(base)
    if not classes:
        raise ModelError(
            f"{name} has no routers that could be trained: it is no mixture of experts that transformers "
            f"records router logits of. {INSTEAD}"
        )
    for cls in classes:
        _check_known(name, cls.__name__)
    (target, index), *others = classes.items()
    if others:
        raise ModelError(
            f"{name} has routers of several kinds ({', '.join(cls.__name__ for cls in classes)}), whose "
            f"order cannot be told. {INSTEAD}"
        )
    modules = {key: module for key, module in base.named_modules() if isinstance(module, target)}
    copied = [key for key in modules if ".modules_to_save." in key]
    if copied:
        raise ModelError(
            f"{copied[0]} is a copy of a router that modules_to_save trains. Leave routers out of "
            "modules_to_save and write parametrization: routers."
        )
    if not modules:
        raise ModelError(f"{name} has no layer with experts: its config makes every layer dense. {INSTEAD}")
    return [_router(base, key, module, index) for key, module in modules.items()]


def last_routers(model: nn.Module, count: int | None) -> list[Router]:
    """The routers of the last ``count`` layers that have experts, all where there are fewer; all for None.

    Args:
        model: As for :func:`find_routers`.
        count: How many layers.

    Raises:
        ModelError: There are none, or what they compute is not known.
    """
    return find_routers(model)[-(count or 0) :]


def routing_scores(logits: Tensor, kind: ScoreKind, router: Router) -> Tensor:
    """How a router shares a token out among its experts, as numbers that sum to 1.

    A correction bias or a limit to groups of experts, by which some families choose, is not in it.

    Args:
        logits: What the router computed, before any score, [..., E].
        kind: ``softmax`` over all experts; ``sigmoid_norm``, each expert's sigmoid divided by their sum; ``topk``, the
            family's own of the two, 0 except for the k largest; ``auto``, the family's own.
        router: The router that computed them.

    Returns:
        float32, [..., E].
    """
    logits = logits.float()
    if kind == "topk":
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(router.top_k, -1).indices, True)
        logits = logits.masked_fill(~kept, float("-inf"))
    if kind == "softmax" or (kind != "sigmoid_norm" and router.score == "softmax"):
        return logits.softmax(-1)
    # In log space: far below 0 all the sigmoids would be 0, and their shares 0 / 0.
    return nn.functional.logsigmoid(logits).softmax(-1)


class RouterCapture:
    """Keeps the logits of routers, with their graph, of the one forward pass that is made while it is open.

    Closed, it keeps nothing more: what gradient checkpointing computes again during the backward pass is not seen.
    Open ``torch.no_grad()`` around it, not inside it.

    Args:
        routers: Of :func:`find_routers` or :func:`last_routers`.

    Attributes:
        logits: One tensor [B * S, E] a router, in their order, before any score. Filled when it is closed.

    Raises:
        ModelError: A router ran twice, or not at all, or without gradients though they are enabled outside.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self.routers = routers
        self.logits: list[Tensor] = []
        self._kept: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._gradients = True

    def __enter__(self) -> Self:
        self.logits, self._kept, self._gradients = [], {}, torch.is_grad_enabled()
        self._handles = [router.module.register_forward_hook(self._keep(router)) for router in self.routers]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            return
        idle = [router.name for router in self.routers if router.name not in self._kept]
        if idle:
            raise ModelError(
                f"{len(idle)} of {len(self.routers)} routers did not run in the forward pass ({idle[0]} is "
                "the first): their logits cannot be had. Train without what skips layers."
            )
        self.logits = [self._kept[router.name] for router in self.routers]

    def _keep(self, router: Router) -> Any:
        def hook(_: nn.Module, inputs: object, output: Any) -> None:
            if router.name in self._kept:
                raise ModelError(f"{router.name} ran twice where one forward pass was to be looked at: make one pass.")
            if self._gradients and not torch.is_grad_enabled():
                raise ModelError(
                    f"{router.name} ran without gradients inside a training step, so that nothing could train it: "
                    "gradient checkpointing is reentrant. Write gradient_checkpointing_kwargs: {use_reentrant: false}."
                )
            self._kept[router.name] = output if router.logits_index is None else output[router.logits_index]

        return hook


@torch.no_grad()
def check_capture(model: nn.Module, routers: Sequence[Router]) -> None:
    """Compare the logits that are captured with those that the model itself puts out, on a few tokens.

    Args:
        model: The one that the routers were found in; a collective where it is sharded.
        routers: All of them, or the last ones.

    Raises:
        ModelError: They differ.
    """
    base: Any = base_model(extract_model_from_parallel(model))
    device = next(base.parameters()).device
    ids = torch.arange(1, 17, device=device).view(2, 8) % base.config.get_text_config().vocab_size
    with evaluating(model), RouterCapture(routers) as captured:
        own = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits or ()
    name = type(base).__name__
    if len(own) < len(routers):
        raise ModelError(
            f"{name} puts out the logits of {len(own)} routers with output_router_logits, and {len(routers)} were "
            f"found in it, so these may not be what chooses its experts. {INSTEAD}"
        )
    for router, ours, theirs in zip(routers, captured.logits, own[-len(routers) :], strict=True):
        if ours.shape != (ids.numel(), router.num_experts) or not torch.equal(ours, theirs):
            raise ModelError(
                f"the logits of {router.name} are not those that {name} puts out with output_router_logits: they have "
                f"the shape {list(ours.shape)}, the model's {list(theirs.shape)}, for {ids.numel()} tokens and "
                f"{router.num_experts} experts. {INSTEAD}"
            )


def _router_classes(base: nn.Module) -> dict[type[nn.Module], int]:
    """Classes of routers, each with which of its outputs are the logits, of all models inside ``base``."""
    classes: dict[type[nn.Module], int] = {}
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            recorded: Any = (module._can_record_outputs or {}).get("router_logits", [])
            for recorder in recorded if isinstance(recorded, list) else [recorded]:
                classes[recorder.target_class] = recorder.index
    return classes


def _check_known(model: str, cls: str) -> None:
    if cls in REFUSED:
        raise ModelError(f"the routers of {model} cannot be trained: {REFUSED[cls]}. {INSTEAD}")
    if cls not in SOFTMAX_ROUTERS | SIGMOID_ROUTERS:
        raise ModelError(f"the routers of {model} cannot be trained: how {cls} weighs experts is not known. {INSTEAD}")


def _router(base: nn.Module, key: str, module: nn.Module, index: int) -> Router:
    cls = type(module).__name__
    weights = {name.replace("base_layer.", ""): value for name, value in module.named_parameters()}
    found = [name for name in WEIGHT_NAMES if name in weights]
    if len(found) != 1:
        raise ModelError(f"{key} ({cls}) has no weight of one row an expert, only {', '.join(weights)}. {INSTEAD}")
    # DeepSpeed leaves an empty tensor where a weight is spread over processes, and its shape beside it.
    shape = vars(weights[found[0]]).get("ds_shape", weights[found[0]].shape)
    # DBRX's says nothing of how many experts are chosen; the block that it stands in does.
    holder: Any = module if "top_k" in vars(module) else base.get_submodule(key.rpartition(".")[0])
    return Router(
        name=key.replace(".base_layer", ""),
        module=module,
        parameter=found[0],
        num_experts=int(shape[0]),
        top_k=holder.top_k,
        score="softmax" if cls in SOFTMAX_ROUTERS else "sigmoid",
        logits_index=None if cls in RETURNS_TENSOR else index,
    )
