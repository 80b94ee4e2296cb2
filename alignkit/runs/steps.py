"""The steps that every program takes; ``steps_preference.py`` and ``steps_sft.py`` hold those of their own."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from alignkit.runs.checkpoints import CheckpointGuard
from alignkit.runs.health import HealthMonitor
from alignkit.reports.metrics_log import MetricsLog
from alignkit.runs.pickles import check_deepspeed_shards, check_sharded_model, refused_pickle
from alignkit.runs.preemption import StopRequest, StopWhenAsked
from alignkit.runs.process_layout import ProcessLayoutRecorder
from alignkit.runs.progress import ShortProgress
from alignkit.runs.space import RoomForCheckpoints
from alignkit.runs.start_line import StartLine
from alignkit.runs.unmoved import UnmovedWeights
from alignkit.config import LoadedConfig
from alignkit.config.check import in_force
from alignkit.data.checks import Limits
from alignkit.data.load import load_rows, split_held_out
from alignkit.data.messages import as_messages
from alignkit.data.report import SplitReport, data_report
from alignkit.environment import environment
from alignkit.errors import CheckpointError, ConfigError, ModelError, Stopped
from alignkit.gradients._support import RunLayout, check_layout
from alignkit.parts.rule import load_rule
from alignkit.hub.upload import check_before_training
from alignkit.runs.model_steps import RunConfig
from alignkit.runs.origin import OriginWriter
from alignkit.models import loading
from alignkit.models.files import read_adapter
from alignkit.parametrizations.lora import trainable_report
from alignkit.runs.resumption import how_to_go_on
from alignkit.runs.directory import RunDirectory
from alignkit.storage.refusals import Reserve, StorageError, storage_error

_PASSED_THROUGH = (
    "output_dir seed data_seed num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay optim adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm bf16 fp16 gradient_checkpointing torch_compile dataloader_num_workers logging_steps "
    "eval_strategy eval_steps save_strategy save_steps report_to use_cpu ddp_timeout pad_to_multiple_of "
    "trust_remote_code router_aux_loss_coef"
).split()
"""Config keys that are TRL's own, handed on unchanged."""

STREAM_BUFFER = 1000  # rows a stream is shuffled within; rows at hand are shuffled by the trainer, anew each epoch
MOST_STEPS = 10**9
ACCELERATOR_ATTENTION = ("flash_attention_2", "flex_attention")

Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows of a run.

    Attributes:
        train: Training rows.
        evaluation: Held-out rows, None where there are none.
        prompts: Token ids of held-out prompts to answer in the report.
    """

    train: Rows
    evaluation: Rows | None
    prompts: list[tuple[int, ...]]


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
    reuse = {"resume": config.resume, "overwrite": config.overwrite, "config": loaded.effective()}
    directory = RunDirectory.create(config.output_dir, is_main=is_main, **reuse)
    if directory.kept:
        print(f"kept in {directory.path}, as no run is known to have written it: {', '.join(directory.kept)}")
    for remark in directory.remarks:
        print(f"warning: {remark}")
    try:
        if config.resume and is_main:
            directory.check_resumable(loaded.effective(), world_size=int(os.environ.get("WORLD_SIZE", "1")))
        directory.record(config=loaded.effective(), environment=environment(), status="running")
    except BaseException:
        directory.lock.release()
        raise
    return directory


@contextlib.contextmanager
def failures_recorded(directory: RunDirectory, *, resume: bool | str) -> Iterator[None]:
    """Leave ``status: failed`` in run.json when the run ends with an error, ``stopped`` when a signal ends it.

    Args:
        directory: The run.
        resume: The key of that name as it was given, for the command that goes on.
    """
    reserve = Reserve(directory.path, is_main=directory.is_main)
    reserve.hold()
    try:
        yield
    except Stopped as stopped:
        reserve.release()
        name = signal.Signals(stopped.signal).name
        directory.record(status=f"stopped: {name}")
        go_on = how_to_go_on(directory, sys.argv, resume=resume) if directory.is_main else ""
        raise Stopped(stopped.signal, go_on and f"stopped by {name}; {go_on}") from None
    except BaseException as error:
        told = storage_error(error, directory.path) or error
        headline = str(told).partition("\n")[0]
        reserve.release()
        # Where a file may not even be as long as run.json is, what has happened is still printed.
        with contextlib.suppress(StorageError):
            directory.record(status=f"failed: {type(told).__name__}: {headline}".removesuffix(": "))
        if told is not error:
            raise told from error
        raise
    finally:
        reserve.release()
        directory.lock.release()


def common_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments that TRL's trainers have in common."""
    return {
        **{key: in_force(config)[key] for key in _PASSED_THROUGH},
        "prediction_loss_only": True,
        # CheckpointGuard deletes old checkpoints, after the new one is known to be complete.
        "save_total_limit": None,
        "save_only_model": False,
        # A loss that is not finite must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "ignore_data_skip": False,
    }


