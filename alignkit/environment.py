"""What a run was made with, for ``run.json``: versions, platform and the state of the sources."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import alignkit

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
)
"""Distributions whose version can change a result."""


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
