"""What a folder of weights holds, read without torch: model or adapter, the adapter's base, empty tensors, hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alignkit.errors import CheckpointError, ModelError
from alignkit.json_text import parse_json
from alignkit.models.adapter_config import MOST_LAYERS, config_problem, possible_patterns
from alignkit.places import is_hub_id, is_local, similar_entry

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_LOADED_FIRST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of the weights of a model those that transformers loads: the first that is there."""
RUN_MARKS = ("run.json", "complete.json")
"""Files by which a folder of weights is known to have been written by a run."""
CARD_OF_THE_ADAPTER = "adapter_card.md"
"""Name under which a merged model keeps the card of the adapter."""


@dataclass(frozen=True)
class AdapterFiles:
    """A saved PEFT adapter.

    Attributes:
        directory: Where it lies.
        base: Model it was trained on, as written in its config: a Hub id or a path; None when not written.
        base_revision: Branch, tag or commit of the base, or None.
        kind: PEFT's name of the method, such as ``LORA``.
    """

    directory: Path
    base: str | None
    base_revision: str | None
    kind: str

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.directory / ADAPTER_WEIGHTS

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved with it."""
        return (self.directory / TOKENIZER_CONFIG).is_file()


def read_adapter(directory: str | Path) -> AdapterFiles:
    """Read the config of a saved adapter and check that its weights are there.

    Args:
        directory: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelError: It is no such folder.
        CheckpointError: Its weights are empty or truncated.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        advice = "download a Hub adapter first: hf download NAME --local-dir DIR"
        raise ModelError(f"the adapter {str(directory)!r} is not a folder. {_near(path)}{advice}")
    if not (path / ADAPTER_CONFIG).is_file():
        kind = "it holds a full model: give it as --model" if (path / MODEL_CONFIG).is_file() else _checkpoints(path)
        raise ModelError(f"{str(directory)!r} has no {ADAPTER_CONFIG}, so it is not a saved adapter; {kind}")
    config = read_json(path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{str(directory)!r} has an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}: save the adapter again")
    check_tensors(path / ADAPTER_WEIGHTS)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise ModelError(f"{path / ADAPTER_CONFIG} has no peft_type: PEFT did not write it")
    if problem := config_problem(config):
        raise ModelError(f"{path / ADAPTER_CONFIG} cannot be used: {problem}. Save the adapter again with PEFT")
    return AdapterFiles(path, config.get("base_model_name_or_path"), config.get("revision"), peft_type)


