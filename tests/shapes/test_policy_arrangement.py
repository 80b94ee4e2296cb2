"""Completions in better places: every step is made of the same rows, and no number of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.shapes._arrangement import Arrangement, arranged, dead_rows, passes, window_of
from alignkit.shapes._policy_rows import groups_with_spread
from tests.online import make, make_peer, prompt_rows, share_of_vowels
from tests.trainers import flat_weights, logged

SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TWICE = {"num_iterations": 2}
SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-3}
PAIRS: dict[str, dict[str, Any]] = {
    "dapo, small": SMALL | TWICE,
    "grpo, small": SMALL | TWICE | {"loss_type": "grpo"},
    "dr_grpo, small": SMALL | TWICE | {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "luspo": TWICE | SEQUENCE | {"loss_type": "luspo"},
    "cispo, small": SMALL | TWICE | {"loss_type": "cispo", "epsilon_high": 5.0},
    "sequence level, small": SMALL | TWICE | SEQUENCE,
    "two steps a draw": SMALL | {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
}


def half_without_spread(completions: list[Any], **columns: Any) -> list[float]:
    """Every second prompt has completions that are all worth the same."""
    return [0.5 if i // 4 % 2 else value for i, value in enumerate(share_of_vowels(completions))]


def nothing_to_learn(completions: list[Any], **columns: Any) -> list[float]:
    """All are worth the same, in numbers whose mean is not exact."""
    return [0.1] * len(completions)


def draw(steps: int, rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Micro-batches as TRL splits them; every row is marked by its number, and half of the prompts have no spread."""
    torch.manual_seed(seed)
    prompts, completions = torch.randint(1, 9, (steps * rows, 1)), torch.randint(1, 13, (steps * rows, 1))
    number = torch.arange(steps * rows)
    prompt_mask = (torch.arange(8) >= 8 - prompts).long()
    completion_mask = (torch.arange(12) < completions).long()
    advantages = torch.randn(steps * rows) * (number // 4 % 2)
    whole = {
        "prompt_ids": prompt_mask * (number[:, None] + 1),
        "prompt_mask": prompt_mask,
        "completion_ids": completion_mask * (number[:, None] + 1),
        "completion_mask": completion_mask,
        "old_per_token_logps": -torch.rand(steps * rows, 12) * completion_mask,
        "importance_sampling_ratio": torch.rand(steps * rows, 1),
        "advantages": advantages,
        "group_index": number // 4,
    }
    mixed = torch.randperm(steps * rows)
    total = torch.tensor(int(completion_mask.sum()))
    split = [{key: value[mixed[i * rows : (i + 1) * rows]] for key, value in whole.items()} for i in range(steps)]
    return [{**batch, "num_items_in_batch": total} for batch in split]


def numbers(batch: dict[str, Any]) -> list[int]:
    return [int(row.max()) for row in batch["completion_ids"]]


def test_rows_stay_within_their_step_whole_and_unpadded() -> None:
    before = draw(steps=8, rows=4)
    after = arranged(before, Arrangement(window=4))
    for start in (0, 4):
        rows = [sorted(sum((numbers(batch) for batch in half[start : start + 4]), [])) for half in (before, after)]
        assert rows[0] == rows[1]
        tokens = [(b["prompt_mask"].sum(1) + b["completion_mask"].sum(1)).tolist() for b in after[start : start + 4]]
        assert sum(tokens, []) == sorted(sum(tokens, []), reverse=True) and [len(row) for row in tokens] == [4] * 4
    assert [numbers(batch) for batch in before] != [numbers(batch) for batch in after]
    columns = {int(ids.max()): (batch, i) for batch in before for i, ids in enumerate(batch["completion_ids"])}
    for batch in after:
        assert batch["prompt_mask"].any(0).all() and batch["completion_mask"].any(0).all()
        assert int(batch["num_items_in_batch"]) == int(before[0]["num_items_in_batch"])
        for i, row in enumerate(numbers(batch)):
            source, j = columns[row]
            long = int(source["completion_mask"][j].sum())
            for key in ("completion_ids", "old_per_token_logps"):
                assert torch.equal(batch[key][i][:long], source[key][j][:long]), key
            assert torch.equal(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].unique(), torch.tensor([row]))
            for key in ("advantages", "group_index", "importance_sampling_ratio"):
                assert torch.equal(batch[key][i], source[key][j]), key


