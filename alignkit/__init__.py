"""alignkit: preference, online and supervised tuning of language models on Hugging Face TRL.

The names in ``__all__`` are imported on first use, so that ``import alignkit`` costs milliseconds and no torch. Other
modules may be imported too, but only these names are promised from one minor version to the next.
"""

from __future__ import annotations

import importlib
import warnings
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
    from alignkit.errors import RewardError as RewardError
    from alignkit.errors import RunDirectoryError as RunDirectoryError
    from alignkit.gradients.asam import ASAMOptions as ASAMOptions
    from alignkit.gradients.decay_to_init import DecayToInitOptions as DecayToInitOptions
    from alignkit.gradients.glad import GLADOptions as GLADOptions
    from alignkit.gradients.gnp import GNPOptions as GNPOptions
    from alignkit.gradients.gsam import GSAMOptions as GSAMOptions
    from alignkit.gradients.l2_sp import L2SPOptions as L2SPOptions
    from alignkit.gradients.perpgrad import PerpGradOptions as PerpGradOptions
    from alignkit.gradients.random_perturbation import RandomPerturbationOptions as RandomPerturbationOptions
    from alignkit.gradients.sagm import SAGMOptions as SAGMOptions
    from alignkit.gradients.sam import SAMOptions as SAMOptions
    from alignkit.losses.adpo import adpo_loss as adpo_loss
    from alignkit.losses.bradley_terry import bradley_terry_loss as bradley_terry_loss
    from alignkit.losses.d2o import d2o_loss as d2o_loss
    from alignkit.losses.dpo import dpo_loss as dpo_loss
    from alignkit.losses.flex_dpo import flex_dpo_loss as flex_dpo_loss
    from alignkit.losses.grpo import grpo_loss as grpo_loss
    from alignkit.losses.mr_rml import mr_rml_loss as mr_rml_loss
    from alignkit.losses.plackett_luce import plackett_luce_loss as plackett_luce_loss
    from alignkit.losses.process_reward import process_reward_loss as process_reward_loss
    from alignkit.losses.roma import roma_loss as roma_loss
    from alignkit.losses.sft import sft_loss as sft_loss
    from alignkit.losses.treg import treg_loss as treg_loss
    from alignkit.losses.types import CandidateBatch as CandidateBatch
    from alignkit.losses.types import LossOutput as LossOutput
    from alignkit.losses.types import LossTerm as LossTerm
    from alignkit.losses.types import Metric as Metric
    from alignkit.losses.types import PolicyBatch as PolicyBatch
    from alignkit.losses.types import RewardBatch as RewardBatch
    from alignkit.losses.types import RoutedBatch as RoutedBatch
    from alignkit.losses.types import TokenBatch as TokenBatch
    from alignkit.models.reward_model import RewardModel as RewardModel
    from alignkit.models.reward_model import load_reward_model as load_reward_model
    from alignkit.objectives.adpo import ADPOOptions as ADPOOptions
    from alignkit.objectives.bradley_terry import BradleyTerryOptions as BradleyTerryOptions
    from alignkit.objectives.d2o import D2OOptions as D2OOptions
    from alignkit.objectives.dpo import DPOOptions as DPOOptions
    from alignkit.objectives.flex_dpo import FlexDPOOptions as FlexDPOOptions
    from alignkit.objectives.grpo import GRPOOptions as GRPOOptions
    from alignkit.objectives.mr_rml import MrRmlOptions as MrRmlOptions
    from alignkit.objectives.plackett_luce import PlackettLuceOptions as PlackettLuceOptions
    from alignkit.objectives.process_reward import ProcessRewardOptions as ProcessRewardOptions
    from alignkit.objectives.roma import RomaOptions as RomaOptions
    from alignkit.objectives.sft import SFTOptions as SFTOptions
    from alignkit.objectives.treg import TREGOptions as TREGOptions
    from alignkit.parts.method import Method as Method
    from alignkit.parts.method import load_method as load_method
    from alignkit.parts.method import method_names as method_names
    from alignkit.reports.held_out import pass_at_k as pass_at_k
    from alignkit.rewards import ChosenReward as ChosenReward
    from alignkit.rewards import load_rewards as load_rewards
    from alignkit.runs.python import Run as Run
    from alignkit.runs.python import prepare as prepare
    from alignkit.runs.python import train_online as train_online
    from alignkit.runs.python import train_preference as train_preference
    from alignkit.runs.python import train_reward as train_reward
    from alignkit.runs.python import train_router as train_router
    from alignkit.runs.python import train_sft as train_sft
    from alignkit.shapes._candidates import PreferenceTrainer as PreferenceTrainer
    from alignkit.shapes._policy_trainer import OnlineTrainer as OnlineTrainer
    from alignkit.shapes._reward import RewardModelTrainer as RewardModelTrainer
    from alignkit.shapes._routed import RoutedTrainer as RoutedTrainer
    from alignkit.shapes._tokens import SupervisedTrainer as SupervisedTrainer
    from alignkit.shapes.candidates import PreferenceConfig as PreferenceConfig
    from alignkit.shapes.policy import OnlineConfig as OnlineConfig
    from alignkit.shapes.reward import RewardConfig as RewardConfig
    from alignkit.shapes.routed import RouterConfig as RouterConfig
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
        "RewardError",
        "RunDirectoryError",
    ),
    "alignkit.gradients.asam": ("ASAMOptions",),
    "alignkit.gradients.decay_to_init": ("DecayToInitOptions",),
    "alignkit.gradients.glad": ("GLADOptions",),
    "alignkit.gradients.gnp": ("GNPOptions",),
    "alignkit.gradients.gsam": ("GSAMOptions",),
    "alignkit.gradients.l2_sp": ("L2SPOptions",),
    "alignkit.gradients.perpgrad": ("PerpGradOptions",),
    "alignkit.gradients.random_perturbation": ("RandomPerturbationOptions",),
    "alignkit.gradients.sagm": ("SAGMOptions",),
    "alignkit.gradients.sam": ("SAMOptions",),
    "alignkit.losses.adpo": ("adpo_loss",),
    "alignkit.losses.bradley_terry": ("bradley_terry_loss",),
    "alignkit.losses.d2o": ("d2o_loss",),
    "alignkit.losses.dpo": ("dpo_loss",),
    "alignkit.losses.flex_dpo": ("flex_dpo_loss",),
    "alignkit.losses.grpo": ("grpo_loss",),
    "alignkit.losses.mr_rml": ("mr_rml_loss",),
    "alignkit.losses.plackett_luce": ("plackett_luce_loss",),
    "alignkit.losses.process_reward": ("process_reward_loss",),
    "alignkit.losses.roma": ("roma_loss",),
    "alignkit.losses.sft": ("sft_loss",),
    "alignkit.losses.treg": ("treg_loss",),
    "alignkit.losses.types": (
        "CandidateBatch",
        "LossOutput",
        "LossTerm",
        "Metric",
        "PolicyBatch",
        "RewardBatch",
        "RoutedBatch",
        "TokenBatch",
    ),
    "alignkit.models.reward_model": ("RewardModel", "load_reward_model"),
    "alignkit.shapes.policy": ("OnlineConfig",),
    "alignkit.shapes.candidates": ("PreferenceConfig",),
    "alignkit.shapes.reward": ("RewardConfig",),
    "alignkit.shapes.routed": ("RouterConfig",),
    "alignkit.shapes.tokens": ("SupervisedConfig",),
    "alignkit.shapes._policy_trainer": ("OnlineTrainer",),
    "alignkit.shapes._candidates": ("PreferenceTrainer",),
    "alignkit.shapes._reward": ("RewardModelTrainer",),
    "alignkit.shapes._routed": ("RoutedTrainer",),
    "alignkit.shapes._tokens": ("SupervisedTrainer",),
    "alignkit.objectives.adpo": ("ADPOOptions",),
    "alignkit.objectives.bradley_terry": ("BradleyTerryOptions",),
    "alignkit.objectives.d2o": ("D2OOptions",),
    "alignkit.objectives.dpo": ("DPOOptions",),
    "alignkit.objectives.flex_dpo": ("FlexDPOOptions",),
    "alignkit.objectives.grpo": ("GRPOOptions",),
    "alignkit.objectives.mr_rml": ("MrRmlOptions",),
    "alignkit.objectives.plackett_luce": ("PlackettLuceOptions",),
    "alignkit.objectives.process_reward": ("ProcessRewardOptions",),
    "alignkit.objectives.roma": ("RomaOptions",),
    "alignkit.objectives.sft": ("SFTOptions",),
    "alignkit.objectives.treg": ("TREGOptions",),
    "alignkit.parts.method": ("Method", "load_method", "method_names"),
    "alignkit.reports.held_out": ("pass_at_k",),
    "alignkit.rewards": ("ChosenReward", "load_rewards"),
    "alignkit.runs.python": (
        "Run",
        "prepare",
        "train_online",
        "train_preference",
        "train_reward",
        "train_router",
        "train_sft",
    ),
}
_FORMER = {"SFTConfig": "SupervisedConfig"}
"""Names that were public once, and what they are called now."""
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _FORMER:
        warnings.warn(f"alignkit.{name} is called {_FORMER[name]} now", DeprecationWarning, stacklevel=2)
        return __getattr__(_FORMER[name])
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    from alignkit.environment import notices_unlogged  # which imports this module

    with notices_unlogged():
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
