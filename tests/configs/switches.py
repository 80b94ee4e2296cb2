"""Examples of refused combinations of the keys that say how training proceeds, for ``test_refusals.py``."""

from __future__ import annotations

from typing import Any

from tests.configs.cases import ONLINE

EVALUATED = {"eval_fraction": 0.5, "eval_strategy": "steps"}
NEW = {"new_tokens": ["<think>"]}
PISSA = {"init_lora_weights": "pissa"}
BEST = {"load_best_model_at_end": True}

# title: (what is refused, what is changed to mend it)
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logging_steps that is neither steps nor a share": ({"logging_steps": 2.5}, {"logging_steps": 0.25}),
    "eval_steps that is neither steps nor a share": (
        EVALUATED | {"eval_steps": 1.0},
        {"eval_steps": 1},
    ),
    "save_steps that is neither steps nor a share": ({"save_steps": 7.0}, {"save_steps": 7}),
    "schedule-free optimizer with a schedule": (
        {"optim": "schedule_free_adamw"},
        {"lr_scheduler_type": "constant", "warmup_steps": 10},
    ),
    "schedule-free optimizer that warms up for a share of the steps": (
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 0.1},
        {"warmup_steps": 10},
    ),
    "order of rows of a stream": (
        {"train_sampling_strategy": "group_by_length", "streaming": True, "max_steps": 5},
        {"streaming": False},
    ),
    "new tokens where embeddings do not train": (NEW | {"parametrization": "pat"}, {"parametrization": "lora"}),
    "new tokens with a continued adapter": (NEW | {"adapter": "lora"}, {"adapter": None}),
    "new tokens with quantization": (NEW | {"quantization": "nf4"}, {"quantization": "none"}),
    "LoRA that starts nowhere known": ({"init_lora_weights": "pisa"}, {"init_lora_weights": "pissa_niter_16"}),
    "start of LoRA with learnt removal": (
        {"parametrization": "atp", "init_lora_weights": "gaussian"},
        {"parametrization": "lora"},
    ),
    "start on weights that are quantised": (PISSA | {"quantization": "nf4"}, {"init_lora_weights": "eva"}),
    "start on weights with other forms of LoRA": (PISSA | {"use_rslora": True}, {"init_lora_weights": True}),
    "start on weights with weight decay": (PISSA | {"weight_decay": 0.1}, {"weight_decay": 0.0}),
    "start on weights with a gradient rule": (PISSA | {"gradient_rule": "sam"}, {"init_lora_weights": "eva"}),
    "start on rows of a stream": (
        {"init_lora_weights": "eva", "streaming": True, "max_steps": 5},
        {"streaming": False},
    ),
    "start on answers that are still to be drawn": (
        ONLINE | {"init_lora_weights": "eva"},
        {"init_lora_weights": "pissa"},
    ),
    "LoRA+ with learnt removal": (
        {"parametrization": "pat", "loraplus_lr_ratio": 4.0},
        {"parametrization": "lora"},
    ),
    "best or early end without evaluations": (BEST, EVALUATED),
    "best or early end of what is pruned while training": (
        EVALUATED | {"early_stopping_patience": 2, "parametrization": "pat"},
        {"parametrization": "lora"},
    ),
    "no tracker beside trackers": ({"report_to": ["wandb", "none"]}, {"report_to": ["wandb", "tensorboard"]}),
}
IGNORED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "keep_best with load_best_model_at_end": (
        ONLINE | EVALUATED | BEST | {"keep_best": True},
        {"load_best_model_at_end": False},
    ),
    "what is best where nothing is compared": (
        EVALUATED | {"metric_for_best_model": "loss", "greater_is_better": True},
        BEST,
    ),
    "early_stopping_threshold without patience": (
        EVALUATED | {"early_stopping_threshold": 0.1},
        {"early_stopping_patience": 2},
    ),
    "Adam's epsilon with another optimizer": ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, {"optim": "muon"}),
    "betas with an optimizer that has none": (
        {"optim": "sgd", "adam_beta1": 0.8, "adam_beta2": 0.9},
        {"optim": "paged_lion_8bit"},
    ),
    "run_name without a tracker": ({"run_name": "first"}, {"report_to": ["tensorboard"]}),
}
