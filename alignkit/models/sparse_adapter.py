"""Adapters that remove structures of the model while it trains: PEFT's LoRA with more in its layers.

What is more is put into PEFT's own layers once these are in place (:meth:`SparseConfig.equip`), under names that begin
with ``lora_``: so it is saved, loaded, resumed, gathered and switched off with the adapter it belongs to. Switched off,
the model is the unpruned one, which makes a reference.

In the file of its configuration such an adapter is of a kind of its own, which PEFT does not know: PEFT alone would
load the factors, pass over the rest with a warning, and answer as a model that nobody has trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.adapter_config import SPARSE_PREFIX
from alignkit.models.files import ADAPTER_CONFIG, AdapterFiles, read_json

POLICY = "default"
"""PEFT's name of the adapter that trains."""


@dataclass
class SparseConfig(LoraConfig):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's configuration of such an adapter; a subclass adds its settings as fields.

    Attributes:
        kind: What it is called in the file, in the place of PEFT's ``LORA``.
    """

    kind: ClassVar[str]
    product_of: str = field(default="alignkit", metadata={"help": "The library that can load this adapter."})

    def equip(self, model: PeftModel, adapter: str) -> None:
        """Put what is more into the LoRA layers of ``adapter``, which are in place and at their start."""
        raise NotImplementedError

    def finish(self, model: PeftModel, adapter: str) -> str | None:
        """Have a loaded adapter compute as what it will be exported as; why it cannot, after "the adapter", or None."""
        raise NotImplementedError

    def kept(self, model: PeftModel, adapter: str) -> dict[str, Any]:
        """What a loaded adapter keeps, by axis of a pruning plan: ascending indices in the dense model."""
        raise NotImplementedError

    def folds(self, model: PeftModel, adapter: str) -> Mapping[str, tuple[Tensor, Tensor, Tensor]]:
        """(l0 [r, D], l1 [D, r], v [D]) of the map diag(v) (I + l1 l0) behind a writer, by its name; or nothing."""
        return {}

    def cut(self, model: PeftModel, adapter: str) -> float:
        """Length of the adapter's weights that an export cuts off although training had not driven them to zero."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it is saved."""
        return {**super().to_dict(), "peft_type": self.kind}


def equip(model: nn.Module) -> None:
    """Equip the adapters of this sort that have not been yet; other models are left as they are.

    Called once a trainer has put an adapter on the model, before anything is scored or sharded.
    """
    if not isinstance(model, PeftModel):
        return
    for name, config in model.peft_config.items():
        if isinstance(config, SparseConfig) and not is_equipped(model, name):
            config.equip(model, name)


def is_equipped(model: nn.Module, adapter: str = POLICY) -> bool:
    """Whether the LoRA layers of an adapter have what is more in them."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return any(isinstance(layer.lora_variant.get(adapter), SparseVariant) for layer in layers)


class SparseVariant:
    """Mark of the variants that :meth:`SparseConfig.equip` gives to LoRA layers, in PEFT's table ``lora_variant``."""


def load_sparse_adapter(model: PreTrainedModel, adapter: AdapterFiles) -> PeftModel:
    """Put a saved adapter of this sort on its base, hard; the caller compares it with its file.

    Args:
        model: The base.
        adapter: The saved adapter.

    Raises:
        ModelError: Its training had not got as far as an adapter that removes anything.
    """
    layers = importlib.import_module(f"alignkit.models._{adapter.kind.removeprefix(SPARSE_PREFIX).lower()}_layers")
    config_class: type[SparseConfig] = layers.CONFIG
    saved = read_json(adapter.directory / ADAPTER_CONFIG)
    known = {f.name for f in fields(config_class)} - {"peft_type"}
    config = config_class(**{key: value for key, value in saved.items() if key in known})
    config.inference_mode = True
    wrapped = get_peft_model(model, config)
    equip(wrapped)
    set_peft_model_state_dict(wrapped, load_file(adapter.weights))
    if problem := config.finish(wrapped, POLICY):
        raise ModelError(f"the adapter {str(adapter.directory)!r} {problem}.")
    return wrapped.requires_grad_(False)


def put_module(layer: LoraLayer, name: str, adapter: str, module: nn.Module) -> None:
    """Give a LoRA layer one more module, which trains, is saved and is placed as its factors are.

    Args:
        layer: The layer.
        name: Attribute of the layer that holds one such module for every adapter; begins with ``lora_``.
        adapter: PEFT's name of the adapter.
        module: The module.
    """
    if name not in layer.adapter_layer_names:
        layer.adapter_layer_names = (*layer.adapter_layer_names, name)
        setattr(layer, name, nn.ModuleDict())
    getattr(layer, name)[adapter] = module.to(_device(layer))


def _device(layer: LoraLayer) -> torch.device:
    """Where the weights below are."""
    device: torch.device = next(layer.get_base_layer().parameters()).device
    return device
