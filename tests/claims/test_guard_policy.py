"""GRPO-Guard-style clipping while a small policy learns: the policy is what it says, and the mechanism shows."""

from __future__ import annotations

import pytest
import torch

from guard_policy import ARMS, clip_figures, share_of_one_letter
from guard_toy import LETTERS, STOP, Policy, Rollout, Schedule, grammar_words, train, write

SHORT = Schedule(rollouts=8, grammar_steps=60)
"""Enough for a policy whose words differ in length; that it knows the grammar well does not matter here."""


def test_the_grammar_ends_words_and_repeats_letters_as_often_as_told() -> None:
    words, mask = grammar_words(2_000, torch.Generator().manual_seed(0), repeats=0.0)
    letters = words[:, 1:] != STOP
    assert not ((words[:, 1:] == words[:, :-1]) & letters).any()
    assert (words < LETTERS).sum() > 0 and (mask.sum(-1) == letters.sum(-1) + (words[:, -1] == STOP)).all()
    words, _ = grammar_words(2_000, torch.Generator().manual_seed(0), repeats=0.1)
    letters = words[:, 1:] != STOP
    assert float(((words[:, 1:] == words[:, :-1]) & letters).sum() / letters.sum()) == pytest.approx(0.1, abs=0.01)


def test_a_written_word_carries_the_log_probs_it_was_drawn_with() -> None:
    """Drawn a letter at a time, scored in one pass: what is drawn at first must come as often as it is scored."""
    torch.manual_seed(0)
    policy, prompts = Policy(8), torch.zeros(6_000, dtype=torch.long)
    rollout = write(policy, prompts, torch.Generator().manual_seed(0))
    first = rollout.words[:, 1]
    share = torch.bincount(first, minlength=LETTERS + 1) / len(first)
    scored = torch.zeros(LETTERS + 1).scatter(0, first, rollout.logps[:, 0].exp())
    torch.testing.assert_close(scored, share, atol=0.02, rtol=0)
    assert (rollout.mask.sum(-1) >= 1).all() and not rollout.logps[~rollout.mask].any()


def test_the_reward_is_the_share_of_the_letter() -> None:
    words = torch.tensor([[3, 0, 0, 5, STOP, STOP], [0, 1, 0, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    assert share_of_one_letter(Rollout(words, mask, torch.zeros(2, 5))).tolist() == [0.5, pytest.approx(0.8)]


def test_the_guard_balances_clipping_and_makes_it_flat_over_lengths() -> None:
    """Six updates on the same words: plain GSPO beside the guard, at level ``sequence``."""
    found = {}
    for name in ("GSPO", "guard, pooled, full"):
        trace = train(ARMS[name], SHORT, 0, {"reward": share_of_one_letter}, keeps_batches=True)
        found[name] = clip_figures(trace.batches, ARMS[name])
        assert trace.rewards["reward"][-1] > 1.5 * trace.rewards["reward"][0]
    plain, guard = found.values()
    assert plain["mean ratio"] < 0.998 and abs(guard["mean ratio"] - 1) < (1 - plain["mean ratio"]) / 2
    assert plain["imbalance"] > 0.08 and abs(guard["imbalance"]) < plain["imbalance"] / 2
    assert plain["largest / smallest"] > 1.2 > guard["largest / smallest"]
