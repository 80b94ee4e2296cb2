"""Every option of an online method changes something where it is taken: none is ignored in silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from alignkit.parts.method import Method, load_method
from tests.losses.policies import policy_batch, random_completions, slopes
from tests.losses.test_policy_properties import ONLINE_METHODS

SEQUENCE = {"importance_sampling_level": "sequence"}
CLIP: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "beta": [({}, 0.1)],
    "use_bias_correction_kl": [({"beta": 0.1}, False)],
    "entropy_coef": [({}, 0.1)],
    "epsilon": [({}, 0.1)],
    "epsilon_high": [({}, 0.5), ({}, 0.0)],
    "delta": [({}, 1.3)],
    "importance_sampling_level": [({}, "sequence")],
}
CHANGES: dict[str, dict[str, list[tuple[dict[str, Any], Any]]]] = {
    "grpo": {
        **CLIP,
        "loss_type": [({}, name) for name in ("grpo", "bnpo", "dr_grpo", "luspo", "sapo")]
        + [({"epsilon_high": 1.1}, "cispo")],
        "sapo_temperature_pos": [({"loss_type": "sapo"}, 2.0)],
        "sapo_temperature_neg": [({"loss_type": "sapo"}, 2.0)],
    },
    "grpo_guard": {
        **CLIP,
        "loss_type": [({}, name) for name in ("grpo", "bnpo", "dr_grpo", "luspo")],
        "step_axis": [({}, "position"), ({}, "entropy")],
        "num_steps": [({}, 2), (SEQUENCE, 2)],
        "scale": [({}, "fisher"), ({}, "fixed"), ({}, "none"), (SEQUENCE, "pooled"), (SEQUENCE, "none")],
        "center": [({}, name) for name in ("logmean", "exact_kl", "k3", "none")] + [(SEQUENCE, "logmeanexp")],
        "mode": [({}, "full")],
        "reweight": [({}, "bucket_rms"), ({"mode": "full"}, "none"), ({"mode": "full"}, "bucket_rms")],
        "min_count": [({}, 1000)],
        "kappa_min": [({}, 1.0)],
        "kappa_max": [({}, 1.0)],
        "fixed_std": [({"scale": "fixed"}, 0.3)],
        "alpha": [({"reweight": "bucket_rms"}, 0.5)],
        "wmax": [({"reweight": "bucket_rms"}, 1.1)],
        "ema": [({}, 0.5)],
    },
}
"""Option to pairs of other options and a value that changes something beside them."""
SMALL = {"grpo": {}, "grpo_guard": {"min_count": 2}}


def effects(method: Method, **options: Any) -> list[Any]:
    """All that a method computes of one batch, and then of another, with these options."""
    chosen, memory, found = method.options(**options), {}, []
    for seed in (3, 4):
        batch = dataclasses.replace(policy_batch(random_completions(seed, 12)), memory=memory)
        output = method.objective(batch, chosen)
        metrics = {name: value.values.tolist() for name, value in output.metrics.items()}
        found += [output.mean().item(), [term.item for term in output.terms], slopes(output, batch).tolist(), metrics]
    return found


def test_every_option_of_every_method_is_here() -> None:
    assert set(CHANGES) == set(ONLINE_METHODS)
    for name, changes in CHANGES.items():
        assert set(changes) == {field.name for field in dataclasses.fields(load_method(name).options)}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CHANGES for option in CHANGES[name]])
def test_it_changes_something(name: str, option: str) -> None:
    method = load_method(name)
    for others, value in CHANGES[name][option]:
        base = {**SMALL[name], **others}
        assert effects(method, **{**base, option: value}) != effects(method, **base), (others, value)
