"""Find a config file by path or by the name of a shipped recipe."""

from __future__ import annotations

import difflib
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.shipped import configs_dir, recipe_names, recipe_path


def find_recipe(name: str) -> Path:
    """The config file meant by ``name``: an existing file, else a shipped recipe such as ``preference/flex_dpo``.

    Args:
        name: A path, or the name of a recipe with or without ``.yaml``.

    Raises:
        ConfigError: There is neither; lists the recipes.
    """
    file = Path(name).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise _not_found(f"{name}: is a folder, not a YAML file", sorted(str(entry) for entry in file.glob("*.yaml")))
    recipe = name.removesuffix(".yaml").removeprefix("configs/")
    if recipe in recipe_names():
        return recipe_path(recipe)
    if (configs_dir() / f"{recipe}.yaml").is_file():
        advice = f"Use it as `accelerate launch --config_file {name} trainers/... --config RECIPE`"
        raise ConfigError("no such configuration", [f"{name}: configures the launcher, not the training. {advice}."])
    siblings = [str(entry) for entry in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*siblings, *recipe_names()], n=1, cutoff=0.5)
    raise _not_found(f"{name}: no such file and no shipped recipe", near)


def _not_found(what: str, near: list[str]) -> ConfigError:
    advice = f"Did you mean {' or '.join(near)}?" if near else "Give the path of a YAML file."
    shipped = ", ".join(recipe_names()) or "none"
    return ConfigError("no such configuration", [f"{what}. {advice} Shipped recipes: {shipped}."])
