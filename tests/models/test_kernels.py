"""Kernels compute what the model computes, leave its names alone, and are taken out where they do not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.models.qwen3 import modeling_qwen3

from alignkit.data.prefix import CandidateCollator
from alignkit.errors import ConfigError, ModelError
from alignkit.gradients._hook import chosen_rule
from alignkit.models import _kernels
from alignkit.models._comparison import ScoringRun
from alignkit.models._forward import add_completion_head, completion_logps, use_packed_attention
from alignkit.models._kernels import (
    LIGER_TYPES,
    Passes,
    compile_problem,
    is_within,
    kernel_difference,
    liger_problem,
    put_compiled,
    put_liger,
)
from alignkit.models.choices import Choice
from alignkit.shapes import _kernel_choice
from alignkit.shapes._candidates import BridgeSettings
from alignkit.shapes._kernel_choice import take_kernels
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import VOCABULARY, flat_weights, logged, random_rows

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
(ROW,) = random_rows([(9, (7, 5))])
TOKENS = torch.tensor([ROW["prompt_ids"]])


@pytest.fixture
def model(model_path: str) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    add_completion_head(loaded)
    return loaded


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole of tracing, without minutes of a C++ compiler."""
    monkeypatch.setattr(_kernels, "BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fake_liger(monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False) -> list[str]:
    """The functions of Liger that are used, in plain torch, where Triton cannot run; what is called is returned."""
    called: list[str] = []

    def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, *, in_place: bool) -> Tensor:
        called.append("norm")
        assert not in_place
        return weight * (x / (x.pow(2).mean(-1, keepdim=True) + eps * (1 if not wrong else 1e6)).sqrt())

    class LigerSwiGLUMLP:
        def forward(self: Any, x: Tensor) -> Tensor:
            called.append("mlp")
            gate = self.gate_proj(x)
            product: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
            return product

    def liger_rotary_pos_emb(*unused: Any) -> None:
        raise AssertionError("Triton runs on no CPU")

    package, transformers, functional = (ModuleType(f"liger{i}") for i in range(3))
    functional.liger_rms_norm = liger_rms_norm  # type: ignore[attr-defined]
    transformers.LigerSwiGLUMLP = LigerSwiGLUMLP  # type: ignore[attr-defined]
    transformers.liger_rotary_pos_emb = liger_rotary_pos_emb  # type: ignore[attr-defined]
    for name, module in {"": package, ".transformers": transformers, ".transformers.functional": functional}.items():
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    return called


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_liger_is_put_in_and_taken_out(model: PreTrainedModel, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake_liger(monkeypatch)
    own_rotary = modeling_qwen3.apply_rotary_pos_emb
    whole: Any = get_peft_model(model, LORA) if adapted else model
    before, names = logits(whole), list(whole.state_dict())
    undo = put_liger([model])
    torch.testing.assert_close(logits(whole), before, atol=1e-5, rtol=1e-5)
    # Two norms of the layer and two of heads in each of two layers, and the last; two feed-forward layers.
    assert (called.count("norm"), called.count("mlp")) == (2 * 4 + 1, 2)
    assert list(whole.state_dict()) == names
    # A copy has kernels of its own, on weights of its own.
    twin = copy.deepcopy(model.model)
    torch.nn.init.zeros_(twin.norm.weight)
    assert twin(input_ids=TOKENS).last_hidden_state.abs().sum() == 0
    undo()
    called.clear()
    assert torch.equal(logits(whole), before) and not called
    assert modeling_qwen3.apply_rotary_pos_emb is own_rotary


@pytest.mark.parametrize("kind", LIGER_TYPES)
def test_types_with_kernels_have_what_is_replaced(kind: str) -> None:
    """Rotary positions that rotate halves of whole heads, RMSNorm without an offset, SiLU in a gate."""
    from transformers import AutoConfig

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **more, **experts))
    file = sys.modules[type(model).__module__]
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms and all(type(m).__module__ == file.__name__ and m.weight.eq(1).all() for m in norms)
    x = torch.randn(3, norms[0].weight.shape[0])
    expected = x / (x.pow(2).mean(-1, keepdim=True) + norms[0].variance_epsilon).sqrt()
    torch.testing.assert_close(norms[0](x), expected)
    q, angle = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    low, high = q[..., :4], q[..., 4:]
    turned = torch.cat(
        [
            low * cos[:, None, :, :4] - high * sin[:, None, :, :4],
            high * cos[:, None, :, :4] + low * sin[:, None, :, :4],
        ],
        -1,
    )
    torch.testing.assert_close(file.apply_rotary_pos_emb(q, q, cos, sin)[0], turned)
    for mlp in (m for m in model.modules() if type(m).__name__.endswith("MLP")):
        assert isinstance(mlp.act_fn, type(ACT2FN["silu"]))
        x = torch.randn(2, 16)
        expected = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), expected)


