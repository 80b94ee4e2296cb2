"""The reference bank on disk: a few files of tensors, each named by what it depends on, and ``bank.json``.

================================  ====================================================================================
file                              tensors (n rows, D = layers * experts, d numbers of an embedding, K neighbours kept)
================================  ====================================================================================
``routing-<key>.safetensors``     ``routing`` [n, D] float32; ``pooled`` [n, d] where the base model embeds
``success-<key>.safetensors``     ``success`` [n] bool
``embeddings-<key>.safetensors``  ``embeddings`` [n, d] float32, where the base model does not embed
``targets-<key>.safetensors``     ``target`` [n, D], ``variance`` [n], ``has_target`` [n]; ``indices`` and ``weights``
                                  [n, K] and ``sizes`` [n] of the neighbours; ``tasks`` and ``groups`` [n]
``bank.json``                     which of them are the bank, and what it was made with
================================  ====================================================================================

A key is a hash of all that decides the content, so that another k makes another ``targets`` file and nothing else.
Files are written whole, are never changed, and are read through the memory map of the system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignkit.errors import CheckpointError
from alignkit.sampling.store import fingerprint
from alignkit.storage.durability import partial_path, write_whole
from alignkit.storage.refusals import writing

FORMAT = 1
"""Raised whenever the same settings would mean other content."""
BANK_FILE = "bank.json"
ROUTING, SUCCESS, EMBEDDINGS, TARGETS = "routing", "success", "embeddings", "targets"
_IDENTITY, _CONTENT = "identity", "content"


def default_bank_dir() -> Path:
    """``$ALIGNKIT_CACHE/routing``, by default ``~/.cache/alignkit/routing``."""
    return Path(os.environ.get("ALIGNKIT_CACHE", Path.home() / ".cache" / "alignkit")) / "routing"


@dataclass(frozen=True)
class Identity:
    """What the content of a file depends on.

    Attributes:
        kind: ``routing``, ``success``, ``embeddings`` or ``targets``.
        settings: Everything that decides it, by name; JSON values.
    """

    kind: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of the settings."""
        return fingerprint([FORMAT, self.kind, self.settings])

    def path(self, directory: Path) -> Path:
        """The file of this content in a folder."""
        return directory / f"{self.kind}-{self.key}.safetensors"


def write_part(path: Path, tensors: Mapping[str, Tensor], identity: Identity) -> None:
    """Write tensors whole or not at all.

    Args:
        path: File to create or replace.
        tensors: Its content.
        identity: What it depends on, of which the key is written beside it.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _IDENTITY: identity.key, _CONTENT: _content_hash(plain)}
    partial = partial_path(path)
    with writing(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def read_part(path: Path, identity: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory and compared with their hash.

    Args:
        path: Written by :func:`write_part`.
        identity: Key of the content that it must have; None takes any.

    Raises:
        CheckpointError: It is damaged, or is not what was asked for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}, a file of a routing bank, cannot be read ({error}). {_again(path)}") from error
    if _IDENTITY not in metadata or identity not in (None, metadata[_IDENTITY]):
        raise CheckpointError(f"{path} is not the file of a routing bank that its name says. Move it and start again.")
    if metadata.get(_CONTENT) != _content_hash(tensors):
        raise CheckpointError(
            f"{path}, a file of a routing bank, is not what was saved (its hash differs). {_again(path)}"
        )
    return tensors


def _again(path: Path) -> str:
    return f"Delete {path} and start again; what else there is will be used."


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes; it finds damage, and is no defence against intent."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class BankRows:
    """What the bank says of a batch of B rows.

    Attributes:
        target: [B, D] float32, where their routing is drawn to; 0 where there is no target.
        variance: [B] float32, of the neighbours' routings about the target.
        has_target: [B] bool.
        routing: [B, D] float32, the rows' own under the model that the bank was made with.
    """

    target: Tensor
    variance: Tensor
    has_target: Tensor
    routing: Tensor


class RoutingBank:
    """A finished bank; its tensors stay on disk until rows of them are asked for.

    Attributes:
        directory: Where it is.
        facts: What it was made with, as ``bank.json`` says it.
        routing: [n, D] float32.
        success: [n] bool; of held-out rows, which nobody is the neighbour of, all False.
        embeddings: [n, d] float32, as the embedder gave them.
        found: The tensors of the ``targets`` file, by name.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.directory, self.facts = directory, facts
        self.routing = parts[ROUTING]["routing"]
        embeddings = parts[EMBEDDINGS]
        self.embeddings = embeddings["pooled" if "pooled" in embeddings else "embeddings"]
        self.success = parts[SUCCESS]["success"] if SUCCESS in parts else torch.zeros(len(self.routing)).bool()
        self.found = parts[TARGETS]

    @classmethod
    def open(cls, directory: Path) -> RoutingBank:
        """The bank of a folder.

        Args:
            directory: Holds a ``bank.json``.

        Raises:
            CheckpointError: There is none, or one of its files is missing or damaged.
        """
        file = directory / BANK_FILE
        try:
            facts = json.loads(file.read_bytes())
            names = {kind: str(name) for kind, name in facts["files"].items()}
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no routing bank in {directory} ({BANK_FILE} is missing).") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not the list of a routing bank ({error!r}). {_again(file)}") from error
        return cls.of_facts(directory, {**facts, "files": names})

    @classmethod
    def of_facts(cls, directory: Path, facts: Mapping[str, Any]) -> RoutingBank:
        """The bank that some facts tell of, among those that a folder may hold.

        Args:
            directory: Holds the files that they name.
            facts: Of a bank.

        Raises:
            CheckpointError: One of its files is missing or damaged.
        """
        names: Mapping[str, str] = facts["files"]
        parts = {name: read_part(directory / name) for name in set(names.values())}
        return cls(directory, facts, {kind: parts[name] for kind, name in names.items()})

    def __len__(self) -> int:
        """Rows."""
        return len(self.routing)

    @property
    def num_layers(self) -> int:
        """Layers that are compared."""
        return len(self.facts["layers"])

    def targets(self, rows: Tensor) -> BankRows:
        """What is known of some rows, on the device of their numbers.

        Args:
            rows: [B] int64, their numbers.
        """
        numbers, device = rows.cpu(), rows.device
        found = {name: self.found[name][numbers].to(device) for name in ("target", "variance", "has_target")}
        return BankRows(**found, routing=self.routing[numbers].to(device))


def write_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write ``bank.json``, the last file of a bank.

    Args:
        directory: Holds the files that it names.
        facts: See :class:`RoutingBank`.
    """
    write_whole(directory / BANK_FILE, json.dumps(facts, indent=1, ensure_ascii=False, default=str) + "\n")
