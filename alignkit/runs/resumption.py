"""Going on with a run: whether there is one to continue, and the command that does."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkit.config import LoadedConfig
from alignkit.config.overrides import split_overrides
from alignkit.config.settings import DEFAULT
from alignkit.environment import launched_precision
from alignkit.runs.directory import RUN_FILE, RunDirectory
from alignkit.storage.durability import complete_checkpoints

AUTO = "auto"


def settled(loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with ``resume: auto`` settled by what lies in ``output_dir``, and defaults as the run has them.

    A complete checkpoint is continued from. Without one the run starts, over what an attempt left that was stopped
    before its first checkpoint; but never over a finished run, nor over weights, nor over what is not ours: these are
    refused as always.

    Args:
        loaded: The configuration.
    """
    config = loaded.config
    path = Path(config.output_dir)
    if config.resume == AUTO:
        resume = path.is_dir() and bool(complete_checkpoints(path))
        overwrite = not resume and _has_come_to_nothing(path)
        loaded = dataclasses.replace(loaded, config=dataclasses.replace(config, resume=resume, overwrite=overwrite))
    return _with_its_defaults(loaded, path) if loaded.config.resume and (path / RUN_FILE).is_file() else loaded


def _with_its_defaults(loaded: LoadedConfig, path: Path) -> LoadedConfig:
    """The configuration with the defaults that the run began with, where they have changed since."""
    recorded: dict[str, Any] = RunDirectory(path, is_main=False).sections().get("config", {})
    changed = {
        key: recorded[key]["value"]
        for key, now in loaded.effective().items()
        if key in vars(loaded.config) and now["source"] == DEFAULT
        if key in recorded and recorded[key]["source"] == DEFAULT and recorded[key]["value"] != now["value"]
    }
    if changed.get("bf16") is False and launched_precision() is not None:
        # Where the launcher's file names a precision, that was followed although the default was false.
        changed["bf16"] = loaded.config.bf16
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **changed))


def _has_come_to_nothing(path: Path) -> bool:
    """Whether a run was begun here and left neither weights nor a result."""
    if not (path / RUN_FILE).is_file():
        return False
    is_finished = RunDirectory(path, is_main=False).sections().get("status") == "finished"
    return not is_finished and not any(path.glob("*.safetensors"))


def how_to_go_on(directory: RunDirectory, command: Sequence[str] | None, *, resume: bool | str) -> str:
    """What to say about a run that was stopped: the command that continues it.

    Args:
        directory: The run.
        command: The words of the program's command line, as in ``sys.argv``; None where Python called.
        resume: The key of that name, as it was given.
    """
    checkpoint = directory.last_complete_checkpoint()
    launched = "accelerate launch ... " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "python "
    if resume == AUTO:
        again = f"goes on from {checkpoint}" if checkpoint else "starts it again"
        if command is None:
            return f"the same call {again} (resume: auto)"
        return f"the same command {again} (resume: auto):\n  {launched}{shlex.join(command)}"
    if checkpoint is None:
        return "stopped before the first checkpoint was complete; there is nothing to continue from"
    if command is None:
        return f"to continue from {checkpoint}, make the same call with resume=True"
    words = [command[0], *_without(command[1:], {"resume", "overwrite"}), "--resume"]
    return f"to continue from {checkpoint}:\n  {launched}{shlex.join(words)}"


def _without(arguments: Sequence[str], names: set[str]) -> Iterator[str]:
    """The arguments but for those options and their values."""
    options = list(split_overrides(arguments))
    ends = [option.position for option in options[1:]] + [len(arguments)]
    for option, end in zip(options, ends, strict=True):
        if option.name not in names:
            yield from arguments[option.position : end]