def is_reward_adapter(adapter: AdapterFiles) -> bool:
    """Whether a saved adapter is that of a model with a head of numbers, which is saved with it."""
    return bool(read_json(adapter.directory / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS")


def is_reward_model(model: str, adapter: AdapterFiles | None = None) -> bool:
    """Whether a folder, with an adapter on it if there is one, holds a reward model; a Hub id is taken for none.

    Args:
        model: A folder or a Hub id.
        adapter: What is put on it.
    """
    if adapter is not None:
        return is_reward_adapter(adapter)
    config = Path(model).expanduser() / MODEL_CONFIG
    kinds = read_json(config).get("architectures") if config.is_file() else None
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds or ())


def module_patterns(adapter: AdapterFiles) -> list[str]:
    """What in a saved adapter's config may be a regular expression, which PEFT matches with the names of modules.

    Args:
        adapter: The saved adapter.
    """
    return possible_patterns(read_json(adapter.directory / ADAPTER_CONFIG))


def find_model(model: str | None, adapter: str | None) -> tuple[str, str | None, AdapterFiles | None]:
    """What the options ``--model`` and ``--adapter`` name together.

    Args:
        model: A model, or an adapter in its place; None to take the base that the adapter's config names.
        adapter: An adapter, or None.

    Returns:
        (the model, its revision if the adapter's config names one, the adapter or None).

    Raises:
        ModelError: Neither is given, or one of them is not what it is given as.
        CheckpointError: The adapter's weights are empty or truncated.
    """
    if adapter is None and model is not None and (Path(model).expanduser() / ADAPTER_CONFIG).is_file():
        return find_model(None, model)
    files = None if adapter is None else read_adapter(adapter)
    if model is not None:
        if problem := model_problem(model):
            raise ModelError(problem)
        return model, None, files
    if files is None:
        raise ModelError("no model is given: write --model with a folder or a Hub id, or --adapter with a folder")
    if files.base is None or (is_local(files.base) and model_problem(files.base)):
        given = f"the base {files.base!r}, which is not here" if files.base else "no base"
        raise ModelError(f"the adapter {str(adapter)!r} names {given}. Give the model it was trained on with --model")
    return files.base, files.base_revision, files


def model_problem(model: str) -> str | None:
    """What is wrong with the name of a model, without loading it, or None; Hub ids are believed.

    Args:
        model: A folder or a Hub id.
    """
    path = Path(model).expanduser()
    if (path / MODEL_CONFIG).is_file():
        return content_problem(path)
    if (path / ADAPTER_CONFIG).is_file():
        return f"{model!r} is an adapter, not a model: give it as --adapter"
    if path.is_dir():
        return f"{model!r} has no {MODEL_CONFIG}, so it is not a saved model; {_checkpoints(path)}"
    if path.is_file():
        return f"{model!r} is a file; give the folder of a saved model, or a Hub id"
    if not is_hub_id(model):
        return f"the model {model!r} does not exist. {_near(path)}Give the folder of a saved model, or a Hub id"
    return None


def content_problem(folder: Path) -> str | None:
    """What in the files of a saved model cannot be true, and would be believed at any cost; or None.

    A model is built as large as its config says before a weight is read, and its index may name any file.

    Args:
        folder: Folder with a ``config.json``.

    Raises:
        ModelError: Its config or index is no JSON.
    """
    config = read_json(folder / MODEL_CONFIG)
    index = next((folder / name for name in _LOADED_FIRST if (folder / name).is_file()), folder)
    if index.name.endswith(".index.json"):  # Others, as of weights that were not downloaded, are not looked at.
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            return f"{index} has no weight_map of names: save the model again"
        for name in sorted(set(shards.values())):
            if Path(name).name != name:
                return f"{index} names {name!r}, which lies elsewhere: a shard lies beside its index"
            if not (folder / name).is_file():
                return f"{index} names {name!r}, which is not here: save or download the model again"
    files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    numbers = 8 * sum(file.stat().st_size for file in files)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    sizes = {key: text.get(key) for key in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size")}
    for key, size in sizes.items():
        if files and isinstance(size, int) and size > (most := MOST_LAYERS if key == "num_hidden_layers" else numbers):
            return f"{folder / MODEL_CONFIG} says {key}: {size}, of which its weights can have at most {most:,}"
    return None


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """How the weights of a saved model are quantised: ``nf4``, ``int8`` or what its config calls it; None if not.

    Args:
        config: Content of its ``config.json``.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return None
    if stored.get("load_in_8bit"):
        return "int8"
    return str(stored.get("bnb_4bit_quant_type" if stored.get("load_in_4bit") else "quant_method"))


def quantization_problem(stored: str | None, *, wanted: str, in_full: bool = False) -> tuple[str, str] | None:
    """Why a model that is quantised already cannot be used as wanted, and what to do instead; None if it can.

    Args:
        stored: How it is quantised.
        wanted: ``none``, which takes it as it is, or another kind.
        in_full: Whether all its weights are to be trained.
    """
    if stored is None:
        return None
    if in_full:
        why = f"its weights are quantised already ({stored}): they are integers and cannot be trained"
        return why, "Write parametrization: lora, or give the model before it was quantised"
    if wanted in ("none", stored):
        return None
    why = f"its weights are quantised already ({stored}) and would stay so under quantization {wanted}"
    return why, "Take quantization none to use it as it is, or give the model before it was quantised"


def check_tensors(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file, after checking that it is whole and none is empty.

    Raises:
        CheckpointError: It is truncated, or holds no tensor or an empty one (a ZeRO-3 shard that was never gathered).
    """
    shapes = tensor_shapes(file)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        found = f"{len(empty)} of {len(shapes)} tensors are empty, such as {empty[0]}" if empty else "it has no tensor"
        raise CheckpointError(f"{file} was saved without its numbers: {found}. Gather the parameters before saving.")
    return list(shapes)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a safetensors file, by name.

    Raises:
        CheckpointError: It is truncated, or no such file.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is truncated or not a safetensors file") from error


def sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that anybody may have written.

    Raises:
        ModelError: It holds something else, or no JSON.
    """
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds {type(value).__name__}, expected an object")
    return value


def _near(path: Path) -> str:
    near = similar_entry(path)
    return f"Did you mean {str(near)!r}? " if near else ""


def _checkpoints(path: Path) -> str:
    """Advice for a folder that holds no weights itself."""
    saved = newest_inside(path, ADAPTER_CONFIG, MODEL_CONFIG)
    return f"did you mean {str(saved)!r}?" if saved else "the folder holds no saved weights"


def newest_inside(path: Path, *names: str) -> Path | None:
    """The last checkpoint, by its number, among the folders in ``path`` that hold a file of one of these names.

    Args:
        names: Names of files.
    """
    saved = [entry for entry in path.iterdir() if any((entry / name).is_file() for name in names)]
    return max(saved, key=lambda entry: (_number(entry.name), entry.name), default=None)


def _number(name: str) -> int:
    """Number at the end of a name, -1 where there is none."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else -1
