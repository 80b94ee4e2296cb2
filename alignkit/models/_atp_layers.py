"""ATP's masks as parts of a LoRA adapter: on the projections whose rows go when a structure is pruned.

A structure is a feed-forward channel (a row of gate and up, a column of down) or a KV group (the rows of a key/value
head and of the query heads that read it, in q, k and v, and their columns in o). Every layer has a mask s over its
structures of each kind, which multiplies the rows of q, k, v, gate and up, biases included. With a layer W x + b, its
LoRA factors and their scale c (LoRA-aware forward of ATP, arXiv 2412.14426, as in the authors' code):

    while training:   y = s * (W x + b) + c B A dropout(x)        what is pruned can still fade out of the factors
    otherwise:        y = s * (W x + b + c B A x)                 the model that will be exported

They are the same once the rows of B are zero where s is. A pruned structure then puts out exactly zero: silu(0) * 0 for
a channel, a value of 0 for a group, so that o and down, whose inputs that are, need no mask. The width of a head is
never pruned.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- peft ``LoraVariant``, and that the layers of LoRA, plain and of bitsandbytes, ask ``lora_variant[adapter]`` for
  ``forward``, ``merge_safe``, ``merge_unsafe`` and ``unmerge``
- peft ``_caches`` of a layer, which go with the layer and are not saved
- peft ``BufferDict``, whose entries are saved with the adapter they are named after
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.models.sparse_adapter import POLICY, SparseConfig, SparseVariant

LAYERS = "model.layers"
MASKED: Mapping[str, tuple[str, ...]] = {
    "ffn": ("mlp.gate_proj", "mlp.up_proj"),
    "kv_groups": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
"""By kind of structure, the projections whose rows it has."""
READERS: Mapping[str, str] = {"ffn": "mlp.down_proj", "kv_groups": "self_attn.o_proj"}
"""By kind, the projection whose columns it has."""
_BUFFER = "lora_kept"


@dataclass
class AtpConfig(SparseConfig):
    """Configuration of an ATP adapter.

    Attributes:
        atp_layers: Layers of the model.
        atp_sizes: By kind of structure that is pruned, how many a layer has.
        atp_kept: By kind, how many of them are left.
    """

    kind: ClassVar[str] = "ALIGNKIT_ATP"
    atp_layers: int = field(default=0, metadata={"help": "Layers of the model."})
    atp_sizes: dict[str, int] = field(default_factory=dict, metadata={"help": "Structures of a layer, by kind."})
    atp_kept: dict[str, int] = field(default_factory=dict, metadata={"help": "Structures that are left, by kind."})

    def equip(self, model: PeftModel, adapter: str) -> None:
        """Put the masks, of ones, into the layers."""
        for kind, size in self.atp_sizes.items():
            for layer in range(self.atp_layers):
                for name in MASKED[kind]:
                    _put_mask(_lora_layer(model, layer, name), adapter, size)

    def finish(self, model: PeftModel, adapter: str) -> str | None:
        """Nothing: the masks that were saved are hard."""
        return None

    def kept(self, model: PeftModel, adapter: str) -> dict[str, Any]:
        """The structures that are left in every layer.

        Raises:
            ModelError: Decisions were not settled when the adapter was saved.
        """
        masks = masks_of(model, adapter)
        if any((mask.sum(-1) != self.atp_kept[kind]).any() for kind, mask in masks.items()):
            raise ModelError(
                "the decisions of this ATP adapter are not settled: it was saved in the control phase of its run, in "
                "which layers keep different numbers. Take a checkpoint from after that part of the steps "
                "(atp_control_fraction)."
            )
        return {kind: tuple(tuple(row.nonzero().flatten().tolist()) for row in mask) for kind, mask in masks.items()}

    def cut(self, model: PeftModel, adapter: str) -> float:
        """Length of the LoRA weights of what is removed."""
        return left_in_pruned(model, adapter)


CONFIG = AtpConfig


class AtpVariant(SparseVariant, LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """LoRA on a layer some of whose rows are pruned.

    Attributes:
        rows: Rows of the layer that belong to one structure.
        soft: While decisions are learnt, the mask [structures] that is in force instead, with its gradient.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.soft: Tensor | None = None

    def supports_lora_conversion(self) -> bool:
        """No."""
        return False

    def mask(self, module: LoraLayer, adapter: str) -> Tensor:
        """The mask in force, for each row of the layer."""
        structures = module.lora_kept[adapter] if self.soft is None else self.soft
        expanded: Tensor = structures.repeat_interleave(self.rows)
        return expanded

    def forward(  # type: ignore[override]  # an instance knows its mask
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """[.., rows] of the layer's output ``result``, whose input was ``x``."""
        factors = module.lora_B[active_adapter](module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)))
        update = factors * module.scaling[active_adapter]
        mask = self.mask(module, active_adapter).to(result.dtype)
        out: Tensor = result * mask + update if module.training else (result + update) * mask
        return out

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight as it is outside training; the bias, which PEFT does not ask for, is masked in place."""
        mask = self.mask(module, active_adapter).to(orig_weight.dtype)
        base, bias = module.get_base_layer(), None
        if base.bias is not None:
            bias = base.bias.data.clone()
            base.bias.data *= mask
        module._caches[f"{active_adapter}-pruned"] = (orig_weight[mask == 0], bias)
        delta: Tensor = module.get_delta_weight(active_adapter)
        return (orig_weight + delta.to(orig_weight.dtype)) * mask[:, None]

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """The same, into the weight."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight as it was before it was merged, up to rounding where it was kept; likewise its bias."""
        rows, bias = module._caches.pop(f"{active_adapter}-pruned")
        if bias is not None:
            module.get_base_layer().bias.data = bias
        restored = orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        restored[self.mask(module, active_adapter) == 0] = rows
        return restored


