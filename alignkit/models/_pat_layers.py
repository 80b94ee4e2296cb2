"""PAT's sparsification modules as parts of an adapter: on what writes the residual stream, with one mask for all.

Behind the embedding, every attention output projection and every MLP down projection stands a hybrid sparsification
module (HSM; PAT, arXiv 2408.14721, equations 4 to 10), a linear map of the D hidden channels and a mask over them. One
mask serves all, so that the same channels are zero in the whole stream. With L0 [r, D], L1 [D, r], x [.., D]:

    released code:  M * v * (x + L1 L0 x)              v [D], at first 1
    paper:          M * (x + L1 (v * (L0 x)))          v [r], at first 0

At the start a module changes nothing: L1 is zero in the released form, v in the paper's. L0 starts with orthonormal
rows, and L1 in the paper's form with orthonormal columns (ours: neither text says how).

What trains is read by calling the module that has it, also for the terms that are added to the loss: a call is what
ZeRO-3 gathers a sharded weight for, and gathers it again for the backward pass.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- peft ``LoraVariant``, and that the layers of LoRA, plain and of bitsandbytes, ask ``lora_variant[adapter].forward``
- peft ``BufferDict``, whose entries are saved with the adapter they are named after
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.models._engine import trained_value
from alignkit.models.mask_gate import Gate, fading_mask, identity_loss, largest, soft_mask
from alignkit.models.sparse_adapter import POLICY, SparseConfig, SparseVariant, put_module

MASK_UNIT = 2.0**-8
"""Mask logits are this times the parameter that is stored. Their gradient, which sums over the channels, is then small
beside that of the factors, with which it is clipped as one; Adam does not see the scale of a gradient. Ours."""


@dataclass
class PatConfig(SparseConfig):
    """Configuration of a PAT adapter.

    Attributes:
        hsm_rank: r of the modules.
        hsm_form: ``paper`` or ``released``.
        hsm_writers: Full names of the linear layers that write the residual stream; all have LoRA factors too.
        hsm_width: Channels that are left, d.
        hsm_keep_tied: Whether the embedding has a mask only, so that a tied head can stay tied.
        whole_updates: Whether every number of the adapted layers moves, not factors of a low rank.
        mask_trained: Whether the mask is learnt; otherwise it is chosen before training and put on gradually.
    """

    kind: ClassVar[str] = "ALIGNKIT_PAT"
    hsm_rank: int = field(default=8, metadata={"help": "Rank of the sparsification modules."})
    hsm_form: str = field(default="released", metadata={"help": "Their form: paper or released."})
    hsm_writers: list[str] = field(default_factory=list, metadata={"help": "Layers that write the residual stream."})
    hsm_width: int = field(default=0, metadata={"help": "Hidden channels that are left."})
    hsm_keep_tied: bool = field(default=False, metadata={"help": "Whether the embedding has a mask only."})
    whole_updates: bool = field(default=False, metadata={"help": "Whether updates are whole matrices, not factors."})
    mask_trained: bool = field(default=True, metadata={"help": "Whether the mask is learnt."})

    def equip(self, model: PeftModel, adapter: str) -> None:
        """Put the modules behind the writers, and the mask into the embedding's layer."""
        base = model.get_base_model()
        embedding = base.get_input_embeddings()
        if not isinstance(embedding, SparseEmbedding):
            embedding = SparseEmbedding(embedding)
            base.set_input_embeddings(embedding)
        channels = base.config.get_text_config().hidden_size
        mask = Mask(embedding, adapter, self.hsm_width, is_trained=self.mask_trained)
        embedding.put_mask(adapter, channels, mask)
        if self.whole_updates:
            for layer in [module for module in base.modules() if isinstance(module, LoraLayer)]:
                if adapter in layer.lora_A:
                    _replace_factors(layer, adapter)
        for layer in [None if self.hsm_keep_tied else embedding, *map(base.get_submodule, self.hsm_writers)]:
            if layer is not None:
                module = SparsificationModule(channels, self.hsm_rank, self.hsm_form)
                put_module(layer, "lora_hsm", adapter, module)
                layer.lora_variant[adapter] = PatVariant(mask)
        embedding.set_adapter(model.active_adapters, inference_mode=self.inference_mode)

    def finish(self, model: PeftModel, adapter: str) -> str | None:
        """Keep the channels that training settled on."""
        mask = mask_of(model, adapter)
        if not mask.kept.any():
            return (
                "was saved before its mask was settled, which the step pat_milestone_steps of its run does: it is no "
                "narrow model yet. Take a checkpoint from after that step, or the run's end"
            )
        mask.harden()
        return None

    def kept(self, model: PeftModel, adapter: str) -> dict[str, Any]:
        """The channels that are left."""
        return {"hidden": tuple(mask_of(model, adapter).kept.nonzero().flatten().tolist())}

    def folds(self, model: PeftModel, adapter: str) -> Mapping[str, tuple[Tensor, Tensor, Tensor]]:
        """Of every module."""
        return {name: module.folded() for name, module in sparsification_modules(model, adapter)}


