"""Without PEFT's casts of inputs a pass under autocast gives the same bits; outside autocast nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from alignkit.models._atp_layers import AtpConfig
from alignkit.models._pat_layers import PatConfig
from alignkit.models.adapter_casts import leave_casts_to_autocast
from alignkit.models.precision import hold_in_float32
from alignkit.models.sparse_adapter import equip

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WRITERS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
TOKENS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(3))


def lora(cls: type[LoraConfig] = LoraConfig, **more: Any) -> LoraConfig:
    return cls(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False, **more)


KINDS: dict[str, Callable[[], LoraConfig]] = {
    "lora": lora,
    "lora with biases": lambda: lora(lora_bias=True, use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "dropout": lambda: lora(lora_dropout=0.3),
    "pruning while adapting (ATP)": lambda: lora(
        AtpConfig, atp_layers=2, atp_sizes={"ffn": 64, "kv_groups": 2}, atp_kept={"ffn": 32, "kv_groups": 1}
    ),
    "sparsification modules (PAT)": lambda: lora(PatConfig, hsm_writers=WRITERS, hsm_width=16),
    "whole updates (PAT)": lambda: lora(PatConfig, hsm_writers=WRITERS, hsm_width=16, whole_updates=True),
}


def model(path: str, dtype: torch.dtype, config: LoraConfig) -> PeftModel:
    """As training holds it: a frozen base in ``dtype``, what trains in float32."""
    torch.manual_seed(5)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), config)
    equip(wrapped)
    hold_in_float32(wrapped, {}, autocast=True)
    return wrapped.train()


class Casts(TorchDispatchMode):
    """Counts copies from one precision to another."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("dtype", args[0].dtype) != args[0].dtype
        return func(*args, **kwargs)


def loss_and_gradients(wrapped: PeftModel, *, autocast: bool = True) -> tuple[dict[str, torch.Tensor], int]:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Casts() as casts:
        loss = wrapped(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
    found = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert sum(bool(gradient.abs().sum() > 0) for gradient in found.values()) >= 2 * len(TARGETS)
    return {"loss": loss.detach(), **found}, casts.count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft(
    model_path: str, kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    plain, ours = (model(model_path, dtype, KINDS[kind]()) for _ in range(2))
    leave_casts_to_autocast(ours)
    if checkpointing:
        for each in (plain, ours):
            each.gradient_checkpointing_enable()
    (expected, before), (found, after) = loss_and_gradients(plain), loss_and_gradients(ours)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    if kind not in ("dora", "dropout") and dtype == torch.bfloat16:
        # In each of two decoder layers, seven casts of the input and as many of its gradient.
        assert before - after >= 2 * 2 * len(TARGETS)


def test_outside_autocast_the_layers_cast_as_peft_has_them(model_path: str) -> None:
    plain, ours = (model(model_path, torch.bfloat16, lora()) for _ in range(2))
    leave_casts_to_autocast(ours)
    loss_and_gradients(ours)
    ours.zero_grad()
    (expected, _), (found, _) = (loss_and_gradients(each, autocast=False) for each in (plain, ours))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_trainer_leaves_the_casts_out_while_it_trains_and_not_after(make_trainer: Any, model_path: str) -> None:
    seen = []
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    trainer = make_trainer(model=base, peft_config=lora(), arguments={"bf16": True, "max_steps": 1})
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    layer.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.cast_input_dtype_enabled))
    trainer.train()
    assert seen and not any(seen)
    with torch.no_grad():
        trainer.model.generate(input_ids=TOKENS[:, :4], max_new_tokens=2)
