"""What a run was made with, for ``run.json``: versions, platform and the state of the sources."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import alignkit
from alignkit.errors import ConfigError

RECORDED = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "deepspeed",
    "bitsandbytes",
    "liger-kernel",
)
"""Distributions whose version can change a result."""


_NOTICES = (
    ".*gradient_checkpointing.* is deprecated",
    "`torch.jit.script.*` is deprecated",
    ".*find_unused_parameters=True was specified in DDP constructor",
)
"""Warnings about the insides of the dependencies, which a user can do nothing about."""


def ignore_notices() -> None:
    """Show no warnings about the insides of the dependencies, from now on or to the end of ``catch_warnings``."""
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message=message)
    # What a user can do about an adapter is said by our own checks, with the config's words.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")


@contextmanager
def notices_unlogged() -> Iterator[None]:
    """Log no notice of bitsandbytes about its insides meanwhile, unless the level of its logger is set already."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    if before == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def environment() -> dict[str, Any]:
    """Versions, platform and git state.

    A distribution that is not installed is None. ``git`` is the checkout alignkit runs from, ``working_directory_git``
    the one around the current directory, where the user's configs are; each is None where there is none.
    """
    project = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / ".git").exists()), None)
    return {
        "alignkit": alignkit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed_version(name) for name in RECORDED},
        "cpu_count": os.cpu_count(),
        "git": git_state(Path(alignkit.__file__).resolve().parents[1]),
        "working_directory_git": None if project is None else git_state(project),
    }


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit of a checkout and the files that differ from it; None where there is no checkout, as after pip install."""
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "status", "--porcelain")
    return {"commit": commit, "changed": None if changed is None else changed.splitlines()}


def _git(checkout: Path, *arguments: str) -> str | None:
    """Output of a git command; None when git is missing or refuses (no commit yet, another owner)."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")


def launched_with_fsdp() -> bool:
    """Whether accelerate was told to shard the model with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def launched_with_deepspeed() -> bool:
    """Whether accelerate was told to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def launched_precision() -> str | None:
    """What the launcher's files say a run computes in: ``bf16``, ``fp16`` or ``no``; None where they say nothing.

    ``mixed_precision: no`` is also what accelerate sets where its file is silent, so it counts as saying nothing.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given != "no":
        return given
    file = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if not (launched_with_deepspeed() and file.is_file()):
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        enabled = {name: content[name].get("enabled") for name in ("bf16", "fp16") if name in content}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError("the launcher's DeepSpeed file cannot be read", [f"`{file}`: {error}"]) from error
    # "auto" is filled in from the run's own precision.
    stated = {name: value for name, value in enabled.items() if isinstance(value, bool)}
    return next((name for name, value in stated.items() if value), "no" if stated else None)


def launched_on_cpu() -> bool:
    """Whether accelerate was told to use the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")


def process_of_launch() -> tuple[int, int]:
    """Number of this process and how many there are, as launchers say before any of them are connected.

    Raises:
        ConfigError: The variables in which they say so do not fit together.
    """
    rank, size = _whole_number("RANK", 0), _whole_number("WORLD_SIZE", 1)
    missing = [name for name in _LAUNCH_VARIABLES if size > 1 and not os.environ.get(name)]
    problems = []
    if missing:
        set_by = "A launcher sets all of them: start the program with `accelerate launch`, or unset WORLD_SIZE"
        problems.append(
            f"`WORLD_SIZE={size}` asks for {size} processes, and {', '.join(missing)} are not set. {set_by}"
        )
    elif not 0 <= rank < size:
        problems.append(
            f"`RANK={rank}` is not one of the {size} processes of `WORLD_SIZE`, which count from 0. {_WAY_OUT}"
        )
    if size > 1 and not missing:
        _whole_number("MASTER_PORT", 0)
    if problems:
        raise ConfigError(_LAUNCH_HEADLINE, problems)
    return rank, size


_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH_HEADLINE = "the environment describes no launch"
_WAY_OUT = "Launchers set these variables; unset them to train in one process"


def _whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(_LAUNCH_HEADLINE, [f"`{variable}={text}` is not a whole number. {_WAY_OUT}"])
    return int(text)
