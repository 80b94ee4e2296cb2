"""What surrounds the training of a run: its directory, its callbacks, what is said of it, and going on with it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback

from alignkit.config import LoadedConfig
from alignkit.config.base import ProgramConfig
from alignkit.config.check import in_force
from alignkit.environment import environment
from alignkit.errors import CheckpointError, Stopped
from alignkit.hub.upload import check_before_training
from alignkit.models.choices import Choice, chosen_line, recorded, taken_before
from alignkit.parametrizations._trainable import trainable_report
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.reports.metrics_log import MetricsLog
from alignkit.runs.best import ChecksMetric, EarlyStopping, Ranking
from alignkit.runs.checkpoints import CheckpointGuard
from alignkit.runs.directory import RunDirectory
from alignkit.runs.health import HealthMonitor
from alignkit.runs.live_plot import LivePlot, is_notebook
from alignkit.runs.origin import OriginRecord
from alignkit.runs.pickles import check_deepspeed_shards, check_sharded_model, refused_pickle
from alignkit.runs.process_layout import ProcessLayoutRecorder
from alignkit.runs.progress import ShortProgress
from alignkit.runs.ranks import Ranks
from alignkit.runs.resumption import how_to_go_on
from alignkit.runs.rows import PreparedData
from alignkit.runs.space import refuse_full_disk
from alignkit.runs.start_line import StartLine
from alignkit.runs.unmoved import UnmovedWeights
from alignkit.storage.refusals import Reserve, StorageError, storage_error


def open_run_directory(loaded: LoadedConfig) -> RunDirectory:
    """Create or reopen the run directory and write down what the run was asked to do.

    Raises:
        RunDirectoryError: The directory cannot be used, or resuming would not continue the recorded run.
        HubError, ProblemListError: The result could not be uploaded as asked.
    """
    config = loaded.config
    if config.push_to_hub:
        is_adapter = load_parametrization(config.parametrization).has_adapter
        check_before_training(config.hub_model_id, config.model, is_adapter=is_adapter)
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
def failures_recorded(
    directory: RunDirectory, command: Sequence[str] | None, *, resume: bool | str, goes_on: bool = False
) -> Iterator[None]:
    """Leave ``status: failed`` in run.json when the run ends with an error, ``stopped`` when a signal ends it.

    Args:
        directory: The run; its lock is given back at the end.
        command: The words of the command line, as in ``sys.argv``; None where Python called.
        resume: The key of that name as it was given, for the command that goes on.
        goes_on: Keep the lock where the block ends without an error: the run has more steps to take.
    """
    reserve = Reserve(directory.path, is_main=directory.is_main)
    reserve.hold()
    keeps_lock = False
    try:
        yield
        keeps_lock = goes_on
    except Stopped as stopped:
        reserve.release()
        name = signal.Signals(stopped.signal).name
        directory.record(status=f"stopped: {name}")
        go_on = how_to_go_on(directory, command, resume=resume) if directory.is_main else ""
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
        if not keeps_lock:
            directory.lock.release()


def choices_before(directory: RunDirectory, ranks: Ranks, *, resume: bool) -> dict[str, Choice]:
    """What a run that is resumed chose when it began, none of a new one; a collective."""
    kept = ranks.of_first("choices", lambda: directory.sections().get("choices", {})) if resume else {}
    return taken_before(kept)


def run_callbacks(config: ProgramConfig, directory: RunDirectory, data: PreparedData) -> list[TrainerCallback]:
    """The log, the health monitor and, in a notebook, the figure."""
    values = in_force(config)
    advised = {key: values[key] for key in ("learning_rate", "router_layers") if key in values}
    settings = asdict(config.method_options) | advised
    settings["lowers_chosen"] = load_method(config.method).lowers_chosen
    if isinstance(data.evaluation, Dataset):
        settings["eval_rows"] = len(data.evaluation)
    shown = [LivePlot(config, directory)] if is_notebook() else []
    return [MetricsLog(directory.metrics_path), HealthMonitor(settings), *shown]


def introduce(
    config: ProgramConfig,
    trainer: Trainer,
    directory: RunDirectory,
    *,
    reference: str | None = None,
    drawn: str | None = None,
    best: str | None = None,
    **sections: Any,
) -> None:
    """Set up what a trainer prints and how it saves, record what it trains, and say so.

    Args:
        trainer: The trainer, with all its callbacks.
        directory: Where it is recorded.
        reference: The reference in force, in words; None where there is no such thing.
        drawn: What is drawn while training, in words; None where nothing is.
        best: Metric of evaluations whose best checkpoint is kept; None keeps the newest alone.
        **sections: More for ``run.json``.
    """
    trainer.remove_callback(PrinterCallback)
    # In a notebook that is a table of all metrics, most of them of evaluations alone.
    if trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
        trainer.add_callback(ShortProgress())
    trainer.add_callback(ProcessLayoutRecorder(trainer, lambda layout: directory.record(process_layout=layout)))
    trainer.add_callback(UnmovedWeights(trainer))
    kind = config.parametrization + ("" if config.quantization == "none" else f" on {config.quantization}")
    rule = f" with {config.gradient_rule}" if config.gradient_rule else ""
    against = f"; reference: {reference}" if reference else ""
    taught = f"; teacher: {sections['teacher']}" if "teacher" in sections else ""
    drawing = f"; {drawn}" if drawn else ""
    trainer.add_callback(StartLine(trainer, f"{config.method}{rule}, {kind}{against}{taught}{drawing}"))
    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluationAtTheEnd())
    trainer.persistent.append(OriginRecord(directory))
    guard = CheckpointGuard(config.save_total_limit, directory.lock.check, _compare_evaluations(config, trainer, best))
    trainer.add_callback(guard)
    trainer.before_saving += [partial(refuse_full_disk, trainer), guard.announce]
    choices = recorded(trainer.choices)
    directory.record(trainable=asdict(trainable_report(trainer.model)), choices=choices, **sections)
    if directory.is_main:
        directory.manifest.claim(directory.metrics_path.name)
    if trainer.is_world_process_zero():
        print(trainable_report(trainer.model))
        if told := chosen_line(trainer.choices):
            print(told)
        if trainer.aux_loss_enabled:
            origin = "the model's own" if config.router_aux_loss_coef is None else "as asked"
            print(f"load-balancing loss: router_aux_loss_coef {trainer.router_aux_loss_coef:g}, {origin}")


def _compare_evaluations(config: Any, trainer: Trainer, best: str | None) -> Ranking | None:
    """What the checkpoint that is kept is the best in; training is ended early where that is asked for."""
    ranking = Ranking.of(config)
    if ranking is None:
        return None if best is None else Ranking(best)
    trainer.add_callback(ChecksMetric(ranking))
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(ranking, config.early_stopping_patience, config.early_stopping_threshold))
    return ranking if config.load_best_model_at_end else None


class EvaluationAtTheEnd(TrainerCallback):
    """Evaluates after the last step, while the run can still be judged by it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation when this was the last step."""
        control.should_evaluate = control.should_evaluate or state.global_step >= state.max_steps


def train(config: ProgramConfig, trainer: Trainer, directory: RunDirectory) -> None:
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
