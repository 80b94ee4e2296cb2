"""Group-sparse tuning: what is pulled at and what is not, the choice for good, and the plan that can be exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.gradients._hook import chosen_rule
from alignkit.parametrizations._sparse import check, prepare
from alignkit.parametrizations.sparse import REGULARISERS
from alignkit.pruning.export import pruned_model
from alignkit.pruning.plan import PLAN_FILE, PruningPlan
from alignkit.pruning.prox import wgsef_prox
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import logged

LAYERS, FFN, GROUPS, QUERIES, HEAD = 2, 32, 2, 2, 8
KEPT = {"ffn": 24, "kv_groups": 1}
RUN: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2}
KEYS = RUN | {"parametrization": "sparse", "sparse_kv_groups": 0.5, "sparse_until": 0.75}
FULL = RUN | {"parametrization": "full"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(path, num_attention_heads=GROUPS * QUERIES, num_key_value_heads=GROUPS, head_dim=HEAD)
    return str(path)


class Snapshots(TrainerCallback):
    """The weights before training, and after every step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.weights = [self._now()]

    def _now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.weights.append(self._now())


def trained(
    model: str, folder: Path, keys: Mapping[str, Any], program: str = "sft"
) -> tuple[Any, list[dict[str, Tensor]]]:
    """A trainer after its run, and its weights before and after every step."""
    folder.mkdir(exist_ok=True)
    config = config_of(program, model, folder, **keys)
    rule = chosen_rule(config.gradient_rule, config.gradient_options)
    trainer = build(config, text_rows(config, 16), rule=rule)
    snapshots = Snapshots(trainer.model)
    trainer.add_callback(snapshots)
    trainer.train()
    return trainer, snapshots.weights


def pieces(weights: dict[str, Tensor], axis: str, layer: int, group: int) -> list[Tensor]:
    """Views of all that goes with one group."""
    if axis == "ffn":
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return [gate[group], up[group], down[:, group]]
    q, k, v, o = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
    queries = slice(group * QUERIES * HEAD, (group + 1) * QUERIES * HEAD)
    keys = slice(group * HEAD, (group + 1) * HEAD)
    return [q[queries], k[keys], v[keys], o[:, queries]]


def norms(weights: dict[str, Tensor], axis: str) -> Tensor:
    """Joint norms of all groups [layers, groups], one at a time."""
    count = {"ffn": FFN, "kv_groups": GROUPS}[axis]
    rows = [
        [sum(float(p.double().square().sum()) for p in pieces(weights, axis, layer, g)) ** 0.5 for g in range(count)]
        for layer in range(LAYERS)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def top(row: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(range(len(row)), key=lambda i: -float(row[i]))[:count]))


def factors_by_hand(regulariser: str, axis: str, start: Tensor, now: Tensor, pulls: int) -> Tensor:
    """What the groups are multiplied by after the first step, from the norms before training and after the step."""
    found = torch.ones_like(now)
    for layer in range(LAYERS):
        threshold = float(start[layer].mean()) / pulls
        kept = top(start[layer], KEPT[axis])
        for group, norm in enumerate(now[layer].tolist()):
            if regulariser == "group_lasso" or (regulariser == "mask_sparsity" and group not in kept):
                found[layer, group] = max(0.0, 1 - threshold / norm)
        if regulariser == "wgsef":  # the count starts to come down with the second step
            found[layer] = wgsef_prox(now[layer], now.shape[1], 1 / pulls)
    return found


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_a_step_is_that_of_full_tuning_and_then_one_pull(regulariser: str, model: str, tmp_path: Path) -> None:
    """All but the groups, and what a regulariser leaves alone, is to the last bit what full tuning makes of it."""
    _, full = trained(model, tmp_path / "full", FULL)
    trainer, sparse = trained(model, tmp_path / "sparse", KEYS | {"sparse_regulariser": regulariser})
    expected = {name: value.clone() for name, value in full[1].items()}
    touched = set()
    for axis, count in (("ffn", FFN), ("kv_groups", GROUPS)):
        factors = factors_by_hand(regulariser, axis, norms(full[0], axis), norms(full[1], axis), pulls=3)
        assert bool((factors == 1).any()) == (regulariser == "mask_sparsity")
        for layer in range(LAYERS):
            for group in range(count):
                if (factor := float(factors[layer, group])) != 1:
                    touched |= {axis}
                    for piece in pieces(expected, axis, layer, group):
                        piece *= factor
    assert touched == {"ffn", "kv_groups"}
    for name, value in sparse[1].items():
        same = full[1][name] == expected[name]
        assert torch.equal(value[same], expected[name][same]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8, msg=name)
    assert len(logged(trainer, "loss")) == 4


