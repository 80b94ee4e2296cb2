"""Every argument of TRL's is followed or refused by name, and a field that a new release adds is noticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from alignkit.errors import ConfigError
from alignkit.shapes._arguments import REFUSED_FOR_PREFERENCE, REFUSED_FOR_SUPERVISED
from tests.supervised import completions, make, model, token_rows

OF_TRANSFORMERS = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps save_only_model save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    label_names train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    """.split()
)
"""Followed by the Trainer that the bridges inherit from, as by any other."""
OF_BOTH = {"trust_remote_code", "router_aux_loss_coef", "pad_to_multiple_of", "activation_offloading"}
FOLLOWED = {
    DPOConfig: OF_TRANSFORMERS | OF_BOTH | {"disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size"},
    SFTConfig: OF_TRANSFORMERS
    | OF_BOTH
    | {"dataset_num_proc", "max_length", "truncation_mode", "shuffle_dataset", "packing", "packing_strategy"}
    | {"padding_free", "eval_packing"},
}
REFUSED = {DPOConfig: REFUSED_FOR_PREFERENCE, SFTConfig: REFUSED_FOR_SUPERVISED}
OTHER_VALUES: dict[str, Any] = {
    "loss_type": {DPOConfig: ["ipo"], SFTConfig: "dft"},
    "loss_weights": [0.5],
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "beta": 0.2,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "max_length": 512,
    "truncation_mode": "keep_end",
    "dataset_num_proc": 2,
    "padding_free": True,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 7,
    "average_tokens_across_devices": False,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "model_init_kwargs": {"dtype": "float32"},
    "pad_token": "<pad>",
    "chat_template_path": "template.jinja",
    "dataset_text_field": "content",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "eos_token": "<eos>",
    "completion_only_loss": True,
    "assistant_only_loss": True,
}


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig])
def test_every_field_is_followed_or_refused(kind: type) -> None:
    """A new release of TRL or transformers: put its fields on the side they belong to."""
    fields = {field.name for field in dataclasses.fields(kind)}
    assert not FOLLOWED[kind] & set(REFUSED[kind])
    assert fields == FOLLOWED[kind] | set(REFUSED[kind])
    assert {field.name for field in dataclasses.fields(TrainingArguments)} >= OF_TRANSFORMERS


# The sharding of parallelism_config asks for packages that are not there.
PREFERENCE, SUPERVISED = (
    [name for name in refused if name != "parallelism_config"]
    for refused in (REFUSED_FOR_PREFERENCE, REFUSED_FOR_SUPERVISED)
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_refused_field_is_named_for_preference(make_trainer: Any) -> None:
    for name in PREFERENCE:
        value = OTHER_VALUES[name][DPOConfig] if name == "loss_type" else OTHER_VALUES[name]
        with pytest.raises(ConfigError, match=f"1 problem\n.*`{name}=.* of DPOConfig would change nothing"):
            make_trainer(arguments={name: value})
    with pytest.raises(ConfigError, match=r"2 problems\n.*`loss_type=.*\n.*`beta="):
        make_trainer(arguments={"beta": 0.5, "loss_type": ["hinge"]})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_refused_field_is_named_for_supervision(tmp_path: Path) -> None:
    for name in SUPERVISED:
        value = OTHER_VALUES[name][SFTConfig] if name == "loss_type" else OTHER_VALUES[name]
        with pytest.raises(ConfigError, match=f"1 problem\n.*`{name}=.* of SFTConfig would change nothing"):
            make(tmp_path, None, **{name: value})


def test_other_parameters_and_uneven_batches_are_refused(make_trainer: Any) -> None:
    with pytest.raises(ConfigError, match=r"`compute_metrics`: the trainer has no use for it. It takes eval_dataset"):
        make_trainer(compute_metrics=print)
    arguments = {"accelerator_config": {"even_batches": False}, "train_sampling_strategy": "batch_rebalance"}
    with pytest.raises(ConfigError, match=r"batch_rebalance(.|\n)*even_batches"):
        make_trainer(arguments=arguments)


def test_each_of_several_evaluation_sets_has_its_own_mean_over_tokens(tmp_path: Path) -> None:
    """Against plain cross-entropy, one row at a time; batches of 3 and 2 rows whose tokens differ in number."""
    rows = token_rows(completions(12))
    sets = {"few": rows.select(range(5)), "more": rows.select(range(5, 12))}
    trainer = make(tmp_path, rows, eval_dataset=sets, per_device_eval_batch_size=3)
    found, plain = trainer.evaluate(), model().eval()
    for name, subset in sets.items():
        total, count = 0.0, 0
        for row in subset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                logps = plain(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            trained = labels != -100
            total -= float(logps[trained, labels[trained]].sum())
            count += int(trained.sum())
        assert found[f"eval_{name}_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found[f"eval_{name}_loss/nll"] == found[f"eval_{name}_loss"]
        (logged,) = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert logged[f"eval_{name}_loss"] == found[f"eval_{name}_loss"]
        assert not [key for key in logged if key.startswith("eval_loss")]


def test_each_set_of_pairs_is_evaluated_as_it_is_alone(make_trainer: Any, rows: Dataset) -> None:
    sets = {"few": rows.select(range(5)), "more": rows.select(range(5, 16))}
    trainer = make_trainer("flex_dpo", arguments={"per_device_eval_batch_size": 3}, eval_dataset=sets)
    found = trainer.evaluate()
    for name, subset in sets.items():
        alone = trainer.evaluate(subset)
        for key in ("loss", "loss/preference", "rewards/margins", "mean_logps/chosen"):
            assert found[f"eval_{name}_{key}"] == alone[f"eval_{key}"], key