def check_bf16(config: RunConfig) -> None:
    """Refuse bfloat16 mixed precision where transformers would, before it does so with a traceback.

    Raises:
        ConfigError: There is no accelerator for it, and the CPU has not been chosen.
    """
    if config.bf16 and not config.use_cpu and not is_torch_bf16_gpu_available() and not is_torch_xla_available():
        problem = "`bf16: true` on the CPU has to be asked for. Write use_cpu: true as well, or remove bf16"
        raise ConfigError("torch finds no accelerator with bfloat16 on this machine", [problem])


def check_device(config: RunConfig, args: TrainingArguments) -> None:
    """Refuse what needs an accelerator where there is none.

    Raises:
        ConfigError: Lists it.
    """
    if args.device.type != "cpu":
        return
    problems = []
    if config.fp16:
        advice = "Write bf16: true and use_cpu: true, or remove it"
        problems.append(f"`fp16: true`: float16 mixed precision needs an accelerator. {advice}")
    adapter = None if config.adapter is None else LoraConfig.from_pretrained(config.adapter)
    if config.quantization == "int8" and (config.use_dora or (adapter is not None and adapter.use_dora)):
        why = "PEFT measures unpacked weights, and int8 weights are unpacked on an accelerator alone"
        named = "`use_dora: true`" if adapter is None else f"`adapter: {config.adapter}`, which has use_dora,"
        advice = "Write quantization: nf4 or none" + (", or remove use_dora" if adapter is None else "")
        problems.append(f"{named} with `quantization: int8`: {why}. {advice}")
    if config.attn_implementation in ACCELERATOR_ATTENTION:
        kernel = f"`attn_implementation: {config.attn_implementation}`"
        problems.append(f"{kernel}: it has no backward pass on the CPU. Write attn_implementation: sdpa")
    if problems:
        raise ConfigError("training runs on the CPU: torch finds no accelerator on this machine", problems)


def check_length(config: RunConfig, args: TrainingArguments, rows: Rows) -> None:
    """Refuse a share of the rows that is no step, and more steps than a run can take.

    Args:
        config: The config.
        args: The trainer's arguments.
        rows: The training rows, as the trainer takes them; those of a stream are not counted.

    Raises:
        ConfigError: Says how many steps it would be.
    """
    if config.max_steps > 0 or not isinstance(rows, Dataset):
        return
    batches = math.ceil(len(rows) / (args.per_device_train_batch_size * args.world_size))
    an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = config.num_train_epochs * an_epoch
    given = f"`num_train_epochs: {config.num_train_epochs:g}` of {an_epoch:,} steps each is"
    if 0 < steps < 1:
        problem = f"{given} less than one step. Write at least {1 / an_epoch:.3g}, or max_steps: 1"
    elif steps > MOST_STEPS:
        problem = f"{given} {steps:.3g} steps, which no run takes. Write a smaller number, or max_steps"
    else:
        return
    raise ConfigError("the length of the run cannot be meant", [problem])


