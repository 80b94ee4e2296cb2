"""GRPO-Guard-style clipping through the online bridge: switched off it is GRPO; switched on it clips and is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.parts.method import load_method
from tests.online import make
from tests.trainers import flat_weights, logged

OFF_POLICY: dict[str, Any] = {"num_iterations": 3, "learning_rate": 3e-3, "epsilon": 0.01}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_switched_off_it_is_grpo(level: str, tmp_path: Path) -> None:
    keys = {**OFF_POLICY, "importance_sampling_level": level}
    plain = make(tmp_path / "plain", **keys)
    plain.train()
    off = make(tmp_path / "off", method="grpo_guard", scale="none", center="none", min_count=1, **keys)
    off.train()
    for key in ("loss", "grad_norm", "clip_ratio/high_mean"):
        assert logged(off, key) == pytest.approx(logged(plain, key), rel=1e-6, abs=1e-9), key
    torch.testing.assert_close(flat_weights(off.model), flat_weights(plain.model), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "keys",
    [{}, {"step_axis": "entropy", "ema": 0.5}, {"importance_sampling_level": "sequence", "reweight": "bucket_rms"}],
)
def test_switched_on_it_centres_the_ratios_and_logs_what_it_says(keys: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(tmp_path, method="grpo_guard", min_count=4, **OFF_POLICY, **keys)
    trainer.train()
    means, raw = logged(trainer, "grpo_guard/ratio_mean"), logged(trainer, "ratio/mean")
    assert set(logged(trainer, "grpo_guard/guarded")) == {1.0}
    if not keys:
        assert means == pytest.approx([1.0] * len(means), abs=1e-5)
    assert max(abs(mean - 1.0) for mean in raw) > 0.05
    assert load_method("grpo_guard").metrics.keys() <= trainer.state.log_history[0].keys()
    assert bool(trainer.rollouts.memory) == ("ema" in keys)
