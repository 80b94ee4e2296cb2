"""Samples on disk while they are being made: one file a chunk, each written whole, beside what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import hf_hub_download
from transformers.utils import GENERATION_CONFIG_NAME

from alignkit.data.schema import shorten
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.files import ADAPTER_CONFIG, MODEL_CONFIG, AdapterFiles, sha256
from alignkit.models.loading import ModelSource
from alignkit.storage.durability import partial_path, write_whole
from alignkit.storage.refusals import writing

SETTINGS = "settings.json"
WEIGHT_FILES = (".safetensors", ".bin")
CONFIG_FILES = (MODEL_CONFIG, GENERATION_CONFIG_NAME)
_WRITTEN = ("chunk-*.jsonl", ".chunk-*.jsonl.partial", f".{SETTINGS}.partial")

Result = TypeVar("Result")


@dataclass
class RowSamples:
    """The samples of one row that were kept, and what became of the others.

    Attributes:
        row: Number of the row.
        texts, num_tokens, finished, repetition: As in :class:`alignkit.sampling.generation.Sample`, one entry a sample.
        dropped: Samples discarded, by cause.
        scores: One score a completion, or None without a scorer.
    """

    row: int
    texts: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    repetition: list[float] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    scores: list[float] | None = None


class ChunkStore:
    """A folder of finished chunks. Only the first process may touch it.

    Args:
        directory: The folder, created when the first chunk is written.
        settings: Everything the samples depend on, by name; JSON values.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory, self.settings = directory, json.loads(json.dumps(settings))

    def done(self) -> set[int]:
        """Numbers of the chunks that are there.

        Raises:
            ConfigError: They were made with other settings; every difference.
        """
        file = self.directory / SETTINGS
        if not file.is_file():
            if self.directory.is_symlink() or (self.directory.exists() and self._holds_what_is_not_ours()):
                raise ConfigError(
                    str(self.directory), [f"is in the way: it has no {SETTINGS}, so it is not ours. Move it"]
                )
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n")
            return set()
        before = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        if names:
            problems = [
                f"{name}: {shorten(before.get(name))} then, {shorten(self.settings.get(name))} now" for name in names
            ]
            advice = f"give the settings of then to continue, or remove {self.directory} to begin anew"
            raise ConfigError(f"{self.directory} was begun with other settings", [*problems, advice])
        return {int(path.stem.partition("-")[2]) for path in self.directory.glob("chunk-*.jsonl")}

    def write(self, number: int, records: Sequence[RowSamples]) -> None:
        """Add a chunk.

        Args:
            records: Its rows.
        """
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
        write_whole(self.directory / f"chunk-{number:06d}.jsonl", "".join(lines))

    def read(self) -> list[RowSamples]:
        """The rows of all chunks, in the order of the rows."""
        records = [
            RowSamples(**json.loads(line))
            for path in self.directory.glob("chunk-*.jsonl")
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]
        ]
        return sorted(records, key=lambda record: record.row)

    def remove(self) -> None:
        """Delete what was written here, which the finished file has made superfluous, and the folder if it is empty."""
        for pattern in (*_WRITTEN, SETTINGS):
            for path in self.directory.glob(pattern):
                path.unlink()
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _holds_what_is_not_ours(self) -> bool:
        """Whether there is more than what a kill leaves before the settings are written."""
        drafts = [partial_path(self.directory / SETTINGS)]
        return not self.directory.is_dir() or any(path not in drafts for path in self.directory.iterdir())


class MemoryStore:
    """Finished chunks of samples that nobody will want to continue."""

    def __init__(self) -> None:
        self._records: list[RowSamples] = []

    def done(self) -> set[int]:
        """No chunk: nothing is left of an earlier process."""
        return set()

    def write(self, number: int, records: Sequence[RowSamples]) -> None:
        """Add a chunk.

        Args:
            number: Its number, not used.
            records: Its rows.
        """
        self._records += records

    def read(self) -> list[RowSamples]:
        """The rows of all chunks, in the order of the rows."""
        return sorted(self._records, key=lambda record: record.row)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as jsonl or parquet, by the ending of the name; the file appears whole or not at all.

    Args:
        path: File to create or replace.
    """
    partial = partial_path(path)
    with writing(path, partial):
        if path.suffix == ".parquet":
            Dataset.from_list(list(rows)).to_parquet(str(partial))
        else:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def fingerprint(value: Any) -> str:
    """Hash of a JSON value.

    Args:
        value: For instance rows, or token ids.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_identity(source: ModelSource, adapter: AdapterFiles | None) -> dict[str, Any]:
    """Which model this is: the commit of a Hub model, the hash of the files of a local one.

    Its config counts as much as its weights (``rope_theta``), as does an adapter's (``lora_alpha``), and its generation
    config has stop tokens.

    Args:
        source: The model.
        adapter: The adapter on it, or None.
    """
    folder = Path(source.model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES or path.name in CONFIG_FILES)
        weights = fingerprint([[path.name, sha256(path)] for path in files])
    else:
        # The cache keeps every commit in a folder of its name; this works offline too.
        weights = Path(hf_hub_download(source.model, MODEL_CONFIG, revision=source.revision)).parent.name
    return {
        **asdict(source),
        "weights": weights,
        "adapter_weights": None if adapter is None else sha256(adapter.weights),
        "adapter_config": None if adapter is None else sha256(adapter.directory / ADAPTER_CONFIG),
    }


def on_first_process(work: Callable[[], Result], state: PartialState) -> Result:
    """Let the first process do something and give its result, or its error, to all. A collective.

    Args:
        work: Called on the first process alone.
        state: This process among the others.

    Raises:
        AlignkitError: What ``work`` raised.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except AlignkitError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], AlignkitError):
        raise outcome[0]
    return outcome[0]
