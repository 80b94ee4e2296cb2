"""The figure is a PNG with ink where there is data, for any log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from alignkit.models.router_watch import METRICS as ROUTER_METRICS
from alignkit.objectives._pair_metrics import PAIR_METRICS
from alignkit.objectives.adpo import METRICS as ADPO_METRICS
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import parametrizations
from alignkit.parts.rule import TWO_GRADIENT_METRICS
from alignkit.reports.plot import panels_of_log, plot_run, with_ratios_per_token
from alignkit.shapes import tokens
from alignkit.shapes.candidates import PANELS
from tests.reports.logs import training_logs, write_metrics


def colours(path: Path) -> set[tuple[int, int, int]]:
    """The colours of a PNG, as bytes."""
    red, green, blue = np.moveaxis((imread(path)[..., :3] * 255).round().astype(np.uint32), -1, 0)
    packed = np.unique(red << 16 | green << 8 | blue)
    return {(int(p) >> 16, int(p) >> 8 & 255, int(p) & 255) for p in packed}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


CURVE_COLOURS = {rgb(curve.colour) for panel in PANELS for curve in panel.curves}


def test_a_run_fills_every_panel(tmp_path: Path) -> None:
    logs = training_logs(chosen=lambda t: -5 * t, rejected=lambda t: -20 * t, probe=lambda t: -0.2 * t, num_logs=80)
    metrics = write_metrics(tmp_path / "metrics.jsonl", logs)
    plot_run(
        metrics, tmp_path / "plot.png", panels=PANELS, title="flex_dpo on a tiny model", marks={"degradation": 300}
    )
    assert imread(tmp_path / "plot.png").shape[:2] > (700, 1200)
    assert colours(tmp_path / "plot.png") >= CURVE_COLOURS
    plot_run(metrics, tmp_path / "unmarked.png", panels=PANELS, title="flex_dpo on a tiny model")
    assert (tmp_path / "plot.png").read_bytes() != (tmp_path / "unmarked.png").read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 5, "loss": 0.5, "grad_norm": 0.0}],
        [{"step": 1, "loss": None, "grad_norm": None, "nonfinite": ["loss", "grad_norm"]}],
        [{"step": 0, "eval_loss": 0.7}, {"step": 0, "eval_rewards/chosen": 0.0}],
        [{"step": i, "loss": 0.6931471824645996} for i in range(200)],
    ],
)
def test_sparse_logs(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "plot.png", panels=PANELS)
    assert imread(tmp_path / "plot.png").ndim == 3


def test_one_logged_point_is_visible(tmp_path: Path) -> None:
    logs = training_logs(chosen=lambda t: -5 * t, rejected=lambda t: -20 * t, num_logs=1)
    plot_run(write_metrics(tmp_path / "metrics.jsonl", logs), tmp_path / "plot.png", panels=PANELS)
    green = rgb("#009E73")  # the probe, which was not logged
    assert colours(tmp_path / "plot.png") >= CURVE_COLOURS - {green}
    assert green not in colours(tmp_path / "plot.png")


def test_every_curve_is_of_a_metric_that_methods_return() -> None:
    keys = {curve.key for panel in PANELS for curve in panel.curves}
    beside = {"loss", "dispersion", "mean_logps/probe", "log-ratio a token/chosen", "log-ratio a token/rejected"}
    of_parametrizations = {key for record in parametrizations() for key in record.metrics}
    beside |= set(load_method("kto").metrics)
    assert keys - beside <= {*PAIR_METRICS, *ADPO_METRICS, *TWO_GRADIENT_METRICS, *ROUTER_METRICS, *of_parametrizations}


RULED = {"gradient/cosine": 0.9, "gradient/sharpness_gap": 0.02}
RATIO = "Rejected over chosen gradient"


@pytest.mark.parametrize(
    ("changes", "gone", "new"),
    [
        ({}, [], []),
        (RULED, [], ["Gradient and displaced gradient", "Loss at the displaced weights, above the loss"]),
        ({"grad_ratio_log_per_token": None}, [RATIO], []),
        (
            {"grad_ratio_log_per_token": None, "adpo/anchor_drift": 3.0},
            [RATIO, "Likelihood against the reference"],
            ["Likelihood against the anchor", "Distance from the anchor"],
        ),
    ],
)
def test_panels_are_those_of_what_was_logged(changes: dict[str, float], gone: list[str], new: list[str]) -> None:
    logs = training_logs(chosen=lambda t: -5 * t, rejected=lambda t: -20 * t)
    entries = [with_ratios_per_token({"step": step, **log, **changes}) for step, log in logs]
    plain = [
        *("Likelihood", "Likelihood against the reference", "Implicit rewards", "Pairs told apart, and gradient left"),
        *(RATIO, "Loss and gradient norm"),
    ]
    shown = [panel.title for panel in panels_of_log(PANELS, entries)]
    assert sorted(shown) == sorted({*plain, *new} - {*gone}) and shown[-1] == plain[-1]


def test_a_supervised_run_shows_its_rule_and_leaves_no_empty_axes(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 2.0, "entropy": 1.0, "mean_token_accuracy": 0.5, **RULED} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "plot.png", panels=tokens.PANELS)
    ink = imread(tmp_path / "plot.png")[..., :3].min(-1) < 0.9
    height, width = ink.shape
    corner = ink[height // 2 :, 2 * width // 3 + 30 :]
    assert not corner.any(), "five panels, so the sixth place is blank"
    assert ink[height // 2 :, : width // 3].any()


def test_log_ratios_are_divided_by_the_mean_length() -> None:
    """60 nats at 1.5 nats a token are 40 tokens; a gain of 6 nats is 0.15 a token."""
    logged = {"step": 1, "logratio/chosen": 6.0, "logps/chosen": -60.0, "mean_logps/chosen": -1.5}
    assert with_ratios_per_token(logged)["log-ratio a token/chosen"] == pytest.approx(0.15)
    evaluated = {"step": 1, **{f"eval_{key}": value for key, value in logged.items()}}
    assert with_ratios_per_token(evaluated)["eval_log-ratio a token/chosen"] == pytest.approx(0.15)
    assert with_ratios_per_token({"step": 1, "logratio/chosen": 6.0}) == {"step": 1, "logratio/chosen": 6.0}
