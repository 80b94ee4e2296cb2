"""Scores against plain loops over rows without padding, and the plans that follow from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignkit.errors import ModelError
from alignkit.pruning.importance import CRITERIA, Scores, importance, plan_by_importance, strongest

HEADS, GROUPS, HEAD, HIDDEN, FFN, LAYERS = 4, 2, 6, 12, 10, 3
SHAPE: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "initializer_range": 0.3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 16}),
}
ROWS = [[5, 9, 12, 3, 7, 1], [20, 3], [2, 2, 8, 14], [6], [11, 13, 17]]
"""Rows of which the first token of each, and every 13, has no label."""


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    kind, config, more = KINDS[request.param]
    torch.manual_seed(1)
    made = kind(config(**SHAPE, **more)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:  # biases start at 0, norms at 1
                parameter += 0.3 * torch.randn_like(parameter)
    return made


def batches(size: int, side: str = "right") -> Iterator[dict[str, Tensor]]:
    """The rows in padded batches."""
    for start in range(0, len(ROWS), size):
        rows = ROWS[start : start + size]
        length = max(map(len, rows))
        batch = {"input_ids": torch.zeros(len(rows), length, dtype=torch.long)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            batch["input_ids"][i, where] = torch.tensor(row)
            batch["attention_mask"][i, where] = 1
            batch["labels"][i, where] = torch.tensor([-100, *[-100 if t == 13 else t for t in row[1:]]])
        yield batch


def names(layer: int) -> dict[str, str]:
    inside = {name: f"self_attn.{name}_proj" for name in "qkvo"}
    inside |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    return {short: f"model.layers.{layer}.{name}" for short, name in inside.items()}


def totals_by_hand(model: PreTrainedModel, of: dict[str, Tensor]) -> dict[str, Any]:
    """Sums of ``of`` over what goes with each structure, one row or column at a time."""
    biased = {name.removesuffix(".bias") for name in of if name.endswith(".bias")}

    def total(name: str, rows: Any = None, columns: Any = None) -> float:
        weight = of[f"{name}.weight"]
        if rows is None:
            return float(weight[:, columns].sum())
        bias = float(of[f"{name}.bias"][rows].sum()) if name in biased else 0.0
        return float(weight[rows].sum()) + bias

    width = HEADS // GROUPS * HEAD
    ffn, kv, layers = [], [], []
    hidden = [float(of["model.embed_tokens.weight"][:, i].sum()) for i in range(HIDDEN)]
    if "lm_head.weight" in of:
        hidden = [value + float(of["lm_head.weight"][:, i].sum()) for i, value in enumerate(hidden)]
    for index in range(LAYERS):
        n = names(index)
        ffn.append([total(n["gate"], j) + total(n["up"], j) + total(n["down"], columns=j) for j in range(FFN)])
        blocks = [(slice(width * g, width * (g + 1)), slice(HEAD * g, HEAD * (g + 1))) for g in range(GROUPS)]
        kv.append(
            [total(n["q"], q) + total(n["k"], k) + total(n["v"], k) + total(n["o"], columns=q) for q, k in blocks]
        )
        layers.append(sum(total(name, slice(None)) for name in n.values()))
        for i in range(HIDDEN):
            hidden[i] += sum(total(n[short], i) for short in ("o", "down"))
            hidden[i] += sum(total(n[short], columns=i) for short in ("q", "k", "v", "gate", "up"))
    return {"hidden": hidden, "ffn": ffn, "kv_groups": kv, "layers": layers}


def agree(found: Scores, expected: Mapping[str, Any], rtol: float = 1e-5) -> None:
    for axis, values in expected.items():
        torch.testing.assert_close(
            getattr(found, axis), torch.tensor(values, dtype=torch.float64), rtol=rtol, atol=1e-7, msg=axis
        )


def test_magnitudes_are_norms_of_all_that_goes(model: PreTrainedModel) -> None:
    squares = {name: p.detach().double().square() for name, p in model.named_parameters()}
    expected = {axis: torch.tensor(v).sqrt().tolist() for axis, v in totals_by_hand(model, squares).items()}
    agree(importance(model, [], "magnitude"), expected)


def test_gradients_are_those_of_the_mean_over_labelled_tokens(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    logps = []
    for row in ROWS:
        for position in range(1, len(row)):
            if row[position] != 13:
                logits = plain(torch.tensor([row[:position]])).logits[0, -1]
                logps.append(logits.log_softmax(-1)[row[position]])
    (-torch.stack(logps).mean()).backward()
    products = {name: (p.grad * p.detach()).abs() for name, p in plain.named_parameters()}
    agree(importance(model, batches(2), "gradient"), totals_by_hand(model, products), rtol=1e-3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Reads(nn.Module):
    """Keeps what a module is given, in place of that module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = module, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(args[0][0].detach().double())
        return self.module(*args, **kwargs)


