"""Pickles of a checkpoint, looked at before anything opens them: a pickle may hold code, which runs where it is read.

torch reads a pickle with or without trust (``weights_only``). transformers trusts none of its own files; DeepSpeed
trusts the shards of its engine and torch the index of what FSDP saves in shards. Both are read here first without
trust, with the few classes that these libraries write; what passes does nothing when it is read again. Tensors stay on
the disk (they are mapped into memory), so the size of the model does not count.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import CheckpointError

DEEPSPEED_TAG = "latest"
"""File in which DeepSpeed names the folder of its shards."""
_ENGINE_FOLDER = re.compile(r"global_step\d+")
SHARD_INDEX = ".metadata"
"""File in which torch lists the tensors that FSDP has saved in shards."""
_OF_SHARD_INDEX = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
        "BytesStorageMetadata", "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}  # fmt: skip


def check_deepspeed_shards(checkpoint: Path) -> None:
    """Refuse shards of a DeepSpeed engine that hold more than it writes.

    Args:
        checkpoint: The checkpoint that is resumed from.

    Raises:
        CheckpointError: Names the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if not (checkpoint / DEEPSPEED_TAG).is_file():
        raise CheckpointError(
            f"{checkpoint} was not saved under DeepSpeed, so DeepSpeed cannot resume from it. Launch as the run was "
            "that saved it."
        )
    tag = (checkpoint / DEEPSPEED_TAG).read_text(encoding="utf-8").strip()
    if not _ENGINE_FOLDER.fullmatch(tag) or (checkpoint / tag).is_symlink():
        raise CheckpointError(
            f"{checkpoint / DEEPSPEED_TAG} names {tag!r}, which is no folder of this checkpoint. Put back what was "
            "saved, or delete the checkpoint and resume from the one before it."
        )
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        for path in sorted((checkpoint / tag).rglob("*.pt")):
            if not _is_plain(path):
                raise CheckpointError(_refusal(path))


def check_sharded_model(checkpoint: Path) -> None:
    """Refuse what FSDP has saved in shards if its index, or an entry that is no tensor, holds more than torch writes.

    Args:
        checkpoint: The checkpoint that is resumed from.

    Raises:
        CheckpointError: Names the file.
    """
    for index in sorted(checkpoint.rglob(SHARD_INDEX)):
        try:
            metadata = _ShardIndex(io.BytesIO(index.read_bytes())).load()
            for file, content in _objects(index.parent, metadata):
                if not _is_plain(content):
                    raise CheckpointError(_refusal(file))
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(_refusal(index)) from error


def refused_pickle(checkpoint: Path) -> str:
    """What to say of a checkpoint one of whose pickles holds more than tensors and numbers, which none of ours does.

    Args:
        checkpoint: One that could not be resumed from; its files are opened again, without running what they hold.
    """
    # Generator states hold arrays of numpy, which need more than this: looked at last, and named where no other is.
    files = sorted(checkpoint.rglob("*.pt")) + sorted(checkpoint.rglob("*.pth"))
    refused = next((path for path in files if path.suffix == ".pth" or not _is_plain(path)), checkpoint)
    return _refusal(refused)


class _ShardIndex(pickle.Unpickler):
    """Reads an index of shards: nothing but its own classes and the types of tensors is looked up, or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OF_SHARD_INDEX or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _objects(folder: Path, metadata: Any) -> Iterator[tuple[Path, io.BytesIO]]:
    """Entries of the shards that are no tensors, such as the settings of an optimizer; torch reads them with trust."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                yield folder / place.relative_path, io.BytesIO(file.read(place.length))


def _is_plain(file: Path | io.BytesIO) -> bool:
    """Whether a file holds tensors, numbers and what is allowed at the moment, and nothing else."""
    # Only archives, which torch writes, can be mapped.
    is_mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError:
        return False
    return True


def _refusal(path: Path) -> str:
    return (
        f"{path} is a pickle that holds more than tensors and numbers, such as code, so it is not opened: no run "
        "wrote it. Put back the file that was saved, or delete the checkpoint and resume from the one before it."
    )
