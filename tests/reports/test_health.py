"""Verdicts on synthetic logs, both ways: what is wrong is said, and nothing is said of a run that is well."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import TrainerControl, TrainerState

from alignkit.errors import AlignkitError
from alignkit.parts.method import load_method, method_names
from alignkit.reports.series import trend
from alignkit.runs.health import HealthMonitor
from alignkit.storage.durability import mark_complete
from tests.reports.logs import training_logs
from tests.runs.saved import arguments, write_checkpoint

Logs = Iterator[tuple[int, dict[str, float]]]
FLEX = {"method": "flex_dpo", "learning_rate": 3e-6, "beta_pos": 0.1, "beta_neg": 0.08, "eta": 0.0}
DPO = {"method": "dpo", "learning_rate": 3e-6, "beta": 0.2}


def judge(logs: Logs, settings: dict[str, object] = FLEX) -> HealthMonitor:
    monitor = HealthMonitor(settings)
    for step, log in logs:
        monitor.observe(step, log)
    return monitor


def names(logs: Logs) -> list[str]:
    return [verdict.name for verdict in judge(logs).verdicts]


def sliding(*, chosen: float, rejected: float = -30.0, **options: object) -> Logs:
    return training_logs(chosen=lambda t: chosen * t, rejected=lambda t: rejected * t, **options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.1, 1.0, 4.0])
def test_a_healthy_run_is_healthy(seed: int, noise: float) -> None:
    """Chosen rises or stays, rejected falls, the probe hardly moves; no noise, much noise."""
    for slope in (3.0, 0.0):
        logs = training_logs(
            chosen=lambda t, slope=slope: slope * t, rejected=lambda t: -9 * t, probe=lambda t: 0.01 * t, noise=noise,
            seed=seed,
        )  # fmt: skip
        monitor = judge(logs)
        assert monitor.verdicts == []
        assert monitor.summary()["state"] == "healthy over 60 logs"


def test_noise_without_a_trend_is_no_verdict_however_long_the_run() -> None:
    logs = training_logs(
        chosen=lambda t: 0.0, rejected=lambda t: 0.0, probe=lambda t: 0.0, noise=5.0, num_logs=600, seed=7
    )
    assert names(logs) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_chosen_likelihood_is_degradation(seed: int) -> None:
    (verdict,) = judge(sliding(chosen=-8.0, seed=seed)).verdicts
    assert verdict.name == "degradation"
    assert "logratio/chosen fell from" in verdict.evidence and "rewards/margins rose from" in verdict.evidence
    assert "margin" in verdict.meaning


def test_a_loss_that_lowers_the_chosen_on_purpose_does_not_degrade() -> None:
    lowering = {name for name in method_names() if load_method(name).lowers_chosen}
    assert lowering == {"apo_down"}
    for mixture in ("1.0*apo_down+0.5*dpo", "0.5*dpo+1.0*apo_down"):
        assert load_method(mixture).lowers_chosen, "whichever is named first"
    assert not load_method("0.5*dpo+1.0*apo_zero").lowers_chosen
    assert judge(sliding(chosen=-8.0), FLEX | {"lowers_chosen": False}).verdicts
    assert judge(sliding(chosen=-8.0), FLEX | {"lowers_chosen": True}).verdicts == []


def test_degradation_is_seen_without_log_ratios_too() -> None:
    logs = list(sliding(chosen=-90.0, rejected=-200.0))
    bare = [(step, {k: v for k, v in log.items() if not k.startswith("logratio")}) for step, log in logs]
    verdict = judge(iter(bare)).verdicts[0]
    assert verdict.name == "degradation" and "logps/chosen fell" in verdict.evidence


@pytest.mark.parametrize(
    "logs",
    [
        sliding(chosen=-0.6, noise=0.05),  # a clear trend of no consequence
        training_logs(chosen=lambda t: -5 - 0.6 * t, rejected=lambda t: -30 * t, noise=0.05),  # the same, further down
        training_logs(chosen=lambda t: 12 - 8 * t, rejected=lambda t: -30 * t),  # likelier than it began, all along
        sliding(chosen=-12.0, rejected=0.0),  # falls, but so does the margin: another trouble
        sliding(chosen=-8.0, num_logs=9),  # too few logs to tell
    ],
)
def test_what_is_not_degradation(logs: Logs) -> None:
    assert names(logs) == []


def test_a_late_fall_is_found_and_one_outlier_is_not_a_fall() -> None:
    late = training_logs(chosen=lambda t: min(4 * t, 4 - 30 * (t - 0.7)), rejected=lambda t: -35 * t, num_logs=200)
    (verdict,) = judge(late).verdicts
    assert verdict.name == "degradation" and verdict.step > 0.6 * 2000
    spiked = list(sliding(chosen=2.0))
    spiked[-1][1]["logratio/chosen"] = -500.0
    assert names(iter(spiked)) == []


@pytest.mark.parametrize(("direction", "words"), [(0.3, "in neither list"), (-0.3, "in no list")])
def test_both_falling_with_a_moving_probe_is_dispersion(direction: float, words: str) -> None:
    monitor = judge(sliding(chosen=-8.0, probe=lambda t: direction * t))
    assert [verdict.name for verdict in monitor.verdicts] == ["degradation", "dispersion"]
    assert words in monitor.verdicts[1].meaning


def test_a_moving_probe_alone_is_not_dispersion() -> None:
    assert names(sliding(chosen=5.0, probe=lambda t: 0.3 * t)) == []


def constant(num_logs: int = 12, every: int = 10, **values: float) -> Logs:
    """Healthy logs with some values held."""
    for step, log in training_logs(chosen=lambda t: 3 * t, rejected=lambda t: -9 * t, num_logs=num_logs, every=every):
        yield step, {**log, **values}


def test_rewards_pinned_at_zero() -> None:
    held = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "loss/preference": math.log(2)}
    (verdict,) = judge(constant(**held)).verdicts
    assert verdict.name == "pinned" and verdict.step == 50 and "loss/preference is 0.6931" in verdict.evidence
    assert names(constant(num_logs=30, every=1, **held)) == [], "a slow warm-up looks the same at first"
    assert names(constant(**{**held, "rewards/rejected": -0.01})) == []


def test_zero_gradient() -> None:
    (verdict,) = judge(constant(grad_norm=0.0)).verdicts
    assert (verdict.name, verdict.step) == ("no_gradient", 50)
    assert names(constant(grad_norm=1e-12)) == []


def test_steps_that_are_rounded_away() -> None:
    """After one log: nothing about it is noise."""
    (verdict,) = judge(constant(num_logs=1, unmoved_weights=0.98)).verdicts
    assert (verdict.name, verdict.step) == ("rounded_away", 10) and "unmoved_weights is 0.980" in verdict.evidence
    assert verdict.fixes[0].startswith("dtype: float32")
    assert names(constant(unmoved_weights=0.01)) == []


def test_solved_pairs() -> None:
    (verdict,) = judge(constant(**{"rewards/accuracies": 1.0, "effective_weight": 0.001})).verdicts
    assert verdict.name == "solved" and verdict.fixes[0].startswith("max_steps: 50")
    assert names(constant(**{"rewards/accuracies": 1.0, "effective_weight": 0.2})) == []
    assert names(constant(**{"rewards/accuracies": 0.98, "effective_weight": 0.001})) == []


def test_dominating_rejected_gradient() -> None:
    (verdict,) = judge(constant(grad_ratio_log_per_token=math.log(150))).verdicts
    assert verdict.name == "rejected_dominates" and "150 times" in verdict.evidence
    assert names(constant(grad_ratio_log_per_token=2.0)) == []


def test_a_gradient_rule_that_looks_too_far() -> None:
    (verdict,) = judge(constant(loss=0.7, **{"gradient/sharpness_gap": 1.34})).verdicts
    assert (verdict.name, verdict.step) == ("displaced_too_far", 50) and verdict.fixes[0].startswith("rho: ")
    assert "gradient/sharpness_gap is 1.34, the loss 0.7" in verdict.evidence
    assert names(constant(loss=0.7, **{"gradient/sharpness_gap": 0.34})) == [], "less than half"
    assert names(constant(num_logs=4, loss=0.7, **{"gradient/sharpness_gap": 24.7})) == [], "too few logs"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (FLEX, {"eta": 0.1, "beta_neg": 0.04, "learning_rate": 1e-6}),
        ({**FLEX, "eta": 0.1}, {"eta": 0.2, "beta_neg": 0.04, "learning_rate": 1e-6}),
        (DPO, {"method": "flex_dpo", "beta_pos": 0.2, "beta_neg": 0.1, "eta": 0.1, "learning_rate": 1e-6}),
    ],
)
def test_fixes_are_yaml_written_from_the_settings(settings: dict[str, object], expected: dict[str, object]) -> None:
    (verdict,) = judge(sliding(chosen=-8.0), settings).verdicts
    lines = [line.replace("1e-06", "1.0e-6") for line in verdict.fixes]
    assert yaml.safe_load("\n".join(lines)) == expected


def test_advice_without_settings_is_general() -> None:
    monitor = HealthMonitor()
    for step, log in sliding(chosen=-8.0):
        monitor.observe(step, log)
    assert any(line.startswith("learning_rate: ...") for line in monitor.verdicts[0].fixes)


# --- levels, and what evaluations say ---


def evaluation(step: int, **metrics: float) -> tuple[int, dict[str, float]]:
    """An evaluation as it is logged."""
    return step, {f"eval_{key.replace('__', '/')}": value for key, value in metrics.items()}


def whole(
    logs: list[tuple[int, dict[str, float]]], settings: dict[str, object] = FLEX, max_steps: int = 100
) -> HealthMonitor:
    """The monitor behind a whole run."""
    monitor = HealthMonitor(settings)
    state = TrainerState(max_steps=max_steps, is_world_process_zero=False)
    monitor.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    for step, log in logs:
        monitor.observe(step, log)
    monitor.on_train_end(None, state, TrainerControl())  # type: ignore[arg-type]
    return monitor


def run(
    logs: list[tuple[int, dict[str, float]]], settings: dict[str, object] = FLEX, max_steps: int = 100
) -> list[str]:
    """Verdicts of a whole run."""
    return [f"{verdict.name} at {verdict.step}" for verdict in whole(logs, settings, max_steps).verdicts]


def supervised(losses: list[float], accuracy: float = 0.6) -> list[tuple[int, dict[str, float]]]:
    """Logs of a supervised run, every 10 steps."""
    return [
        (10 * i, {"loss": loss, "grad_norm": 1.0, "mean_token_accuracy": accuracy}) for i, loss in enumerate(losses, 1)
    ]


def test_rows_learnt_by_heart_with_a_rising_held_out_loss() -> None:
    """The reported run: 100 % on trained rows, 41 % on others, whose loss rises from 1.27 to 2.10."""
    trained = supervised([1.25, 0.7, 0.3, 0.1, 0.02, 0.01], accuracy=1.0)
    logs = [evaluation(0, loss=1.27), *trained[:3], evaluation(30, loss=1.4), *trained[3:], evaluation(60, loss=2.1)]
    assert run(logs) == ["overfitting at 30"]
    monitor = judge(iter(logs))
    assert "eval_loss rose from 1.27 to 1.4, while loss is 0.7" in monitor.verdicts[0].evidence
    well = [evaluation(0, loss=1.27), *supervised([1.2, 1.1, 1.0, 0.9]), evaluation(40, loss=0.95)]
    assert run(well) == []
    worse_everywhere = [evaluation(0, loss=1.27), *supervised([1.2, 1.4, 1.5, 1.6]), evaluation(40, loss=1.6)]
    assert run(worse_everywhere) == [], "trained rows get worse as well"


@pytest.mark.parametrize(("rows", "held_out", "found"), [(100, 0.41, True), (100, 0.75, False), (6, 0.41, False)])
def test_pairs_learnt_by_heart(rows: int, held_out: float, found: bool) -> None:
    """The gap in accuracy alone is enough, unless so few rows are held out that chance explains it."""
    logs = list(constant(num_logs=3, **{"rewards/accuracies": 1.0}))
    logs = [evaluation(0, loss=0.69, rewards__accuracies=0.0), *logs]
    logs.append(evaluation(30, loss=0.7, rewards__accuracies=held_out, rewards__margins=0.1))
    assert run(logs, {**FLEX, "eval_rows": rows}) == (["overfitting at 30"] if found else [])


def test_a_collapse_is_seen_in_the_first_log() -> None:
    """The reported run: learning rate 1, chosen responses at -1055 nats."""
    fallen = {"logratio/chosen": -1055.0, "logps/chosen": -1125.0, "mean_logps/chosen": -1125.0 / 60}
    (verdict,) = judge(constant(num_logs=1, **fallen)).verdicts
    assert (verdict.name, verdict.step) == ("collapse", 10)
    assert "logratio/chosen is -1055 nats a response, -17.6 a token" in verdict.evidence
    some = {"logratio/chosen": -30.0, "logps/chosen": -100.0, "mean_logps/chosen": -100.0 / 60}
    assert names(constant(num_logs=1, **some)) == [], "half a nat a token"


def test_a_collapse_of_supervised_rows_and_without_a_reference() -> None:
    assert run([evaluation(0, loss=1.0), *supervised([1.5, 3.0, 4.0]), evaluation(30, loss=4.2)]) == ["collapse at 30"]
    assert run(supervised([1.0] + [2.5] * 9)) == ["collapse at 100"]
    assert run(supervised([0.5, 1.9, 0.4, 1.8, 0.6, 0.5, 0.4, 0.5, 0.4, 1.9])) == [], "rows differ from log to log"
    start, end = (evaluation(s, loss=0.6, mean_logps__chosen=m) for s, m in ((0, -1.0), (30, -2.5)))
    assert run([start, (30, {"loss": 0.6, "rewards/margins": 1.0}), end]) == ["collapse at 30"]


def test_held_out_chosen_responses_that_fall_are_degradation_after_one_evaluation() -> None:
    """The quickstart as it was: -1.1 nats."""
    held_out = {"loss": 0.5, "rewards__margins": 0.4, "logps__chosen": -20.0, "mean_logps__chosen": -1.0}
    logs = [evaluation(0, **held_out, logratio__chosen=0.0), *constant(num_logs=3)]
    assert run([*logs, evaluation(30, **held_out, logratio__chosen=-1.1)]) == ["degradation at 30"]
    monitor = judge(iter([*logs, evaluation(30, **held_out, logratio__chosen=-1.1)]))
    assert "eval_logratio/chosen is -1.1 nats a response" in monitor.verdicts[0].evidence
    assert "about 3 times less likely" in monitor.verdicts[0].evidence
    assert run([*logs, evaluation(30, **held_out, logratio__chosen=-0.9)]) == []


def test_a_fall_in_a_run_too_short_for_trends() -> None:
    logs = list(constant(num_logs=4))
    for (_, log), ratio in zip(logs, (-0.1, -0.5, -1.5, -2.5), strict=True):
        log["logratio/chosen"] = ratio
    assert run(logs) == ["degradation at 40"]
    logs[2][1]["logratio/chosen"] = 0.5
    assert run(logs) == []


STILL = {"logratio/chosen": 0.02, "logratio/rejected": -0.03, "rewards/chosen": 0.002, "rewards/rejected": -0.003}


def test_a_run_that_barely_moves_is_not_healthy() -> None:
    """The reported run: LoRA at 1e-6, after 60 steps the loss is 0.692."""
    still = {**STILL, "loss": 0.692, "loss/preference": 0.692}
    assert run(list(constant(num_logs=6, **still)), max_steps=60) == ["barely_moved at 30"]
    assert run(list(constant(num_logs=6, **still)), max_steps=600) == ["barely_moved at 60"], "at the latest at its end"
    monitor = judge(constant(num_logs=6, **still))
    assert monitor.verdicts == [], "not while it may still be warming up"
    monitor.on_train_end(arguments(Path()), TrainerState(is_world_process_zero=False), TrainerControl())
    assert monitor.verdicts[0].fixes[0].startswith("learning_rate: 3e-05")
    assert "loss/preference 0.6920" in monitor.verdicts[0].evidence
    assert run(list(constant(num_logs=6, **{**still, "logratio/rejected": -0.5})), max_steps=60) == []


def test_held_out_rows_that_are_predicted_as_before_have_barely_been_moved() -> None:
    logs = supervised([1.27, 1.25, 1.28])
    assert run([evaluation(0, loss=1.27), *logs, evaluation(30, loss=1.265)], max_steps=30) == ["barely_moved at 30"]
    assert run([evaluation(0, loss=1.27), *logs, evaluation(30, loss=1.2)], max_steps=30) == []


def test_the_loss_of_a_reward_model_is_not_of_tokens() -> None:
    logs = [evaluation(0, loss=0.693), *supervised([0.693, 0.692, 0.694]), evaluation(30, loss=0.692)]
    (tokens,) = whole(logs, max_steps=30).verdicts
    (rewards,) = whole([(step, {**log, "mean_reward": 0.1}) for step, log in logs], max_steps=30).verdicts
    assert "0.6920 nats a token, in" in tokens.evidence and "0.6920, in" in rewards.evidence


def test_the_summary_says_what_was_seen() -> None:
    monitor = judge(iter([evaluation(0, loss=0.7), *constant(), evaluation(120, loss=0.6)]))
    assert monitor.summary()["state"] == "healthy over 12 logs and 2 evaluations"


# --- as a callback ---


def feed(monitor: HealthMonitor, logs: Logs, tmp_path: Path, **options: object) -> None:
    args = arguments(tmp_path, **{"learning_rate": 3e-6, **options})
    for step, log in logs:
        monitor.on_log(args, TrainerState(global_step=step), TrainerControl(), logs=log)


def test_each_verdict_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = HealthMonitor(FLEX)
    feed(monitor, sliding(chosen=-8.0), tmp_path)
    monitor.on_train_end(arguments(tmp_path), TrainerState(), TrainerControl())
    shown = capsys.readouterr().out
    step = monitor.verdicts[0].step
    assert shown.count("becoming less likely") == 1 and f"[health] step {step}:" in shown and "beta_neg: 0.04" in shown
    assert f"[health] warnings: degradation at step {step}" in shown


def test_only_the_first_rank_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = HealthMonitor(FLEX)
    args = arguments(tmp_path)
    for step, log in sliding(chosen=-8.0):
        monitor.on_log(args, TrainerState(global_step=step, is_world_process_zero=False), TrainerControl(), logs=log)
    assert monitor.verdicts and capsys.readouterr().out == ""


def test_a_resumed_run_reaches_the_verdicts_of_the_uninterrupted_one(tmp_path: Path) -> None:
    logs = list(sliding(chosen=-8.0, probe=lambda t: 0.3 * t))
    whole = judge(iter(logs))
    history = [{**log, "step": step} for step, log in logs[:30]]
    resumed = HealthMonitor(FLEX)
    resumed.on_train_begin(arguments(tmp_path), TrainerState(global_step=300, log_history=history), TrainerControl())
    feed(resumed, iter(logs[30:]), tmp_path)
    assert resumed.summary() == whole.summary() and len(whole.verdicts) == 2


@pytest.mark.parametrize("key", ["loss", "grad_norm", "loss/preference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_run_is_stopped_with_advice(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match=f"{key} is {value} at step 40.*now 3e-06; try 1e-06"):
        feed(HealthMonitor(), iter([(40, {"loss": 0.5, "grad_norm": 1.0, key: value})]), tmp_path)


def divergence(tmp_path: Path, **options: object) -> str:
    """What is said of a run that diverges in its first step."""
    with pytest.raises(AlignkitError) as caught:
        feed(HealthMonitor(), iter([(1, {"loss": math.nan})]), tmp_path, **options)
    return str(caught.value)


def test_the_advice_does_not_name_what_is_in_force(tmp_path: Path) -> None:
    bare = divergence(tmp_path, max_grad_norm=0.0)
    assert "max_grad_norm: 1.0 and some warmup_steps; then" in bare
    assert "max_grad_norm: 1.0" in divergence(tmp_path, max_grad_norm=10.0)
    held = divergence(tmp_path, max_grad_norm=1.0, warmup_steps=5)
    assert "max_grad_norm" not in held and "try 1e-06) and more warmup_steps; then" in held


def test_only_checkpoints_that_are_there_and_complete_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    assert "checkpoint" not in divergence(tmp_path)
    mark_complete(tmp_path / "checkpoint-4")
    assert "checkpoint-4 is from before" in divergence(tmp_path)


@pytest.mark.parametrize(("every", "steps", "advises"), [(10, 100, True), (1, 100, False), (2, 4, False)])
def test_more_logs_are_advised_where_there_can_be(every: int, steps: int, advises: bool, tmp_path: Path) -> None:
    monitor, state = HealthMonitor(), TrainerState(logging_steps=every, max_steps=steps)
    monitor.on_train_begin(arguments(tmp_path), state, TrainerControl())
    assert monitor.summary()["state"].endswith("lower logging_steps") == advises


def test_fp16_may_overflow_a_few_times_while_it_finds_its_scale(tmp_path: Path) -> None:
    overflow, fine = {"loss": 0.5, "grad_norm": math.inf}, {"loss": 0.5, "grad_norm": 1.0}
    monitor = HealthMonitor()
    args = arguments(tmp_path)
    args.fp16 = True
    state = TrainerState(global_step=1)
    for log in [*[overflow] * 5, fine, *[overflow] * 5]:
        monitor.on_log(args, state, TrainerControl(), logs=log)
    with pytest.raises(AlignkitError, match="bf16: true"):
        monitor.on_log(args, state, TrainerControl(), logs=overflow)


def test_evaluations_and_summaries_are_passed_over(tmp_path: Path) -> None:
    monitor = HealthMonitor()
    feed(monitor, iter([(10, {"eval_loss": math.nan}), (10, {"train_loss": 0.5, "train_runtime": 1.0})]), tmp_path)
    assert monitor.summary()["state"].startswith("nothing wrong seen, but 0 logs")


# --- trend ---


def test_trend_of_a_line_and_of_noise() -> None:
    line = trend([3.0 - 0.5 * i for i in range(20)])
    assert line.change == pytest.approx(-9.5) and line.falls and not line.rises
    assert trend([2.0] * 20).z == 0
    assert trend(list(range(9))).z == 0, "nine points are too few"
    assert trend(list(range(10))).rises
    noises = random.Random(0)
    false_alarms = sum(abs(trend([noises.gauss(0, 1) for _ in range(30)]).z) >= 4 for _ in range(1000))
    assert false_alarms == 0


def test_trend_is_not_decided_by_an_outlier() -> None:
    found = trend([*range(19), -1000.0])
    assert found.rises and found.change == pytest.approx(19, abs=0.5)
