"""Saved weights looked at once more: every file opens, every tensor has numbers in it, and all of them are finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignkit.errors import CheckpointError
from alignkit.storage import durability

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SavedWeights:
    """What :func:`verify_weights` found: the files, their tensors and the number of parameters in them."""

    files: tuple[Path, ...]
    num_tensors: int
    num_parameters: int


def verify_weights(directory: Path) -> SavedWeights:
    """Reopen the adapter or model saved in ``directory`` and look at every tensor.

    Args:
        directory: A checkpoint, or the directory of a finished run; checkpoints inside it are left alone.

    Raises:
        CheckpointError: There are no weights, a file cannot be read, or a tensor is empty or not finite.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"{directory} holds no weights: neither {ADAPTER_FILE} nor model.safetensors. Under ZeRO-3 set "
            "zero3_save_16bit_model: true in the accelerate config."
        )
    _check_index(directory)
    sizes = [_check_tensor(path, name, tensor) for path in files for name, tensor in _tensors(path)]
    return SavedWeights(tuple(files), len(sizes), sum(sizes))


def weight_files(directory: Path) -> list[Path]:
    """Model shards and adapters; PEFT keeps an adapter that is not called ``default`` in a folder of its name."""
    named_adapters = (p for p in directory.glob(f"*/{ADAPTER_FILE}") if durability.checkpoint_step(p.parent) is None)
    return sorted([*directory.glob("*.safetensors"), *named_adapters])


def _check_index(directory: Path) -> None:
    """Every tensor that the index of a sharded model promises must be in the shard it names."""
    index = directory / MODEL_INDEX
    if not index.is_file():
        return
    promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(promised.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing; {MODEL_INDEX} names it")
        present = {name for name, _ in _tensors(directory / shard)}
        missing = [name for name, file in promised.items() if file == shard and name not in present]
        if missing:
            raise CheckpointError(f"{directory / shard}: tensor {missing[0]} is missing; {MODEL_INDEX} names it")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and content of each tensor of a file, one at a time in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not names:
                raise CheckpointError(f"{path} holds no tensor: nothing was gathered when it was saved")
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the file is truncated or damaged") from error


def _check_tensor(path: Path, name: str, tensor: Tensor) -> int:
    """Number of elements of a sound tensor."""
    if tensor.numel() == 0:
        raise CheckpointError(
            f"{path}: tensor {name} is empty, shape {list(tensor.shape)}: the partitioned weight was saved without "
            "gathering it. The checkpoint cannot be used."
        )
    # isfinite does not know the 8-bit floats.
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise CheckpointError(
            f"{path}: tensor {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}. Training has "
            "diverged: lower learning_rate, and resume from an earlier checkpoint."
        )
    return tensor.numel()
