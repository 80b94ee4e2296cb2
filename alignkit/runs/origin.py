"""What a run is made of, in hashes: compared when it is resumed, and written beside every adapter it saves.

A path says where something lies, not what it is. Base, reference models, starting adapter, tokenizer, chat template and
training rows are looked at before training; ``run.json`` keeps what was found under ``origin``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from alignkit.config.base import ProgramConfig
from alignkit.errors import RunDirectoryError
from alignkit.models.files import ADAPTER_CONFIG, read_adapter, sha256
from alignkit.models.fingerprints import ORIGIN_FILE, QUANTIZATION, BaseFingerprint, origin_text
from alignkit.models.loading import fingerprint
from alignkit.parametrizations._policy import model_source
from alignkit.runs.directory import RunDirectory, going_on
from alignkit.runs.ranks import Ranks
from alignkit.runs.rows import PreparedData
from alignkit.storage.durability import write_whole

_ROWS_AT_ONCE = 1000
_NAMES = {
    "rows": "the training rows (samples drawn for them included)",
    "tokenizer": "the tokenizer's vocabulary",
    "chat_template": "the chat template",
    "adapter": "the adapter the run starts from",
}


def record_origin(
    config: ProgramConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    others: Mapping[str, str],
    directory: RunDirectory,
    ranks: Ranks,
) -> None:
    """Write down what the run is made of; when it is resumed, compare that with what it was made of first.

    The processes of a launch compare it as well: a file of the same name and size may hold something else on another
    machine.

    Args:
        data: The rows; those of a stream are not at hand and not compared.
        others: The models beside the policy, by the key that names them.
        directory: The run.
        ranks: The processes of the launch.

    Raises:
        ModelError: A model is not there.
        RanksDifferError: Another process has something else.
        RunDirectoryError: The run is resumed, and something is not what it was.
    """
    origin = _origin(config, tokenizer, data.train, others)
    ranks.compare("origin", lambda: {**_by_name(origin), "the held-out rows": {"value": _rows(data.evaluation)}})
    if not directory.is_main:
        return
    recorded = directory.sections().get("origin")
    if config.resume and recorded is None:
        print(f"{directory.path} was begun before alignkit recorded what a run is made of: base and rows not compared")
    elif config.resume and (differences := list(_differences(recorded, origin))):
        lines = "\n".join(f"  {line}" for line in differences)
        raise RunDirectoryError(
            f"{directory.path} cannot be resumed: under the same names lies something else than when it was begun, and "
            f"the result would be neither run:\n{lines}\nPut back what was there; or "
            f"{going_on(directory.path, config.parametrization)}."
        )
    directory.record(origin=origin)


def write_origin(directory: RunDirectory, folder: Path) -> None:
    """Write ``alignkit.json`` beside an adapter saved in ``folder``, if one is there; the main process does.

    Args:
        directory: The run that saved it.
        folder: The run directory or one of its checkpoints.
    """
    if directory.is_main and (folder / ADAPTER_CONFIG).is_file():
        sections = directory.sections()
        quantization = sections["config"]["quantization"]["value"]
        write_whole(folder / ORIGIN_FILE, origin_text({**sections["origin"], QUANTIZATION: quantization}))


class OriginRecord:
    """``alignkit.json`` in every checkpoint of an adapter.

    Args:
        directory: The run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def save(self, directory: Path) -> None:
        """Write ``alignkit.json``."""
        write_origin(self.directory, directory)

    def load(self, directory: Path) -> None:
        """Nothing: :func:`record_origin` has compared what the run is made of with ``run.json``."""


def rows_fingerprint(rows: Dataset) -> str:
    """Hash of all numbers in tokenised rows, in order: token ids, labels, scores, whatever type they are stored in."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for name in sorted(batch.column_names):
            for part in _numbers(batch.column(name).combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _numbers(values: pa.Array) -> Iterator[bytes]:
    """Lengths of the lists, then what they hold; nothing of a column of text."""
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.list_value_length(values).cast(pa.int64()).fill_null(-1).to_numpy().tobytes()
        yield from _numbers(pc.list_flatten(values))
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        wide = pa.float64() if pa.types.is_floating(kind) else pa.int64()
        yield values.cast(wide).to_numpy(zero_copy_only=False).tobytes()


def _origin(
    config: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset | IterableDataset, others: Mapping[str, str]
) -> dict[str, Any]:
    """What the run is made of."""
    template = tokenizer.chat_template
    return {
        "base": asdict(fingerprint(model_source(config, config.model, config.model_revision))),
        **{key: asdict(fingerprint(model_source(config, path))) for key, path in others.items()},
        "adapter": None if config.adapter is None else sha256(read_adapter(config.adapter).weights),
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
        "chat_template": None if template is None else _hash(template),
        "rows": _rows(rows),
    }


def _rows(rows: Dataset | IterableDataset | None) -> str | None:
    return rows_fingerprint(rows) if isinstance(rows, Dataset) else None


def _by_name(origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the run is made of, each thing under the name it has in messages."""
    found = {}
    for key, value in origin.items():
        if isinstance(value, Mapping):
            name = _model_name(key)
            found[name] = {"value": f"weights {value['weights']}"}
            found |= {f"{entry} in the config of {name}": {"value": one} for entry, one in value["config"].items()}
        else:
            found[_NAMES.get(key, key)] = {"value": value}
    return found


def _model_name(key: str) -> str:
    return "the model" if key == "base" else f"the model of {key}"


def _hash(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that is not what it was."""
    for key, value in now.items():
        old = recorded.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from (
                f"{_model_name(key)}: {line}" for line in BaseFingerprint(**old).differences(BaseFingerprint(**value))
            )
        elif old != value:
            yield f"{_NAMES.get(key, key)}: not the same as when the run was begun"