def check_gradient_rule(config: RunConfig, args: TrainingArguments) -> None:
    """Refuse a gradient rule that cannot work as the run was launched, before hours are spent on its rows.

    Raises:
        ConfigError: Lists what stands in the way.
    """
    if config.gradient_rule is not None:
        has_adapter = config.parametrization == "lora"
        check_layout(load_rule(config.gradient_rule), RunLayout.of_arguments(args), has_adapter=has_adapter)


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or that of the adapter that is continued, with the config's chat template if any.

    The adapter's knows the tokens and the template it was trained with.

    Raises:
        ModelError: There is none, or it has no end-of-sequence token.
    """
    adapter = None if config.adapter is None else read_adapter(config.adapter)
    from_adapter = adapter is not None and adapter.has_tokenizer
    tokenizer = loading.load_tokenizer(
        config.adapter if from_adapter else config.model,
        revision=None if from_adapter else config.model_revision,
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


def load_splits(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """The rows as loaded, plain ones as messages if so asked: ``train``, and ``held-out`` where some are.

    Raises:
        DataError: They cannot be read.
    """
    seed = config.seed if config.data_seed is None else config.data_seed
    family = config.row_family(vars(config))
    common = {"column_map": config.column_map, "seed": seed, "family": family, "name_sources": True}
    limits = {"streaming": config.streaming, "max_rows": config.max_rows}
    rows = load_rows(config.data, split=config.data_split, **limits, **common)
    splits = {"train": rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER) if config.streaming else rows}
    if config.eval_data is not None:
        limit = config.max_eval_rows
        splits["held-out"] = load_rows(config.eval_data, split=config.eval_split, max_rows=limit, **common)
    elif config.eval_fraction > 0:
        splits["train"], splits["held-out"] = split_held_out(rows, config.eval_fraction, seed, family)
    if config.apply_chat_template:
        splits = {name: as_messages(split, tokenizer, name) for name, split in splits.items()}
    return splits


def convert_splits(
    config: RunConfig, splits: Mapping[str, Rows], convert: Callable[..., tuple[Rows, SplitReport]]
) -> dict[str, tuple[Rows, SplitReport]]:
    """Every split converted by ``convert(rows, name=..., ...)``, with its report."""
    stops = loading.generation_stop_ids(config.model, config.model_revision)
    shared = {
        "max_dropped_fraction": config.max_dropped_fraction,
        "num_proc": config.dataset_num_proc,
        "stop_token_ids": stops,
    }
    return {name: convert(split, name=name, **shared) for name, split in splits.items()}


def report_data(
    config: RunConfig,
    converted: Mapping[str, tuple[Rows, SplitReport]],
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    directory: RunDirectory,
) -> None:
    """Print and record what the rows are, and refuse those that would not do what was asked.

    Raises:
        DataError: A check fails.
    """
    limits = Limits(config.max_truncated_fraction, config.allow_overlap)
    report = data_report(converted, tokenizer, limits=limits)
    if args.process_index == 0:
        report.print_to(sys.stdout)
    directory.record(data=report.to_dict())
    report.raise_for_failures()


def run_callbacks(config: RunConfig, directory: RunDirectory, data: PreparedData) -> list[TrainerCallback]:
    """The log and the health monitor."""
    settings = asdict(config.method_options) | {"learning_rate": in_force(config)["learning_rate"]}
    if isinstance(data.evaluation, Dataset):
        settings["eval_rows"] = len(data.evaluation)
    return [MetricsLog(directory.metrics_path), HealthMonitor(settings)]


def introduce(
    config: RunConfig, trainer: Trainer, directory: RunDirectory, *, reference: str | None = None, **sections: Any
) -> None:
    """Set up what a trainer prints and how it saves, record what it trains, and say so.

    Args:
        config: The config.
        trainer: The trainer, with all its callbacks.
        directory: Where it is recorded.
        reference: The reference in force, in words; None where there is no such thing.
        **sections: More for ``run.json``.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    trainer.add_callback(ProcessLayoutRecorder(trainer, lambda layout: directory.record(process_layout=layout)))
    trainer.add_callback(UnmovedWeights(trainer))
    kind = config.parametrization + ("" if config.quantization == "none" else f" on {config.quantization}")
    rule = f" with {config.gradient_rule}" if config.gradient_rule else ""
    against = f"; reference: {reference}" if reference else ""
    trainer.add_callback(StartLine(trainer, f"{config.method}{rule}, {kind}{against}"))
    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluationAtTheEnd())
    trainer.add_callback(OriginWriter(directory))
    # Last: whatever belongs to a checkpoint is in it before it is called complete.
    trainer.add_callback(CheckpointGuard(config.save_total_limit, directory.lock.check))
    directory.record(trainable=asdict(trainable_report(trainer.model)), **sections)
    if directory.is_main:
        directory.manifest.claim(directory.metrics_path.name)
    if trainer.is_world_process_zero():
        print(trainable_report(trainer.model))
        if trainer.aux_loss_enabled:
            origin = "the model's own" if config.router_aux_loss_coef is None else "as asked"
            print(f"load-balancing loss: router_aux_loss_coef {trainer.router_aux_loss_coef:g}, {origin}")


