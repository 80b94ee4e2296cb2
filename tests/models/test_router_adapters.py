"""Routers that an adapter moves, in every family: standard PEFT reads it, and a merge is the same model without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignkit.models._routers import Router, check_capture, find_routers, last_routers
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource, load_adapter, load_model
from tests.moe import FAMILIES, tiny_moe

PROMPTS = [[5, 9, 12, 30, 7, 22], [20, 3, 41]]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS])


def moved_by(model: Any, routers: list[Router]) -> tuple[PeftModel, dict[str, Tensor]]:
    """An adapter of full rank whose one matrix is the change of a router, and the changes by name of the weight."""
    names = [f"{router.name}.{router.parameter}" for router in routers]
    rank = routers[0].num_experts
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names)
    wrapped = get_peft_model(model, config).eval()
    changes = {}
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.eye_(parameter)
        elif "lora_A" in name:
            torch.manual_seed(len(changes))
            nn.init.normal_(parameter, std=0.5)
            changes[names[len(changes)]] = parameter.detach().clone()
    return wrapped, changes


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_reloaded_and_merged_it_is_the_model_that_was_trained(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    base, folder, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    tiny_moe(family).save_pretrained(base)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)  # noqa: E731
    model, report = load(base)
    assert not any(report.values()), report
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = logits(model)
    wrapped, changes = moved_by(model, last_routers(model, 2))
    trained = logits(wrapped)
    assert (trained - untouched).abs().max() > 1e-2 and len(changes) == 2
    wrapped.save_pretrained(folder)

    reloaded = PeftModel.from_pretrained(load(base)[0], folder).eval()
    assert torch.equal(logits(reloaded), trained)
    check_capture(reloaded, find_routers(reloaded))
    files = read_adapter(folder)
    assert torch.equal(logits(load_adapter(load_model(ModelSource(str(base))), files)), trained)

    merge_adapter(files, ModelSource(str(base)), merged, tokenizer=tokenizer, prompts=PROMPTS)
    plain, report = load(merged)
    assert not any(report.values()), report
    # Rounding of kernels alone, by where a file lies in memory: the weights are the same to the last bit.
    torch.testing.assert_close(logits(plain), trained, rtol=0, atol=1e-4)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value + changes[name] if name in changes else value), name
