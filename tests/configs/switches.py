"""Examples of refused combinations of the keys that say how training proceeds, for ``test_refusals.py``."""

from __future__ import annotations

from typing import Any

EVALUATED = {"eval_fraction": 0.5, "eval_strategy": "steps"}

# title: (what is refused, what is changed to mend it)
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logging_steps that is neither steps nor a share": ({"logging_steps": 2.5}, {"logging_steps": 0.25}),
    "eval_steps that is neither steps nor a share": (
        EVALUATED | {"eval_steps": 1.0},
        {"eval_steps": 1},
    ),
    "save_steps that is neither steps nor a share": ({"save_steps": 7.0}, {"save_steps": 7}),
    "no tracker beside trackers": ({"report_to": ["wandb", "none"]}, {"report_to": ["wandb", "tensorboard"]}),
}
IGNORED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "run_name without a tracker": ({"run_name": "first"}, {"report_to": ["tensorboard"]}),
}
