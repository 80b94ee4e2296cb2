"""Routers moved by their parametrisation, in every family: PEFT alone loads it, and a merge is the same model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignkit.models._routers import check_capture, find_routers
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.full_rank import settle
from alignkit.models.loading import ModelSource, load_adapter, load_model
from alignkit.parametrizations._routers import prepare
from tests.moe import FAMILIES, tiny_moe

PROMPTS = [[5, 9, 12, 30, 7, 22], [20, 3, 41]]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS])


def moved(model: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """The parametrisation's adapter on the last two routers after some training, and their changes by name."""
    wrapped = get_peft_model(model, prepare(SimpleNamespace(router_layers=2), model)).eval()
    settle(wrapped)
    changes = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(changes))
            nn.init.normal_(parameter, std=0.5)
            place = name.removeprefix("base_model.model.").removesuffix("lora_A.default.weight")
            changes[f"{place}weight"] = parameter.detach().clone()
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
    routers = find_routers(model)
    wrapped, changes = moved(model)
    assert list(changes) == [f"{router.name}.{router.parameter}" for router in routers[-2:]]
    trained = logits(wrapped)
    assert (trained - untouched).abs().max() > 1e-2
    wrapped.save_pretrained(folder)

    reloaded = PeftModel.from_pretrained(load(base)[0], folder).eval()
    assert type(reloaded.peft_config["default"]) is LoraConfig
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
