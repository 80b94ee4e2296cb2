"""Mixtures of experts: which load-balancing loss is trained, that it is the model's own, and how to do without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.models import _aux_loss, _comparison
from alignkit.models._aux_loss import aux_loss_coefficient, check_aux_loss
from alignkit.models._forward import add_completion_head
from tests.supervised import make as make_supervised
from tests.trainers import VOCABULARY, logged, random_rows

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "doge": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def mixture(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **SPARSE[family], **changes))


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_list(random_rows([(4, (3, 5)), (2, (4, 2)), (6, (5, 5)), (3, (2, 4))], seed=1))


@pytest.mark.parametrize("family", ["granitemoe", "phimoe", "doge"])
def test_a_family_whose_loss_breaks_is_refused(make_trainer: Any, pairs: Dataset, family: str) -> None:
    with pytest.raises(ModelError, match=r"router_aux_loss_coef: 0\.001.*ForCausalLM.*Write router_aux_loss_coef: 0"):
        make_trainer(model=mixture(family), train_dataset=pairs)


@pytest.mark.parametrize("family", ["granitemoe", "phimoe"])
def test_it_goes_without_where_the_checkpoint_asks_for_router_logits(
    make_trainer: Any, pairs: Dataset, family: str
) -> None:
    trainer = make_trainer(
        model=mixture(family, output_router_logits=True),
        train_dataset=pairs,
        peft_config=LORA,
        arguments={"router_aux_loss_coef": 0.0, "max_steps": 1},
    )
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(0.693147, abs=1e-5)] and not logged(trainer, "aux_loss")


@pytest.mark.parametrize(("requested", "expected"), [(None, 0.25), (0.5, 0.5), (0.0, 0.0)])
def test_the_coefficient_is_the_models_own_unless_one_is_asked_for(
    make_trainer: Any, pairs: Dataset, requested: float | None, expected: float
) -> None:
    model = mixture("mixtral", router_aux_loss_coef=0.25)
    assert aux_loss_coefficient(model, requested) == expected
    arguments = {"router_aux_loss_coef": requested, "max_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(model=model, train_dataset=pairs, arguments=arguments, peft_config=LORA)
    assert trainer.router_aux_loss_coef == expected
    trainer.train()
    if expected == 0.0:
        assert not logged(trainer, "aux_loss") and trainer.layout.layout
        return
    (aux_loss,), (loss,) = logged(trainer, "aux_loss"), logged(trainer, "loss")
    rows = replace(trainer.data_collator, layout="padded")(list(pairs))
    own = mixture("mixtral")(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], output_router_logits=True
    ).aux_loss
    assert aux_loss == pytest.approx(float(own), rel=1e-5)
    assert loss == pytest.approx(0.693147 + expected * aux_loss, abs=1e-4)


def test_a_coefficient_for_a_dense_model_and_a_loss_that_is_not_the_models_are_refused(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="Qwen3ForCausalLM is no mixture of experts.*Remove router_aux_loss_coef"):
        make_trainer(arguments={"router_aux_loss_coef": 0.1})
    model = mixture("mixtral")
    add_completion_head(model)
    check_aux_loss(model, 0.1)
    forward = type(model).forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.aux_loss = output.aux_loss * 1.5
        return output

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(ModelError, match=r"TRL computes 2\.\d+, the model itself"):
        other_model = mixture("mixtral")
        add_completion_head(other_model)
        check_aux_loss(other_model, 0.1)


@pytest.mark.parametrize("program", ["preference", "sft"])
def test_weights_that_are_sharded_are_compared_when_training_begins(
    make_trainer: Any, pairs: Dataset, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process has them before, so a model whose loss breaks is found then, and by the same message."""
    for module in (_aux_loss, _comparison):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    model = mixture("phimoe")
    if program == "preference":
        trainer = make_trainer(model=model, train_dataset=pairs, peft_config=LORA)
    else:
        rows = [row["prompt_ids"] + row["completion_ids"][0] for row in pairs]
        trainer = make_supervised(
            tmp_path, Dataset.from_list([{"input_ids": r, "labels": r} for r in rows]), model=model
        )
    with pytest.raises(ModelError, match=r"router_aux_loss_coef: 0\.001.*cannot be computed for Phimoe"):
        trainer.train()
