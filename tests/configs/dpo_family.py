"""What the losses that TRL's DPO trainer has refuse: an example of each, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Example = tuple[dict[str, Any], dict[str, Any]]

CONFLICTS: Mapping[str, Example] = {
    **{
        f"tokens_per_batch with {name}": ({"method": name, "tokens_per_batch": 512}, {"tokens_per_batch": None})
        for name in ("aot", "aot_unpaired")
    },
    "tokens_per_batch with adaptive_tau": (
        {"method": "adpo", "tokens_per_batch": 512, "adaptive_tau": True},
        {"adaptive_tau": False},
    ),
}
IGNORED: Mapping[str, Example] = {
    f"f_alpha_divergence_coef of {name} without f_divergence_type: alpha_divergence": (
        {"method": name, "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence"},
    )
    for name in ("discopop", "dpo", "exo_pair", "hinge", "ipo", "robust", "sigmoid_norm")
}