def test_activations_are_those_of_tokens_that_count(model: PreTrainedModel) -> None:
    """Row by row without padding, in a copy whose modules keep what they read."""
    plain = copy.deepcopy(model)
    kept: dict[tuple[int, str], Reads] = {}
    for index in range(LAYERS):
        for short in ("q", "gate", "o", "down"):
            parent, _, name = names(index)[short].rpartition(".")
            kept[index, short] = Reads(plain.get_submodule(names(index)[short]))
            setattr(plain.get_submodule(parent), name, kept[index, short])
    plain.lm_head = head = Reads(plain.lm_head)
    stream = Reads(plain.model.norm)
    plain.model.norm = stream
    with torch.no_grad():
        states = [plain(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ROWS]

    def rms(reads: Reads, feature: int) -> float:
        tokens = [float(token[feature]) for part in reads.seen for token in part]
        assert len(tokens) == sum(map(len, ROWS))
        return (sum(x * x for x in tokens) / len(tokens)) ** 0.5

    readers = [*(kept[i, short] for i in range(LAYERS) for short in ("q", "gate")), head]
    hidden = [sum(rms(reads, i) for reads in readers) / len(readers) for i in range(HIDDEN)]
    ffn = [[rms(kept[i, "down"], j) for j in range(FFN)] for i in range(LAYERS)]
    width = HEADS // GROUPS * HEAD
    heads = [
        [
            (sum(rms(kept[i, "o"], f) ** 2 for f in range(width * g, width * (g + 1))) / width) ** 0.5
            for g in range(GROUPS)
        ]
        for i in range(LAYERS)
    ]
    layers = []
    for i in range(LAYERS):
        cosines = []
        for row, state in enumerate(states):
            after = stream.seen[row] if i == LAYERS - 1 else state[i + 1][0].double()
            for x, y in zip(state[i][0].double(), after, strict=True):
                cosines.append(float(x @ y / (x.norm() * y.norm())))
        layers.append(1 - sum(cosines) / len(cosines))
    agree(importance(model, batches(2), "activation"), {"hidden": hidden, "ffn": ffn, "kv_groups": heads})
    agree(importance(model, batches(2), "activation"), {"layers": layers})


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_depend_neither_on_batches_nor_on_the_mode_of_the_model(model: PreTrainedModel, criterion: str) -> None:
    first = importance(model, batches(1), criterion)
    model.train()
    model.lm_head.requires_grad_(False)
    agree(importance(model, batches(5), criterion), {k: v.tolist() for k, v in vars(first).items()}, rtol=1e-4)
    assert model.training and not model.lm_head.weight.requires_grad
    model.eval().requires_grad_(True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = importance(model, batches(1), criterion)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))


def test_a_plan_keeps_the_highest_scores_of_every_axis_named(model: PreTrainedModel) -> None:
    found = importance(model, batches(2), "activation")
    plan = plan_by_importance(model, batches(2), criterion="activation", hidden=8, ffn=7, kv_groups=1, drop_layers=1)

    def kept(scores: Tensor, count: int) -> tuple[int, ...]:
        return tuple(sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count]))

    assert plan.hidden == kept(found.hidden, 8) and plan.layers == kept(found.layers, 2)
    assert plan.ffn == tuple(kept(row, 7) for row in found.ffn)
    assert plan.kv_groups == tuple(kept(row, 1) for row in found.kv_groups)
    alone = plan_by_importance(model, [], criterion="magnitude", ffn=4)
    assert alone.hidden is alone.kv_groups is alone.layers is None and {len(row) for row in alone.ffn} == {4}


def test_of_equal_scores_the_first_are_kept() -> None:
    assert strongest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3, "channels") == (0, 1, 3)
    assert strongest(torch.zeros(300), 5, "channels") == (0, 1, 2, 3, 4)


def test_what_cannot_be_kept_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="13 of 12 hidden channels cannot be kept. Keep from 1 to 12"):
        plan_by_importance(model, [], criterion="magnitude", hidden=13)
    with pytest.raises(ModelError, match="0 of 3 layers cannot be kept"):
        plan_by_importance(model, [], criterion="magnitude", drop_layers=3)
    with pytest.raises(ModelError, match="no labelled token was given"):
        importance(model, [], "gradient")
    with pytest.raises(ModelError, match="no token that is not masked"):
        importance(model, [], "activation")


def test_a_layer_that_does_nothing_goes_first() -> None:
    """Its branches write zero, so that what leaves it is what entered."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for name in ("o", "down"):
            model.get_submodule(names(2)[name]).weight.zero_()
    assert float(importance(model, batches(2), "activation").layers[2]) == pytest.approx(0, abs=1e-12)
    plan = plan_by_importance(model, batches(2), criterion="activation", drop_layers=1)
    assert plan.layers == (0, 1), "the last layer is no exception"
