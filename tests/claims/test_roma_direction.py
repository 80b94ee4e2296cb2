"""The direction that RoMA's mechanism test is to show, with three seeds, two sizes of the damage and lambda 1."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest

from roma_arms import ARMS, CE, RANDOM, RATE, ROMA, build_bank, train_routers
from roma_toy import accuracy, damage, draw_split, pretrain

SEEDS = (0, 1, 2)
NOISES = (1.0, 2.0)


@pytest.mark.experiment
def test_neighbours_beat_cross_entropy_alone_and_random_neighbours() -> None:
    found: dict[str, list[float]] = {CE: [], ROMA: [], RANDOM: []}
    whole = {seed: pretrain(seed, task_routing=True, until=0.6) for seed in SEEDS}
    for seed, noise in product(SEEDS, NOISES):
        model, split = copy.deepcopy(whole[seed]), draw_split(seed, 120)
        damage(model, noise, seed)
        for name, weight in ((CE, 0.0), (ROMA, 1.0), (RANDOM, 1.0)):
            bank = build_bank(model, split.train, ARMS[name], seed)
            trained = train_routers(model, split.train, bank, ARMS[name], weight=weight, rate=RATE, seed=seed)
            found[name].append(accuracy(trained, split.test))
    means = {name: np.mean(values) for name, values in found.items()}
    assert means[ROMA] > means[CE]
    assert means[ROMA] > means[RANDOM] + 0.05
