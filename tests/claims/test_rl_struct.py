"""The small JSON writer of the RL-Struct ablation: its task, its faults, and that GRPO on all parts mends them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rl_struct import ARMS, DROPPED, FULL, WEIGHTS
from rl_struct_toy import (
    FAULTS,
    PROMPT,
    REWARDS,
    STOP,
    Question,
    Writer,
    ask,
    encode,
    measure,
    rewarded,
    spoilt,
    taught,
    train,
)


def test_the_wanted_answer_has_every_reward_in_full() -> None:
    questions = ask(50, np.random.default_rng(0))
    found = rewarded(questions, [question.answer for question in questions])
    assert set(found) == {"valid", "struct", "format", "correct"}
    assert all((values == 1).all() for values in found.values())
    assert json.loads(Question(3, "*", 4).answer) == {"a": 3, "op": "*", "ans": 12}


def test_rewards_tell_the_faults_apart() -> None:
    question = Question(3, "+", 4)
    written = [
        '{"a":3,"op":"+","ans":7,}',
        '{"a":3,"op":"+"}',
        'ok {"a":3,"op":"+","ans":7}',
        '{"a":3,"op":"+","ans":8}',
    ]
    found = rewarded([question] * 4, written)
    assert found["valid"].tolist() == [0, 1, 0, 1]
    assert found["struct"].tolist() == [0, pytest.approx(2 / 3), 0, 1]
    assert found["format"].tolist() == [1, 1, 0, 1]
    assert found["correct"].tolist() == [0, 0, 0, 0]


def test_answers_are_spoilt_as_often_as_told() -> None:
    generator = np.random.default_rng(1)
    questions = ask(3_000, generator)
    found = rewarded(questions, [spoilt(question, generator) for question in questions])
    syntax, structure, around = FAULTS
    assert (found["valid"] == 1).mean() == pytest.approx((1 - syntax) * (1 - around), abs=0.03)
    assert (found["struct"] == 1).mean() == pytest.approx((1 - syntax) * (1 - around) * (1 - structure), abs=0.03)


def test_the_mask_covers_the_answer_and_its_stop_token() -> None:
    rows, mask = encode(["1+2{}", "1+2{"])
    assert (rows[:, 1:][mask] == STOP).sum() == 2 and mask.sum(-1).tolist() == [3, 2]
    assert not mask[:, : PROMPT - 1].any() and mask[:, PROMPT - 1].all()


def test_an_arm_drops_one_part_and_leaves_the_weights_of_the_others() -> None:
    assert ARMS[FULL] == WEIGHTS == {name: reward.weight for name, reward in REWARDS.items()}
    for part in DROPPED:
        assert ARMS[f"without {part}"] == {name: weight for name, weight in WEIGHTS.items() if name != part}


def test_grpo_on_all_parts_mends_what_was_spoilt() -> None:
    before = Writer()
    before.load_state_dict(taught(0, 60))
    after = train(WEIGHTS, 0, steps=30, taught_steps=60, learning_rate=1e-3)
    start, end = measure(before, 200), measure(after, 200)
    assert all(torch.isfinite(p).all() for p in after.parameters())
    assert end["valid"] > start["valid"] + 0.25 and end["struct"] > start["struct"] + 0.2
