"""What a base is, in two hashes and a few numbers: kept beside an adapter, compared wherever it meets a base again.

An adapter says which base it belongs to by name alone, and a name does not say what lies there today. So a run writes
the fingerprint of its base into ``alignkit.json`` beside every adapter it saves.

**Seen:** the name, shape and type of every tensor, its values (all of them up to 65,536; beyond that up to 16 evenly
spaced blocks of 1,024), and every entry of the config that can change what the model computes. It reads some 30 MB of a
model of 70 billion parameters. **Not seen:** where the files lie, how they are sharded, how a run quantises them when
it loads them, dropout, token ids of the generation, and an edit that misses every block of a large tensor. A cast
between float32 and bfloat16 is seen through: checkpoints of different types are compared as rounded to bfloat16.

Two other identities of a model are keys of what is stored, and so exact: ``model_fingerprint`` of the reference cache
hashes every value of a model in memory, for log-probs that another bit would change; ``source_identity`` of the store
of answers hashes the files of a model that is not loaded, or takes its commit on the Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from alignkit.errors import ModelError
from alignkit.json_text import parse_json

ORIGIN_FILE = "alignkit.json"
QUANTIZATION = "quantization"
"""Key of it that says how the run quantised the base when it loaded it; files of earlier versions lack it."""

_FORMAT_KEY, _FORMAT = "alignkit_origin", 1

WHOLE, BLOCK, BLOCKS = 65_536, 1_024, 16
"""Values of a tensor read in full; length and number of the blocks read of a larger one."""

ALL_BLOCKS = 16_384
"""Blocks read of a whole model, two of each tensor at least; tens of thousands of experts would take minutes."""

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WIDTHS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

WITHOUT_EFFECT = frozenset(
    "architectures use_cache id2label label2id initializer_range initializer_factor output_attentions "
    "output_hidden_states return_dict output_router_logits router_aux_loss_coef problem_type auto_map".split()
)
"""Entries of a config that do not change the logits; see :func:`has_effect` for the others."""

_OF_THE_FILES = ("transformers_version", "dtype", "torch_dtype", "quantization_config")
"""Entries that say how a base is stored, or with what it was saved: two copies of it may differ in them."""


def has_effect(key: str) -> bool:
    """Whether an entry of a config can change what a model computes outside training: not names, dropout, token ids.

    Args:
        key: Its name.
    """
    is_training_or_token = "dropout" in key or key.endswith(("pdrop", "_token_id"))
    return not (key.startswith("_") or key in WITHOUT_EFFECT or is_training_or_token)


@dataclass(frozen=True)
class BaseFingerprint:
    """What identifies the base model of an adapter.

    Attributes:
        weights: Hash of names, shapes, types and values.
        rounded: The same of the values rounded to bfloat16, without the types.
        types: Number of tensors by type, such as ``{"BF16": 290}``.
        config: Entries of the config that change what the model computes, nested ones as ``a.b``.
    """

    weights: str
    rounded: str
    types: dict[str, int]
    config: dict[str, Any]

    def differences(self, other: BaseFingerprint) -> list[str]:
        """What tells this base, then, from another one, now; empty where they are the same.

        Entries that only one of the two configs has are passed over: versions of transformers add and remove some.
        """
        shared = [key for key in self.config if key in other.config]
        found = [
            f"{key} of its config was {json.dumps(self.config[key])} and is {json.dumps(other.config[key])}"
            for key in shared
            if self.config[key] != other.config[key]
        ]
        same_types = self.types == other.types
        if (self.weights != other.weights) if same_types else (self.rounded != other.rounded):
            found.append("its weights are others")
        return found


def base_fingerprint(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, local_files_only: bool = False
) -> BaseFingerprint:
    """Fingerprint of a saved model, without loading it; a Hub model is downloaded if it is not here.

    Args:
        model: Folder of a saved model, or Hub id.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Run Python code that comes with the model's config.
        local_files_only: Download nothing.

    Raises:
        OSError, ValueError: It has no config or no weights, or is not here.
    """
    where: dict[str, Any] = {"local_files_only": local_files_only} | ({"revision": revision} if revision else {})
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **where)
    exact, rounded, types = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16), Counter[str]()
    for name, shape, kind, raw in _sampled_tensors(_weight_files(model, where)):
        types[kind] += 1
        exact.update(f"{name} {shape} {kind}".encode() + raw)
        rounded.update(f"{name} {shape}".encode() + _as_bfloat16(raw, kind))
    types_found, effective = dict(sorted(types.items())), computing_config(config)
    return BaseFingerprint(exact.hexdigest(), rounded.hexdigest(), types_found, effective)


def computing_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a config that change what the model computes outside training, nested ones as ``a.b``."""
    return dict(_effective(config.to_dict()))