def test_completions_of_a_prompt_stand_together() -> None:
    after = arranged(draw(steps=4, rows=8), Arrangement(window=4, by_prompt=True))
    assert [len(set(batch["group_index"].tolist())) for batch in after] == [2] * 4
    assert [len(batch["advantages"]) for batch in after] == [8] * 4


def test_prompts_are_torn_by_none_of_those_left_and_what_has_none_does_next_to_nothing() -> None:
    """Sixteen rows of four prompts over four micro-batches of eight: torn, each prompt would be computed twice."""
    after = arranged(draw(steps=4, rows=8), Arrangement(window=4, by_prompt=True, skip_dead=True))
    groups = [sorted(set(batch["group_index"].tolist())) for batch in after]
    assert sorted(map(tuple, groups)) == [(1,), (3,), (5,), (7,)] and [len(b["advantages"]) for b in after] == [4] * 4
    costs = [int(batch["prompt_mask"][0].sum() + batch["completion_mask"].sum()) for batch in after]
    assert costs == sorted(costs, reverse=True)
    few = draw(steps=4, rows=8)
    for batch in few:
        batch["advantages"] = torch.where(batch["group_index"] == 5, 1.0, 0.0)
    only, *idle = arranged(few, Arrangement(window=4, by_prompt=True, skip_dead=True))
    assert only["group_index"].tolist() == [5] * 4
    for batch in idle:
        assert batch["prompt_ids"].shape == batch["completion_ids"].shape == (1, 1)
        assert bool(batch["prompt_mask"].all()) and batch["prompt_ids"].item() > 0
        assert not batch["completion_mask"].any() and not batch["advantages"].any()


def test_prompts_that_do_not_fit_whole_are_dealt_evenly() -> None:
    batches = draw(steps=2, rows=6)  # three prompts of four completions
    after = arranged(batches, Arrangement(window=2, by_prompt=True))
    assert [len(batch["advantages"]) for batch in after] == [6, 6]


@pytest.mark.parametrize(("live", "expected"), [(9, [3, 2, 2, 2]), (2, [1, 1, 1, 1]), (0, [1, 1, 1, 1])])
def test_live_rows_are_dealt_evenly_and_no_micro_batch_is_empty(live: int, expected: list[int]) -> None:
    before = draw(steps=4, rows=4)
    for i, batch in enumerate(before):
        batch["advantages"] = torch.where(torch.arange(i * 4, i * 4 + 4) < live, 1.0, 0.0)
    after = arranged(before, Arrangement(window=4, skip_dead=True))
    assert [len(batch["advantages"]) for batch in after] == expected
    kept = sum((numbers(batch) for batch in after if batch["completion_mask"].any()), [])
    marked = [n for batch in before for n, a in zip(numbers(batch), batch["advantages"], strict=True) if a]
    assert sorted(marked) == sorted(kept)


def padded(batch: dict[str, Any]) -> int:
    return batch["prompt_ids"].numel() + batch["completion_ids"].numel()


def test_rows_are_dealt_by_tokens_and_no_pass_has_more_than_allowed() -> None:
    before = draw(steps=4, rows=8)
    evenly, dealt = (arranged(before, Arrangement(window=4, max_tokens=most)) for most in (None, 60))
    for batches in (evenly, dealt):
        assert sorted(sum(map(numbers, batches), [])) == list(range(1, 33)) and len(batches) == 4
    for batch in dealt:
        parts = passes(batch, 60)
        assert sum(map(numbers, parts), []) == numbers(batch) and max(map(padded, parts)) <= 60
        assert 1 < len(parts) and all(padded(a) + padded(b) > 60 for a, b in zip(parts, parts[1:], strict=False))
    assert passes(dealt[0], None) == [dealt[0]] and [len(numbers(part)) for part in passes(dealt[0], 1)] == [1] * len(
        numbers(dealt[0])
    )


def test_dealing_by_tokens_is_as_even_as_any() -> None:
    """Against every way to cut the sorted rows into as many runs."""
    for seed in range(8):
        before = draw(steps=3, rows=3, seed=seed)
        (whole,) = arranged(
            [{k: torch.cat([b[k] for b in before]) if v.ndim else v for k, v in before[0].items()}], Arrangement()
        )
        best = min(
            max(padded(part) for part in (taken(whole, 0, i), taken(whole, i, j), taken(whole, j, 9)))
            for i in range(1, 8)
            for j in range(i + 1, 9)
        )
        assert max(map(padded, arranged(before, Arrangement(window=3, max_tokens=10**6)))) == best


