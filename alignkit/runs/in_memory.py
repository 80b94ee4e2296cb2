"""What a Python program hands over in memory, kept on disk under the hash of its content.

A run is made of things that have a place: it loads its reference from there, compares it when it is resumed, and names
it in the adapter that it saves. So a model, a tokenizer or rows that exist in memory alone are written once into
``$ALIGNKIT_CACHE/inputs`` (by default ``~/.cache/alignkit/inputs``), and the run is given that place. The same content
is written once, however often it is handed over. A model that is still what it was loaded from is not written: the run
is given the name that it has.

The run loads its own copy: what was handed over stays as it is, and the same call gives the same result again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import try_to_load_from_cache
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.readers import KEPT_FOLDER
from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.models.files import MODEL_CONFIG, TOKENIZER_CONFIG
from alignkit.models.fingerprints import computing_config
from alignkit.models.loading import generation_stop_ids, is_quantized, load_tokenizer
from alignkit.models.saved_comparison import has_model, model_difference
from alignkit.references._cache import default_cache_dir, weights_fingerprint
from alignkit.runs.function_source import NotAlone, source_of

SOURCE_KEYS = {"path", "weight", "split", "config"}
"""Keys of a source of ``data``; a mapping with others is a row."""
DATA_KEYS = ("data", "eval_data")
REWARDS = "rewards"
IN_MEMORY = "in memory"
_HOW_IT_WAS_LOADED = ("is_local", "local_files_only", "name_or_path")


def kept_inputs(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Keywords as a configuration takes them, with a place for everything that is in memory.

    Args:
        keywords: Keys of a configuration; models, tokenizers, rows and reward functions may be objects.

    Returns:
        The keywords, and which of them were objects.

    Raises:
        ConfigError: Some of it cannot be kept; all such problems together.
    """
    kept, problems = dict(keywords), []
    for key, value in keywords.items():
        try:
            if key in DATA_KEYS:
                kept[key] = _kept_data(key, value)
            elif key == REWARDS and _holds_functions(value):
                kept[key] = [_kept_reward(entry) for entry in _listed(value)]
            elif isinstance(value, PreTrainedModel):
                kept[key] = _kept_model(value, keywords.get("tokenizer"))
        except AlignkitError as error:
            problems.append(f"keyword: `{key}`: {error}")
    if problems:
        raise ConfigError("what was handed over cannot be kept", problems)
    if isinstance(tokenizer := keywords.get("tokenizer"), PreTrainedTokenizerBase):
        if _is_that_of(kept.get("model"), tokenizer):
            del kept["tokenizer"]  # it is taken anyway
        else:
            kept["tokenizer"] = _kept_tokenizer(tokenizer)
    return kept, {key for key in kept if key in in_memory_keys(keywords)}


def in_memory_keys(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that are objects, with what stands for each while the others are checked."""
    objects = (PreTrainedModel, PreTrainedTokenizerBase)
    found: dict[str, Any] = {key: IN_MEMORY for key, value in keywords.items() if isinstance(value, objects)}
    if _holds_functions(keywords.get(REWARDS)):
        found[REWARDS] = [IN_MEMORY]
    return found | {key: IN_MEMORY for key in DATA_KEYS if key in keywords and _holds_rows(keywords[key])}


# --- models and tokenizers -------------------------------------------------------------------------------------------


def _kept_model(model: PreTrainedModel, tokenizer: Any) -> str:
    """Where the model lies, or lies now."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "carries an adapter. Save that (save_pretrained) and write model: its base, adapter: the folder; or load "
            "the model anew, if an earlier run put the adapter on it"
        )
    if is_quantized(model):
        raise ModelError("is quantised. Write its name, and quantization: nf4 or int8")
    if (name := _unchanged_since_loaded(model)) is not None:
        return name
    if tokenizer is None:
        if not model.name_or_path:
            raise ModelError("has no tokenizer. Write tokenizer=, an object or a name")
        tokenizer = model.name_or_path
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(str(tokenizer))
    generation = model.generation_config.to_dict() if model.can_generate() else None
    settings = [type(model).__name__, _settled_config(model), generation, _saved(tokenizer)]
    text = json.dumps(settings, sort_keys=True, default=str)
    folder = _folder() / f"model-{_hash([weights_fingerprint(model, None).encode(), text.encode()])}"
    if not folder.exists():
        draft = _draft(folder)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        _put(draft, folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"the model in memory is kept as {folder}, which an adapter of it names as its base")
    return str(folder)


