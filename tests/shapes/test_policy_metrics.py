"""What is seen of completions: every number against loops over Python floats, and the files of what was drawn."""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from pathlib import Path
from statistics import correlation as pearson
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import TrainerCallback, TrainerControl

from alignkit.reports.rollouts import FOLDER, rollout_files
from alignkit.shapes._policy_metrics import METRICS, Drawn, correlation, evaluation_metrics, quarter_of, ratio_metrics
from alignkit.shapes._policy_trainer import METRICS as BRIDGE_METRICS
from alignkit.shapes._policy_trainer import OnlineTrainer
from alignkit.shapes._rollout_files import RolloutFiles, as_text
from alignkit.storage.manifest import Manifest
from tests.online import make, prompt_rows
from tests.trainers import flat_weights, logged


def quarter(rank: int, count: int) -> int:
    """By the middle of a place, in numbers that are read off: (rank + 1/2) / count of four."""
    return math.floor((rank + 0.5) / count * 4)


def test_ratios_by_quarter_are_those_of_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    logps, old, entropies = (torch.randn(6, 9, generator=draw) for _ in range(3))
    mask = torch.rand(6, 9, generator=draw) > 0.3
    mask[4] = False
    lengths = torch.tensor([2, 0, 3, 3, 1, 2])
    found = ratio_metrics(logps, old, entropies, mask, lengths)
    assert {name for name in METRICS if name.startswith("ratio/")} == set(found)

    expected: dict[str, list[float]] = defaultdict(list)
    for row in range(6):
        written = [t for t in range(9) if mask[row, t]]
        certain = sorted(written, key=lambda t: entropies[row, t].item())
        for place, t in enumerate(written):
            ratio = math.exp(float(logps[row, t]) - float(old[row, t]))
            own = {
                "position": quarter(place, len(written)),
                "length": int(lengths[row]),
                "entropy": quarter(certain.index(t), len(written)),
            }
            for axis, which in own.items():
                expected[f"ratio/mean/{axis}_{which + 1}"].append(ratio)
                expected[f"ratio/spread/{axis}_{which + 1}"].append(abs(ratio - 1))
    for name, metric in found.items():
        assert metric.counts is not None
        assert metric.counts.item() == len(expected[name])
        assert metric.values.item() == pytest.approx(math.fsum(expected[name]), rel=1e-5)


def test_quarters_are_equal_parts() -> None:
    for count in (4, 8, 64):
        assert quarter_of(torch.arange(count), count).bincount().tolist() == [count // 4] * 4
    assert quarter_of(torch.arange(2), 2).tolist() == [1, 3] and quarter_of(torch.arange(1), 1).tolist() == [2]


def drawn(groups: int = 5, generations: int = 4, seed: int = 0) -> Drawn:
    draw = random.Random(seed)
    count = groups * generations
    right = torch.tensor([float(draw.random() < 0.4) for _ in range(count)])
    length = torch.tensor([draw.randint(1, 9) for _ in range(count)])
    short = -length / 100.0
    return Drawn(torch.stack([right, short], 1), right + 2 * short, length, length == 9, generations)


def test_length_goes_with_reward_within_prompts() -> None:
    seen = drawn()
    lengths, rewards = [], []
    for start in range(0, 20, 4):
        own = seen.lengths[start : start + 4].tolist(), seen.rewards[start : start + 4].tolist()
        lengths += [value - fmean(own[0]) for value in own[0]]
        rewards += [value - fmean(own[1]) for value in own[1]]
    assert correlation(seen).item() == pytest.approx(pearson(lengths, rewards), abs=1e-6)
    flat = Drawn(seen.parts, torch.full_like(seen.rewards, 0.1), seen.lengths, seen.truncated, 4)
    assert correlation(flat).item() == 0.0
    # A completion that no reward says anything of is left out, together with its length.
    some = seen.rewards.clone()
    some[3] = math.nan
    without = Drawn(seen.parts[:3], seen.rewards[:3], seen.lengths[:3], seen.truncated[:3], 3)
    assert correlation(Drawn(seen.parts[:4], some[:4], seen.lengths[:4], seen.truncated[:4], 4)) == pytest.approx(
        correlation(without)
    )


def test_an_evaluation_is_over_its_completions() -> None:
    seen = drawn()
    rewards = seen.rewards.tolist()
    found = evaluation_metrics(seen, ["right", "short"], success_threshold=0.8)
    groups = [rewards[start : start + 4] for start in range(0, 20, 4)]
    assert found["reward"] == pytest.approx(fmean(rewards)) and found["reward_std"] == pytest.approx(stdev(rewards))
    assert found["rewards/short/mean"] == pytest.approx(fmean(seen.parts[:, 1].tolist()))
    assert found["frac_reward_zero_std"] == fmean(len(set(group)) == 1 for group in groups)
    assert found["completions/clipped_ratio"] == fmean(seen.truncated.tolist())
    stopped = [n for n in seen.lengths.tolist() if n < 9]
    assert found["completions/mean_terminated_length"] == pytest.approx(fmean(stopped))
    won = [sum(value >= 0.8 for value in group) for group in groups]
    # Two tries without replacement of four, of which c are right.
    tries = {0: 0.0, 1: 1 / 2, 2: 5 / 6, 3: 1.0, 4: 1.0}
    assert found["pass@2"] == pytest.approx(fmean(tries[c] for c in won))
    assert found["pass@1_low"] < found["pass@1"] < found["pass@1_high"]
    assert {key for key in found if key.startswith("pass@")} == {
        f"pass@{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")
    }


