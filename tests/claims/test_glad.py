"""The study of glad: its domains, its model and adapters, and what its tables are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import glad_study as study
from glad_adapt import Arm, Budget, edited_gradient, evaluate, train
from glad_domains import LENGTH, VOCABULARY, few_shot, make_domains, sample
from glad_lm import SCALE, WIDTH, adapted, initial_adapters, initial_weights, mean_loss
from glad_page import kept_run, write_section

SHORT = Budget(steps=4, measure_every=2)


def test_domains_are_chains_and_only_the_new_one_depends_on_the_seed() -> None:
    first, second = make_domains(0), make_domains(1)
    for chain in [*first.sources, first.new, first.shifted]:
        assert chain.shape == (VOCABULARY, VOCABULARY)
        torch.testing.assert_close(chain.sum(-1), torch.ones(VOCABULARY))
    assert torch.equal(first.sources, second.sources) and not torch.equal(first.new, second.new)


def test_the_shifted_domain_is_nearer_to_the_new_one_than_the_old_ones_are() -> None:
    """Divergence a token of the new domain from each, averaged over the token before."""
    domains = make_domains(3)

    def divergence(chain: torch.Tensor) -> float:
        return float((domains.new * (domains.new / chain).log()).sum(-1).mean())

    assert 0.05 < divergence(domains.shifted) < 0.5 * min(divergence(chain) for chain in domains.sources)


def test_sampled_transitions_follow_the_chain_and_noise_replaces_its_share() -> None:
    chain = make_domains(0).new
    tokens = sample(chain, 20_000, torch.Generator().manual_seed(0))
    assert tokens.shape == (20_000, LENGTH)
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(()), accumulate=True)
    common = counts.sum(-1) > 5000
    assert common.any()
    assert ((counts / counts.sum(-1, keepdim=True))[common] - chain[common]).abs().max() < 0.03
    noisy = sample(chain, 20_000, torch.Generator().manual_seed(0), noise=0.15)
    assert float((noisy != tokens).float().mean()) == pytest.approx(0.15 * (1 - 1 / VOCABULARY), abs=0.003)


def test_few_shot_sets_are_what_they_are_called() -> None:
    """Transitions of each test are likelier under its own chain than under any other."""
    domains = make_domains(5)
    data = few_shot(domains, seed=5)
    assert [len(x) for x in vars(data).values()] == [48, 96, 128, 128, 128]
    sets = {
        "id": (data.id, domains.new),
        "ood": (data.ood, domains.shifted),
        "old": (data.old[:32], domains.sources[0]),
    }
    chains = [*domains.sources, domains.new, domains.shifted]
    for name, (tokens, own) in sets.items():
        scores = [float(chain[tokens[:, :-1], tokens[:, 1:]].log().mean()) for chain in chains]
        assert torch.equal(chains[scores.index(max(scores))], own), name


def test_adapters_start_like_those_of_peft_and_change_nothing() -> None:
    base, adapters = initial_weights(0), initial_adapters(0)
    assert all(torch.equal(x, y) for x, y in zip(base, adapted(base, adapters), strict=True))
    layer = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    peft = {name.split(".")[-3]: p.detach() for name, p in layer.named_parameters() if "lora" in name}
    assert peft["lora_A"].shape == adapters[0].shape and not peft["lora_B"].any() and not adapters[1].any()
    assert layer.base_model.model[0].scaling["default"] == SCALE
    # Both are uniform on the same interval, so neither has an entry beyond its end and both come near it.
    for a in (peft["lora_A"], adapters[0]):
        assert 0.98 / WIDTH**0.5 < float(a.abs().max()) <= 1 / WIDTH**0.5


def test_the_model_cannot_see_what_it_predicts() -> None:
    weights = initial_weights(0)
    tokens = sample(make_domains(0).new, 4, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    shorter = mean_loss(weights, tokens[:, :-1])
    for row in (tokens, changed):
        last = mean_loss(weights, row) * (LENGTH - 1) - shorter * (LENGTH - 2)
        assert float(last) > 0
    torch.testing.assert_close(mean_loss(weights, changed[:, :-1]), shorter)


def test_an_arm_without_a_displacement_trains_as_plain_lora_does() -> None:
    base, data = initial_weights(0), few_shot(make_domains(0), seed=0, validation=8, test=8)
    plain, glad, far = (train(arm, base, data, 0, SHORT)["curve"] for arm in (Arm(), Arm("glad", 0), Arm("glad", 1)))
    assert plain == glad
    assert plain["train"][0] == far["train"][0] and plain["train"][-1] != far["train"][-1]


def test_sam_hands_over_the_gradient_at_the_displaced_adapters() -> None:
    base, data = initial_weights(0), few_shot(make_domains(0), seed=0, validation=8, test=8)
    adapters = [a + 0.01 for a in initial_adapters(0)]
    first = evaluate(base, adapters, data.train)
    length = sum(float(g.square().sum()) for g in first.gradient) ** 0.5
    moved = [a + 0.3 / length * g for a, g in zip(adapters, first.gradient, strict=True)]
    edited, metrics = edited_gradient(Arm("sam", 0.3).chosen(), base, first, data.train)
    for e, g in zip(edited, evaluate(base, moved, data.train).gradient, strict=True):
        torch.testing.assert_close(e, g, rtol=1e-3, atol=1e-6)
    assert set(metrics) == {"gradient/cosine", "gradient/conflict_rate"}


def run(validation: list[float], test: list[float]) -> dict[str, Any]:
    """A finished run of three checkpoints."""
    return {"curve": {"step": [0, 1, 2], "validation": validation} | dict.fromkeys(study.SETS, test)}


def test_the_best_checkpoint_is_chosen_by_validation_and_not_by_the_test() -> None:
    runs = {"plain LoRA": [run([3, 1, 2], [9, 5, 4]), run([3, 2, 1], [9, 7, 6])]}
    runs["glad 0.3"] = [run([1, 2, 3], [5, 0, 0]), run([3, 2, 1], [0, 0, 4])]
    assert study.losses(runs, "plain LoRA", "ood").tolist() == [5, 6]
    assert study.losses(runs, "plain LoRA", "ood", final=True).tolist() == [4, 6]
    assert study.changes(runs, final=False)["glad 0.3"][0].startswith("-1.000 [")
    table = study.claim_table(runs, study.Choice(0.3, 0.1, {}))
    assert "| out of domain: glad below plain LoRA | 1.000 [-11.706, 13.706] | 1 of 2 | **not shown** |" in table


def test_tuning_takes_the_lowest_validation_loss_and_no_other_seed() -> None:
    seen = []

    def fake(arm: Arm, seed: int) -> dict[str, Any]:
        seen.append(seed)
        return run([5, 2 - arm.rho - arm.rate_factor, 5], [0, 0, 0])

    choice = study.tune(fake)
    assert (choice.rho, choice.rate_factor) == (1.0, 0.3)
    assert set(seen) == {study.TUNING_SEED}


def test_a_finished_run_is_read_again_unless_its_settings_changed(tmp_path: Path) -> None:
    made = []

    def compute() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    settings = vars(replace(SHORT, steps=8))
    assert [kept_run(tmp_path / "a.json", settings, compute)["value"] for _ in range(2)] == [1, 1]
    assert kept_run(tmp_path / "a.json", settings | {"steps": 9}, compute)["value"] == 2


def test_a_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "# Head\n", "a", "old")
    write_section(page, "# Head\n", "b", "other")
    page.write_text(page.read_text(encoding="utf-8") + "\nBy hand.\n", encoding="utf-8")
    write_section(page, "# Head\n", "a", "new")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Head\n") and text.endswith("By hand.\n") and "old" not in text
    assert text.index("new") < text.index("other")
