"""Check the folders, files and Python packages a config asks for, without opening a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignkit.config.kernels import attention_packages
from alignkit.config.optimizers import OPTIMIZERS
from alignkit.config.settings import Settings
from alignkit.json_text import parse_json
from alignkit.models.adapter_config import config_problem
from alignkit.models.files import newest_inside, quantization_problem, stored_quantization
from alignkit.models.positions import is_stretched, stated_positions
from alignkit.parametrizations.lora import names_output_head
from alignkit.parts.parametrization import load_parametrization
from alignkit.places import is_hub_id, similar_entry

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "*.model")


def nearest_entry(path: Path) -> str:
    """Where to look for a path that does not exist: the entry beside it with the most similar name."""
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either."
    near = similar_entry(path)
    return f"Did you mean {near}?" if near else f"The folder {path.parent} has no entry like it."


def has_similar_entry(path: Path) -> bool:
    """Whether ``owner/name`` is the entry of a local folder misspelt rather than a Hub id."""
    return path.parent != Path() and similar_entry(path) is not None


def check_model_files(settings: Settings) -> None:
    """Report what is wrong with the model, adapter and template folders, and with the output folder."""
    for key in ("model", "reference_model"):
        if settings.values.get(key) is not None:
            _check_model(settings, key)
    _check_quantization(settings)
    _check_positions(settings)
    if settings.values.get("adapter") is not None:
        _check_adapter(settings, Path(settings.values["adapter"]))
    if settings.values.get("tokenizer") is not None:
        _check_tokenizer(settings, Path(settings.values["tokenizer"]))
    template = settings.values.get("chat_template")
    if template is not None and not Path(template).is_file():
        settings.report("chat_template", "is not an existing file", nearest_entry(Path(template)))
    for key in ("output_dir", "reference_cache"):
        if settings.values.get(key) is not None:
            _check_directory(settings, key)


def _check_model(settings: Settings, key: str) -> None:
    name = settings.values[key]
    path = Path(name)
    if path.is_dir():
        for why, fix in _model_faults(path):
            settings.report(key, why, fix)
        if key == "model" and settings.is_set("model_revision") and "model_revision" in settings.values:
            settings.report("model_revision", f"would be ignored: {name} is a local folder", "Remove it")
    elif path.exists():
        settings.report(key, "is a file", "Write the folder that holds config.json and the weights, or a Hub id")
    elif not is_hub_id(name) or (key == "reference_model" and has_similar_entry(path)):
        settings.report(key, "is a path that does not exist", f"{nearest_entry(path)} A Hub id is owner/name")
    elif key == "model" and "/" in name and path.parent.is_dir() and not settings.is_set("model_revision"):
        advice = f"{nearest_entry(path)} If you mean the Hub model {name}, write model_revision: main"
        settings.report(key, f"does not exist, while {path.parent} is a local folder", advice)


def _model_faults(path: Path) -> Iterator[tuple[str, str]]:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            base = _json(path / "adapter_config.json").get("base_model_name_or_path") or "BASE"
            yield "is a LoRA adapter, not a model", f"Write model: {base} and adapter: {path}"
        else:
            yield "has no config.json", "Write a folder made by save_pretrained, or a Hub id"
        return
    if not _any_file(path, _WEIGHTS):
        yield "has no weights (*.safetensors)", "Write a folder made by save_pretrained, or a Hub id"
    if not _any_file(path, _TOKENIZER):
        yield "has no tokenizer", f"Save the tokenizer beside the model: tokenizer.save_pretrained('{path}')"


def _check_tokenizer(settings: Settings, path: Path) -> None:
    if path.is_dir():
        if not _any_file(path, _TOKENIZER):
            settings.report("tokenizer", "has no tokenizer", f"Save one there: tokenizer.save_pretrained('{path}')")
    elif path.exists():
        settings.report("tokenizer", "is a file", "Write the folder that save_pretrained made, or a Hub id")
    elif not is_hub_id(str(path)) or has_similar_entry(path):
        settings.report("tokenizer", "is a path that does not exist", f"{nearest_entry(path)} A Hub id is owner/name")


def _check_quantization(settings: Settings) -> None:
    """Report a model that is quantised already and is to be quantised otherwise, or trained in full."""
    values = settings.values
    if any(values.get(key) is None for key in ("model", "quantization", "parametrization")):
        return
    stored = stored_quantization(_json(Path(values["model"]) / "config.json"))
    in_full = not load_parametrization(values["parametrization"]).has_adapter
    if problem := quantization_problem(stored, wanted=values["quantization"], in_full=in_full):
        settings.report("parametrization" if in_full else "quantization", *problem)


def _check_positions(settings: Settings) -> None:
    """Report a ``max_length`` beyond what a model was made for; packed examples count their positions anew.

    Of the default nothing is said: rows that really are too long are found when the model is looked at.
    """
    asked = settings.values.get("max_length")
    if asked is None or settings.is_set("packing") or not settings.is_set("max_length"):
        return
    names = (settings.values.get(key) for key in ("model", "reference_model"))
    for path in (Path(name) for name in names if name is not None):
        config = _json(path / "config.json")
        key, limit = stated_positions(config) or ("", math.inf)
        if limit < asked and not is_stretched(config):
            why = f"is beyond the {limit} positions of {path} ({key} in its config.json)"
            settings.report("max_length", why, f"Write max_length: {limit}, or less")


def _any_file(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(file.is_file() for pattern in patterns for file in path.glob(pattern))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_adapter(settings: Settings, path: Path) -> None:
    if not path.exists():
        settings.report("adapter", "does not exist", nearest_entry(path))
    elif not (path / "adapter_config.json").is_file():
        inside = newest_inside(path, "adapter_config.json") if path.is_dir() else None
        fix = f"Write adapter: {inside}, which has one" if inside else "Write the folder of an adapter saved by PEFT"
        settings.report("adapter", "has no adapter_config.json", fix)
    elif not _any_file(path, ("adapter_model.safetensors", "adapter_model.bin")):
        settings.report("adapter", "has no adapter_model.safetensors", "Write the folder of an adapter saved by PEFT")
    elif problem := config_problem(config := _json(path / "adapter_config.json")):
        settings.report("adapter", f"has a config that cannot be used: {problem}", "Save it again with PEFT")
    else:
        _check_adapter_config(settings, config)


def _check_adapter_config(settings: Settings, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        first = "export it (alignkit prune)" if str(kind).startswith("ALIGNKIT_") else "merge it first"
        settings.report("adapter", f"holds peft_type {kind}", f"Only LoRA adapters can be continued; {first}")
    modules = config.get("target_modules")
    if isinstance(modules, (str, list)) and names_output_head(modules):
        why = "has low-rank factors on lm_head, whose weight is read directly when log-probs are computed"
        settings.report("adapter", why, "Merge it first (alignkit merge) and start a new adapter")


def _check_directory(settings: Settings, key: str) -> None:
    path = Path(settings.values[key])
    if "\0" in str(path):
        settings.report(key, "holds a NUL character", "Write the name of a folder")
        return
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                where = "is an existing file" if place == path else f"lies below {place}, which is a file"
                settings.report(key, where, "Write a folder that exists or can be made")
            return


def check_packages(settings: Settings) -> None:
    """Report keys that need a Python package which is not installed."""
    for key, packages, command in _needed_packages(settings):
        if not any(_is_installed(package) for package in packages):
            missing = " or ".join(packages)
            settings.report(key, f"needs the Python package {missing}", f"Install it: {command}")


def _is_installed(package: str) -> bool:
    """Whether ``package`` can be imported; a mere folder of that name, such as wandb's own logs, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _needed_packages(settings: Settings) -> Iterator[tuple[str, tuple[str, ...], str]]:
    values = settings.values
    bitsandbytes = ("bitsandbytes",), "pip install 'alignkit[quantization]'"
    if values.get("quantization", "none") != "none":
        yield "quantization", *bitsandbytes
    optimizer = OPTIMIZERS.get(values.get("optim", ""))
    if optimizer is not None and optimizer.package is not None:
        package, command = optimizer.package
        yield "optim", (package,), command
    trackers = values.get("report_to", "none")
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker != "none":
            yield "report_to", (tracker,), f"pip install {tracker}"
    if values.get("kernels") == "liger":
        yield "kernels", ("liger_kernel",), "pip install 'alignkit[fast]'"
    if (needed := attention_packages(values.get("attn_implementation"))) is not None:
        yield "attn_implementation", *needed
