"""Dropout belongs to the policy's passes: a reference has none, and with ``disable_dropout`` nothing has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from alignkit.models._forward import completion_logps
from tests.references.test_anchor import anchored
from tests.trainers import VOCABULARY, logged

DROPOUT = 0.5


def policy_model(model_path: str) -> Any:
    """Qwen3, whose attention drops by a function rather than by a module."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attention_dropout=DROPOUT)


def adapter(targets: Any = ("q_proj", "v_proj")) -> LoraConfig:
    targets = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, lora_dropout=DROPOUT)


def continued(model_path: str) -> PeftModel:
    """An adapter that has been trained before: TRL keeps a frozen copy of it as the reference."""
    torch.manual_seed(4)
    model = get_peft_model(policy_model(model_path), adapter())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def own_logps(model: Any, rows: Any) -> list[list[float]]:
    """Sums of log-probs from the logits of single sequences."""
    sums = []
    for row in rows:
        prompt = row["prompt_ids"]
        ids = [torch.tensor([prompt + completion]) for completion in row["completion_ids"]]
        with torch.no_grad():
            logps = [model.eval()(input_ids=i).logits[:, :-1].log_softmax(-1).gather(-1, i[:, 1:, None]) for i in ids]
        sums.append([float(values[0, len(prompt) - 1 :].sum()) for values in logps])
    return sums


@pytest.mark.parametrize("kind", ["adapter off", "continued adapter", "moving anchor", "own model"])
def test_references_and_the_probe_have_no_dropout(make_trainer: Any, model_path: str, rows: Any, kind: str) -> None:
    method = anchored(kind="ema", decay=0.9) if kind == "moving anchor" else "dpo"
    model = continued(model_path) if kind == "continued adapter" else policy_model(model_path)
    trainer = make_trainer(
        method,
        model=model,
        peft_config=None if kind in ("continued adapter", "own model") else adapter(),
        arguments={"disable_dropout": False},
    )
    start = continued(model_path) if kind == "continued adapter" else policy_model(model_path)
    inputs = trainer.data_collator(list(rows)[:4])
    trainer.model.train()
    frozen = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Embedding))
    frozen.eval()
    modes = [module.training for module in trainer.model.modules()]
    random_state = torch.get_rng_state()
    reference, policy = trainer.reference.token_logps(inputs), trainer.probe_logps(inputs)
    assert torch.equal(torch.get_rng_state(), random_state), "the policy draws what it would draw without a reference"
    assert [module.training for module in trainer.model.modules()] == modes
    expected = torch.tensor(own_logps(start, list(rows)[:4]))
    for found in (reference, policy):
        torch.testing.assert_close(found.sum(-1), expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        dropped = completion_logps(trainer.model, inputs).sum(-1)
    assert (dropped - expected).abs().max() > 0.1, "the policy keeps its dropout"


def test_a_run_with_dropout_is_the_same_whether_its_reference_is_scored_live_or_before(
    make_trainer: Any, model_path: str
) -> None:
    runs = []
    for precomputed in (False, True):
        arguments = {"disable_dropout": False, "precompute_ref_log_probs": precomputed, "max_steps": 3}
        trainer = make_trainer(model=policy_model(model_path), peft_config=adapter(), arguments=arguments)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert abs(runs[0][0] - 0.6931) > 1e-3, "dropout is on: the policy is not its reference"


def test_disable_dropout_disables_what_is_not_a_module(make_trainer: Any, model_path: str, rows: Any) -> None:
    """OPT drops by functions of a number, as the attention of most models does; TRL looks at modules alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=VOCABULARY, **sizes, word_embed_proj_dim=32, dropout=DROPOUT, layerdrop=DROPOUT)
    falcon = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout=DROPOUT, attention_dropout=DROPOUT,
    )  # fmt: skip
    # `disable_dropout` is on by default.
    for model in (OPTForCausalLM(config), policy_model(model_path), FalconForCausalLM(falcon)):
        trainer = make_trainer(model=model, peft_config=adapter("all-linear"), arguments={"max_steps": 1})
        trainer.train()
        assert logged(trainer, "loss") == [pytest.approx(0.693147, abs=1e-5)]