def test_pass_at_k_without_a_threshold_asks_for_rewards_of_0_and_1() -> None:
    seen = drawn()
    assert not [key for key in evaluation_metrics(seen, ["a", "b"], None) if key.startswith("pass@")]
    binary = Drawn(seen.parts[:, :1], seen.parts[:, 0], seen.lengths, seen.truncated, 4)
    assert evaluation_metrics(binary, ["a"], None)["pass@1"] == pytest.approx(seen.parts[:, 0].mean().item())


@pytest.mark.parametrize(
    ("prompts", "processes", "is_last", "counted"),
    # Of 2 processes with 4 rows each and 4 completions a prompt: 3 prompts leave one group of the last 8 rows.
    [(3, 2, True, 4), (3, 2, False, 8), (4, 2, True, 8), (3, 1, True, 4), (7, 2, True, 4)],
)
def test_rows_that_accelerate_repeats_are_known_by_completions(
    prompts: int, processes: int, is_last: bool, counted: int
) -> None:
    loader = SimpleNamespace(dataset=range(prompts))
    state = SimpleNamespace(end_of_dataloader=is_last, active_dataloader=loader)
    accelerator = SimpleNamespace(gradient_state=state, num_processes=processes)
    trainer: Any = SimpleNamespace(accelerator=accelerator, num_generations_eval=4)
    assert OnlineTrainer.counted_rows(trainer, 4) == counted


def rows_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    return {step: pyarrow.parquet.read_table(path).to_pylist() for step, path in rollout_files(run).items()}


def lengthy(completions: list[str], **columns: Any) -> list[float | None]:
    """A second reward, which says nothing of completions that begin late in the alphabet."""
    return [None if text[:1] > "t" else len(text) / 10 for text in completions]


def observed(folder: Path, **changes: Any) -> OnlineTrainer:
    """A trainer that writes every second step, with two rewards and completions that are used twice."""
    from tests.online import share_of_vowels

    keys: dict[str, Any] = {"num_iterations": 2, "max_steps": 6, "reward_funcs": [share_of_vowels, lengthy]}
    trainer = make(folder, **keys | {"save_strategy": "steps", "save_steps": 3} | changes)
    trainer.watch.consumers.append(RolloutFiles(trainer, 2))
    return trainer


