"""What a run leaves behind: verified weights, results, samples, plot, model card, and an upload if asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from transformers import Trainer

from alignkit.config import LoadedConfig
from alignkit.errors import CheckpointError
from alignkit.hub.upload import plan_upload, push
from alignkit.models.files import ADAPTER_CONFIG
from alignkit.models.fingerprints import ORIGIN_FILE
from alignkit.models.saved_weights import verify_weights
from alignkit.parts.shape import shapes_by_program
from alignkit.reports.card import content_of_run, render_card
from alignkit.reports.plot import plot_run
from alignkit.reports.rollouts import write_page
from alignkit.reports.router_loads import draw_loads
from alignkit.runs.checkpoints import CheckpointGuard
from alignkit.runs.directory import RunDirectory
from alignkit.runs.health import HealthMonitor
from alignkit.runs.origin import write_origin
from alignkit.sampling.generation import Sample, Sampling, generate_samples
from alignkit.storage.durability import write_whole

DRAFT = ".model.partial"
"""Folder of the run directory that the model is saved in before it gets its place."""
TIMINGS = ("_runtime", "_per_second")


def finish(loaded: LoadedConfig, trainer: Trainer, prompts: Sequence[Sequence[int]], directory: RunDirectory) -> None:
    """Go back to the best evaluation if asked to, save, evaluate, answer prompts, look at it all, report; a collective.

    Args:
        loaded: The configuration.
        trainer: The trainer after training.
        prompts: Token ids of the prompts to answer.
        directory: Where to.

    Raises:
        CheckpointError: The saved weights are empty or not finite, or the best checkpoint is gone.
    """
    step = _go_back_to_best(trainer, directory) if loaded.config.load_best_model_at_end else trainer.state.global_step
    # First: whatever goes wrong in the report, the model is not lost.
    _save_model(trainer, directory)
    write_origin(directory, directory.path)
    results = _evaluate(trainer, step)
    before = _before_training(trainer)
    samples = _sample_answers(loaded, trainer, prompts)
    if trainer.is_world_process_zero():
        _report(loaded, trainer, directory, {"before": before, "after": results}, samples)
    trainer.accelerator.wait_for_everyone()


def _go_back_to_best(trainer: Trainer, directory: RunDirectory) -> int:
    """Take the weights of the best evaluation, and return its step; those of the last step need not be read."""
    best, last = _best(trainer), int(trainer.state.global_step)
    if best is None or best["step"] == last:
        return last
    checkpoint = directory.path / best["checkpoint"]
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint}, the best checkpoint, is gone, and load_best_model_at_end: true asks for its weights. Put "
            "it back, or write load_best_model_at_end: false and resume: true, which takes those of the last step."
        )
    trainer.load_weights(checkpoint)
    return int(best["step"])


def _save_model(trainer: Trainer, directory: RunDirectory) -> None:
    """Save into a folder of its own, list what is in it as written by the run, and move it into place; a collective."""
    draft = directory.path / DRAFT
    if trainer.is_world_process_zero():
        directory.manifest.claim_checkpoint(draft)
        if draft.exists():
            shutil.rmtree(draft)  # left by a kill
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(draft))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    # PEFT also saves the frozen copy a continued adapter has for a reference; it belongs in checkpoints alone.
    shutil.rmtree(draft / "ref", ignore_errors=True)
    files = [path.relative_to(draft) for path in sorted(draft.rglob("*")) if path.is_file()]
    origin = [ORIGIN_FILE] if (draft / ADAPTER_CONFIG).is_file() else []
    directory.manifest.claim(*origin, *(file.as_posix() for file in files))
    for file in files:
        (directory.path / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / file, directory.path / file)
    directory.manifest.delete_checkpoint(draft)


def _report(
    loaded: LoadedConfig,
    trainer: Trainer,
    directory: RunDirectory,
    results: Mapping[str, dict[str, float]],
    samples: list[dict[str, Any]],
) -> None:
    config = loaded.config
    saved = verify_weights(directory.path)
    health, best = _health(trainer), _best(trainer)
    directory.record(
        results=results["after"],
        results_before=results["before"],
        samples=samples,
        health=health["verdicts"],
        health_state=health["state"],
        saved={"files": [f.name for f in saved.files], "parameters": saved.num_parameters},
        **({} if best is None else {"best": best}),
        **({} if config.early_stopping_patience is None else {"ended_early": _ended_early(trainer)}),
    )
    page = write_page(directory.path)
    marks = {verdict["name"]: verdict["step"] for verdict in health["verdicts"]}
    directory.manifest.claim(directory.plot_path.name, directory.card_path.name)
    plot_run(directory.metrics_path, directory.plot_path, marks=marks, **figure_of(config))
    loads = draw_loads(directory.path)
    location = config.hub_model_id if config.push_to_hub else str(directory.path)
    write_whole(directory.card_path, render_card(content_of_run(directory.sections(), location)))
    directory.record(status="finished")
    print(summary(directory))
    if loads is not None:
        print(f"  tokens by layer and expert: {loads.name}")
    if page is not None:
        print(f"  completions with their rewards: {page.name}, all of them in rollouts/")
    if config.push_to_hub:
        url = push(plan_upload(directory.path, config.hub_model_id), private=config.hub_private)
        directory.record(hub={"url": url})
        print(f"uploaded to {url}")


def figure_of(config: Any) -> dict[str, Any]:
    """Title and panels of the figure of a run."""
    panels = shapes_by_program()[config.program].panels
    return {"title": f"{config.method} on {config.model}", "panels": panels}


def _evaluate(trainer: Trainer, step: int) -> dict[str, float]:
    """Figures of the held-out rows by the weights of a step, which the model has; computed if they are not logged."""
    if trainer.eval_dataset is None:
        return {}
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    return metrics_of(logged[-1] if logged else trainer.evaluate())


def _before_training(trainer: Trainer) -> dict[str, float]:
    """What was found before the first step; empty where no rows are held out."""
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == 0]
    return metrics_of(found[0]) if found else {}


def metrics_of(logged: Mapping[str, float]) -> dict[str, float]:
    """An evaluation as it was logged, without prefix, clock times and place in the run."""
    kept = {key.removeprefix("eval_"): value for key, value in logged.items() if not key.endswith(TIMINGS)}
    return {key: value for key, value in kept.items() if key not in ("epoch", "step")}


def _sample_answers(loaded: LoadedConfig, trainer: Trainer, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Answers to held-out prompts; sharded models cannot generate here and say so."""
    config = loaded.config
    if not prompts or config.num_samples == 0:
        return []
    if trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and trainer.args.deepspeed_plugin.zero_stage == 3):
        if trainer.is_world_process_zero():
            print("no sample answers: the model is sharded; run alignkit evaluate on the result")
        return []
    tokenizer = trainer.processing_class
    samples = generate_samples(
        trainer.model,
        tokenizer,
        prompts,
        Sampling(max_new_tokens=config.sample_max_new_tokens, seed=config.seed),
        state=PartialState(),
    )
    return [_sample(tokenizer.decode(ids), sample) for ids, sample in zip(prompts, samples, strict=True)]


