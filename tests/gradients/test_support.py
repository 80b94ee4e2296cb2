"""What a rule cannot work in is refused by name before training; what it composes with works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType, TorchDynamoPlugin
from peft import LoraConfig
from torch import nn

from alignkit.errors import ConfigError
from alignkit.gradients import _support
from alignkit.gradients._weights import low_rank_pairs, shadowed, trainable_tensors
from alignkit.losses.types import count_items
from alignkit.models.loading import ModelSource, load_model
from alignkit.parts.method import load_method
from alignkit.runs.arguments import check_gradient_rule
from alignkit.shapes._candidates import BridgeSettings
from alignkit.shapes.candidates import PreferenceConfig
from tests.gradients.conftest import chosen, lora
from tests.models.test_quantized import wide_model
from tests.runs.saved import arguments
from tests.shapes.test_preference_trainer import rows_for
from tests.trainers import logged

__all__ = ["wide_model"]


class Layout:
    """Stands in for an accelerator in another process layout."""

    def __init__(
        self,
        distributed_type: DistributedType = DistributedType.NO,
        mixed_precision: str = "no",
        plugin: Any = None,
        dynamo_backend: str = "no",
    ) -> None:
        self.distributed_type, self.mixed_precision = distributed_type, mixed_precision
        self.state = SimpleNamespace(deepspeed_plugin=plugin, dynamo_plugin=TorchDynamoPlugin(backend=dynamo_backend))


def check(trainer: Any, rule: Any, layout: Layout | None = None, args: Any = None) -> None:
    _support.check_supported(
        rule.rule,
        rule.options,
        model=trainer.model,
        tensors=trainable_tensors(trainer.model),
        accelerator=layout or Layout(),
        args=args or trainer.args,
    )


def refusal(trainer: Any, rule: Any, layout: Layout | None = None, args: Any = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(trainer, rule, layout, args)
    return caught.value.problems


@pytest.fixture
def full(make_trainer: Any) -> Any:
    return make_trainer()


@pytest.mark.parametrize("name", ["glad", "perpgrad", "decay_to_init"])
def test_fsdp_is_refused(full: Any, name: str) -> None:
    (problem,) = refusal(full, chosen(name), Layout(DistributedType.FSDP))
    assert f"`gradient_rule: {name}` under FSDP" in problem


def test_fp16_of_the_launcher_is_refused(full: Any) -> None:
    assert "fp16" in refusal(full, chosen("sam"), Layout(mixed_precision="fp16"))[0]


def test_zero3_without_adapter_is_refused(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "is_deepspeed_zero3_enabled", lambda: True)
    assert "ZeRO-3 without an adapter" in refusal(full, chosen("glad"))[0]


def deepspeed(stage: int, **zero: Any) -> Layout:
    """A launch with this DeepSpeed config, parsed by accelerate as it parses a file named by the launcher."""
    pytest.importorskip("deepspeed")
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": stage, **zero}}
    return Layout(DistributedType.DEEPSPEED, plugin=DeepSpeedPlugin(hf_ds_config=config))


OFFLOAD: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "none": (3, {"reduce_bucket_size": "auto"}, None),
    "of the optimizer": (2, {"offload_optimizer": {"device": "cpu"}}, None),
    "to NVMe": (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "x"}}, None),
    "ratio without offloading": (3, {"offload_optimizer": {"device": "none", "ratio": 0.5}}, None),
    "partial": (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "`ratio: 0.5`"),
    "partial, to NVMe": (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "x", "ratio": 0.0}}, "`ratio: 0.0`"),
    "SuperOffload": (3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}, "`super_offload: true`"),
    "ZenFlow": (2, {"offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1}}, "`zenflow`"),
    "ZenFlow under ZeRO-3": (3, {"offload_optimizer": {"device": "cpu"}, "zenflow": {}}, "`zenflow`"),
}


@pytest.mark.parametrize("title", OFFLOAD)
def test_offloading_whose_steps_the_decay_would_not_see_is_refused(full: Any, title: str) -> None:
    """Parsed configs of the real libraries; rules that edit gradients do not depend on who steps the weights."""
    stage, zero, named = OFFLOAD[title]
    layout = deepspeed(stage, **zero)
    for name, expected in [("decay_to_init", named), ("l2_sp", None)]:
        if expected is None:
            check(full, chosen(name), layout)
        else:
            (problem,) = refusal(full, chosen(name), layout)
            assert f"`gradient_rule: {name}` with {expected}" in problem and " Remove " in problem


def test_zenflow_steps_past_the_hook_of_the_torch_optimizer() -> None:
    """Why it is refused. Should this fail after an upgrade of DeepSpeed, the refusal may have become needless."""
    adam = pytest.importorskip("deepspeed.ops.adam")
    seen: list[Any] = []
    weight = nn.Parameter(torch.ones(3))
    weight.selected_grad = weight.grad = torch.ones(3)
    for optimizer, is_seen in [(torch.optim.AdamW, True), (adam.ZenFlowSelectiveAdamW, False)]:
        before, stepper = weight.detach().clone(), optimizer([weight], lr=0.1)
        stepper.register_step_pre_hook(lambda *unused: seen.append(unused))
        stepper.step()
        assert not torch.equal(weight, before)
        assert bool(seen) == is_seen
        seen.clear()


@pytest.mark.parametrize("name", ["sam", "perpgrad", "decay_to_init"])
def test_half_precision_weights_that_train_are_refused(make_trainer: Any, full: Any, name: str) -> None:
    """Whatever the config said: dtype: auto takes what the checkpoint has, TRL casts the adapters of a 4-bit base."""
    full.model.to(torch.bfloat16)
    (problem,) = refusal(full, chosen(name))
    assert "held in torch.bfloat16" in problem and "Write dtype: float32" in problem
    adapted = make_trainer(peft_config=lora())
    adapted.model.to(torch.bfloat16)
    if name == "decay_to_init":
        (problem,) = refusal(adapted, chosen(name))
        assert "or gradient_rule: l2_sp" in problem
    else:
        check(adapted, chosen(name))


def test_data_parallel_and_compile_are_refused(full: Any) -> None:
    class Arguments:
        n_gpu, torch_compile = 2, True

    problems = refusal(full, chosen("sam"), args=Arguments())
    assert "drives 2 GPUs" in problems[0] and "compiled model" in problems[1]


def test_compilation_by_the_launcher_is_refused(full: Any) -> None:
    assert "the launcher's dynamo_backend" in refusal(full, chosen("sam"), Layout(dynamo_backend="inductor"))[0]


LAUNCHES = {
    "compiled": ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "a compiled model"),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "with fp16"),
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, "under FSDP"),
}


@pytest.mark.parametrize(("variables", "expected"), LAUNCHES.values(), ids=LAUNCHES.keys())
def test_the_launch_is_known_before_anything_is_loaded(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    layout = _support.RunLayout.of_arguments(arguments(tmp_path))
    with pytest.raises(ConfigError) as caught:
        _support.check_layout(chosen("sam").rule, layout, has_adapter=True)
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


def test_zero3_is_refused_by_the_parametrization_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_support, "is_deepspeed_zero3_enabled", lambda: True)
    args, common = arguments(tmp_path), {"model": "m", "data": "d", "output_dir": "o", "gradient_rule": "sam"}
    with pytest.raises(ConfigError, match="ZeRO-3 without an adapter"):
        check_gradient_rule(PreferenceConfig(**common, method="dpo", parametrization="full"), args)
    check_gradient_rule(PreferenceConfig(**common, method="dpo", parametrization="lora"), args)


def test_the_layout_of_a_run_is_that_of_its_trainer(full: Any) -> None:
    assert _support.RunLayout.of_arguments(full.args) == _support.RunLayout.of_accelerator(full.accelerator, full.args)


def test_frozen_parameters_are_refused_before_training(make_trainer: Any) -> None:
    trainer = make_trainer(gradient_rule=chosen("glad", rule_targets="lora"))
    with pytest.raises(ConfigError, match="no LoRA factor trains"):
        trainer.train()
    trainer.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no tensor that trains"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_lora_factors_are_told_from_what_is_saved_beside_them(make_trainer: Any) -> None:
    trainer = make_trainer(peft_config=lora(modules_to_save=["q_norm"], use_dora=True))
    tensors = trainable_tensors(trainer.model)
    assert {t.is_lora for t in tensors if "lora_" in t.name} == {True}
    assert {t.is_lora for t in tensors if "q_norm" in t.name} == {False}
    pairs = low_rank_pairs(trainer.model, tensors)
    assert len(pairs) == 4
    for pair in pairs:
        assert tensors[pair.a].name.replace("lora_A", "lora_B") == tensors[pair.b].name and pair.scale == 2.0


def test_a_tied_weight_is_one_tensor_in_two_places(full: Any) -> None:
    tensors = trainable_tensors(full.model)
    assert len(tensors) == len(list(full.model.parameters()))
    assert sorted(len(t.places) for t in tensors)[-2:] == [1, 2]


def test_shadows_leave_no_trace_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    weight, before = module.weight, dict(vars(module))
    with pytest.raises(RuntimeError):
        with shadowed([(module, "weight", torch.zeros(2, 2)), (module, "forward", lambda x: x)]):
            assert not module.weight.any() and module.forward(1) == 1
            assert list(module.parameters())[0] is weight
            raise RuntimeError
    assert module.weight is weight and vars(module) == before


@pytest.mark.parametrize(("kind", "method"), [("nf4", "flex_dpo"), ("int8", "dpo")])
def test_glad_on_a_quantised_base(make_trainer: Any, wide_model: str, rows: Any, kind: str, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(
        method,
        settings=BridgeSettings(layout="padded"),
        gradient_rule=chosen("glad", rho=0.1, rule_targets="lora"),
        arguments={"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
        model=load_model(ModelSource(wide_model, quantization=kind)),
        train_dataset=rows_for(method, rows.select(range(8))),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    losses = logged(trainer, "loss/preference")
    assert losses[0] == pytest.approx(0.6931, abs=5e-3)
    assert losses[-1] < 0.75 * losses[0]
    assert logged(trainer, "gradient/displacement_norm") == pytest.approx([0.1] * 12, rel=1e-3)
    assert min(logged(trainer, "gradient/sharpness_gap")) > 0


def test_dora_reads_its_factors_from_outside_and_sees_them_displaced(make_trainer: Any, watched: Any) -> None:
    from tests.gradients.steps import expected_gradients, micro_batches, step_gradients

    rule, _ = watched("sam", rho=0.3)
    trainer = make_trainer(gradient_rule=rule, peft_config=lora(use_dora=True, init_lora_weights=False))
    batches, counts = micro_batches(trainer)
    ours = step_gradients(trainer, batches, counts)
    for x, y in zip(ours, expected_gradients(trainer, rule, batches[0], counts), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_an_objective_with_several_denominators(make_trainer: Any) -> None:
    """The rule acts on the sum of all terms, whatever each is divided by."""
    method = load_method("flex_dpo")
    trainer = make_trainer(
        replace(method), method.options(eta=0.3), gradient_rule=chosen("glad", rho=0.1), peft_config=lora()
    )
    trainer.train()
    for loss, a, b in zip(*(logged(trainer, k) for k in ("loss", "loss/preference", "loss/sft")), strict=True):
        assert loss == pytest.approx(a + 0.3 * b, abs=1e-6)
    assert count_items(torch.ones(1, 2, 3, dtype=torch.bool))["group"] == 1