def taken(batch: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Those rows, cut to their longest by another way than the one that is tested."""
    rows = {key: value[start:end] for key, value in batch.items() if value.ndim}
    return {name: rows[name][:, rows[name.replace("ids", "mask")].any(0)] for name in ("prompt_ids", "completion_ids")}


def test_what_is_dead_has_no_advantage_or_nothing_to_train_on() -> None:
    batch = {
        "completion_mask": torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]]),
        "tool_mask": torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0]]),
        "advantages": torch.tensor([0.0, -0.1, 2.0, 3.0]),
    }
    assert dead_rows(batch).tolist() == [True, False, True, True]
    assert dead_rows(batch | {"advantages": torch.tensor([[0.0, 0.1]] * 4)}).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("accumulation", "of_a_draw", "expected"), [(4, 4, 4), (2, 8, 2), (8, 4, 4), (1, 3, 1), (4, 6, 1), (3, 2, 1)]
)
def test_windows_are_the_micro_batches_of_one_step(accumulation: int, of_a_draw: int, expected: int) -> None:
    assert window_of(accumulation, of_a_draw) == expected
    # Whatever iteration it is: no window has micro-batches of two steps.
    for first in range(0, 12 * accumulation * of_a_draw, of_a_draw):
        for start in range(first, first + of_a_draw, expected):
            assert start // accumulation == (start + expected - 1) // accumulation


def test_spread_is_of_sums_or_of_parts_and_rewards_that_say_nothing_have_none() -> None:
    nan = float("nan")
    rewards = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [nan, nan], [0.7, nan], [0.1, 0.1], [0.1, 0.2], [nan, nan]] + [[nan, nan]]
    )
    assert groups_with_spread(rewards, 2, True).tolist() == [False, False, True, False]
    assert groups_with_spread(rewards, 2, False).tolist() == [True, False, True, False]


BUDGET = {"max_tokens_per_micro_batch": 40}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradient_norms_with_dead_rows_left_out_follow_those_of_trl(name: str, tmp_path: Path) -> None:
    theirs = make_peer(tmp_path / "theirs", reward_funcs=half_without_spread, **PAIRS[name])
    theirs.train()
    ours = make(tmp_path / "ours", reward_funcs=half_without_spread, **BUDGET, **PAIRS[name])
    rows: list[int] = []
    count = ours.evaluate_objective

    def counted(model: Any, inputs: dict[str, Any]) -> Any:
        rows.append(ours.num_rows(inputs))
        assert padded(inputs) <= 40
        return count(model, inputs)

    ours.evaluate_objective = counted  # type: ignore[method-assign]
    ours.train()
    for key in ("loss", "grad_norm", "reward"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key
    assert any(logged(ours, "grad_norm")) and set(logged(ours, "dead_rows")) == {0.5}
    # Four steps, half of whose rows are dead; a micro-batch without any other keeps one.
    of_a_step = ours.args.per_device_train_batch_size * ours.args.gradient_accumulation_steps
    assert 2 * of_a_step <= sum(rows) <= (2 if of_a_step == 8 else 3) * of_a_step


def test_whole_prompts_in_packed_rows_without_the_dead_follow_those_of_trl(tmp_path: Path) -> None:
    """Eight prompts over four micro-batches of two, half of which are left: whole ones, and idle micro-batches."""
    how = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, **TWICE}
    theirs = make_peer(tmp_path / "theirs", reward_funcs=half_without_spread, **how)
    theirs.train()
    ours = make(tmp_path / "ours", reward_funcs=half_without_spread, layout="packed", **how)
    ours.train()
    for key in ("loss", "grad_norm", "reward"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key
    assert any(logged(ours, "grad_norm")) and min(logged(ours, "dead_rows")) >= 0.5


def test_a_step_without_a_signal_moves_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward_funcs=nothing_to_learn, num_generations=8, max_steps=2, **SMALL)
    before = flat_weights(trainer.model).clone()
    trainer.train()
    assert logged(trainer, "loss") == logged(trainer, "grad_norm") == [0.0, 0.0]
    assert logged(trainer, "dead_rows") == [1.0, 1.0]
    assert torch.equal(flat_weights(trainer.model), before)


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "bnpo"}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}, {"method": "grpo_guard"}],
    ids=lambda changes: next(iter(changes)),
)
def test_rows_of_a_loss_with_a_mean_or_statistic_within_a_micro_batch_stay(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make(tmp_path, **SMALL, **changes)
    assert trainer.why_rows_stay is not None
    assert trainer.arrangement == Arrangement(window=1)
    diverging = make(tmp_path, beta=0.1, **SMALL)
    assert diverging.arrangement == Arrangement(window=4, skip_dead=False)
    assert make(tmp_path, **SMALL).arrangement == Arrangement(window=4, skip_dead=True)


def test_the_budget_and_drawing_again_are_refused_where_they_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="statistic within a micro-batch"):
        make(tmp_path, method="grpo_guard", **BUDGET)
    trainer = make(tmp_path, dynamic_sampling=1)
    with pytest.raises(ConfigError, match="Remove it, or the environment"):
        trainer.refuse_settings(rollout_func=print)
    trainer.args.per_device_train_batch_size = 2  # as on each of four processes
    with pytest.raises(ConfigError, match="num_generations, now 4, that divides"):
        trainer.refuse_settings(rollout_func=None)


# --- drawing again ---------------------------------------------------------------------------------------------------


class Drawn:
    """A reward that counts its calls: prompts have spread from the call on that their number says."""

    __name__ = "drawn"

    def __init__(self, *needed: int) -> None:
        self.needed, self.calls = needed, 0
        self.order: list[str] = []
        self.seen: list[list[str]] = []

    def __call__(self, prompts: list[str], completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        self.order = list(dict.fromkeys([*self.order, *prompts]))
        self.calls += 1
        self.seen.append(completions)
        log_extra("call", [self.calls] * len(prompts))
        return [
            self.calls + 0.25 * (i % 4) if self.needed[self.order.index(prompt)] <= self.calls else float(self.calls)
            for i, prompt in enumerate(prompts)
        ]


def test_prompts_without_spread_are_drawn_again_and_the_first_with_spread_are_kept(tmp_path: Path) -> None:
    reward = Drawn(2, 1, 9, 3)
    changes = {"per_device_train_batch_size": 16, "max_steps": 1, "skip_dead_rows": False}
    trainer = make(tmp_path, reward_funcs=reward, dynamic_sampling=3, **changes)
    trainer.train()
    assert [len(completions) for completions in reward.seen] == [16, 12, 8, 4]
    first, second, third, _ = reward.seen
    # Prompt 0 has spread in the second call, where it stands first; 3 in the third, behind 2, which never has.
    assert list(trainer._logs["completion"]) == second[:4] + first[4:12] + third[4:8]
    assert list(trainer._logs["extra"]["call"]) == [2] * 4 + [1] * 8 + [3] * 4
    of_prompts = [2.375, 1.375, 1.0, 3.375]
    assert logged(trainer, "reward") == [pytest.approx(sum(of_prompts) / 4)]
    assert logged(trainer, "frac_reward_zero_std") == [0.25] == logged(trainer, "dead_rows")
    assert logged(trainer, "dynamic_sampling/first_reward") == [pytest.approx((3 + 1.375) / 4)]
    assert logged(trainer, "dynamic_sampling/redrawn") == [0.75]
    assert logged(trainer, "dynamic_sampling/still_dead") == [0.25]
    kept = trainer._buffered_inputs[0]
    texts = trainer.processing_class.batch_decode(
        [ids[mask.bool()] for ids, mask in zip(kept["completion_ids"], kept["completion_mask"], strict=True)],
        skip_special_tokens=True,
    )
    assert sorted(texts) == sorted(trainer._logs["completion"])
    assert int(kept["num_items_in_batch"]) == int(kept["completion_mask"].sum())


def test_nothing_is_drawn_again_where_all_have_spread_or_in_an_evaluation(tmp_path: Path) -> None:
    reward = Drawn(1, 1, 9, 9, 9, 9)
    trainer = make(tmp_path, reward_funcs=reward, dynamic_sampling=3, max_steps=1, eval_dataset=prompt_rows(2))
    trainer.train()
    assert [len(completions) for completions in reward.seen] == [8]
    trainer.evaluate()
    assert sum(map(len, reward.seen)) == 8 + 8
