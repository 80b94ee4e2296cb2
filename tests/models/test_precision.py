"""What trains is held in float32, from its exact starting values, and a metric tells where steps are rounded away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.losses.types import Metric
from alignkit.models.loading import ModelSource, load_model
from alignkit.models.precision import hold_in_float32
from alignkit.parametrizations._policy import load_model as load_as_policy
from alignkit.parametrizations._policy import load_policy
from alignkit.runs.unmoved import UnmovedWeights
from alignkit.shapes.candidates import PreferenceConfig
from tests.trainers import logged

bitsandbytes = pytest.importorskip("bitsandbytes")
RATE = 1e-6


def base(path: str, kind: str) -> PreTrainedModel:
    """A bfloat16 base, or one that is quantised on top of it."""
    return load_model(ModelSource(path, dtype="bfloat16", quantization=kind))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> str:
    """Width 64: the CPU kernels of bitsandbytes need multiples of 64."""
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(model_path).config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory: pytest.TempPathFactory, wide_model: str) -> str:
    """A saved adapter with random float32 values."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(wide_model), config).save_pretrained(path)
    return str(path)


def entries(model: torch.nn.Module) -> torch.Tensor:
    """Every entry that trains, in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_continued_adapter_moves_at_a_small_rate(
    make_trainer: Any, wide_model: str, trained_adapter: str, kind: str
) -> None:
    """TRL casts the adapter of a quantised base to bfloat16, in which 99 % of the entries would never move."""
    model = PeftModel.from_pretrained(base(wide_model, kind), trained_adapter, is_trainable=True)
    before = entries(model).clone()
    arguments = {"max_steps": 5, "learning_rate": RATE, "lr_scheduler_type": "constant"}
    trainer = make_trainer(model=model, arguments=arguments)
    assert before.dtype == entries(trainer.model).dtype == torch.float32
    assert torch.equal(entries(trainer.model), before), "the exact values of the file, not rounded ones"
    trainer.add_callback(UnmovedWeights(trainer))
    trainer.train()
    assert (entries(trainer.model) == before).float().mean() < 0.01
    assert max(logged(trainer, "unmoved_weights")) < 0.01
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-4), "the reference starts where it does"


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_module_saved_beside_the_adapter_moves(make_trainer: Any, wide_model: str, kind: str) -> None:
    """PEFT leaves its copy in the precision of the base."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    arguments = {"max_steps": 2, "learning_rate": RATE, "lr_scheduler_type": "constant", "bf16": True}
    trainer = make_trainer(model=base(wide_model, kind), arguments=arguments, peft_config=lora)
    embedding = trainer.model.get_input_embeddings()
    exact = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.bfloat16).get_input_embeddings().weight
    trained, kept = embedding.modules_to_save["default"].weight, embedding.original_module.weight
    assert trained.dtype == torch.float32 and kept.dtype == torch.bfloat16
    assert torch.equal(trained.detach(), exact.float())
    before = trained.detach().clone()
    trainer.train()
    used = (embedding.modules_to_save["default"].weight != before).any(-1)
    assert used.float().mean() > 0.5 and trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-2)


def test_modules_saved_in_half_precision_need_autocast(make_trainer: Any, wide_model: str) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"bfloat16 and .*embed_tokens trains in full.*Write dtype: float32"):
        make_trainer(model=base(wide_model, "none"), peft_config=lora)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_models_in_half_precision_are_refused(make_trainer: Any, model_path: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    with pytest.raises(ModelError, match="all weights train: rounding would swallow .* Write dtype: float32 and bf16"):
        make_trainer(model=model)


def test_a_run_that_trains_all_weights_holds_them_in_float32(
    make_trainer: Any, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the values that bfloat16 gives, and its reference with it; DeepSpeed keeps copies of its own."""
    config = PreferenceConfig(
        model=model_path, data="-", method="dpo", output_dir="-", parametrization="full", dtype="bfloat16"
    )
    policy, reference = load_policy(config), load_as_policy(config, config.model)
    assert "loaded in bfloat16 and held in float32" in capsys.readouterr().out
    rounded = entries(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16))
    assert torch.equal(entries(policy), rounded.float()) and entries(policy).dtype == torch.float32
    arguments = {"max_steps": 3, "learning_rate": RATE, "lr_scheduler_type": "constant"}
    trainer = make_trainer(model=policy, ref_model=reference, arguments=arguments)
    trainer.add_callback(UnmovedWeights(trainer))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    assert (entries(trainer.model) == rounded.float()).float().mean() < 0.05
    assert max(logged(trainer, "unmoved_weights")) < 0.05
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert load_policy(config).dtype == torch.bfloat16


def test_frozen_weights_and_float32_stay_as_they_are(model_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).requires_grad_(False)
    hold_in_float32(model, {}, autocast=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Recorder:
    """Stands in for a trainer."""

    def __init__(self) -> None:
        self.metrics: list[Metric] = []

    def record(self, name: str, metric: Metric) -> None:
        assert name == "unmoved_weights"
        self.metrics.append(metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_metric_counts_what_a_step_leaves(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against the whole tensors; entries without a gradient and steps of a warm-up do not count."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 50, dtype=dtype) * 0.02) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0)
    recorder = Recorder()
    callback = UnmovedWeights(recorder)
    args: Any = type("Arguments", (), {"device": torch.device("cpu")})
    callback.on_train_begin(args, None, None, optimizer=optimizer)  # type: ignore[arg-type]
    shares = []
    for factor in (1.0, 1.0, 0.1):
        optimizer.param_groups[0].update(lr=1e-5 * factor, initial_lr=1e-5)
        before = [w.detach().clone() for w in weights]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
            weight.grad[:10] = 0
        optimizer.step()
        same = torch.cat([(w.detach() == b)[10:].flatten() for w, b in zip(weights, before, strict=True)])
        shares.append(float(same.float().mean()))
        callback.on_step_end(args, None, None)  # type: ignore[arg-type]
    found = [(float(m.values), float(m.counts)) for m in recorder.metrics]
    assert [count for _, count in found] == [4500, 4500, 0]
    assert [same / count for same, count in found[:2]] == pytest.approx(shares[:2], abs=1e-6)
    assert (min(shares[:2]) > 0.7) == (dtype == torch.bfloat16) and (max(shares[:2]) < 0.01) == (dtype == torch.float32)
