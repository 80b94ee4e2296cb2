"""A trained reward model as one of the rewards of an online run."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit import load_reward_model, load_rewards
from alignkit.errors import ConfigError
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model and a tiny reward model."""
    plain, judge = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("judge")
    save_model(plain)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).save_pretrained(judge)
    AutoTokenizer.from_pretrained(plain).save_pretrained(judge)
    return plain, judge


def test_it_gives_every_completion_what_the_model_says(folders: tuple[Path, Path]) -> None:
    (chosen,) = load_rewards([{"name": "reward_model", "model": str(folders[1]), "weight": 0.5, "as": "judge"}])
    assert (chosen.name, chosen.weight) == ("judge", 0.5)
    prompts, texts = ["w1 w2 ", "w3 w4 "], ["w5 w6 ", "w7 \ud800"]
    found = chosen.function(prompts=prompts, completions=texts, completion_ids=[[1], [2]])
    expected = load_reward_model(str(folders[1]))
    assert found == pytest.approx([expected(prompts[0], ["w5 w6 "])[0], expected(prompts[1], ["w7 ?"])[0]], abs=1e-5)
    assert len(set(found)) == 2
    again = pickle.loads(pickle.dumps(chosen.function))
    assert again(prompts=prompts, completions=texts, completion_ids=[[1], [2]]) == found


def test_nothing_of_the_insides_of_transformers_is_said(folders: tuple[Path, Path]) -> None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    told = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    for logger in told:
        logger.addHandler(handler)
    try:
        load_reward_model(str(folders[1]))
    finally:
        for logger in told:
            logger.removeHandler(handler)
    assert said == []


def test_no_warning_of_the_insides_of_peft_is_shown(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders[1])
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        load_reward_model(str(tmp_path), base=str(folders[1]))
        warnings.warn("gradient_checkpointing is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["gradient_checkpointing is deprecated"], "a caller's own are shown"


def test_online_training_takes_it_as_any_other(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rewards = [{"name": "reward_model", "model": str(folders[1])}, {"name": "repetition", "weight": 0.1}]
    config = config_of("online", str(folders[0]), tmp_path, rewards=rewards, max_steps=1)
    trainer = build(config, text_rows(config, 4))
    trainer.train()
    logged = trainer.state.log_history[0]
    whole = logged["rewards/reward_model/mean"] + 0.1 * logged["rewards/repetition/mean"]
    assert logged["reward"] == pytest.approx(whole, rel=1e-5) and logged["rewards/reward_model/std"] > 0


def test_what_is_no_reward_model_is_refused_before_anything_is_loaded(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a language model, without a head of rewards"):
        load_rewards([{"name": "reward_model", "model": str(folders[0])}])
    with pytest.raises(ConfigError, match="has no config.json"):
        load_rewards([{"name": "reward_model", "model": str(tmp_path)}])
    with pytest.raises(ConfigError, match="needs model"):
        load_rewards(["reward_model"])
