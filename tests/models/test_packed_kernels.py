"""Packed rows at real head sizes against padded rows, eager and in float32; on a GPU by the kernels there."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.data.prefix import CandidateCollator, on_device
from alignkit.models import _segments
from alignkit.models._forward import add_completion_head, completion_logps, use_packed_attention
from tests.trainers import VOCABULARY, random_rows

SHAPES = [(70, (33, 1)), (1, (40,)), (129, (5, 64, 1, 17)), (2, (3,) * 8), (40, (130, 20))]
"""Prompts and completions: K from 1 to 8, no prefix (a prompt of one token), branches of one token."""
FLOOR = 1e-4
"""Distance from float32 padded rows, by its norm over theirs, of log-probs and of all gradients together. In bfloat16
twice that of padded rows of the same model is allowed on top: rounding alone takes them up to 0.14 away."""
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mistral": {"sliding_window": 48},
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 64},
}
ON_CPU = pytest.param("general", "cpu", id="cpu")
KERNELS = [
    pytest.param(name, "cuda", id=name, marks=pytest.mark.gpu) for name in ("torch_varlen", "flash_attn", "general")
]


def model(kind: str, head_size: int, attention: str) -> nn.Module:
    """Two layers with two query heads for every key head."""
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=2 * head_size, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_size, max_position_embeddings=512,
        initializer_range=0.1, pad_token_id=0, attn_implementation=attention, **FAMILIES[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    found: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return found


def passed(net: nn.Module, layout: Any, device: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Log-probs of all completion tokens, and the gradient of a mix of them in all that is trained."""
    batch = on_device(CandidateCollator(0, layout)(random_rows(SHAPES)), device)
    net.zero_grad()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        logps = completion_logps(net, batch)
    # Padded rows stand elsewhere in the batch; tokens have the same order.
    tokens = logps[batch["completion_mask"]].float()
    mix = torch.randn(len(tokens), generator=torch.Generator().manual_seed(1)).to(device)
    (tokens * mix).sum().backward()
    gradients = [p.grad.flatten().float() for p in net.parameters() if p.grad is not None]
    return tokens.detach(), torch.cat(gradients)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def compare(nets: tuple[nn.Module, nn.Module], device: str, kernel: str, dtype: torch.dtype | None) -> None:
    """Padded rows of the first model in float32, and packed rows of the second, twice."""
    plain, packed = nets
    wanted = passed(plain, "padded", device, None)
    # As with padded rows, the kernels' backward passes add up in any order unless this is asked for.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (passed(packed, "packed", device, dtype) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    rounded = passed(packed, "padded", device, dtype)
    for one, again, padded, right in zip(first, second, rounded, wanted, strict=True):
        assert torch.equal(one, again)
        allowed = FLOOR if kernel == "general" else 2 * apart(padded, right) + FLOOR
        assert apart(one, right) < allowed, (kernel, apart(one, right), allowed)


def watch_kernel(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have packed rows run by a kernel; what was asked for is written down."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if kernel == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    monkeypatch.setattr(_segments, "_has_flash_attn", lambda: kernel == "flash_attn")
    chosen: list[str] = []
    plain = _segments.varlen_kernel

    def choose(states: Any, dropout: float) -> Any:
        found = plain(states, dropout)
        chosen.append("general" if found is None else found.__name__.removeprefix("_"))
        return found

    monkeypatch.setattr(_segments, "varlen_kernel", choose)
    return chosen


@pytest.mark.parametrize(("kernel", "device"), [ON_CPU, *KERNELS])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_packed_rows_at_real_head_sizes(
    kind: str, head_size: int, kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 by the kernels, float32 in general."""
    if device == "cpu" and (head_size, kind) not in ((64, "gemma3_text"), (128, "qwen3")):
        pytest.skip("two of them do on a CPU")
    chosen = watch_kernel(kernel, device, monkeypatch)
    plain, packed = model(kind, head_size, "eager"), model(kind, head_size, "sdpa")
    dtype = torch.float32 if kernel == "general" else torch.bfloat16
    packed.load_state_dict(plain.state_dict())
    packed.to(device, dtype)
    plain.to(device).load_state_dict(packed.state_dict())  # Of the same values, rounded where they are.
    for net in (plain, packed):
        add_completion_head(net.eval())
    use_packed_attention(packed)
    compare((plain, packed), device, kernel, None)
    assert set(chosen) == {kernel}


@pytest.mark.parametrize(("kernel", "device"), [ON_CPU, *KERNELS[:2]])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_recomputed_layers_see_the_same_parts(
    kind: str, kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA under autocast, with gradient checkpointing; on a CPU without autocast, where it would choose no kernel."""
    if (device, kind) == ("cpu", "gemma3_text"):
        pytest.skip("one of them does on a CPU")
    chosen = watch_kernel(kernel, device, monkeypatch)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    plain = get_peft_model(model(kind, 128, "eager"), adapter).to(device)
    packed = get_peft_model(model(kind, 128, "sdpa"), copy.deepcopy(adapter)).to(device)
    packed.load_state_dict(plain.state_dict())
    for net in (plain, packed):
        add_completion_head(net)
    use_packed_attention(packed.get_base_model())
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    packed.train()
    dtype = None if device == "cpu" else torch.bfloat16
    compare((plain.eval(), packed), device, kernel, dtype)
    assert set(chosen) == {kernel}