class Stop(TrainerCallback):
    """Stops after the third step, in the middle of what was drawn."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == 3


def test_what_was_drawn_is_in_files_which_a_resumed_run_does_not_double(tmp_path: Path) -> None:
    whole = observed(tmp_path / "whole")
    whole.train()
    found = rows_of(tmp_path / "whole")
    # Draws serve steps 1 and 2, 3 and 4, 5 and 6.
    assert list(found) == [1, 4, 6]
    assert {f"{FOLDER}/step-{step:06d}.parquet" for step in found} <= Manifest(tmp_path / "whole").files()
    assert not [path for path in (tmp_path / "whole" / FOLDER).iterdir() if path.suffix != ".parquet"]
    last = found[6]
    assert len(last) == 8 and [row["group"] for row in last] == [0] * 4 + [1] * 4
    assert [row["completion"] for row in last] == list(whole._logs["completion"])
    for row in last:
        parts = [row["rewards/share_of_vowels"], row["rewards/lengthy"]]
        assert row["reward"] == pytest.approx(sum(part for part in parts if part is not None), rel=1e-6)
        assert 1 <= row["length"] <= 8 and row["truncated"] in (True, False)
    for start in (0, 4):
        assert sum(row["advantage"] for row in last[start : start + 4]) == pytest.approx(0, abs=1e-4)
    rewards = logged(whole, "reward")
    assert rewards[0] == pytest.approx(fmean(row["reward"] for row in found[1]), rel=1e-6)

    observed(tmp_path / "cut", callbacks=[Stop()]).train()
    before = rows_of(tmp_path / "cut")
    assert list(before) == [1, 4]
    resumed = observed(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert rows_of(tmp_path / "cut") == found
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    assert logged(resumed, "ratio/spread/length_4") == logged(whole, "ratio/spread/length_4")
    assert max(logged(whole, "ratio/spread/position_1")) > 0


def test_text_is_kept_whatever_it_is() -> None:
    assert as_text("half \udc00 of a character") == r"half \udc00 of a character"
    assert as_text([{"role": "assistant", "content": "4"}]) == "4"
    messages = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": None, "tool_calls": [{"n": 1}]}]
    assert as_text(messages) == 'user: 2 + 2\n\nassistant: null\n[{"n": 1}]'


def test_equal_rewards_move_nothing_and_raise_the_right_alarm(tmp_path: Path) -> None:
    from alignkit.runs.health import HealthMonitor
    from alignkit.runs.unmoved import UnmovedWeights

    monitor = HealthMonitor({"learning_rate": 1e-3})
    trainer = make(tmp_path, reward_funcs=lambda completions, **columns: [0.5] * len(completions), max_steps=5)
    trainer.add_callback(monitor)
    trainer.add_callback(UnmovedWeights(trainer))
    before = flat_weights(trainer.model)
    trainer.train()
    assert torch.equal(flat_weights(trainer.model), before)
    assert [verdict.name for verdict in monitor.verdicts] == ["no_spread"]
    assert not logged(trainer, "unmoved_weights"), "no weight has a gradient"


def test_an_evaluation_of_a_trainer_counts_every_completion_once(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, eval_dataset=prompt_rows(3), num_generations_eval=4, per_device_eval_batch_size=8, num_iterations=2
    )
    seen: list[Drawn] = []
    trainer.model.train()
    evaluation, trainer.watch.evaluation = (
        trainer.watch.evaluation,
        lambda: seen.extend(trainer.watch._held_out) or evaluation(),
    )
    found = trainer.evaluate()
    assert [len(batch.lengths) for batch in seen] == [8, 4]
    rewards = [value for batch in seen for value in batch.rewards.tolist()]
    assert found["eval_reward"] == pytest.approx(fmean(rewards)) and found["eval_reward_std"] == pytest.approx(
        stdev(rewards)
    )
    # TRL's mean of the two batches is another number.
    batches = fmean(fmean(batch.rewards.tolist()) for batch in seen)
    assert abs(found["eval_reward"] - batches) > 1e-4
    assert not trainer.watch._held_out


def test_every_metric_is_on_the_page_about_reading_a_run(repository: Path) -> None:
    page = (repository / "docs/howto/reading_online_runs.md").read_text()
    families = {re.sub(r"_[2-4]$", "_1", name) for name in BRIDGE_METRICS}
    assert not [name for name in families if f"`{name}`" not in page]
