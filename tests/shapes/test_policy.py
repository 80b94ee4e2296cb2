"""The online bridge against TRL's GRPOTrainer: the same completions, losses and gradient norms, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.online import make, make_peer
from tests.trainers import flat_weights, logged

AGAIN = {"num_iterations": 3}
PAIRS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "accumulation of grpo": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "grpo"},
    "accumulation of bnpo": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "loss_type": "bnpo"},
    "reused completions": {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "several steps a draw": {"steps_per_generation": 2, "per_device_train_batch_size": 4},
    "a clip that acts": {"num_iterations": 3, "epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 3e-3},
    "two-sided clip": {"num_iterations": 3, "epsilon": 0.1, "delta": 1.15, "learning_rate": 3e-3},
    "sequence level": {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "epsilon": 3e-3,
        "num_iterations": 3,
    },
    "divergence": {"beta": 0.1, "num_iterations": 2},
    "divergence without correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy bonus": {"entropy_coef": 0.01},
    "tokens of large entropy": {"top_entropy_quantile": 0.4},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3, "num_iterations": 3, "learning_rate": 3e-3},
    "off-policy mask and entropy bonus": {
        "off_policy_mask_threshold": 1e-3,
        "entropy_coef": 0.01,
        "learning_rate": 3e-3,
        **AGAIN,
    },
    "cut completions masked": {"mask_truncated_completions": True, "max_completion_length": 96, "loss_type": "grpo"},
    "temperature": {"temperature": 0.7, "num_iterations": 2},
    "rewards over the batch": {"scale_rewards": "batch"},
}
METRICS = ("reward", "completions/mean_length", "frac_reward_zero_std")


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradient_norms_follow_those_of_trl(name: str, peft: bool, tmp_path: Path) -> None:
    if peft and name not in ("dapo", "divergence", "reused completions"):
        pytest.skip("what this changes is the same with an adapter")
    # One after the other: both draw from the one random state that their constructors seed.
    theirs = make_peer(tmp_path / "theirs", peft, **PAIRS[name])
    theirs.train()
    ours = make(tmp_path / "ours", peft, **PAIRS[name])
    ours.train()
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    for key in ("loss", "grad_norm", *METRICS):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=2e-5, abs=1e-6), key
    assert len(logged(ours, "loss")) == 4 and any(logged(ours, "grad_norm"))
    torch.testing.assert_close(flat_weights(ours.model), flat_weights(theirs.model), rtol=0, atol=5e-6)