@dataclass(frozen=True)
class Factor:
    """A LoRA weight some of whose rows (of B) or columns (of A) belong to each structure of a layer.

    Attributes:
        weight: B [structures * lines, r], or A [r, structures * lines].
        structures: How many.
        is_b: Whether the lines are rows.
    """

    weight: nn.Parameter
    structures: int
    is_b: bool

    def squares(self, value: Tensor) -> Tensor:
        """Squared norm of each structure's part [structures] of a ``value`` in the shape of the weight."""
        return self._by_structure(value).square().sum(dim=(1, 2))

    def scaled(self, value: Tensor, factors: Tensor) -> Tensor:
        """``value`` with every structure's part times its factor [structures]."""
        lines = factors.repeat_interleave(value.shape[0 if self.is_b else 1] // self.structures)
        return value * (lines[:, None] if self.is_b else lines)

    def _by_structure(self, value: Tensor) -> Tensor:
        """[structures, lines, r]."""
        lines = value if self.is_b else value.T
        return lines.reshape(self.structures, -1, lines.shape[1])


def factors_of(model: PeftModel, adapter: str = POLICY) -> dict[str, list[list[Factor]]]:
    """By kind of structure and by layer, the LoRA weights that go with the structures, as they are at this moment.

    Args:
        model: A model with an adapter of ATP. A reader of the structures that has no factors has no part in it.
    """
    config = model.peft_config[adapter]
    found: dict[str, list[list[Factor]]] = {}
    for kind, size in config.atp_sizes.items():
        found[kind] = []
        for layer in range(config.atp_layers):
            writers = [_lora_layer(model, layer, name) for name in MASKED[kind]]
            factors = [Factor(writer.lora_B[adapter].weight, size, is_b=True) for writer in writers]
            reader = model.get_base_model().get_submodule(f"{LAYERS}.{layer}.{READERS[kind]}")
            if isinstance(reader, LoraLayer) and adapter in reader.lora_A:
                factors.append(Factor(reader.lora_A[adapter].weight, size, is_b=False))
            found[kind].append(factors)
    return found


def masks_of(model: PeftModel, adapter: str = POLICY) -> dict[str, Tensor]:
    """By kind of structure, the hard masks of all layers [layers, structures].

    Args:
        model: A model with an adapter of ATP.
    """
    config = model.peft_config[adapter]
    return {
        kind: torch.stack(
            [_lora_layer(model, layer, MASKED[kind][0]).lora_kept[adapter] for layer in range(config.atp_layers)]
        )
        for kind in config.atp_sizes
    }


def set_masks(model: PeftModel, masks: Mapping[str, Tensor], adapter: str = POLICY) -> None:
    """Put hard masks in force.

    Args:
        model: A model with an adapter of ATP.
        masks: As :func:`masks_of` returns them.
    """
    for kind, mask in masks.items():
        for layer, row in enumerate(mask):
            for name in MASKED[kind]:
                _lora_layer(model, layer, name).lora_kept[adapter].copy_(row)


@contextmanager
def soft_masks_in(model: PeftModel, masks: Mapping[str, Tensor], adapter: str = POLICY) -> Iterator[None]:
    """Masks between 0 and 1, with their gradient, in force inside.

    Args:
        model: A model with an adapter of ATP.
        masks: By kind of structure, [layers, structures].
    """
    variants = [
        (_lora_layer(model, layer, name).lora_variant[adapter], row)
        for kind, mask in masks.items()
        for layer, row in enumerate(mask)
        for name in MASKED[kind]
    ]
    for variant, row in variants:
        variant.soft = row
    try:
        yield
    finally:
        for variant, _ in variants:
            variant.soft = None


@torch.no_grad()
def left_in_pruned(model: PeftModel, adapter: str = POLICY) -> float:
    """Length of all LoRA weights that belong to pruned structures: what an export cuts off, 0 when nothing is lost.

    Args:
        model: A model with an adapter of ATP, its weights whole.
    """
    masks, total = masks_of(model, adapter), 0.0
    for kind, layers in factors_of(model, adapter).items():
        for mask, factors in zip(masks[kind], layers, strict=True):
            for factor in factors:
                total += float((factor.squares(factor.weight) * (1 - mask)).sum())
    return total**0.5


def _lora_layer(model: PeftModel, layer: int, name: str) -> LoraLayer:
    found: LoraLayer = model.get_base_model().get_submodule(f"{LAYERS}.{layer}.{name}")
    return found


def _put_mask(layer: LoraLayer, adapter: str, structures: int) -> None:
    if _BUFFER not in layer.other_param_names:
        layer.other_param_names = (*layer.other_param_names, _BUFFER)
        layer.lora_kept = BufferDict(persistent=True)
    weight = layer.lora_B[adapter].weight
    layer.lora_kept[adapter] = torch.ones(structures, device=weight.device)
    layer.lora_variant[adapter] = AtpVariant(layer.out_features // structures)