def read_origin(directory: Path) -> dict[str, Any] | None:
    """What is recorded beside an adapter about its making; None where alignkit did not write it.

    Args:
        directory: Folder of the adapter.

    Raises:
        ModelError: The record cannot be read.
    """
    file = directory / ORIGIN_FILE
    if not file.is_file():
        return None
    advice = "Remove it to use the adapter without comparing its base."
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} cannot be read ({error}). {advice}") from error
    if not isinstance(content, dict) or content.get(_FORMAT_KEY) != _FORMAT:
        raise ModelError(f"{file} was not written by this version of alignkit. {advice}")
    return content


def origin_text(origin: Mapping[str, Any]) -> str:
    """Content of ``alignkit.json``.

    Args:
        origin: What :func:`read_origin` is to give back.
    """
    return json.dumps({_FORMAT_KEY: _FORMAT, **origin}, indent=1, ensure_ascii=False) + "\n"


def _weight_files(model: str, where: Mapping[str, Any]) -> list[Path]:
    """The files that transformers would load."""
    for name in (*_SAFETENSORS, *_PICKLES):
        try:
            found = Path(cached_file(model, name, **where))
        except OSError:
            continue  # Not there under this name; the next one may be.
        if not name.endswith(".index.json"):
            return [found]
        shards = sorted(set(parse_json(found.read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(cached_file(model, shard, **where)) for shard in shards]
    raise OSError(f"{model} has no weights: none of {', '.join((*_SAFETENSORS, *_PICKLES))}")


def _sampled_tensors(files: list[Path]) -> Iterator[tuple[str, str, str, bytes]]:
    """Name, shape, type and sampled bytes of every tensor, by name, however they are spread over files."""
    tensors: dict[str, tuple[Path, str, str, int, int]] = {}
    for file in files:
        if file.suffix != ".safetensors":
            tensors[file.name] = (file, "", "pickle", 0, file.stat().st_size)
            continue
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError(f"{file} is truncated or not a safetensors file: its header ends beyond the file")
            header = parse_json(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = (file, str(entry["shape"]), entry["dtype"], 8 + size + begin, end - begin)
    blocks = max(2, min(BLOCKS, ALL_BLOCKS // len(tensors)))
    for name, (file, shape, kind, start, length) in sorted(tensors.items()):
        with file.open("rb") as stream:
            width = np.dtype(_WIDTHS[kind]).itemsize if kind in _WIDTHS else 1
            raw = b""
            for offset, count in _blocks(length // width, blocks):
                stream.seek(start + offset * width)
                raw += stream.read(count * width)
        yield name, shape, kind, raw


def _blocks(count: int, blocks: int) -> list[tuple[int, int]]:
    """Start and length of what is read of ``count`` values."""
    if count <= WHOLE:
        return [(0, count)]
    return [(i * (count - BLOCK) // (blocks - 1), BLOCK) for i in range(blocks)]


def _as_bfloat16(raw: bytes, kind: str) -> bytes:
    """Values rounded to the nearest bfloat16, ties to even; types that are no plain floats as they are."""
    if kind == "BF16" or kind not in _WIDTHS:
        return raw
    bits = np.frombuffer(raw, _WIDTHS[kind]).astype("<f4").view("<u4").astype("<u8")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _effective(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a config that change what the model computes; those without a value are left out."""
    for key, value in config.items():
        if key in _OF_THE_FILES or not has_effect(key):
            continue
        if isinstance(value, Mapping):
            yield from _effective(value, f"{prefix}{key}.")
        elif value is not None:
            # As records give it back: lists for tuples, and text for infinity and NaN, wherever in them they are.
            text = json.dumps(value, default=str)
            yield f"{prefix}{key}", json.loads(text, parse_constant=lambda name: str(float(name)))
