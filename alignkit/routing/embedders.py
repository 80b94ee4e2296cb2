"""What says which rows are alike: numbers of a frozen model, or of a file.

``base`` is no embedder of its own: the mean hidden states of the base model come with its routing, in the same pass.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignkit.errors import DataError, ModelError
from alignkit.models.files import sha256
from alignkit.routing.options import BASE_EMBEDDER, FILE_PREFIX

Embedder = Callable[[Sequence[str]], Tensor]
"""Texts to their embeddings [n, d]."""

INSTALL = "Install it with `pip install sentence-transformers`, or write bank_embedder: base, which needs nothing more."


def is_base(embedder: str) -> bool:
    """Whether the base model itself embeds."""
    return embedder == BASE_EMBEDDER


def is_file(embedder: str) -> bool:
    """Whether the embeddings come from a file."""
    return embedder.startswith(FILE_PREFIX)


def check_embedder(embedder: str) -> None:
    """Refuse what is not here, before a model is run.

    Args:
        embedder: ``bank_embedder``.

    Raises:
        ModelError: A package or a file is missing.
    """
    if is_file(embedder):
        path = file_path(embedder)
        if not path.is_file():
            raise ModelError(f"bank_embedder names {path}, which is no file. Write file: and the path of a .npy file.")
    elif not is_base(embedder) and importlib.util.find_spec("sentence_transformers") is None:
        raise ModelError(f"bank_embedder: {embedder} needs the package sentence-transformers. {INSTALL}")


def file_path(embedder: str) -> Path:
    """The path behind ``file:``."""
    return Path(embedder.removeprefix(FILE_PREFIX)).expanduser()


def embedder_identity(embedder: str) -> dict[str, Any]:
    """What the embeddings depend on besides the texts.

    Args:
        embedder: ``bank_embedder``, other than base.
    """
    if is_file(embedder):
        return {"file": sha256(file_path(embedder))}
    folder = Path(embedder).expanduser()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {"model": embedder, "files": [[str(path.relative_to(folder)), sha256(path)] for path in files]}


def sentence_embedder(name: str, device: torch.device | str) -> Embedder:
    """A model of sentence-transformers.

    Args:
        name: On the Hub, or a folder.
        device: Where it runs.

    Raises:
        ModelError: The package is not installed, or the model cannot be loaded.
    """
    check_embedder(name)
    package: Any = importlib.import_module("sentence_transformers")
    folder = Path(name).expanduser()
    try:
        model = package.SentenceTransformer(str(folder) if folder.is_dir() else name, device=str(device))
    except (OSError, ValueError) as error:
        raise ModelError(f"bank_embedder: {name} cannot be loaded by sentence-transformers ({error}).") from error

    def embed(texts: Sequence[str]) -> Tensor:
        found = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(found).float().cpu()

    return embed


def embeddings_of_file(embedder: str, num_rows: int) -> Tensor:
    """The embeddings of ``file:PATH``: a .npy file, or safetensors with one tensor.

    Args:
        embedder: ``bank_embedder``.
        num_rows: Rows of the data, in whose order they stand.

    Returns:
        [n, d] float32.

    Raises:
        DataError: It cannot be read, or does not hold one row of finite numbers a row of the data.
    """
    path = file_path(embedder)
    try:
        values = _of_npy(path) if path.suffix == ".npy" else _of_safetensors(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(str(path), [f"holds no embeddings that can be read ({error})"]) from error
    if values.ndim != 2 or len(values) != num_rows or not values.shape[1]:
        held = " x ".join(map(str, values.shape)) or "one number"
        raise DataError(str(path), [f"holds {held}, and {num_rows} rows of embeddings are needed, one a row of data"])
    check_finite(values, str(path))
    return values.float()


def check_finite(values: Tensor, source: str) -> None:
    """Refuse embeddings that no distance can be taken of.

    Args:
        values: [n, d].
        source: What gave them.

    Raises:
        DataError: Some are NaN or infinite, or 0 throughout.
    """
    bad = (~values.isfinite().all(1) | ~values.any(1)).nonzero().squeeze(1).tolist()
    if bad:
        shown = ", ".join(map(str, bad[:3]))
        problem = f"{len(bad)} of {len(values)} embeddings are NaN, infinite or 0 throughout (row {shown})"
        raise DataError(source, [f"{problem}: leave these rows out, or write another bank_embedder"])


def _of_npy(path: Path) -> Tensor:
    values = np.load(path, allow_pickle=False)
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise ValueError(f"its numbers are {values.dtype}")
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _of_safetensors(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"it has {len(names)} tensors, one is needed")
        tensor: Tensor = file.get_tensor(names[0])
    return tensor