@pytest.mark.parametrize(
    ("regulariser", "program", "method"),
    [(name, "sft", "sft") for name in REGULARISERS] + [("mask_sparsity", "preference", "dpo")],
)
def test_the_chosen_groups_are_left_and_the_plan_exports_the_model(
    regulariser: str, program: str, method: str, model: str, tmp_path: Path
) -> None:
    # A smaller pull than would leave the lasso with fewer groups than are wanted.
    keys = KEYS | {"method": method, "sparse_regulariser": regulariser, "sparse_coef": 0.5}
    trainer, weights = trained(model, tmp_path, keys, program)
    plan = PruningPlan.load(tmp_path / "run")
    assert plan.hidden is plan.layers is None
    for axis, kept in KEPT.items():
        last, chosen = norms(weights[-1], axis), getattr(plan, axis)
        assert [tuple(row.nonzero().flatten().tolist()) for row in last] == list(chosen)
        assert {len(row) for row in chosen} == {kept}
        if regulariser == "mask_sparsity":
            assert list(chosen) == [top(row, kept) for row in norms(weights[0], axis)]
        assert torch.equal(norms(weights[3], axis) == 0, last == 0), "chosen after the third step of four, and held"
    small = pruned_model(trainer.model, plan).eval()
    assert small.config.intermediate_size == 24 and small.config.num_key_value_heads == 1
    tokens = torch.tensor([[5, 9, 12, 30, 7, 20]])
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, trainer.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_that_has_reached_its_number_is_not_pulled_at_any_longer(model: str, tmp_path: Path) -> None:
    """A coefficient so large that the first pull leaves the wanted number, and next to nothing of it."""
    keys = {"sparse_regulariser": "wgsef", "sparse_anneal_fraction": 0.0, "sparse_coef": 3e5, "optim": "sgd"}
    trainer, weights = trained(model, tmp_path, KEYS | keys)
    for axis, kept in KEPT.items():
        first, last = norms(weights[1], axis), norms(weights[4], axis)
        assert ((first > 0).sum(1) == kept).all() and torch.equal(first == 0, last == 0)
        shrunk, after = first[first > 0] / norms(weights[0], axis)[first > 0], last[first > 0] / first[first > 0]
        assert (shrunk < 1.1e-5).all() and (after > 0.5).all(), "one more pull would do the same again"
    assert logged(trainer, "sparse/ffn_zero") == [0.25] * 4 and logged(trainer, "sparse/kv_groups_zero") == [0.5] * 4


@pytest.mark.parametrize("regulariser", ["wgsef", "mask_sparsity"])
def test_a_run_resumed_before_or_after_the_choice_is_the_one_that_never_stopped(
    regulariser: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = KEYS | {"save_strategy": "steps", "save_steps": 1, "sparse_regulariser": regulariser, "sparse_coef": 0.3}
    trainer, weights = trained(model, tmp_path, keys)
    plan = (tmp_path / "run" / PLAN_FILE).read_text()
    said = [line for line in capsys.readouterr().out.splitlines() if "are kept from here on" in line]
    assert len(said) == 2 and "24 of 32 groups of each layer" in said[0] and "larger sparse_coef" in said[0]
    for step in (2, 3):
        (tmp_path / "run" / PLAN_FILE).unlink(missing_ok=True)
        config = config_of("sft", model, tmp_path, **keys)
        resumed = build(config, text_rows(config, 16))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(torch.equal(p, weights[-1][name]) for name, p in resumed.model.named_parameters())
        for name in ("loss", "sparse/ffn_zero", "sparse/ffn_kept_norm", "sparse/kv_groups_other_norm"):
            assert logged(resumed, name) == logged(trainer, name)
        assert (tmp_path / "run" / "checkpoint-4" / PLAN_FILE).read_text() == plan
        assert (tmp_path / "run" / PLAN_FILE).read_text() == plan


@pytest.mark.parametrize("rule", ["sam", "glad", "decay_to_init"])
def test_a_gradient_rule_brings_nothing_back(rule: str, model: str, tmp_path: Path) -> None:
    """One that evaluates other weights than the model's, one that edits gradients, one that pulls to the start."""
    keys = {"gradient_rule": rule} | ({"rule_targets": "all"} if rule == "glad" else {})
    _, weights = trained(model, tmp_path, KEYS | keys)
    plan = PruningPlan.load(tmp_path / "run")
    for axis in KEPT:
        for now in (weights[3], weights[4]):
            assert [tuple(row.nonzero().flatten().tolist()) for row in norms(now, axis)] == list(getattr(plan, axis))


def test_a_checkpoint_of_another_parametrisation_is_not_gone_on_from(model: str, tmp_path: Path) -> None:
    trained(model, tmp_path, KEYS | {"save_strategy": "steps", "save_steps": 2})
    (tmp_path / "run" / "checkpoint-2" / PLAN_FILE).unlink()
    config = config_of("sft", model, tmp_path, **KEYS)
    trainer = build(config, text_rows(config, 16))
    with pytest.raises(CheckpointError, match="saved without parametrization: sparse"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_log_says_how_far_the_groups_have_come(model: str, tmp_path: Path) -> None:
    trainer, weights = trained(model, tmp_path, KEYS | {"sparse_regulariser": "group_lasso", "sparse_kv_groups": 0.0})
    assert PruningPlan.load(tmp_path / "run").kv_groups is None
    start = norms(weights[0], "ffn")
    for step in range(4):
        now = norms(weights[step + 1], "ffn")
        kept = torch.zeros(now.shape, dtype=torch.bool)
        for layer in range(LAYERS):
            kept[layer, list(top(now[layer], 24))] = True
        for name, value in (
            ("zero", float((now == 0).double().mean())),
            ("kept_norm", float(now[kept].sum() / start[kept].sum())),
            ("other_norm", float(now[~kept].sum() / start[~kept].sum())),
        ):
            assert logged(trainer, f"sparse/ffn_{name}")[step] == pytest.approx(value, rel=1e-6), (name, step)
    assert not any("kv_groups" in name for entry in trainer.state.log_history for name in entry)


def test_what_could_not_be_exported_is_refused_before_anything_trains(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys, told in (
        ({"sparse_kv_groups": 0.1}, "sparse_kv_groups: 0.1 takes 0 of the 2 groups of a layer. Write a part from 0.5"),
        ({"sparse_ffn": 0.99}, "sparse_ffn: 0.99 takes 32 of the 32 groups of a layer"),
    ):
        config = config_of("sft", model, tmp_path, **KEYS | keys)
        with pytest.raises(ModelError) as refused:
            build(config, text_rows(config, 16))
        assert told in str(refused.value)
    config = config_of("sft", model, tmp_path, **KEYS)
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ModelError, match="'gpt2' cannot be pruned"):
        prepare(config, other)
    check(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="under FSDP has not been tried"):
        check(config)
