"""Examples of options that belong to another parametrisation than the one chosen, for every pair of these."""

from __future__ import annotations

from itertools import permutations
from typing import Any

from alignkit.config.keys import program_methods
from alignkit.parts.parametrization import parametrizations
from tests.configs.cases import OF_STEPS

OF_PEFT = {"parametrization": "peft", "peft_type": "ia3"}
LORA: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["embed_tokens"],
    "init_lora_weights": "gaussian",
    "use_rslora": True,
    "loraplus_lr_ratio": 16.0,
    "use_dora": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "atp": {
        "atp_ffn": 0.25,
        "atp_kv_groups": 0.25,
        "atp_control_fraction": 0.5,
        "atp_generator_lr": 0.01,
        "atp_ratio_weight": 2.0,
        "atp_temperature": 0.2,
        "atp_keep_bias": 2.0,
        "atp_penalty": "group_lasso",
        "atp_penalty_strength": 0.5,
    },
    "full": {},
    "lora": LORA,
    "pat": {
        "pat_hidden": 0.3,
        "pat_weights": "full",
        "pat_rank": 8,
        "pat_form": "paper",
        "pat_mask": "importance",
        "pat_milestone_steps": 5,
        "pat_freeze_fraction": 0.5,
        "pat_mask_learning_rate": 0.1,
        "pat_active_coef": 2.0,
        "pat_identity_coef": 2.0,
        "pat_bimodality_coef": 2.0,
        "pat_keep_tied": True,
    },
    "peft": {"peft_type": "ia3", "peft_options": {"target_modules": ["q_proj"]}},
    "routers": {"router_layers": 2, "dense_mixer": True},
    "sparse": {
        "sparse_regulariser": "wgsef",
        "sparse_coef": 2.0,
        "sparse_ffn": 0.5,
        "sparse_kv_groups": 0.5,
        "sparse_until": 0.5,
        "sparse_anneal_fraction": 0.2,
    },
}
"""Every option of every parametrisation, with a value that is not its default."""


def under_another() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By the title of the refusal: what is refused, and what is changed to mend it."""
    return {
        f"{owner.label} options with {other.label}": _case(owner.name, other.name)
        for owner, other in permutations(parametrizations(), 2)
        if OPTIONS.get(owner.name) and owner.name not in other.takes
    }


def of_reward_models() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The same of methods that train reward models, which not every parametrisation can."""
    return {
        f"{method} under another parametrization than full or lora": (
            {"method": method, **(OF_STEPS if method == OF_STEPS["method"] else {}), **OF_PEFT},
            {"parametrization": "full", "peft_type": None},
        )
        for method in program_methods("reward")
    }


def _case(owner: str, other: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of one parametrisation under another one, which turns into the first."""
    chosen = {} if other == "lora" else OF_PEFT if other == "peft" else {"parametrization": other}
    mended = {"parametrization": owner} | dict.fromkeys(chosen.keys() - {"parametrization"})
    if owner == "lora":
        mended["disable_dropout"] = False
    return chosen | OPTIONS[owner], mended