CONFIG = PatConfig


class SparsificationModule(nn.Module):
    """The linear map of one HSM, without the mask.

    Args:
        channels: D.
        rank: r.
        form: ``paper`` or ``released``.
    """

    def __init__(self, channels: int, rank: int, form: str) -> None:
        super().__init__()
        self.is_released = form == "released"
        self.l0 = nn.Parameter(torch.empty(rank, channels))
        self.l1 = nn.Parameter(torch.zeros(channels, rank))
        nn.init.orthogonal_(self.l0)
        if self.is_released:
            self.v = nn.Parameter(torch.ones(channels))
        else:
            nn.init.orthogonal_(self.l1)
            self.v = nn.Parameter(torch.zeros(rank))

    def forward(self, x: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Map and mask [.., D]; without an input, how far the factors are from orthonormal (a scalar).

        Args:
            x: [.., D].
            mask: [D]; None is all ones.
        """
        if x is None:
            return identity_loss(self.l0.float(), self.l1.float(), released=self.is_released)
        x = x.to(self.l0.dtype)
        inner = nn.functional.linear(x, self.l0)
        if self.is_released:
            scale = self.v if mask is None else self.v * mask
            return (x + nn.functional.linear(inner, self.l1)) * scale
        out = x + nn.functional.linear(inner * self.v, self.l1)
        return out if mask is None else out * mask

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """(l0 [r, D], l1 [D, r], v [D]) of the same map in the released form: diag(v) (I + l1 l0)."""
        l0, l1, v = self.l0.detach(), self.l1.detach(), self.v.detach()
        if self.is_released:
            return l0, l1, v
        return l0, l1 * v, torch.ones_like(l0[0])


class _NoFactor(nn.Module):
    """What stands in the place of a factor where updates are whole: PEFT looks at its weight, and it adds nothing."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros_like(like.weight), persistent=False)


def _replace_factors(layer: LoraLayer, adapter: str) -> None:
    """Give a layer an update as large as its weight, from zero, in the place of its factors."""
    update = nn.Linear(layer.in_features, layer.out_features, bias=False)
    nn.init.zeros_(update.weight)
    put_module(layer, "lora_update", adapter, update)
    layer.lora_A[adapter], layer.lora_B[adapter] = _NoFactor(layer.lora_A[adapter]), _NoFactor(layer.lora_B[adapter])
    layer.lora_variant[adapter] = WholeUpdate()


class Mask:
    """The mask of an adapter: open before training, soft while it anneals, hard from the milestone on.

    A mask that is not learnt knows from the start which channels will be left.

    Args:
        layer: Holds the logits, where the mask is learnt, and which channels are kept, once that is settled.
        adapter: PEFT's name of the adapter.
        width: Channels that are left.
        is_trained: Whether the mask is learnt.

    Attributes:
        gate: Where in its schedule a soft mask is; None is open.
        is_hard: Whether the channels that are not kept are zero.
    """

    def __init__(self, layer: SparseEmbedding, adapter: str, width: int, *, is_trained: bool) -> None:
        self.layer, self.adapter, self.width, self.is_trained = layer, adapter, width, is_trained
        self.gate: Gate | None = None
        self.is_hard = False

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained of a mask that is learnt."""
        weight: nn.Parameter = self.layer.lora_mask[self.adapter].weight
        return weight

    def logits(self) -> Tensor:
        """[D], with gradient."""
        logits: Tensor = self.layer.lora_mask[self.adapter]()
        return logits

    def stepped_logits(self) -> Tensor:
        """[D], without gradient, between two steps, in the precision they are stepped in; a collective."""
        return trained_value(self.parameter) * MASK_UNIT

    @property
    def kept(self) -> Tensor:
        """[D] bool: the channels that are left; none until that is settled."""
        kept: Tensor = self.layer.lora_kept[self.adapter]
        return kept

    @property
    def chosen(self) -> Tensor:
        """[D] bool: of a mask that is not learnt, the channels that will be left."""
        chosen: Tensor = self.layer.lora_chosen[self.adapter]
        return chosen

    def would_keep(self) -> Tensor:
        """[D] bool: the channels that would be left if the mask were hard now; of equal logits the first."""
        if self.is_hard:
            return self.kept.clone()
        return largest(self.stepped_logits(), self.width) if self.is_trained else self.chosen.clone()

    def harden(self) -> None:
        """Have the mask hard, with the channels that were loaded, or those it would keep now."""
        if not self.kept.any():
            self.kept.copy_(self.would_keep())
        self.is_hard = True

    def value(self) -> Tensor | None:
        """[D] as it multiplies the channels now, with gradient; None for ones."""
        logits = self.logits() if self.is_trained and self.gate is not None else None
        value = self.at(logits)
        # DistributedDataParallel finds out from the forward pass what has a gradient: this has one always, if of zero.
        return value if value is None or logits is None else value + 0 * logits

    def at(self, logits: Tensor | None) -> Tensor | None:
        """[D] as it would multiply the channels now; None for ones.

        Args:
            logits: [D]; None of a mask that is not learnt.
        """
        if self.is_hard:
            return self.kept.float()
        if self.gate is None:
            return None
        return fading_mask(self.chosen, self.gate) if logits is None else soft_mask(logits, self.gate)


class _Logits(nn.Module):
    """The mask's parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self) -> Tensor:
        """The logits [D]: in float32, in which a sum over all channels can be counted."""
        return self.weight.float() * MASK_UNIT


class SparseEmbedding(nn.Module, LoraLayer):  # type: ignore[misc]  # PEFT is untyped
    """The embedding with a sparsification module behind it, and the mask of all of them.

    Args:
        base_layer: The embedding.
    """

    adapter_layer_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_kept, self.lora_chosen = BufferDict(persistent=True), BufferDict(persistent=True)
        self.masks: dict[str, Mask] = {}

    def put_mask(self, adapter: str, channels: int, mask: Mask) -> None:
        """Give an adapter its mask, open."""
        device = self.get_base_layer().weight.device
        if mask.is_trained:
            put_module(self, "lora_mask", adapter, _Logits(channels))
        else:
            self.lora_chosen[adapter] = torch.zeros(channels, dtype=torch.bool, device=device)
        self.lora_kept[adapter] = torch.zeros(channels, dtype=torch.bool, device=device)
        self.masks[adapter] = mask

    @property
    def num_embeddings(self) -> int:
        """Tokens."""
        return int(self.get_base_layer().num_embeddings)

    @property
    def embedding_dim(self) -> int:
        """Channels."""
        return int(self.get_base_layer().embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        """As of the embedding."""
        index: int | None = self.get_base_layer().padding_idx
        return index

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [.., D] of token ids, mapped and masked."""
        result: Tensor = self.base_layer(ids)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.masks:
                mask = self.masks[adapter].value()
                if adapter in getattr(self, "lora_hsm", {}):
                    result = self.lora_hsm[adapter](result, mask).to(result.dtype)
                elif mask is not None:
                    result = (result * mask).to(result.dtype)
        return result


class WholeUpdate(SparseVariant, LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """A layer whose every weight moves."""

    def supports_lora_conversion(self) -> bool:
        """No."""
        return False

    def forward(  # type: ignore[override]  # as below
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """[.., D] of a layer's output ``result``, whose input was ``x``."""
        return result + _update(module, active_adapter, x)


def _update(layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
    """What an adapter adds to the output of a layer, without mask and map."""
    if adapter in getattr(layer, "lora_update", {}):
        added: Tensor = layer.lora_update[adapter](x)
        return added
    factors: Tensor = layer.lora_B[adapter](layer.lora_A[adapter](layer.lora_dropout[adapter](x)))
    return factors * layer.scaling[adapter]


class PatVariant(SparseVariant, LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """LoRA with a sparsification module behind the sum of layer and factors.

    Args:
        mask: That of the adapter.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def supports_lora_conversion(self) -> bool:
        """No."""
        return False

    def forward(  # type: ignore[override]  # an instance knows its mask
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """[.., D] of a writer's output ``result`` [.., D], whose input was ``x``."""
        out: Tensor = module.lora_hsm[active_adapter](result + _update(module, active_adapter, x), self.mask.value())
        return out

    def merge_safe(self, *unused: Any) -> Tensor:  # type: ignore[override]
        """Refused: the mask spans layers."""
        raise ModelError("an adapter of PAT is not merged but exported. Write `alignkit prune --adapter DIR`.")

    merge_unsafe = unmerge = merge_safe  # type: ignore[assignment]


def mask_of(model: nn.Module, adapter: str = POLICY) -> Mask:
    """The mask of a PAT adapter on a model.

    Raises:
        ModelError: There is none.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseEmbedding)]
    if not layers or adapter not in layers[0].masks:
        raise ModelError("the model has no adapter of PAT")
    mask: Mask = layers[0].masks[adapter]
    return mask


def sparsification_modules(model: nn.Module, adapter: str = POLICY) -> Iterator[tuple[str, SparsificationModule]]:
    """(full name in the base of the layer it stands behind, module), embedding first."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in getattr(layer, "lora_hsm", {}):
            yield name.removeprefix("base_model.model."), layer.lora_hsm[adapter]
