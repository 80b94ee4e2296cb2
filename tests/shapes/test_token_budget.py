"""Micro-batches filled by tokens hold the rows of a step, and nothing that is learnt or logged depends on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from alignkit.data.load import load_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.errors import ConfigError
from alignkit.gradients._hook import ChosenRule
from alignkit.models.attachment import Attachment
from alignkit.models.choices import Choice
from alignkit.parts.rule import load_rule
from alignkit.parts.shape import load_shape
from alignkit.shapes._candidates import BridgeSettings, LateRowsTrainer
from alignkit.shapes._token_budget import CPU_TOKENS, micro_batches, row_tokens
from tests import supervised
from tests.programs.conftest import save_model
from tests.shapes.building import MODEL_SHAPES, build, config_of, text_rows
from tests.trainers import dpo_arguments, flat_weights, logged, random_rows

LENGTHS = st.lists(st.integers(1, 60), max_size=30)
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
"""Eight rows a step, in four micro-batches where they are counted by rows."""
LEARNING = SPLIT | {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd"}


# --- the plan ---------------------------------------------------------------------------------------------------------


def cost(lengths: Sequence[int], part: Sequence[int], padded: bool) -> int:
    tokens = [lengths[row] for row in part]
    return len(tokens) * max(tokens) if padded else sum(tokens)


@given(LENGTHS, st.integers(1, 120), st.integers(1, 12), st.booleans())
def test_each_row_stands_once_in_a_micro_batch_within_the_budget(
    lengths: list[int], budget: int, at_least: int, padded: bool
) -> None:
    found = micro_batches(lengths, budget, at_least, padded=padded)
    assert sorted(row for part in found for row in part) == list(range(len(lengths)))
    assert len(found) >= at_least
    full = [part for part in found if part]
    assert all(len(part) == 1 or cost(lengths, part, padded) <= budget for part in full)
    longest = [max(lengths[row] for row in part) for part in full]
    assert longest == sorted(longest, reverse=True) and found[: len(full)] == full
    # One is empty only where no row is left to split off.
    assert len(full) == len(found) or all(len(part) == 1 for part in full)
    assert found == micro_batches(lengths, budget, at_least, padded=padded)


@given(LENGTHS, st.integers(1, 120))
def test_no_two_micro_batches_without_padding_would_fit_into_one(lengths: list[int], budget: int) -> None:
    found = micro_batches(lengths, budget, padded=False)
    for i, part in enumerate(found):
        for other in found[i + 1 :]:
            assert not part or cost(lengths, part + other, False) > budget


def cheapest(lengths: Sequence[int], budget: int, price: Callable[[list[list[int]]], float]) -> float:
    """Of all ways of dealing rows out within a budget, by trying them."""
    padded, best = price is not len, float("inf")

    def deal(row: int, parts: list[list[int]]) -> None:
        nonlocal best
        if row == len(lengths):
            best = min(best, price(parts))
            return
        for part in [*parts, []]:
            grown = [*part, row]
            if len(grown) == 1 or cost(lengths, grown, padded) <= budget:
                deal(row + 1, [*(other for other in parts if other is not part), grown])

    deal(0, [])
    return best


FEW = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@given(FEW, st.integers(20, 60))
def test_rows_without_padding_take_hardly_more_micro_batches_than_they_must(lengths: list[int], budget: int) -> None:
    """First fit, longest first, is known to need no more than 11/9 of them and 2/3."""
    assert len(micro_batches(lengths, budget, padded=False)) <= 11 / 9 * cheapest(lengths, budget, len) + 2 / 3


@given(FEW, st.integers(10, 100))
def test_padding_and_passes_together_cost_as_little_as_can_be(lengths: list[int], budget: int) -> None:
    def price(parts: list[list[int]]) -> float:
        return sum(cost(lengths, part, True) + budget / 16 for part in parts)

    ours = price(micro_batches(lengths, budget, padded=True))
    assert ours == pytest.approx(cheapest(lengths, budget, price))


def test_rows_are_measured_as_they_are_laid_out() -> None:
    rows = random_rows([(5, (3, 7)), (2, (4, 1, 2))])
    assert row_tokens(rows, packed=True, multiple=None) == [5 - 1 + 3 + 7, 2 - 1 + 4 + 1 + 2]
    # A batch has as many candidates a row as its widest row.
    assert row_tokens(rows, packed=False, multiple=None) == [3 * (5 + 7), 3 * (2 + 4)]
    assert row_tokens(rows, packed=False, multiple=8) == [3 * 16, 3 * 8]
    assert row_tokens([{"input_ids": [1] * 9}], packed=False, multiple=4) == [12]


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Pairs as ragged as GSM8K's: prompts of 10 to 60 tokens, completions of 4 to 30."""
    draw = random.Random(3)
    shapes = [(draw.randint(10, 60), (draw.randint(4, 30), draw.randint(4, 30))) for _ in range(20)]
    return Dataset.from_list(random_rows(shapes, seed=4))


