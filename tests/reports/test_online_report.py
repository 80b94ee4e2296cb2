"""What the end of an online run says: rewards before and after with their intervals, and a card that claims no more."""

from __future__ import annotations

from typing import Any

from alignkit.reports.card_online import drawn_text
from alignkit.runs.results import held_out_line

VALUES: dict[str, Any] = {
    "rewards": ["gsm8k_answer", {"name": "/home/me/mine.py:polite", "weight": 0.5}],
    "num_generations": 8,
    "temperature": 0.7,
    "max_completion_length": 256,
    "use_vllm": False,
    "vllm_mode": "colocate",
}


def card_of(**changes: Any) -> str:
    return drawn_text({key: {"value": value, "source": "run.yaml:1"} for key, value in (VALUES | changes).items()})


def test_the_card_says_how_completions_were_drawn_and_what_they_were_rewarded_for() -> None:
    text = card_of()
    assert "8 completions of every prompt were drawn by transformers' own generation, at temperature 0.7" in text
    assert "| `gsm8k_answer` | 1 |\n| `mine.py:polite` | 0.5 |" in text and "/home" not in text
    assert "nothing else" in text and "do not show that the model became better" in text
    assert "vLLM (server)" in card_of(use_vllm=True, vllm_mode="server")
    assert drawn_text({"method": {"value": "dpo", "source": "default"}}) == ""


def test_the_summary_has_rewards_and_pass_at_k_with_intervals_and_no_loss() -> None:
    after = {"loss": 0.01, "reward": 0.5, "reward_low": 0.41, "reward_high": 0.59, "pass@8": 0.9, "pass@8_low": 0.8}
    after |= {"pass@8_high": 0.95, "completions/mean_length": 120.4}
    before = {"loss": 0.0, "reward": 0.25, "reward_low": 0.2, "reward_high": 0.3, "completions/mean_length": 100.0}
    assert held_out_line(before, after) == (
        "held-out rows: reward 0.25 [0.2, 0.3] -> 0.5 [0.41, 0.59], pass@8 0.9 [0.8, 0.95], completions/mean_length "
        "100 -> 120.4  (before -> after training; [95 % intervals over prompts])"
    )


def test_the_summary_of_other_runs_is_as_it_was() -> None:
    after = {"loss": 0.5, "rewards/margins": 1.25, "rewards/chosen": 3.0}
    assert held_out_line({}, after) == "held-out rows: loss 0.5, rewards/margins 1.25"
    assert held_out_line({"loss": 0.69}, after) == (
        "held-out rows: loss 0.69 -> 0.5, rewards/margins 1.25  (before -> after training)"
    )
