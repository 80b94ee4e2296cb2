"""The steps of a preference run; ``alignkit.run`` takes them in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig

from alignkit.callbacks.checkpoints import CheckpointGuard
from alignkit.callbacks.health import HealthMonitor
from alignkit.callbacks.metrics_log import MetricsLog
from alignkit.callbacks.probe import DispersionProbe
from alignkit.callbacks.process_layout import ProcessLayoutRecorder
from alignkit.callbacks.progress import ShortProgress
from alignkit.config import LoadedConfig, PreferenceConfig
from alignkit.data_steps import PreparedData
from alignkit.environment import environment, launched_with_fsdp
from alignkit.errors import ConfigError, ModelError
from alignkit.evals.token_rewards import NUM_SHOWN, write_heatmap
from alignkit.hub.upload import check_before_training
from alignkit.methods._preference import BridgeSettings, PreferenceTrainer
from alignkit.methods.method import load_method
from alignkit.model_steps import load_negative_reference, load_policy, load_reference, new_adapter
from alignkit.parametrizations import loading
from alignkit.parametrizations.lora import check_modules, trainable_report
from alignkit.run_directory import RunDirectory

PASSED_THROUGH = (
    "output_dir seed data_seed num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay optim adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm bf16 fp16 gradient_checkpointing disable_dropout torch_compile dataloader_num_workers "
    "logging_steps eval_strategy eval_steps save_strategy save_steps report_to use_cpu ddp_timeout pad_to_multiple_of"
).split()
"""Config keys that are TRL's own, handed on unchanged."""

ACCELERATOR_ATTENTION = ("flash_attention_2", "flex_attention")


def open_run_directory(loaded: LoadedConfig) -> RunDirectory:
    """Create or reopen the run directory and write down what the run was asked to do.

    Raises:
        RunDirectoryError: The directory cannot be used, or resuming would not continue the recorded run.
        HubError, ProblemListError: The result could not be uploaded as asked.
    """
    config = loaded.config
    if config.push_to_hub:
        check_before_training(config.hub_model_id, config.model, is_adapter=config.parametrization == "lora")
    # The processes of a launch are not connected yet; the launcher's variable tells them apart.
    is_main = int(os.environ.get("RANK", "0")) == 0
    reuse = {"resume": config.resume, "overwrite": config.overwrite}
    directory = RunDirectory.create(config.output_dir, is_main=is_main, **reuse)
    if config.resume and is_main:
        directory.check_resumable(loaded.effective(), world_size=int(os.environ.get("WORLD_SIZE", "1")))
    directory.record(config=loaded.effective(), environment=environment(), status="running")
    return directory


@contextlib.contextmanager
def failures_recorded(directory: RunDirectory) -> Iterator[None]:
    """Leave ``status: failed`` in run.json when the run ends with an error."""
    try:
        yield
    except BaseException as error:
        headline = str(error).partition("\n")[0]
        directory.record(status=f"failed: {type(error).__name__}: {headline}".removesuffix(": "))
        raise


def training_arguments(config: PreferenceConfig) -> DPOConfig:
    """TRL's arguments; creating them also sets up the processes (and ZeRO-3, before a model is loaded).

    Raises:
        ConfigError: The config needs an accelerator and there is none, or does not fit the launcher.
    """
    if config.reference == "precomputed" and launched_with_fsdp():
        why = "`reference: precomputed`: FSDP shards the weights that the cache is keyed by. Write reference: auto"
        raise ConfigError("the launcher uses FSDP", [why])
    args = DPOConfig(
        **{key: getattr(config, key) for key in PASSED_THROUGH},
        precompute_ref_log_probs=config.reference == "precomputed",
        precompute_ref_batch_size=config.reference_batch_size,
        trust_remote_code=config.trust_remote_code,
        max_length=None,
        prediction_loss_only=True,
        # CheckpointGuard deletes old checkpoints, after the new one is known to be complete.
        save_total_limit=None,
        save_only_model=False,
        # A loss that is not finite must be seen, not averaged away.
        logging_nan_inf_filter=False,
        ignore_data_skip=False,
    )
    if args.device.type == "cpu":
        _check_runs_on_cpu(config)
    return args