@pytest.fixture(scope="module")
def texts() -> Dataset:
    """Supervised rows of which the completions are trained."""
    return supervised.token_rows(supervised.completions(20))


class Seen(TrainerCallback):
    """Keeps gradients, which are clipped to a norm of 1."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [parameter.grad.flatten() for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        self.gradients.append(torch.cat(trained))


def trained(trainer: Any, budget: Any) -> Any:
    """``trainer`` after training, with ``pieces`` and ``seen``.

    Of each step the rows of each of its micro-batches, and its gradient.
    """
    trainer.fill_by_tokens(budget)
    trainer.pieces, trainer.seen, compute = [], Seen(), trainer.compute_loss
    trainer.add_callback(trainer.seen)

    def compute_loss(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        step = trainer.state.global_step
        trainer.pieces += [[] for _ in range(step + 1 - len(trainer.pieces))]
        trainer.pieces[step].append(trainer.num_rows(inputs))
        return compute(model, inputs, *rest, **more)

    trainer.compute_loss = compute_loss
    trainer.train()
    return trainer


def assert_same(ours: Any, theirs: Any) -> None:
    """Of two runs: the rows of every step, what is logged of it, its gradient."""
    assert [sum(step) for step in ours.pieces] == [sum(step) for step in theirs.pieces]
    assert ours.pieces != theirs.pieces
    keys = set(theirs.state.log_history[0])
    assert {"loss", "grad_norm"} < keys and min(logged(theirs, "grad_norm")) > 0.05
    for key in keys:
        # Some metrics are differences of log-probs of several hundred nats, which float32 knows to 1e-5.
        exact = key.startswith("loss") or key in ("epoch", "num_tokens")
        near = {"rel": 1e-6, "abs": 1e-6} if exact else {"rel": 1e-5, "abs": 5e-5}
        assert logged(ours, key) == pytest.approx(logged(theirs, key), **near), key
    for gradient, expected in zip(ours.seen.gradients, theirs.seen.gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layout", "adapter"), [("padded", True), ("packed", False)])
def test_supervised_rows_learn_the_same(layout: str, adapter: bool, texts: Dataset, tmp_path: Path) -> None:
    """Twenty rows are two steps and a half: the last step of a pass has fewer rows."""
    theirs, many, one = [
        trained(supervised.make(tmp_path, texts, adapter, layout=layout, **LEARNING), budget)
        for budget in (None, 60, 10_000)
    ]
    assert theirs.pieces == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2]] and one.pieces == [[8], [8], [4]]
    assert max(map(len, texts["input_ids"])) > 60 and len(many.pieces[0]) > 4
    assert_same(many, theirs)
    assert_same(one, theirs)


@pytest.mark.parametrize(("layout", "adapter"), [("padded", False), ("packed", True)])
def test_pairs_learn_the_same(layout: Any, adapter: bool, pairs: Dataset, make_trainer: Callable[..., Any]) -> None:
    peft = supervised.lora() if adapter else None
    shared = {"settings": BridgeSettings(layout), "arguments": LEARNING, "train_dataset": pairs, "peft_config": peft}
    theirs, some, one = [trained(make_trainer("flex_dpo", **shared), budget) for budget in (None, 250, 10_000)]
    assert one.pieces == [[8], [8], [4]] and len(some.pieces[0]) > 1
    assert_same(some, theirs)
    assert_same(one, theirs)


def test_packed_rows_and_the_terms_of_a_parametrisation_count_the_same(texts: Dataset, tmp_path: Path) -> None:
    how = {"packing": True, "max_length": 128, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    how = LEARNING | how | {"max_steps": 2}

    class Pull(Attachment):
        def terms(self) -> dict[str, torch.Tensor]:
            return {"pull": trainer.model.lm_head.weight.square().sum()}

    runs = []
    for budget in (None, 300):
        trainer = supervised.make(tmp_path, texts, **how)
        trainer.attach(Pull())
        runs.append(trained(trainer, budget))
    assert "loss/pull" in runs[0].state.log_history[0]
    assert_same(runs[1], runs[0])


# --- resumption, streams, exchanged rows ------------------------------------------------------------------------------


def test_a_run_resumed_within_a_pass_is_bitwise_the_uninterrupted_one(texts: Dataset, tmp_path: Path) -> None:
    how = LEARNING | {"max_steps": 5, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    whole = trained(supervised.make(tmp_path, texts, **how), 150)
    for step in (1, 4):
        resumed = supervised.make(tmp_path, texts, **how)
        resumed.fill_by_tokens(150)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
        assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_stream_is_dealt_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, supervised.completions(10))))

    def make(folder: str) -> Any:
        rows = load_rows(str(path), family=supervised_rows(), streaming=True).shuffle(seed=3, buffer_size=4)
        stream = to_supervised_rows(rows, supervised.tokenizer(), max_length=None)[0]
        how = LEARNING | {"max_steps": 6, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
        return supervised.make(tmp_path / folder, stream, **how, save_strategy="steps", save_steps=4)

    whole, resumed = trained(make("whole"), 150), make("resumed")
    assert_same(whole, trained(make("by_rows"), None))
    resumed.fill_by_tokens(150)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))


def test_rows_exchanged_between_two_steps_are_those_of_the_moment(
    pairs: Dataset, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    def run(budget: int | None) -> Any:
        plain = make_trainer("flex_dpo", train_dataset=pairs)
        trainer = LateRowsTrainer(
            plain.model,
            dpo_arguments(tmp_path / "late", **LEARNING),
            method=plain.method,
            options=plain.method_options,
            train_dataset=pairs,
            processing_class=plain.processing_class,
        )
        before = trainer.next_batches

        def next_batches(*how: Any) -> Any:
            if trainer.state.global_step == 1:
                trainer.train_dataset = Dataset.from_list(list(pairs)[::-1])
            return before(*how)

        trainer.next_batches = next_batches
        return trained(trainer, budget)

    assert_same(run(250), run(None))


# --- what is refused, and what is chosen ------------------------------------------------------------------------------


def test_what_depends_on_the_rows_beside_is_refused_by_name(texts: Dataset, tmp_path: Path) -> None:
    ruled = supervised.make(tmp_path, texts)
    sam = load_rule("sam")
    ruled.gradient_rule = ChosenRule(sam, sam.options(rule_targets="all"))
    with pytest.raises(ConfigError, match=r"tokens_per_batch: 500.*gradient_rule: sam.*Remove one"):
        ruled.fill_by_tokens(500)
    pulled = supervised.make(tmp_path, texts)
    decay = load_rule("decay_to_init")
    pulled.gradient_rule = ChosenRule(decay, decay.options())
    pulled.fill_by_tokens(500)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    experts = Qwen3MoeConfig(
        vocab_size=300, head_dim=8, moe_intermediate_size=8, num_experts=4, output_router_logits=True, **sizes
    )
    balanced = supervised.make(tmp_path, texts, model=Qwen3MoeForCausalLM(experts), router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match=r"load-balancing loss.*router_aux_loss_coef: 0"):
        balanced.fill_by_tokens("auto")


def test_what_is_said_and_chosen(texts: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = supervised.make(tmp_path, texts, per_device_train_batch_size=3)
    longest = max(map(len, texts["input_ids"]))
    trainer.fill_by_tokens(longest)
    assert "tokens_per_batch" not in capsys.readouterr().out
    trainer.fill_by_tokens(longest - 1)
    assert f"less than the longest row has ({longest})" in capsys.readouterr().out
    assert str(trainer.choices["tokens_per_batch"]) == f"tokens_per_batch {longest - 1} (pinned)"
    trainer.fill_by_tokens("auto")
    assert trainer.tokens_per_batch == trainer.choices["tokens_per_batch"].value == CPU_TOKENS
    trainer.fill_by_tokens("auto", Choice("tokens_per_batch", 700, "when the run began"))
    assert trainer.tokens_per_batch == 700


@pytest.mark.parametrize("shape", ["candidates", "tokens", "routed"])
def test_a_config_has_its_micro_batches_filled(shape: str, tmp_path: Path) -> None:
    """The routing of a prompt does not depend on the rows beside it."""
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", **MODEL_SHAPES.get(shape, {}))
    keys = {"parametrization": "full", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = []
    for budget in (None, 4000) if shape == "routed" else (4000,):
        own = {"tokens_per_batch": budget, "max_steps": 2, **keys}
        config = config_of(load_shape(shape).program, str(tmp_path / "model"), tmp_path, **own)
        trainer = build(config, text_rows(config, 8))
        trainer.train()
        runs.append([trainer.micro_batches_of_step, logged(trainer, "loss"), logged(trainer, "grad_norm")])
    assert runs[-1][0] == 1
    for expected, found in zip(runs[0][1:], runs[-1][1:], strict=True):
        assert found == pytest.approx(expected, rel=1e-6) and len(found) == 2
