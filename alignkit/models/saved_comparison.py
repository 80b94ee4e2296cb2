"""A model against the file it was loaded from or saved to, tensor by tensor, bit by bit.

Loading is not strict: a tensor without a place is ignored, and a weight without a tensor keeps what it had. A mixture
of experts is saved with a tensor for each expert and lives with one for all of them, so a file read by plain names
leaves every expert as it was. The live model is therefore turned into the form of the file, as saving does, and what
comes out must be the file, no tensor more and none less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


@torch.no_grad()
def load_saved_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of its class that were saved in ``folder``, in whatever form it saves them.

    Args:
        model: The model; its type, device and settings stay.
        folder: What ``save_pretrained`` wrote.
    """
    # Every type a weight may have fits into float32 without loss.
    saved = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())


@torch.no_grad()
def model_difference(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> str | None:
    """What differs between a model and the files of one, or None: two numbers are the same only to the last bit.

    A tied weight may be in the files under one of its names. Files of another precision are compared as rounded to
    that of the model.

    Args:
        model: The model, not quantised.
        folder: Folder of its files; other tensors in it, such as a moving anchor, are none of them.
        state: Its tensors by name, where the model itself holds only a part of them.
    """
    files = _model_files(folder)
    live = revert_weight_conversion(model, dict(model.state_dict() if state is None else state))
    stored: set[str] = set()
    for file in files:
        for name, tensor in _tensors(file):
            stored.add(name)
            if name not in live:
                return f"{file}: tensor {name} has no place in the model"
            if not _same(tensor, live[name]):
                return f"{file}: tensor {name} is not the model's"
    places = {live[name].data_ptr() for name in stored}
    ignored = set(model._keys_to_ignore_on_save or ())
    for name, tensor in live.items():
        if name not in stored and name not in ignored and tensor.data_ptr() not in places:
            return f"the model's {name} is in no file of {folder}"
    return None


@torch.no_grad()
def adapter_difference(wrapped: PeftModel, weights: Path, adapter: str = "default") -> str | None:
    """What differs between an adapter on a model and its file, or None.

    Args:
        wrapped: The model with the adapter.
        weights: The file.
        adapter: PEFT's name of the adapter.
    """
    expected = _adapter_state(wrapped, adapter, save_embedding_layers=False)
    # With resized embeddings PEFT stores these whole: base, copy and adapter.
    live = {**wrapped.state_dict(), **_adapter_state(wrapped, adapter, save_embedding_layers=True), **expected}
    stored = dict(_tensors(weights))
    for names, fault in (
        (stored.keys() - live.keys(), "have no place in"),
        (expected.keys() - stored.keys(), "are missing for"),
    ):
        if names:
            return f"{len(names)} tensors {fault} it, such as {min(names)}"
    if unusable := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        return f"{len(unusable)} tensors hold NaN or infinity, such as {unusable[0]}"
    different = [name for name, tensor in stored.items() if not _same(tensor, live[name])]
    return (
        f"{len(different)} tensors came out otherwise than they are stored, such as {different[0]}"
        if different
        else None
    )


def has_model(folder: Path) -> bool:
    """Whether the weights of a whole model are in a folder.

    Args:
        folder: A checkpoint.
    """
    return _model_files(folder)[0].is_file()


def _model_files(folder: Path) -> list[Path]:
    """The files of a saved model: those of its index, or the one there is without."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _adapter_state(wrapped: PeftModel, adapter: str, **how: bool) -> Mapping[str, Tensor]:
    state: Mapping[str, Tensor] = get_peft_model_state_dict(wrapped, adapter_name=adapter, **how)
    return state


def _same(stored: Tensor, live: Tensor) -> bool:
    return stored.shape == live.shape and torch.equal(stored.to(live.device, live.dtype), live)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and content of each tensor, one at a time in memory."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            yield name, tensors.get_tensor(name)
