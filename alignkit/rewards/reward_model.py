"""A reward that a trained reward model gives. The model is loaded when it is first asked; torch is imported then."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.json_text import parse_json
from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample


@dataclass(frozen=True, kw_only=True)
class FromRewardModel(Reward):
    """The number that a reward model gives prompt and completion, as they stood in its training.

    It has no bounds and, unless the model was trained with ``center_rewards_coefficient``, no zero of its own: beside
    other rewards it wants a weight that fits their spread (``alignkit rewards try``).
    """

    name = "reward_model"
    summary = "What a reward model says, such as one that trainers/reward.py has made."
    fidelity = (
        "the model's own; it reads what it read in training, with an EOS or the template's end of turn at the end"
    )

    model: str = option(help="Folder of a reward model or of its adapter, or Hub id of a reward model.", is_path=True)
    base: str | None = option(
        None, help="The model that an adapter was trained on, where it does not name it.", is_path=True
    )
    batch_size: int = option(8, ge=1, help="Completions a forward pass.")
    max_length: int | None = option(None, ge=2, help="Tokens of prompt and completion that are read; null reads all.")

    def __post_init__(self) -> None:
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            return
        if problem := _problem(folder):
            told = f"{self.model} {problem}. Name a folder that trainers/reward.py has written"
            raise ConfigError(self.name, [told])
        # By its whole path: another process may stand in another folder.
        object.__setattr__(self, "model", str(folder.absolute()))

    def score(self, sample: Sample) -> float | None:
        """The reward of one completion."""
        return self.scores([sample])[0]

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """The rewards of a batch."""
        rewards = _loaded(self.model, self.base, self.batch_size, self.max_length)
        # No tokenizer takes half a character.
        texts = [sample.text.encode("utf-8", "replace").decode() for sample in samples]
        rows = [(sample.prompt, [text]) for sample, text in zip(samples, texts, strict=True)]
        return [found for (found,) in rewards.score(rows)]


def _problem(folder: Path) -> str | None:
    """Why a folder is no reward model, as far as its config says; or None."""
    adapter, model = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        is_one = parse_json(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
        return None if is_one else "is an adapter of a language model"
    if not model.is_file():
        return "has no config.json"
    kinds = parse_json(model.read_text(encoding="utf-8")).get("architectures") or []
    is_one = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    return None if is_one else "is a language model, without a head of rewards"


@cache
def _loaded(model: str, base: str | None, batch_size: int, max_length: int | None) -> Any:
    """The model, once a process."""
    half = importlib.import_module("alignkit.models.reward_model")
    return half.load_reward_model(model, base=base, batch_size=batch_size, max_length=max_length)


REWARDS = (FromRewardModel,)
