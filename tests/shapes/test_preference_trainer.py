"""Normalisation, metrics, candidates beyond pairs and the conformance of every discovered preference method."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, Metric, count_items
from alignkit.parts.method import Method, Paper, load_method, method_names
from alignkit.shapes._candidates import METRICS as BRIDGE_METRICS
from alignkit.shapes._candidates import BridgeSettings
from alignkit.shapes._probe import METRICS as PROBE_METRICS
from alignkit.shapes._probe import DispersionProbe
from tests.alike import stands_for_others
from tests.trainers import flat_weights, logged, random_rows

PREFERENCE_METHODS = [name for name in method_names() if load_method(name).program == "preference"]
TRAINER_KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
SPLITS = [(4, 1), (2, 2), (1, 4)]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **changes)


def listwise(batch: CandidateBatch, options: Any) -> LossOutput:
    """Cross-entropy of the best candidate over the log-ratios: enough to train lists of any length."""
    assert batch.ref_token_logps is not None
    ratios = batch.policy_logps - batch.ref_token_logps.sum(-1)
    logps = ratios.masked_fill(~batch.candidate_mask, -torch.inf).log_softmax(-1)
    counts = count_items(batch.completion_mask)
    nll = -batch.policy_logps.masked_fill(~batch.candidate_mask, 0).sum(-1)
    terms = (
        LossTerm("list", -logps[:, 0], counts["group"]),
        LossTerm("nll", nll, counts["completion_token"], "completion_token", 0.1),
    )
    return LossOutput(terms, {"list/best": Metric(logps[:, 0].detach())})


class NoOptions:
    """The list objective has none."""


LISTWISE = Method("listwise", "", NoOptions, listwise, {"list/best": ""}, Paper("", "", ""), "", num_candidates=None)


def rows_for(name: str, rows: Dataset) -> Dataset:
    """``rows`` with everything the method called ``name`` needs of them."""
    method = load_method(name)
    if method.is_unpaired:
        return rows.map(_labelled, with_indices=True, fn_kwargs={"all_ids": rows["completion_ids"]})
    if "token_rewards" not in method.needs(method.options()):
        return rows
    draw = random.Random(4)
    rewards = [[[draw.uniform(-0.5, 0.5) for _ in ids] for ids in row] for row in rows["completion_ids"]]
    return rows.add_column("token_rewards", rewards)


def _labelled(row: dict[str, Any], index: int, all_ids: list[list[list[int]]]) -> dict[str, Any]:
    """One labelled answer, good in every other row, and behind it an answer to another prompt."""
    other = all_ids[(index + 1) % len(all_ids)][0]
    return {"completion_ids": [row["completion_ids"][0], other], "scores": [float(index % 2 == 0), -1.0]}


def sft_options() -> Any:
    return load_method("flex_dpo").options(eta=0.3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_splitting_a_step_into_micro_batches_changes_nothing(make_trainer: Any, layout: str) -> None:
    """The token-level SFT term is where a mean of means would show: completions differ in length."""
    runs = []
    for size, steps in SPLITS:
        trainer = make_trainer(
            "flex_dpo",
            sft_options(),
            BridgeSettings(layout=layout),
            {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps},
        )
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss/sft")[0] > 0
    for other in runs[1:]:
        assert logged(other, "loss") == pytest.approx(logged(runs[0], "loss"), abs=1e-6)
        assert logged(other, "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), abs=1e-5)
        for key in load_method("flex_dpo").metrics:
            assert logged(other, key) == pytest.approx(logged(runs[0], key), abs=1e-5, rel=1e-5), key


def test_the_loss_is_the_weighted_sum_of_its_terms(make_trainer: Any, rows: Dataset) -> None:
    trainer = make_trainer(
        "flex_dpo", sft_options(), arguments={"eval_strategy": "steps", "eval_steps": 6}, eval_dataset=rows
    )
    trainer.train()
    for loss, preference, sft in zip(
        *(logged(trainer, k) for k in ("loss", "loss/preference", "loss/sft")), strict=True
    ):
        assert loss == pytest.approx(preference + 0.3 * sft, abs=1e-6)
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    expected = evaluation["eval_loss/preference"] + 0.3 * evaluation["eval_loss/sft"]
    assert evaluation["eval_loss"] == pytest.approx(expected, abs=1e-7)


def test_evaluation_does_not_depend_on_the_batch_size(make_trainer: Any, rows: Dataset) -> None:
    results = []
    for size in (1, 3, 16):
        trainer = make_trainer(
            "flex_dpo", sft_options(), arguments={"per_device_eval_batch_size": size}, eval_dataset=rows
        )
        results.append({k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "second"))})
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ragged_candidate_lists_train_and_split(make_trainer: Any, layout: str) -> None:
    shapes = [(5, (3, 4, 2, 5)), (2, (6, 1)), (9, (2, 2, 2)), (4, (1, 7, 3, 3))] * 2
    lists = Dataset.from_list(random_rows(shapes, seed=5))
    weights = []
    for size, steps in SPLITS:
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 4}
        trainer = make_trainer(LISTWISE, None, BridgeSettings(layout=layout), arguments, train_dataset=lists)
        trainer.train()
        weights.append((logged(trainer, "loss"), flat_weights(trainer.model)))
    for losses, _ in weights[1:]:
        assert losses == pytest.approx(weights[0][0], abs=2e-5)
    assert weights[0][0][-1] < weights[0][0][0]


MEMORABLE: dict[str, dict[str, float]] = {
    **{name: {"beta": 0.1} for name in ("bco_pair", "nca_pair", "robust")},
    "apo_down": {"beta": 0.3},
    "discopop": {"beta": 0.1, "discopop_tau": 1.0},
    "orpo": {"beta": 10.0},
}
"""Options of runs of 30 steps. A small beta asks for margins that these do not reach; discopop with its small tau
drives a pair that starts at the reference the wrong way (``test_discopop.py``); and the likelihood of words at random
rises slowly in adapters, so that terms of it are not to be most of a loss."""

LOWEST = {"nca_pair": 1.5 * math.log(3) - math.log(2)}
"""What a loss falls to at most, where that is not 0: -log(2/3) - 1/2 log(1/3), the chosen reward at log 2."""


KINDS = ("full", "lora")
IN_FULL = ("cpo",)
"""Where the chosen response must become the likelier one, most of all by likelihood: too much for small adapters."""
MEMORISED = [
    (name, kind)
    for index, name in enumerate(PREFERENCE_METHODS)
    for kind in (KINDS if stands_for_others(name) else KINDS[0 if name in IN_FULL else index % 2 :][:1])
]
"""Of methods that differ in their loss alone, one is trained in both ways and each other one in one."""


@pytest.mark.parametrize(("name", "parametrization"), MEMORISED)
def test_conformance_memorises_eight_rows(make_trainer: Any, rows: Dataset, name: str, parametrization: str) -> None:
    eight = rows_for(name, rows.select(range(8)))
    trainer = make_trainer(
        name,
        load_method(name).options(**MEMORABLE.get(name, {})),
        arguments={
            "max_steps": 30,
            "learning_rate": 3e-3 if parametrization == "full" else 1e-2,
            "per_device_train_batch_size": 8,
        },
        train_dataset=eight,
        peft_config=lora() if parametrization == "lora" else None,
    )
    before = flat_weights(trainer.model)
    trainer.train()
    lowest = LOWEST.get(name, 0.0)
    assert logged(trainer, "loss")[-1] - lowest < 0.6 * (logged(trainer, "loss")[0] - lowest)
    if load_method(name).is_unpaired:
        assert logged(trainer, "rewards/chosen")[-1] > 0 > logged(trainer, "rewards/rejected")[-1]
    else:
        assert logged(trainer, "rewards/accuracies")[-1] == 1.0
    moved = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    if parametrization == "lora":
        assert moved
        assert all("lora_" in n for n in moved)
    assert not torch.equal(before, flat_weights(trainer.model))


@pytest.mark.parametrize("name", PREFERENCE_METHODS)
def test_conformance_logs_exactly_the_documented_metrics(make_trainer: Any, rows: Dataset, name: str) -> None:
    complete = rows_for(name, rows)
    trainer = make_trainer(name, arguments={"max_steps": 2}, train_dataset=complete)
    trainer.add_callback(DispersionProbe(trainer, complete.select(range(4)), 1))
    trainer.train()
    documented = set(load_method(name).metrics) | set(BRIDGE_METRICS) | set(PROBE_METRICS)
    if not trainer.has_frozen_reference:
        documented -= {"dispersion"}
    logged_keys = set(trainer.state.log_history[0]) - TRAINER_KEYS
    terms = {key for key in logged_keys if key.startswith("loss/")}
    assert terms
    assert logged_keys - terms == documented


def test_probe_measures_what_it_says(make_trainer: Any, rows: Dataset) -> None:
    held_out = Dataset.from_list(random_rows([(4, (3, 6)), (7, (2, 5)), (3, (8, 1))], seed=9))
    trainer = make_trainer(arguments={"max_steps": 3, "learning_rate": 5e-3}, peft_config=lora())
    trainer.add_callback(DispersionProbe(trainer, held_out, 3))
    trainer.train()
    assert len(logged(trainer, "dispersion")) == 1, "every third step"
    inputs = trainer.data_collator(list(held_out))
    lengths = inputs["completion_mask"].sum(-1)
    policy, ref = trainer.probe_logps(inputs).sum(-1), trainer.reference.token_logps(inputs).sum(-1)
    assert logged(trainer, "mean_logps/probe")[0] == pytest.approx((policy.sum() / lengths.sum()).item(), abs=1e-5)
    assert logged(trainer, "dispersion")[0] == pytest.approx(((policy - ref) / lengths).mean().item(), abs=1e-5)
    assert trainer.model.training


def test_bf16_autocast_trains_in_both_layouts(make_trainer: Any) -> None:
    losses = {}
    for layout in ("padded", "packed"):
        trainer = make_trainer(settings=BridgeSettings(layout=layout), arguments={"bf16": True, "max_steps": 3})
        trainer.train()
        losses[layout] = logged(trainer, "loss")
    assert losses["padded"] == pytest.approx(losses["packed"], abs=0.05)
    assert losses["padded"][0] == pytest.approx(0.6931, abs=5e-3)


def test_gradient_checkpointing_changes_no_number(make_trainer: Any) -> None:
    weights = []
    for enabled in (False, True):
        trainer = make_trainer(
            settings=BridgeSettings(layout="packed"),
            arguments={"gradient_checkpointing": enabled, "max_steps": 3},
        )
        trainer.train()
        weights.append(flat_weights(trainer.model))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-7, rtol=1e-6)


def test_no_logits_are_ever_returned(make_trainer: Any, rows: Dataset) -> None:
    trainer = make_trainer()
    inputs: dict[str, Tensor] = trainer.data_collator([rows[0]])
    with pytest.raises(NotImplementedError, match=r"alignkit evaluate"):
        trainer.compute_loss(trainer.model, inputs, return_outputs=True)