def _check_runs_on_cpu(config: PreferenceConfig) -> None:
    problems = []
    if config.fp16:
        problems.append("`fp16: true`: float16 mixed precision needs an accelerator. Write bf16: true, or remove it")
    if config.attn_implementation in ACCELERATOR_ATTENTION:
        kernel = f"`attn_implementation: {config.attn_implementation}`"
        problems.append(f"{kernel}: it has no backward pass on the CPU. Write attn_implementation: sdpa")
    if problems:
        raise ConfigError("training runs on the CPU: torch finds no accelerator on this machine", problems)


def load_tokenizer(config: PreferenceConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, with the config's chat template if it names one.

    Raises:
        ModelError: There is none, or it has no end-of-sequence token.
    """
    tokenizer = loading.load_tokenizer(
        config.model,
        revision=config.model_revision,
        chat_template=None if config.chat_template is None else Path(config.chat_template),
        trust_remote_code=config.trust_remote_code,
    )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.model!r} has no eos_token, so the model could never learn to stop. Give it one "
            f"and save it: tokenizer.eos_token = '</s>'; tokenizer.save_pretrained({config.model!r})"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_trainer(
    config: PreferenceConfig,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    directory: RunDirectory,
) -> PreferenceTrainer:
    """Load the models and put the trainer together with its callbacks."""
    method = load_method(config.method)
    model = load_policy(config)
    ref_model, negative_reference = load_reference(config, tokenizer), load_negative_reference(config, tokenizer)
    adapter = new_adapter(config)
    if adapter is not None:
        check_modules(model, config.lora_target_modules, config.lora_modules_to_save)
    cache = None if config.reference_cache is None else Path(config.reference_cache)
    health = HealthMonitor(asdict(config.method_options) | {"learning_rate": config.learning_rate})
    trainer = PreferenceTrainer(
        model,
        args,
        method=method,
        options=config.method_options,
        settings=BridgeSettings(config.layout, config.max_length, cache, negative_reference=negative_reference),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        ref_model=ref_model,
        peft_config=adapter,
        callbacks=[MetricsLog(directory.metrics_path), health],
    )
    _report_token_rewards(trainer, directory)
    _add_callbacks(trainer, config, data, directory)
    directory.record(batch_layout=asdict(trainer.layout), trainable=asdict(trainable_report(trainer.model)))
    if args.process_index == 0:
        print(f"layout: {trainer.layout.layout} ({trainer.layout.reason})\n{trainable_report(trainer.model)}")
    return trainer


def _add_callbacks(
    trainer: PreferenceTrainer, config: PreferenceConfig, data: PreparedData, directory: RunDirectory
) -> None:
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    trainer.add_callback(ProcessLayoutRecorder(trainer, lambda layout: directory.record(process_layout=layout)))
    if data.num_probe_rows:
        probe = trainer.eval_dataset.select(range(data.num_probe_rows))
        trainer.add_callback(DispersionProbe(trainer, probe, config.probe_steps))
    # Last: whatever belongs to a checkpoint is in it before it is called complete.
    trainer.add_callback(CheckpointGuard(config.save_total_limit))


def _report_token_rewards(trainer: PreferenceTrainer, directory: RunDirectory) -> None:
    """Print and record what the token rewards are like, with a picture of some, where rows have any."""
    if "token_rewards" not in trainer.needs or not trainer.is_world_process_zero():
        return
    reports = trainer.token_reward_reports
    for report in reports.values():
        print(report)
    directory.record(token_rewards={name: report.to_dict() for name, report in reports.items()})
    if isinstance(trainer.train_dataset, Dataset):
        picture = directory.path / "token_rewards.html"
        write_heatmap(picture, trainer.train_dataset.take(NUM_SHOWN), trainer.processing_class)
        print(f"  {picture} shows some of them")


def train(config: PreferenceConfig, trainer: PreferenceTrainer, directory: RunDirectory) -> None:
    """Train, from the last complete checkpoint when resuming; after the last step nothing is left but the report."""
    checkpoint = directory.last_complete_checkpoint() if config.resume else None
    if checkpoint is not None and trainer.is_world_process_zero():
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        is_done = state.global_step >= state.max_steps
        left = f": all {state.max_steps} steps are done, only the report is written again" if is_done else ""
        print(f"resuming from {checkpoint}{left}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
