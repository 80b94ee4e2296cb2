"""Synthetic training logs with the noise of real ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

LENGTH = 60
Curve = Callable[[float], float]


def training_logs(
    *,
    chosen: Curve,
    rejected: Curve,
    probe: Curve | None = None,
    num_logs: int = 60,
    every: int = 10,
    noise: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, log) of a DPO run with beta 0.1.

    Args:
        chosen: Mean log-ratio of the chosen responses, nats a response, at a fraction 0..1 of the run.
        rejected: The same of the rejected ones.
        probe: Dispersion, nats a token, logged at every second step; None leaves it out.
        num_logs: Number of logs.
        every: Steps between them.
        noise: Standard deviation of the log-ratios between batches; that of the likelihoods is 8 nats.
        seed: Of the noise.
    """
    noises = random.Random(seed)
    for i in range(1, num_logs + 1):
        t = i / num_logs
        rho_w, rho_l = chosen(t) + noises.gauss(0, noise), rejected(t) + noises.gauss(0, noise)
        margin = 0.1 * (rho_w - rho_l)
        log = {
            "loss": math.log1p(math.exp(-margin)),
            "loss/preference": math.log1p(math.exp(-margin)),
            "grad_norm": math.exp(noises.gauss(0, 0.3)),
            "learning_rate": 1e-6,
            "rewards/chosen": 0.1 * rho_w,
            "rewards/rejected": 0.1 * rho_l,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + margin / 4 + noises.gauss(0, 0.05))),
            "logratio/chosen": rho_w,
            "logratio/rejected": rho_l,
            "logps/chosen": -70 + rho_w + noises.gauss(0, 8),
            "logps/rejected": -75 + rho_l + noises.gauss(0, 8),
            "effective_weight": 1 / (1 + math.exp(margin)),
            "grad_ratio_log_per_token": (5 + rho_w - rho_l) / LENGTH,
        }
        for role in ("chosen", "rejected"):
            log[f"mean_logps/{role}"] = log[f"logps/{role}"] / LENGTH
        if probe is not None and i % 2 == 0:
            log["dispersion"] = probe(t) + noises.gauss(0, 0.002)
            log["mean_logps/probe"] = log["dispersion"] - 1.2
        yield i * every, log


def write_metrics(path: Path, logs: Iterator[tuple[int, dict[str, float]]], *, evaluate_every: int = 20) -> Path:
    """Write logs as ``metrics.jsonl``, with an evaluation now and then."""
    lines = []
    for number, (step, log) in enumerate(logs, 1):
        lines.append({"step": step, **log})
        if number % evaluate_every == 0:
            lines.append({"step": step, **{f"eval_{key}": value for key, value in log.items() if key != "grad_norm"}})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
