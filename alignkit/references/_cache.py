"""Token log-probs of the reference, computed once and kept on disk.

The cache key is exactly what the values depend on: what the reference computes (its weights, its config, its adapter's
config and the version of transformers), the precision it is run in and the token ids of the rows (which already carry
template, tokenisation, truncation and order). The learning rate, the method, the
layout, the number of processes and the way the model is sharded do not enter it.

Upstream names relied on: ``deepspeed.zero.GatheredParameters`` and the ``ds_id`` attribute of partitioned parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.errors import CheckpointError
from alignkit.models._forward import LOGP_TOLERANCE, base_model
from alignkit.models.fingerprints import has_effect
from alignkit.storage.refusals import writing

Scores = list[list[list[float]]]
"""Per row, per candidate, per token."""

COLUMN = "ref_token_logps"
NOT_COMPUTED = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
"""Entries of an adapter's config that no log-prob depends on; of a model's, those that have no effect on any base.

Whatever is left is in the key.
"""
CHECKED_ROWS = 4


def default_cache_dir() -> Path:
    """``$ALIGNKIT_CACHE/reference``, by default ``~/.cache/alignkit/reference``."""
    return Path(os.environ.get("ALIGNKIT_CACHE", Path.home() / ".cache" / "alignkit")) / "reference"


def model_fingerprint(model: nn.Module, adapter: str | None) -> str:
    """Hash of all that decides what a model computes: its weights, its class and config, and its adapter's config.

    The same weights mean another function under another ``rope_theta``, ``rms_norm_eps`` or ``lora_alpha``.

    Args:
        model: The model, plain or PEFT.
        adapter: Name of the adapter in force, or None.
    """
    base: Any = base_model(model)
    settings = [type(base).__qualname__, base.config.to_dict()]
    if adapter is not None:
        assert isinstance(model, PeftModel)
        settings.append(model.peft_config[adapter].to_dict())
    text = json.dumps(_computed(settings), sort_keys=True, default=str)
    return hashlib.blake2b(f"{weights_fingerprint(model, adapter)} {text}".encode(), digest_size=16).hexdigest()


def _computed(value: Any) -> Any:
    """``value`` without the entries that nothing computed depends on, sets in a fixed order."""
    if isinstance(value, Mapping):
        entries = {str(name): entry for name, entry in value.items()}
        kept = (name for name in entries if name not in NOT_COMPUTED and has_effect(name))
        return {name: _computed(entries[name]) for name in kept}
    if isinstance(value, set):
        return sorted(value)
    return [_computed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def weights_fingerprint(model: nn.Module, adapter: str | None) -> str:
    """Hash of the reference's weights: the base model's and, if ``adapter`` names one, that adapter's.

    The same weights give the same hash as a plain model, inside PEFT under any name, and partitioned by ZeRO-3.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _named_weights(model, adapter):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.data)
    return digest.hexdigest()


