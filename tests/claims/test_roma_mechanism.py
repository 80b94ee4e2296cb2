"""The toy of RoMA is what it claims to be; how it comes out with three seeds is in test_roma_direction.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import OlmoeForCausalLM

import roma_arms
from roma_arms import ARMS, CE, DENSE, RANDOM, RATE, ROMA, Arm, build_bank, routed_batch, run_arm, train_routers
from roma_mechanism import SETTINGS, accuracies, against, chosen, differences
from roma_toy import (
    MODULUS,
    PARAPHRASES,
    SEEN,
    SIGN,
    TASKS,
    TEST,
    VALIDATION,
    Split,
    all_samples,
    damage,
    draw_split,
    new_model,
    paraphrases,
    routers,
)


@pytest.fixture(scope="module")
def model() -> OlmoeForCausalLM:
    untrained = new_model(0).eval()
    damage(untrained, 1.0, seed=0)
    return untrained


@pytest.fixture(scope="module")
def split() -> Split:
    return draw_split(0, 120)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roma_arms, "STEPS", 3)
    yield


def test_answers_are_those_of_the_functions() -> None:
    functions = (
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: 2 * a + b,
        lambda a, b: a + 3 * b,
        lambda a, b: a**2 + b,
    )
    samples = all_samples(0)
    assert len(samples.tasks) == TASKS * PARAPHRASES * MODULUS**2
    for prompt, task, answer in zip(samples.prompts.tolist(), samples.tasks, samples.answers, strict=True):
        instruction, a, b, sign = prompt
        assert (instruction - MODULUS) // PARAPHRASES == task and sign == SIGN
        assert answer == functions[int(task)](a, b) % MODULUS


def test_labelled_samples_have_half_of_the_paraphrases_and_none_is_in_the_test(split: Split) -> None:
    parts = [split.train, split.validation, split.test]
    assert [len(part.tasks) for part in parts] == [120, VALIDATION, TEST]
    prompts = [tuple(row) for part in parts for row in part.prompts.tolist()]
    assert len(set(prompts)) == len(prompts)
    assert paraphrases(split.train).max() < SEEN and paraphrases(split.validation).max() < SEEN
    assert set(paraphrases(split.test).tolist()) == set(range(PARAPHRASES))


def test_damage_is_noise_on_the_last_two_routers_alone() -> None:
    before, after = new_model(1), new_model(1)
    damage(after, 2.0, seed=1)
    names = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert names == {f"model.layers.{layer}.mlp.gate.weight" for layer in (2, 3)}
    for old, new in zip(routers(before), routers(after), strict=True):
        assert ((new - old).std() / old.std()).item() == pytest.approx(2.0, rel=0.1)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", [ROMA, DENSE])
def test_training_moves_the_last_two_routers_of_a_copy(model: OlmoeForCausalLM, split: Split, name: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bank = build_bank(model, split.train, ARMS[ROMA], seed=0)
    trained = train_routers(model, split.train, bank, ARMS[name], weight=1.0, rate=1e-2, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    moved = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in (2, 3)}


@pytest.mark.usefixtures("short")
def test_roma_draws_the_routing_nearer_to_its_targets_and_dense_gradients_are_others(
    model: OlmoeForCausalLM, split: Split
) -> None:
    bank = build_bank(model, split.train, ARMS[ROMA], seed=0)
    everyone = torch.arange(len(split.train.tasks))

    def after(arm: Arm, weight: float) -> tuple[float, torch.Tensor]:
        trained = train_routers(model, split.train, bank, arm, weight=weight, rate=1e-2, seed=0)
        batch = routed_batch(trained, split.train, bank, everyone, 0)
        distance = (batch.routing - batch.target_routing).square().sum(1)[batch.has_target].mean()
        return distance.item(), torch.cat(routers(trained))

    plain, weights = after(ARMS[CE], 0.0)
    assert after(ARMS[ROMA], 10.0)[0] < plain
    assert not torch.allclose(after(ARMS[DENSE], 0.0)[1], weights, atol=1e-4)


@torch.no_grad()
def test_the_bank_by_hand(model: OlmoeForCausalLM, split: Split) -> None:
    """The target of one sample from the definition: nearest three that the model solves, of one of its tasks."""
    train = split.train
    bank = build_bank(model, train, ARMS[ROMA], seed=0)
    output = model(train.prompts, output_router_logits=True)
    solved = output.logits[:, -1, :MODULUS].argmax(-1) == train.answers
    layers = [logits.view(120, 4, 12)[:, -1].softmax(-1) for logits in output.router_logits[2:]]
    routing = torch.cat(layers, dim=1)
    torch.testing.assert_close(bank.routing, routing)
    units = train.embeddings / train.embeddings.norm(dim=1, keepdim=True)
    row = int((solved & bank.has_target).nonzero()[0])
    similarity = torch.exp(-(units - units[row]).square().sum(1) / (2 * 0.4**2))
    similarity[~solved] = 0.0
    similarity[row] = 0.0
    near = similarity.topk(3).indices
    weights = similarity[near] / similarity[near].sum()
    torch.testing.assert_close(bank.target[row], weights @ routing[near], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("short")
def test_arms_report_every_trial_and_the_tables_name_every_setting(model: OlmoeForCausalLM, split: Split) -> None:
    few = Split(split.train, split.validation, split.test.rows(torch.arange(50)))
    found = run_arm(model, few, Arm(weights=(0.3, 1.0), mode="random"), seed=0)
    assert [(trial["weight"], trial["rate"]) for trial in found] == [(0.3, RATE), (1.0, RATE)]
    trial = {"weight": 1.0, "rate": 0.01, "validation": 0.5, "test": 0.25, "unseen": 0.5}
    run = {"pretrained": 1.0, "base": 0.125, "purity": {ROMA: 1.0, RANDOM: 0.2}}
    run |= {name: [trial | {"weight": 0.3, "validation": 0.4, "test": 0.9}, trial] for name in ARMS}
    runs = {name: [run, run] for name in SETTINGS}
    assert all(len(cells) == len(SETTINGS) for table in (accuracies(runs), against(runs)) for cells in table.values())
    assert accuracies(runs)["RoMA"][0].startswith("0.250"), "what validation prefers, not what the test prefers"
    assert all(np.shape(values) == (2,) for values in differences(runs).values())


def test_the_first_of_several_equals_is_chosen() -> None:
    trials = [{"weight": weight, "validation": score} for weight, score in ((0.3, 0.5), (1.0, 0.7), (3.0, 0.7))]
    assert chosen(trials)["weight"] == 1.0
