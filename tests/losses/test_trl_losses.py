"""Every loss and modifier that TRL has too, against TRL's own code on the same log-probs: the same bits in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig

from alignkit.objectives._dpo_family import PairOptions, ScoredOptions, WeightedOptions
from alignkit.parts.method import load_method, method_names
from tests.dpo_oracles import LOSSES
from tests.losses.dpo_family import random_family_batch
from tests.losses.test_dpo import trl_outcome

MODIFIERS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
    "all": {"ld_alpha": 0.3, "use_weighting": True, "f_divergence_type": "forward_kl"},
}
OF_TRL = {name: "sigmoid" if name == "dpo" else name for name in LOSSES}
CASES = [
    (name, modifier)
    for name in OF_TRL
    for modifier, keys in MODIFIERS.items()
    if keys.keys() <= load_method(name).options.__dataclass_fields__.keys()
]


def test_every_member_of_the_family_is_here() -> None:
    family = {name for name in method_names() if issubclass(load_method(name).options, PairOptions)}
    assert set(LOSSES) == family
    with_weights = {name for name, modifier in CASES if modifier == "use_weighting"}
    assert family - with_weights == {"aot", "aot_unpaired"}, "which sort, so that a weight would meet another pair"
    with_divergences = {name for name, modifier in CASES if modifier == "forward_kl"}
    assert with_divergences == {name for name in family if issubclass(load_method(name).options, ScoredOptions)}
    assert with_divergences == family & {"dpo", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
    assert with_weights == {name for name in family if issubclass(load_method(name).options, WeightedOptions)}


@pytest.mark.parametrize(("name", "modifier"), CASES)
def test_same_bits_as_trl(name: str, modifier: str) -> None:
    """Gradients always; the mean of a loss whose pairs TRL sorts is summed in another order there."""
    method = load_method(name)
    # No product by 1 or 0 that would hide a rounding.
    own = {key: 0.2 for key in ("label_smoothing", "discopop_tau") if hasattr(method.options(), key)}
    if name == "dpo":
        own = {}  # TRL's sigmoid has no label smoothing.
    options = method.options(beta=0.13, **own, **MODIFIERS[modifier])
    batch = random_family_batch(seed=3, count=8, dtype=torch.float32)
    output = method.objective(batch, options)
    mean = output.terms[0].values.mean()
    (grad,) = torch.autograd.grad(mean, batch.policy_token_logps)
    mask = batch.completion_mask
    clean = type(batch)(
        **{
            **vars(batch),
            "policy_token_logps": batch.policy_token_logps.detach().masked_fill(~mask, 0.0),
            "ref_token_logps": batch.ref_token_logps.masked_fill(~mask, 0.0),
            "policy_log_sum_sq_probs": batch.policy_log_sum_sq_probs.masked_fill(~mask, 0.0),
        }
    )
    if name == "hinge" and options.use_weighting:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trl_outcome(clean, loss_type="hinge", **vars(options))
        return  # TRL multiplies the output of relu in place, which its backward pass needs; the oracle judges.
    loss, trl_grad, metrics = trl_outcome(clean, loss_type=OF_TRL[name], **vars(options))
    assert mean.item() == (pytest.approx(loss.item(), rel=3e-7) if name.startswith("aot") else loss.item())
    assert torch.equal(grad[mask], torch.stack(trl_grad.chunk(2), dim=1)[mask])
    if options == method.options(beta=0.13, **own) and name not in ("ipo", "sigmoid_norm"):
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert output.metrics[key].values.mean().item() == pytest.approx(metrics[key], rel=1e-6), key


def test_defaults_that_differ_from_those_of_trl_are_those_of_the_page(repository: Path) -> None:
    """TRL has beta 0.1, no smoothing but where it must be, and a discopop_tau of 0.05 for all."""
    betas = {name: load_method(name).options().beta for name in LOSSES}
    others = {name: beta for name, beta in betas.items() if beta != DPOConfig.beta}
    assert others == {"nca_pair": 0.01, "robust": 0.01, "bco_pair": 0.01, "discopop": 0.05, "sigmoid_norm": 5.0}
    page = (repository / "docs" / "concepts" / "losses.md").read_text()
    assert "0.01 for `nca_pair`, `robust` and `bco_pair`, 0.05 for\n  `discopop`, and 5 for `sigmoid_norm`" in page
    smoothing = {name: load_method(name).options().label_smoothing for name in ("dpo", "robust", "aot", "aot_unpaired")}
    assert smoothing == {"dpo": 0.0, "robust": 0.1, "aot": 0.0, "aot_unpaired": 0.0}
    assert load_method("discopop").options().discopop_tau == DPOConfig.discopop_tau