def _named_weights(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sorted(base_model(model).state_dict(keep_vars=True).items()):
        is_adapter = ".lora_" in name or ".modules_to_save." in name
        if is_adapter and (adapter is None or f".{adapter}." not in f"{name}."):
            continue
        plain_name = name.replace(".base_layer", "").replace(".original_module", "")
        if is_adapter:  # What an adapter is called changes nothing, and a frozen copy has a name of its own.
            plain_name = f"{plain_name}.".replace(f".{adapter}.", ".default.").removesuffix(".")
        if "ds_id" in vars(tensor):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                yield plain_name, tensor
        else:
            yield plain_name, tensor


def token_ids_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the token ids of candidate rows, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for ids in (row["prompt_ids"], *row["completion_ids"]):
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()


@dataclass(frozen=True)
class ReferenceCache:
    """Flat float32 vectors of token log-probs, one file a (model, precision, rows) triple."""

    directory: Path

    def path(self, model: str, precision: str, rows: str) -> Path:
        """File of the triple, whose first is a :func:`model_fingerprint`."""
        key = hashlib.blake2b(f"{model} {precision} {rows}".encode(), digest_size=16).hexdigest()
        return self.directory / f"{key}.safetensors"

    def holds_as_many(self, num_tokens: int) -> bool:
        """Whether any file has so many tokens: without one there is no need to ask whose they are.

        Args:
            num_tokens: Of the completions of all rows.
        """
        return any(_tokens_in(path) == num_tokens for path in self.directory.glob("*.safetensors"))

    def load(self, path: Path, num_tokens: int) -> Tensor | None:
        """The cached vector, or None when there is none.

        Raises:
            CheckpointError: The file cannot be read or has another length.
        """
        if not path.is_file():
            return None
        advice = f"Delete {path} and start again."
        try:
            values = load_file(path)["token_logps"]
        except (SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(f"the cached reference log-probs cannot be read ({error}). {advice}") from error
        if values.numel() != num_tokens:
            raise CheckpointError(f"the reference cache holds {values.numel()} tokens, the data {num_tokens}. {advice}")
        return values

    def store(self, path: Path, values: Tensor) -> None:
        """Write atomically: neither a killed run nor a full disk leaves a half-written cache."""
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with writing(path, partial):
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file({"token_logps": values.contiguous()}, partial)
            os.replace(partial, path)


def _tokens_in(path: Path) -> int | None:
    """Tokens of a file by its header; None of one that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            (count,) = file.get_slice("token_logps").get_shape()
    except (SafetensorError, OSError, ValueError):
        return None
    return int(count)


def count_tokens(rows: Dataset) -> int:
    """Tokens of the completions of candidate rows."""
    completions = pc.list_flatten(rows.with_format("arrow")["completion_ids"])
    return int(pc.sum(pc.list_value_length(completions)).as_py() or 0)


def with_reference(
    rows: Dataset, *, cache: ReferenceCache, path: Path, precision: str, score: Callable[[Dataset], Scores]
) -> Dataset:
    """Attach ``ref_token_logps``, from the cache when every rank has it, otherwise computed and stored.

    A collective. A reused cache is compared with a few freshly scored rows.

    Args:
        rows: Candidate rows.
        path: This run's file in it.
        precision: Key of ``LOGP_TOLERANCE``, which sets the tolerance of the comparison.
        score: Scores rows under the reference with all ranks, returning all scores on every rank.
    """
    values = cache.load(path, count_tokens(rows))
    cached_everywhere = all(gather_object([values is not None]))
    if values is not None and cached_everywhere:
        attached = attach_tokens(rows, values, COLUMN)
        sample = attached.select(check_sample(len(attached)))
        check_reused(path, flat(sample[COLUMN]), flat(score(sample)), precision)
        return attached
    fresh = flat(score(rows))
    if PartialState().is_main_process:
        cache.store(path, fresh)
    PartialState().wait_for_everyone()
    return attach_tokens(rows, fresh, COLUMN)


def flat(scores: Scores) -> Tensor:
    """All values of ``scores`` in one float32 vector, in order."""
    return torch.tensor([x for row in scores for candidate in row for x in candidate], dtype=torch.float32)


def attach_tokens(rows: Dataset, values: Tensor, name: str) -> Dataset:
    """Add the column ``name`` (K lists a row, as long as the completions) built from the flat vector ``values``."""
    completions = rows["completion_ids"]
    lengths = [len(ids) for row in completions for ids in row]
    inner = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    outer = pa.array(np.concatenate([[0], np.cumsum([len(row) for row in completions])]), pa.int64())
    tokens = pa.LargeListArray.from_arrays(inner, pa.array(values.numpy()))
    column = Dataset(pa.table({name: pa.LargeListArray.from_arrays(outer, tokens)}))
    return concatenate_datasets([rows, column], axis=1)


def check_sample(num_rows: int) -> list[int]:
    """Rows that are scored again when a cache is reused: evenly spaced, first and last included."""
    return sorted({round(i * (num_rows - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)})


def check_reused(path: Path, cached: Tensor, fresh: Tensor, precision: str) -> None:
    """Compare log-probs from the cache with fresh ones of the same tokens.

    Raises:
        CheckpointError: They differ by more than rounding in ``precision`` explains.
    """
    worst = float((cached - fresh).abs().max())
    if not worst <= LOGP_TOLERANCE[precision]:
        raise CheckpointError(
            f"the cached reference log-probs differ from the model's by up to {worst:.3g} nats a token "
            f"(tolerance {LOGP_TOLERANCE[precision]}). Delete {path} and start again."
        )
