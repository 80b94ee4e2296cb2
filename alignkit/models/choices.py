"""What a run chooses by itself: each choice with its reason, the time that choosing may take, and what was measured.

Whoever decides fills ``choices`` of the trainer's bridge. A run prints all of them in one line and keeps them in
``run.json``. What had to be measured is kept on disk, so that the next run of the same kind does not measure it again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

import alignkit
from alignkit.environment import installed_version
from alignkit.storage.durability import write_whole
from alignkit.storage.refusals import StorageError

KEYS = ("layout", "reference", "gradient_checkpointing", "kernels", "bf16", "tokens_per_batch")
"""What can be chosen, in the order in which it is told."""
PINNED = "pinned"
"""The reason of a choice that the user has made."""

ASSUMED_FLOPS = {"cpu": 5e10, "cuda": 4e14}
"""FLOP/s of a core and of an accelerator, more than most reach: a run is rather taken for too short than for too long.

Any other accelerator is taken for half of a large GPU.
"""
FORMAT = 1
"""Counted up whenever what is kept on disk would mean something else, or would be decided otherwise."""
VERSIONS = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Choice:
    """One thing that a run has chosen.

    Attributes:
        key: Which, one of ``KEYS``.
        value: What was taken; printed, and kept in ``run.json``.
        reason: One clause that a user reads, with the saving where one is known; ``PINNED`` where the user chose.
        seconds: What deciding took.
    """

    key: str
    value: Any
    reason: str
    seconds: float = 0.0

    def __str__(self) -> str:
        """As it stands in the line that a run prints."""
        value = ("on" if self.value else "off") if isinstance(self.value, bool) else self.value
        return f"{self.key} {value} ({self.reason})"


def pinned(key: str, value: Any) -> Choice:
    """What the user has written is taken as it stands."""
    return Choice(key, value, PINNED)


def chosen_line(choices: Mapping[str, Choice]) -> str:
    """The line that names all choices of a run; empty where there was nothing to choose."""
    told = [str(choices[key]) for key in KEYS if key in choices]
    seconds = sum(choice.seconds for choice in choices.values())
    took = f"; deciding took {seconds:.1f} s" if seconds >= 0.1 else ""
    return f"chosen: {', '.join(told)}{took}" if told else ""


def recorded(choices: Mapping[str, Choice]) -> dict[str, dict[str, Any]]:
    """The choices for ``run.json``, by key."""
    return {
        key: {"value": choices[key].value, "reason": choices[key].reason, "seconds": round(choices[key].seconds, 3)}
        for key in KEYS
        if key in choices
    }


def taken_before(record: Mapping[str, Any]) -> dict[str, Choice]:
    """The choices that ``run.json`` holds, for a run that is resumed: what was chosen stays, and costs nothing again.

    Args:
        record: What :func:`recorded` returned then.
    """
    return {key: Choice(key, entry["value"], entry["reason"]) for key, entry in record.items()}


# --- what deciding may take -------------------------------------------------------------------------------------------


def run_seconds(steps: int, step_flops: float, device: torch.device) -> float:
    """Seconds that a run will take at least, from what its device may reach at best.

    Args:
        steps: Optimizer steps of the run.
        step_flops: Of one step on one process; see :func:`step_flops`.
        device: What it runs on.
    """
    if device.type == "cpu":
        return steps * step_flops / (ASSUMED_FLOPS["cpu"] * torch.get_num_threads())
    return steps * step_flops / ASSUMED_FLOPS.get(device.type, ASSUMED_FLOPS["cuda"] / 2)


def step_flops(config: Any, tokens: float) -> float:
    """FLOPs of an optimizer step that trains an adapter, roughly: a forward pass, and one backward to the activations.

    Args:
        config: The text config of a model, whose layers are taken to have 12 times the square of their width in
            parameters, as most have; of experts, those that a token passes through.
        tokens: Of the step, on one process.
    """
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    return 4.0 * tokens * (12.0 * layers * width**2 + width * vocabulary)


# --- what was measured ------------------------------------------------------------------------------------------------


def remembered(facts: Mapping[str, Any]) -> Any | None:
    """What was decided before under the same facts, or None; a collective, all processes get what the first one has.

    A file that cannot be read is said, and what it held is measured again.

    Args:
        facts: All that the decision depends on, for JSON: what is decided, the shape of the model, lengths of rows.
            Versions and the device are added here.
    """
    found = [_read(_path(facts), _all(facts)) if PartialState().is_main_process else None]
    return broadcast_object_list(found)[0]


def remember(facts: Mapping[str, Any], value: Any) -> None:
    """Keep what was decided, on the first process; a folder that cannot be written is said, and nothing is kept.

    Args:
        facts: As for :func:`remembered`.
        value: What was decided, for JSON; not None.
    """
    if not PartialState().is_main_process:
        return
    path = _path(facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"facts": _all(facts), "value": value}, indent=1, sort_keys=True) + "\n")
    except (OSError, StorageError) as error:
        print(f"warning: what was measured is not kept for the next run: {error}")


def model_shape(model: Any) -> dict[str, Any]:
    """What of a transformers model decides how fast it is and what it needs, for ``facts``: no path, no weight."""
    config = model.config.get_text_config()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    settings = config.to_dict()
    named = {name: settings[name] for name in sizes if name in settings}
    return {"class": type(model).__name__, "parameters": model.num_parameters(), "dtypes": dtypes, **named}


def _path(facts: Mapping[str, Any]) -> Path:
    """File of a decision."""
    folder = Path(os.environ.get("ALIGNKIT_CACHE", Path.home() / ".cache" / "alignkit")) / "choices"
    text = json.dumps(_all(facts), sort_keys=True)
    return folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.json"


def _all(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with those that concern every decision, as JSON gives them back."""
    full: dict[str, Any] = json.loads(json.dumps({**facts, "format": FORMAT, "machine": _machine()}))
    return full


def _machine() -> dict[str, Any]:
    """Versions and device."""
    versions = {name: installed_version(name) for name in VERSIONS} | {"alignkit": alignkit.__version__}
    device = PartialState().device
    if device.type == "cpu":
        return {"versions": versions, "device": "cpu", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return {"versions": versions, "device": about.name, "memory": about.total_memory}
    return {"versions": versions, "device": device.type}


def _read(path: Path, facts: Mapping[str, Any]) -> Any | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["facts"] != facts or content["value"] is None:
            raise ValueError("it was kept for something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} cannot be used, and what it held is measured again ({error})")
        return None
    return content["value"]
