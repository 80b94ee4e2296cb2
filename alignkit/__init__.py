"""alignkit: preference and supervised tuning of language models on Hugging Face TRL.

The names in ``__all__`` are imported on first use, so that ``import alignkit`` costs milliseconds and no torch. Other
modules may be imported too, but only these names are promised from one minor version to the next.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.config import LoadedConfig as LoadedConfig
    from alignkit.config import load_config as load_config
    from alignkit.errors import AlignkitError as AlignkitError
    from alignkit.errors import CheckpointError as CheckpointError
    from alignkit.errors import ConfigError as ConfigError
    from alignkit.errors import DataError as DataError
    from alignkit.errors import ModelError as ModelError
    from alignkit.errors import ProblemListError as ProblemListError
    from alignkit.errors import RunDirectoryError as RunDirectoryError
    from alignkit.losses.dpo import dpo_loss as dpo_loss
    from alignkit.losses.flex_dpo import flex_dpo_loss as flex_dpo_loss
    from alignkit.losses.sft import sft_loss as sft_loss
    from alignkit.losses.types import CandidateBatch as CandidateBatch
    from alignkit.losses.types import LossOutput as LossOutput
    from alignkit.losses.types import LossTerm as LossTerm
    from alignkit.losses.types import Metric as Metric
    from alignkit.losses.types import TokenBatch as TokenBatch
    from alignkit.parts.method import Method as Method
    from alignkit.parts.method import load_method as load_method
    from alignkit.parts.method import method_names as method_names
    from alignkit.runs.run import train_preference as train_preference
    from alignkit.runs.run import train_sft as train_sft
    from alignkit.shapes._candidates import PreferenceTrainer as PreferenceTrainer
    from alignkit.shapes._tokens import SupervisedTrainer as SupervisedTrainer
    from alignkit.shapes.candidates import PreferenceConfig as PreferenceConfig
    from alignkit.shapes.tokens import SupervisedConfig as SupervisedConfig

__version__ = "0.1.0"

_PUBLIC = {
    "alignkit.config": ("LoadedConfig", "load_config"),
    "alignkit.errors": (
        "AlignkitError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ModelError",
        "ProblemListError",
        "RunDirectoryError",
    ),
    "alignkit.losses.dpo": ("dpo_loss",),
    "alignkit.losses.flex_dpo": ("flex_dpo_loss",),
    "alignkit.losses.sft": ("sft_loss",),
    "alignkit.losses.types": ("CandidateBatch", "LossOutput", "LossTerm", "Metric", "TokenBatch"),
    "alignkit.shapes.candidates": ("PreferenceConfig",),
    "alignkit.shapes.tokens": ("SupervisedConfig",),
    "alignkit.shapes._candidates": ("PreferenceTrainer",),
    "alignkit.shapes._tokens": ("SupervisedTrainer",),
    "alignkit.parts.method": ("Method", "load_method", "method_names"),
    "alignkit.runs.run": ("train_preference", "train_sft"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