class EvaluationAtTheEnd(TrainerCallback):
    """Evaluates after the last step, while the run can still be judged by it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for it."""
        control.should_evaluate = control.should_evaluate or state.global_step >= state.max_steps


def stop_when_asked(trainer: Trainer, request: StopRequest) -> None:
    """Let a signal end training after a step, and refuse a checkpoint for which there is no room."""
    # The guard stays last: it announces what they have decided to save.
    guard = trainer.pop_callback(CheckpointGuard)
    for callback in (StopWhenAsked(request), RoomForCheckpoints(trainer), guard):
        trainer.add_callback(callback)


def train(config: RunConfig, trainer: Trainer, directory: RunDirectory) -> None:
    """Train, from the last complete checkpoint when resuming; after the last step nothing is left but the report.

    Held-out rows are evaluated before the first step, so that there is something to compare with.
    """
    checkpoint = _agreed(directory) if config.resume else None
    if checkpoint is not None and trainer.is_world_process_zero():
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        is_done = state.global_step >= state.max_steps and not directory.extended
        left = f": all {state.max_steps} steps are done, only the report is written again" if is_done else ""
        longer = f", which is made longer ({'; '.join(directory.extended)})" if directory.extended else ""
        print(f"resuming from {checkpoint}{left}{longer}")
    trainer.args.eval_on_start = checkpoint is None and trainer.eval_dataset is not None
    if checkpoint is not None:
        _check_pickles(checkpoint, trainer)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except UnpicklingError as error:
        if checkpoint is None:
            raise
        raise CheckpointError(refused_pickle(checkpoint)) from error
    finally:
        _end_bars(trainer)


def _agreed(directory: RunDirectory) -> Path | None:
    """The checkpoint to resume from, which the first process has looked through; a collective."""
    (checkpoint,) = broadcast_object_list([directory.checkpoint_to_resume() if directory.is_main else None])
    return checkpoint


def _check_pickles(checkpoint: Path, trainer: Trainer) -> None:
    """Look at what DeepSpeed or torch would read with trust, once a machine; a collective."""
    problem = None
    if trainer.args.local_process_index == 0:
        try:
            if trainer.is_deepspeed_enabled:
                check_deepspeed_shards(checkpoint)
            elif trainer.is_fsdp_enabled:
                check_sharded_model(checkpoint)
        except CheckpointError as error:
            problem = str(error)
    if problem := next(filter(None, gather_object([problem])), None):
        raise CheckpointError(problem)


def _end_bars(trainer: Trainer) -> None:
    """End the line of progress bars that an error left open, or its message would go on in that line."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            for bar in (callback.prediction_bar, callback.training_bar):
                if bar is not None:
                    bar.close()