def _sample(prompt: str, sample: Sample) -> dict[str, Any]:
    return {"prompt": prompt, **asdict(sample)}


def _health(trainer: Trainer) -> dict[str, Any]:
    (monitor,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, HealthMonitor))
    return monitor.summary()


def _best(trainer: Trainer) -> dict[str, Any] | None:
    """The best evaluation, where its checkpoint is kept."""
    (guard,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointGuard))
    return guard.best_evaluation(trainer.state)


def _ended_early(trainer: Trainer) -> int | None:
    """The last step of a run that did not make all of them."""
    step = int(trainer.state.global_step)
    return step if step < trainer.state.max_steps else None


SHOWN = (
    *("loss", "rewards/accuracies", "rewards/margins", "logratio/chosen", "logratio/rejected", "mean_token_accuracy"),
    *("accuracy", "margin"),
)
SHOWN_ONLINE = ("reward", *(f"pass@{2**power}" for power in range(17)), "completions/mean_length")
"""What a summary says of held-out rows: of online runs, whose loss is relative to one another, no loss."""


def held_out_line(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Metrics of held-out rows before and after training, with their intervals.

    Args:
        before: May be empty, where nothing was looked at.
        after: Metric to value; ``<metric>_low`` and ``<metric>_high`` are its interval.
    """
    shown = [key for key in (SHOWN_ONLINE if "reward" in after else SHOWN) if key in after]
    both = [key for key in shown if key in before]
    parts = [f"{key} {f'{_value(before, key)} -> ' if key in both else ''}{_value(after, key)}" for key in shown]
    notes = ["before -> after training"] if both else []
    notes += ["[95 % intervals over prompts]"] if any(f"{key}_low" in after for key in shown) else []
    return f"held-out rows: {', '.join(parts)}" + (f"  ({'; '.join(notes)})" if notes else "")


def _value(results: Mapping[str, float], key: str) -> str:
    ends = [results.get(f"{key}_{end}") for end in ("low", "high")]
    interval = "" if None in ends else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
    return f"{results[key]:.4g}{interval}"


def summary(directory: RunDirectory) -> str:
    """What a finished run has come to, from its ``run.json``: held-out rows, best checkpoint, samples and files."""
    recorded, lines = directory.sections(), []
    if recorded["results"]:
        lines.append(held_out_line(recorded["results_before"], recorded["results"]))
    if (best := recorded.get("best")) is not None:
        (metric,) = best.keys() - {"step", "checkpoint"}
        is_result = recorded["config"]["load_best_model_at_end"]["value"]
        what = f"best {metric}: {best[metric]:.4g} at step {best['step']}, kept as {best['checkpoint']}"
        lines.append(what + (", which is the result" if is_result else ""))
    for sample in recorded["samples"]:
        lines.append(f"sample: {sample['prompt']!r}\n     -> {sample['text']!r}{_remarks(sample)}")
    lines.append(f"run directory: {directory.path}")
    lines.append(
        f"  plot {directory.plot_path.name}, card {directory.card_path.name}, metrics {directory.metrics_path.name}"
    )
    return "\n".join(lines)


def _remarks(sample: Mapping[str, Any]) -> str:
    remarks = [] if sample["finished"] else ["did not stop"]
    if sample["repetition"] > 0.3:
        remarks.append(f"repeats itself ({sample['repetition']:.0%} of its 4-grams)")
    return f"  [{', '.join(remarks)}]" if remarks else ""
