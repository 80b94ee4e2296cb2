"""The task on which gold is compared at matched proxy: both can be high, and the shortcut has the proxy alone."""

from __future__ import annotations

import pytest
import torch

from guard_outcome import TARGETS, at_level, gold, proxy, repeats
from guard_toy import STOP, Rollout


def rollout(*words: str) -> Rollout:
    """Words such as ``0120.``: a digit a letter, the first the prompt, a full stop the stop token."""
    longest = max(map(len, words))
    tokens = [[STOP if letter == "." else int(letter) for letter in word] for word in words]
    padded = torch.tensor([word + [STOP] * (longest - len(word)) for word in tokens])
    mask = torch.tensor([[place < len(word) - 1 for place in range(longest - 1)] for word in words])
    return Rollout(padded, mask, torch.zeros(mask.shape))


def test_targets_in_turn_have_both_rewards_and_repeats_the_proxy_alone() -> None:
    assert TARGETS == 3
    batch = rollout("5012012.", "00000000", "9876.", "5.")
    assert proxy(batch).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert gold(batch).tolist() == [1.0, -0.5, 0.0, 0.0]
    assert repeats(batch).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_repeat_is_half_a_target_to_the_proxy() -> None:
    batch = rollout("5566.")  # 5, 6, 6: two of three repeat the one before
    assert proxy(batch).item() == pytest.approx(1 / 3) and gold(batch).item() == pytest.approx(-1.0)


def test_the_level_is_interpolated_at_its_first_crossing() -> None:
    assert at_level([0.2, 0.4, 0.8, 0.7, 0.9], [0.0, 1.0, 3.0, 9.0, 9.0], 0.6) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="never crosses 0.95"):
        at_level([0.2, 0.9], [0.0, 1.0], 0.95)
