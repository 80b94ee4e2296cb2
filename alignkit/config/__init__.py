"""Strict configuration: one flat YAML plus command-line overrides, checked before torch is imported.

Nothing here imports torch, transformers, trl or datasets, so a wrong config is refused in a fraction of a second, with
every problem in one message.
"""

from __future__ import annotations

from alignkit.config.command_line import help_text, parse_program_arguments
from alignkit.config.compatibility import REFUSALS
from alignkit.config.json_schema import json_schema
from alignkit.config.load import LoadedConfig, load_config
from alignkit.config.recipes import find_recipe
from alignkit.config.refusals import IgnoredKeys, Refusal

__all__ = [
    "REFUSALS",
    "IgnoredKeys",
    "LoadedConfig",
    "Refusal",
    "find_recipe",
    "help_text",
    "json_schema",
    "load_config",
    "parse_program_arguments",
]
