"""Where the launch programs and the recipes are: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    inside_wheel = _PACKAGE / f"_{name}"
    return inside_wheel if inside_wheel.is_dir() else _PACKAGE.parent / name


def trainers_dir() -> Path:
    """Folder of the launch programs, ``trainers/`` of the repository."""
    return _shipped("trainers")


def configs_dir() -> Path:
    """Folder of the recipes and accelerate files, ``configs/`` of the repository."""
    return _shipped("configs")


def program_path(program: str) -> Path:
    """Path of the launch program called ``program``, such as ``preference``."""
    return trainers_dir() / f"{program}.py"


def recipe_names() -> list[str]:
    """Names of the shipped training recipes, such as ``preference/flex_dpo`` (accelerate files are left out)."""
    root = configs_dir()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml")]
    return sorted(name for name in names if not name.startswith("accelerate/"))


def recipe_path(name: str) -> Path:
    """Path of the shipped recipe called ``name``, as listed by :func:`recipe_names`."""
    return configs_dir() / f"{name}.yaml"
