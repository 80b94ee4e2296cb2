from __future__ import annotations

import re
from dataclasses import fields

import pytest

from alignkit.config.foreign_keys import ABSENT, SETTLED, WRITE
from alignkit.config.keys import Key, base_keys, keys_that, method_keys, methods_with, program_methods
from alignkit.config.names import is_launcher_key
from alignkit.config.optimizers import MUON, OPTIMIZERS
from alignkit.config.training import SCHEDULERS
from alignkit.config.values import check_value
from alignkit.parts.method import load_method, method_names
from alignkit.parts.shape import shapes_by_program

FOREIGN = {*WRITE, *ABSENT, *SETTLED} - {"loss_type", "max_prompt_length"}
"""Without what is a key of online runs, and a foreign one in all others."""
METHODS = [(program, method) for program in shapes_by_program() for method in program_methods(program)]
KEYS = [(program, key) for program in shapes_by_program() for key in base_keys(program).values()] + [
    (program, key) for program, method in METHODS for key in method_keys(method).values()
]


@pytest.mark.parametrize(("program", "key"), KEYS, ids=[f"{program}-{key.name}" for program, key in KEYS])
def test_key_is_complete(program: str, key: Key) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", key.name)
    assert key.info.help.endswith(".") and key.info.source
    if not key.required:
        assert check_value(key, key.default) == key.default
        assert type(check_value(key, key.default)) is type(key.default), "the default has the type of the key"


@pytest.mark.parametrize(("program", "method"), METHODS)
def test_options_of_a_method_do_not_collide_with_other_words(program: str, method: str) -> None:
    taken = {*base_keys(program), "config", "help", "print_config", "method_options"}
    assert not taken & set(method_keys(method))
    assert not [name for name in method_keys(method) if is_launcher_key(name) or name in FOREIGN]


def test_program_keys_do_not_collide_with_other_words() -> None:
    for program in shapes_by_program():
        assert not {"config", "help", "print_config"} & set(base_keys(program))
        assert not [name for name in base_keys(program) if is_launcher_key(name) or name in FOREIGN]


def test_every_method_belongs_to_a_program_that_exists_here() -> None:
    configured = {method for method in method_names() if load_method(method).program in shapes_by_program()}
    assert configured == {method for _, method in METHODS}
    assert {"dpo", "flex_dpo"} <= set(program_methods("preference"))
    with_beta = methods_with("preference", "beta")
    assert {"adpo", "d2o", "dpo", "treg"} <= set(with_beta) and "flex_dpo" not in with_beta


def test_choices_are_names_that_transformers_knows() -> None:
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) - {MUON} <= {name.value for name in OptimizerNames}
    assert set(SCHEDULERS) <= {name.value for name in SchedulerType}
    intervals = set(base_keys("preference")["eval_strategy"].info.choices or ())
    assert intervals <= {name.value for name in IntervalStrategy} & {name.value for name in SaveStrategy}


def test_defaults_said_to_be_upstream_are_upstream() -> None:
    from trl import DPOConfig
    from trl.trainer.model_config import ModelConfig

    upstream = {field.name: field.default for field in (*fields(ModelConfig), *fields(DPOConfig))}
    names = {"reference_batch_size": "precompute_ref_batch_size"}
    compared = 0
    for key in base_keys("preference").values():
        if key.info.source in ("TRL 1.16", "transformers") and (theirs := names.get(key.name, key.name)) in upstream:
            value = upstream[theirs]
            assert key.default == getattr(value, "value", value), key.name
            compared += 1
    assert compared > 25


TRAITS = {
    "passes_to_trainer": "output_dir seed data_seed num_train_epochs max_steps per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay "
    "optim adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 gradient_checkpointing torch_compile "
    "dataloader_num_workers logging_steps eval_strategy eval_steps save_strategy save_steps report_to use_cpu "
    "ddp_timeout pad_to_multiple_of trust_remote_code router_aux_loss_coef lr_scheduler_kwargs run_name "
    "neftune_noise_alpha train_sampling_strategy "
    "scale_rewards multi_objective_aggregation num_generations num_generations_eval max_completion_length "
    "steps_per_generation num_iterations temperature top_p top_k min_p repetition_penalty generation_kwargs "
    "chat_template_kwargs mask_truncated_completions max_tool_calling_iterations use_transformers_continuous_batching "
    "use_vllm vllm_mode vllm_server_base_url vllm_gpu_memory_utilization vllm_tensor_parallel_size "
    "vllm_max_model_length vllm_enable_sleep_mode vllm_importance_sampling_correction vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "free_on_resume": "resume overwrite output_dir save_steps save_strategy save_total_limit logging_steps report_to "
    "eval_strategy eval_steps per_device_eval_batch_size max_eval_rows probe_steps num_samples sample_max_new_tokens "
    "layout reference_batch_size reference_cache dataset_num_proc dataloader_num_workers max_dropped_fraction "
    "max_truncated_fraction allow_overlap ddp_timeout push_to_hub hub_model_id hub_private rollout_steps "
    "success_threshold keep_best bank_dir bank_batch_size gradient_ratio_steps "
    "run_name load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience "
    "early_stopping_threshold",
    "is_path": "model tokenizer reference_model helpful_reference_model adapter chat_template output_dir "
    "reference_cache bank_dir bank_embedder teacher",
}
"""What each trait means for a run is decided key by key, so a change shows here."""


@pytest.mark.parametrize("trait", TRAITS)
def test_traits(trait: str) -> None:
    assert keys_that(trait) == set(TRAITS[trait].split())


@pytest.mark.parametrize("trait", TRAITS)
def test_programs_agree_on_the_traits_of_a_key(trait: str) -> None:
    """A section that declares a key of another one anew has to say its traits anew."""
    for program in shapes_by_program():
        has = {name for name, key in base_keys(program).items() if getattr(key.info, trait)}
        assert has == keys_that(trait) & set(base_keys(program))


@pytest.mark.parametrize("program", shapes_by_program())
def test_what_passes_to_the_trainer_is_an_argument_of_it(program: str) -> None:
    from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

    arguments = {"preference": DPOConfig, "online": GRPOConfig, "reward": RewardConfig}.get(program, SFTConfig)
    assert keys_that("passes_to_trainer") & set(base_keys(program)) <= {field.name for field in fields(arguments)}