def test_wrong_kernels_are_seen_in_log_probs_and_gradient(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(ScoringRun("the policy", model, "float32"), ROW)
    for wrong in (False, True):
        fake_liger(monkeypatch, wrong=wrong)
        logps, gradient, undo = kernel_difference(passes, lambda: put_liger([model]), compiles=False)
        undo()
        assert is_within(logps, gradient, "float32", 1e-3) is not wrong
        assert (gradient > 1e-3) is wrong
    assert not is_within(0.0, float("nan"), "float32", 1e-3) and not is_within(float("nan"), 0.0, "float32", 1e-3)


def test_the_gradient_alone_tells(model: PreTrainedModel) -> None:
    """A backward pass that loses a part, under a forward pass that is right."""

    def put() -> Any:
        handle = model.model.layers[0].register_full_backward_hook(lambda m, gin, gout: (gin[0] * 1.01,))
        return handle.remove

    passes = Passes(ScoringRun("the policy", model, "float32"), ROW)
    logps, gradient, undo = kernel_difference(passes, put, compiles=False)
    undo()
    assert logps == 0 and not is_within(logps, gradient, "float32", 1e-3)
    assert passes()[1].norm() > 0


@pytest.mark.usefixtures("tracing")
def test_layers_are_traced_once_for_all_lengths(model: PreTrainedModel) -> None:
    from torch._dynamo.utils import counters

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    batches = [torch.randint(2, VOCABULARY, (2, length)) for length in (9, 17, 5)]
    with torch.no_grad():
        before = [model(input_ids=ids).logits for ids in batches]
    names = list(model.state_dict())
    undo = put_compiled([model])
    start = graphs()
    with torch.no_grad():
        after = [model(input_ids=ids, use_cache=False).logits for ids in batches]
    assert graphs() - start == 1, "one for two layers and three lengths"
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
    start = graphs()
    with torch.no_grad():
        model.generate(input_ids=batches[0], max_new_tokens=3, do_sample=False)
    assert graphs() == start, "a cache grows, and is not compiled for"
    undo()
    assert torch.equal(model(input_ids=batches[0]).logits, before[0])


@pytest.mark.slow
@pytest.mark.usefixtures("tracing")
def test_packed_rows_are_traced_for_one_length_and_then_for_all(model: PreTrainedModel) -> None:
    """Attention over their parts stays outside; what is before and behind it is compiled."""
    from torch._dynamo.utils import counters

    use_packed_attention(model)
    shapes = ([(9, (7, 5)), (4, (3, 6))], [(12, (2, 8))], [(3, (4, 4)), (6, (5,)), (1, (9, 2, 3))], [(30, (9, 8))])
    batches = [CandidateCollator(0, "packed")(random_rows(shape)) for shape in shapes]
    expected = [completion_logps(model, batch).detach() for batch in batches]
    put_compiled([model])
    found, graphs = [], []
    for batch in batches:
        found.append(completion_logps(model, batch))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    found[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize(("layout", "peft_config"), [("packed", None), ("padded", LORA)], ids=["full", "lora"])
def test_a_run_with_compiled_layers_is_the_run(make_trainer: Any, tmp_path: Any, layout: Any, peft_config: Any) -> None:
    rows = Dataset.from_list(random_rows([(6, (5, 5)), (9, (4, 7)), (3, (8, 2)), (5, (6, 6))] * 2, seed=3))
    runs = []
    for kernels in ("none", "compile"):
        arguments = {"max_steps": 2, "gradient_checkpointing": True}
        settings = BridgeSettings(layout=layout)
        trainer = make_trainer(settings=settings, arguments=arguments, train_dataset=rows, peft_config=peft_config)
        take_kernels(trainer, kernels)
        assert trainer.choices["kernels"] == Choice("kernels", kernels, "pinned", trainer.choices["kernels"].seconds)
        trainer.train()
        trainer.save_model(str(tmp_path / kernels))
        names = {path.name for path in (tmp_path / kernels).iterdir()}
        runs.append((logged(trainer, "loss"), flat_weights(trainer.model), names, list(trainer.model.state_dict())))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=1e-4, rtol=1e-3)
    assert runs[0][2:] == runs[1][2:]


@pytest.mark.slow
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("program", ["preference", "sft", "online"])
def test_every_program_trains_with_compiled_layers(program: str, tmp_path: Path) -> None:
    """Online, completions are drawn over a cache that grows, and trained on without one."""
    save_model(tmp_path / "model")
    losses = []
    for kernels in ("none", "compile"):
        (tmp_path / kernels).mkdir()
        given = config_of(program, str(tmp_path / "model"), tmp_path / kernels, kernels=kernels, max_steps=2)
        trainer = build(given, text_rows(given, 8))
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert trainer.choices["kernels"].value == kernels
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_compiled_layers_compute_what_the_model_does(model: PreTrainedModel) -> None:
    """Through the C++ compiler, forward and backward."""
    torch.compiler.reset()
    passes = Passes(ScoringRun("the policy", model, "float32"), ROW)
    logps, gradient, undo = kernel_difference(passes, lambda: put_compiled([model]), compiles=True)
    assert logps <= 1e-5 and gradient <= 1e-5
    undo()


# --- the choice -------------------------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_chosen_and_liger_is_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    take_kernels(trainer, "auto")
    assert trainer.choices["kernels"] == Choice("kernels", "none", "on a CPU")
    with pytest.raises(ConfigError, match=r"`kernels: liger`: liger-kernel is not installed \(pip install"):
        take_kernels(trainer, "liger")
    monkeypatch.setattr(_kernels, "find_spec", lambda name: object())
    with pytest.raises(
        ConfigError, match="`kernels: liger`: Liger's kernels are written in Triton, which needs a CUDA"
    ):
        take_kernels(trainer, "liger")


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA and Liger, as far as the choice looks at it."""
    monkeypatch.setattr(_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_kernel_choice, "_expected_seconds", lambda trainer: 1000.0)


def fitting(trainer: Any) -> tuple[str, str]:
    """What ``auto`` is on an accelerator."""
    there: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cuda")), is_fsdp_enabled=False,
        **{name: getattr(trainer, name) for name in ("args", "gradient_rule", "lengths", "models_of_run")},
    )  # fmt: skip
    choice = _kernel_choice._fitting(there, trainer.models_of_run())
    return choice.value, choice.reason


@pytest.mark.usefixtures("accelerated")
def test_what_fits_an_accelerator(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    assert fitting(trainer)[0] == "liger"
    monkeypatch.setattr(_kernels, "find_spec", lambda name: None)
    assert fitting(trainer)[0] == "compile" and "pip install 'alignkit[fast]'" in fitting(trainer)[1]
    monkeypatch.setattr(_kernel_choice, "_expected_seconds", lambda trainer: 700.0)
    assert fitting(trainer)[0] == "none" and "compiling pays from 13 min on" in fitting(trainer)[1]


@pytest.mark.usefixtures("accelerated")
def test_what_is_never_compiled(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "find_spec", lambda name: None)
    ruled = make_trainer(gradient_rule=chosen_rule("sam", None))
    assert fitting(ruled)[0] == "none" and "a gradient rule displaces" in fitting(ruled)[1]
    tiny = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**tiny, **heads, num_experts=2, moe_intermediate_size=8))
    assert "mixture of experts" in str(compile_problem([experts]))
    plain = AutoModelForCausalLM.from_config(Qwen3Config(**tiny, **heads))
    assert compile_problem([plain]) is None and liger_problem([plain]) is not None


def test_a_type_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    monkeypatch.setattr(_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert liger_problem([model]) is None
    monkeypatch.setattr(model.config, "model_type", "gemma2")
    assert "a model of type gemma2" in str(liger_problem([model]))


@pytest.mark.usefixtures("accelerated")
def test_wrong_kernels_are_taken_out_or_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_liger(monkeypatch, wrong=True)
    trainer = make_trainer()
    before = logits(trainer.model)
    with pytest.raises(ModelError, match="kernels: liger cannot be used: log-probs of the policy.*its gradient by"):
        take_kernels(trainer, "liger")
    assert torch.equal(logits(trainer.model), before)
    chosen = Choice("kernels", "liger", "as it was")
    with pytest.raises(ModelError, match="Write kernels: none"):
        take_kernels(trainer, "auto", chosen)
    monkeypatch.setattr(_kernel_choice, "_fitting", lambda trainer, bases: replace(chosen, reason="faster"))
    take_kernels(trainer, "auto")
    taken = trainer.choices["kernels"]
    assert taken.value == "none" and taken.reason.startswith("with liger, log-probs of the policy")
    assert torch.equal(logits(trainer.model), before)


@pytest.mark.usefixtures("accelerated")
def test_all_models_of_a_run_have_the_kernels(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake_liger(monkeypatch)
    trainer = make_trainer()
    take_kernels(trainer, "liger")
    assert trainer.ref_model is not None
    for each in (trainer.model, trainer.ref_model):
        called.clear()
        logits(each)
        assert called.count("norm") == 9


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_ligers_kernels_at_real_sizes(kind: str, precision: str) -> None:
    """Heads of 128, rows of hundreds of tokens, against eager rows in float32."""
    from transformers import AutoConfig

    pytest.importorskip("liger_kernel", reason="pip install 'alignkit[fast]'")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, sliding_window=None,
    )  # fmt: skip
    exact = AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda().eval()
    add_completion_head(exact)
    (row,) = random_rows([(300, (200,))])
    expected, direction = Passes(ScoringRun("eager", exact, "float32"), row)()
    fast = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").cuda().eval()
    fast.load_state_dict(exact.state_dict())
    fast = fast.to(getattr(torch, precision))
    add_completion_head(fast)
    passes = Passes(ScoringRun("the policy", fast, precision), row)
    plain, plain_direction = passes()
    undo = put_liger([fast])
    found, gradient = passes()
    undo()
    error, plain_error = (float((each - expected).abs().max()) for each in (found, plain))
    # No further from the exact values than the model's own code is.
    assert error <= 2 * plain_error + 1e-4
    apart, plain_apart = (float((each - direction).norm() / direction.norm()) for each in (gradient, plain_direction))
    assert apart <= 2 * plain_apart + 1e-4
