"""QLoRA on real bitsandbytes layers: nf4 and int8 bases, references by disabled adapter and precomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from alignkit.models.loading import ModelSource, load_model
from alignkit.shapes._candidates import BridgeSettings
from alignkit.shapes._probe import DispersionProbe
from tests.list_oracles import Candidate, d2o
from tests.trainers import VOCABULARY, logged, random_rows

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Width 64: the CPU kernels of bitsandbytes need multiples of 64."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_qlora_trains_only_the_adapter(make_trainer: Any, wide_model: str, rows: Any, kind: str, layout: str) -> None:
    model = load_model(ModelSource(wide_model, quantization=kind))
    trainer = make_trainer(
        "flex_dpo",
        settings=BridgeSettings(layout=layout),
        arguments={"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
        model=model,
        train_dataset=rows.select(range(8)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.add_callback(DispersionProbe(trainer, rows.select(range(8, 12)), 4))
    inputs = trainer.data_collator([rows[i] for i in range(8)])
    trainer.model.train()
    before = trainer.reference.token_logps(inputs)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=5e-3), "the policy starts as its reference"
    assert losses[-1] < 0.75 * losses[0]
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    # bitsandbytes would repack nf4 weights on the CPU when the probe evaluates, and round otherwise from then on.
    torch.testing.assert_close(trainer.reference.token_logps(inputs), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_pass_quantised_layers_after_an_evaluation(wide_model: str, kind: str) -> None:
    """bitsandbytes' repacked nf4 weights have no backward pass, and nothing says so."""
    model = load_model(ModelSource(wide_model, quantization=kind))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))
    embeddings = model.get_input_embeddings()(torch.tensor([[3, 4, 5, 6]])).detach().requires_grad_()
    model.train()
    query = model.model.layers[0].self_attn.q_proj(embeddings)
    query.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_precomputed_reference_starts_at_log_two(make_trainer: Any, wide_model: str, tmp_path: Path, kind: str) -> None:
    """The values must be those of the training forward, not of an inference kernel with other rounding."""
    trainer = make_trainer(
        settings=BridgeSettings(reference_cache=tmp_path / "cache"),
        arguments={"precompute_ref_log_probs": True, "max_steps": 1, "learning_rate": 0.0},
        model=load_model(ModelSource(wide_model, quantization=kind)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    # int8 rounds activations by what else is in the batch: a few hundredths of a nat a token.
    tolerance = 1e-4 if kind == "nf4" else 0.3
    assert abs(logged(trainer, "logratio/chosen")[0]) < tolerance
    assert abs(logged(trainer, "logratio/rejected")[0]) < tolerance


def dequantised(path: str, adapted: torch.nn.Module | None = None) -> PreTrainedModel:
    """A plain float32 model with the values that nf4 weights stand for, and the adapter of another one added."""
    modules = dict(load_model(ModelSource(path, quantization="nf4")).named_modules())
    quantised = {name: m.weight for name, m in modules.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert len(quantised) == 14
    for name, weight in quantised.items():
        value = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        if adapted is not None:
            adapter = adapted.get_submodule(f"base_model.model.{name}")
            value += adapter.scaling["default"] * adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
        model.get_submodule(name).weight.data = value
    return model


def token_logps(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return [float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_d2o_on_an_nf4_base(make_trainer: Any, wide_model: str, layout: str) -> None:
    """The loss of dequantised float32 models, by Python sums; gradients of the adapter alone; one step."""
    lists = random_rows([(5, (3, 4, 2, 5)), (2, (6, 1)), (9, (2, 2, 2)), (4, (1, 7, 3))], seed=5)
    for row in lists:
        row["scores"] = [1.0] * (len(row["completion_ids"]) - 1) + [0.0]
    trainer = make_trainer(
        "d2o",
        settings=BridgeSettings(layout=layout),
        arguments={"max_steps": 1, "learning_rate": 1e-2},
        model=load_model(ModelSource(wide_model, quantization="nf4")),
        train_dataset=Dataset.from_list(lists),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    torch.manual_seed(1)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.2)
        policy, start = dequantised(wide_model, trainer.model), dequantised(wide_model)
    losses = [
        d2o(
            [
                Candidate(token_logps(policy, row["prompt_ids"], ids), token_logps(start, row["prompt_ids"], ids))
                for ids in row["completion_ids"]
            ],
            alpha=0.1,
            beta=0.1,
        )
        for row in lists
    ]
    trainer.model.train()
    inputs = trainer.data_collator(lists)
    loss = trainer.batch_loss(trainer.model, inputs, None, record=False)
    assert loss.item() == pytest.approx(sum(losses) / 4, abs=1e-4) and abs(loss.item() - 0.6931) > 0.05
    loss.backward()
    assert {name for name, p in trainer.model.named_parameters() if p.grad is not None} == trained.keys()
    assert all("lora_" in name and parameter.grad.abs().max() > 0 for name, parameter in trained.items())
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), abs=1e-5)]
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == trained.keys()