def _settled_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config of a model without what saving it writes there."""
    return {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "dtype")}


def _unchanged_since_loaded(model: PreTrainedModel) -> str | None:
    """The name that the model was loaded under, where the very same weights still lie there; else None."""
    name = model.name_or_path
    if not name:
        return None
    config = Path(name) / MODEL_CONFIG if Path(name).is_dir() else try_to_load_from_cache(name, MODEL_CONFIG)
    if not isinstance(config, (str, Path)) or not Path(config).is_file() or not has_model(Path(config).parent):
        return None
    folder = Path(config).parent
    if computing_config(model.config) != computing_config(AutoConfig.from_pretrained(folder)):
        return None
    if model.can_generate():
        stops = model.generation_config.eos_token_id
        listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if listed != generation_stop_ids(str(folder)):
            return None
    return name if model_difference(model, folder) is None else None


def _is_that_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is the one that lies beside a model here."""
    is_here = isinstance(model, str) and (Path(model) / TOKENIZER_CONFIG).is_file()
    return is_here and _saved(load_tokenizer(model)) == _saved(tokenizer)


def _kept_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    folder = _folder() / f"tokenizer-{_saved(tokenizer)}"
    if not folder.exists():
        draft = _draft(folder)
        tokenizer.save_pretrained(draft)
        _put(draft, folder)
    return str(folder)


def _saved(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the files that a tokenizer is saved as, without the entries that say how it was loaded."""
    draft = _draft(_folder() / "tokenizer")
    try:
        tokenizer.save_pretrained(draft)
        settings = json.loads((draft / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        entries = {key: value for key, value in settings.items() if key not in _HOW_IT_WAS_LOADED}
        (draft / TOKENIZER_CONFIG).write_text(json.dumps(entries, sort_keys=True), encoding="utf-8")
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        return _hash(part for file in files for part in (file.name.encode(), file.read_bytes()))
    finally:
        shutil.rmtree(draft)


# --- rows ------------------------------------------------------------------------------------------------------------


def _holds_rows(value: Any) -> bool:
    """Whether a value of ``data`` has rows in memory, itself or in one of its sources."""
    return not isinstance(value, (str, Path)) and (
        not isinstance(value, Sequence) or any(not isinstance(item, (str, Path)) for item in value)
    )


def _kept_data(key: str, value: Any) -> Any:
    """A value of ``data``, with a path in place of rows."""
    if value is None or isinstance(value, (str, Path)):
        return value if value is None else str(value)
    if isinstance(value, Mapping) and "path" in value and value.keys() <= SOURCE_KEYS:
        return {**value, "path": _kept_data(key, value["path"])}
    if isinstance(value, Dataset):
        return _kept_table(value)
    if isinstance(value, DatasetDict):
        raise AlignkitError(f"is a DatasetDict ({', '.join(value)}). Write {key}=dataset[{next(iter(value))!r}]")
    if isinstance(value, (list, tuple)):
        is_rows = bool(value) and all(isinstance(row, Mapping) and not row.keys() <= SOURCE_KEYS for row in value)
        return _kept_rows(value) if is_rows else [_kept_data(key, item) for item in value]
    raise AlignkitError(
        f"is a {type(value).__name__}. Write a path or Hub id, a datasets.Dataset, a list of rows "
        "(DataFrame.to_dict('records')), or a list of {'path': any of these, 'weight': ...}"
    )


def _kept_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as lines of JSON, in which every row keeps its own keys and types."""
    lines = []
    for index, row in enumerate(rows):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            expected = "Write text, numbers, True, False, None, lists and mappings of these"
            raise AlignkitError(f"row {index} holds what JSON does not have ({error}). {expected}") from error
    content = "".join(f"{line}\n" for line in lines).encode()
    file = _folder() / f"rows-{_hash([content])}.jsonl"
    if not file.exists():
        draft = _draft(file)
        draft.write_bytes(content)
        _put(draft, file)
    return str(file)


def _kept_table(rows: Dataset) -> str:
    draft = _draft(_folder() / "rows")
    rows.to_parquet(draft)
    file = _folder() / f"rows-{_hash([draft.read_bytes()])}.parquet"
    _put(draft, file)
    return str(file)


# --- reward functions ------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _holds_functions(value: Any) -> bool:
    entries = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in _listed(value)]
    return any(callable(entry) for entry in entries)


def _kept_reward(entry: Any) -> Any:
    """An entry of ``rewards``, with ``file.py:function`` in place of a function."""
    if isinstance(entry, Mapping):
        return {**entry, "name": _kept_reward(entry.get("name"))}
    if not callable(entry):
        return entry
    try:
        content = source_of(entry).encode()
    except NotAlone as error:
        raise AlignkitError(str(error)) from error
    file = _folder() / f"reward_{_hash([content])}.py"
    if not file.exists():
        draft = _draft(file)
        draft.write_bytes(content)
        _put(draft, file)
    return f"{file}:{entry.__name__}"


# --- the folder ------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return default_cache_dir().with_name(KEPT_FOLDER)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _draft(place: Path) -> Path:
    """Where something is written before it gets its place, which it has whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.with_name(f".{place.name}.{secrets.token_hex(8)}.partial")


def _put(draft: Path, place: Path) -> None:
    """Give a draft its place, unless another process has put the same there."""
    if place.exists():
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        return
    try:
        os.replace(draft, place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(draft)
