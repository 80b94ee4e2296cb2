"""Which model teaches: the policy without its adapter, the model it was before it was pruned, or one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from alignkit.errors import ModelError
from alignkit.json_text import parse_json
from alignkit.models.files import model_problem
from alignkit.parts.method import STARTING_MODEL, load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.references.models import load_other

PRUNING_REPORT = "pruning_report.json"
"""What ``alignkit prune`` leaves beside a pruned model; its ``model`` is the folder or Hub id of the unpruned one."""


def teacher_models(config: Any) -> dict[str, str]:
    """The teacher where it is a model of its own, by the key that names it.

    Raises:
        ModelError: ``teacher: base`` names none.
    """
    choice = load_method(config.method).teacher(config.method_options)
    if choice is None:
        return {}
    path = _starting_model(config) if choice.model == STARTING_MODEL else choice.model
    return {} if path is None else {"teacher": path}


def load_teacher(config: Any) -> PreTrainedModel | None:
    """The teacher where it is a model of its own; None where the policy's own weights serve, or there is none.

    Raises:
        ModelError: It cannot be loaded, or has another vocabulary.
    """
    return next((load_other(config, key, path) for key, path in teacher_models(config).items()), None)


def _starting_model(config: Any) -> str | None:
    """The model from before pruning; None is the policy with its adapter off."""
    unpruned = _unpruned(config.model, config.model_revision)
    if unpruned is None and not load_parametrization(config.parametrization).has_adapter:
        raise ModelError(
            f"teacher: base has no model to take under parametrization: {config.parametrization}: the weights of "
            f"{config.model!r} train themselves, and it has no {PRUNING_REPORT}, which would name the model that it "
            "was pruned from. Write teacher: the folder or Hub id of the unpruned model (of the weights that this run "
            f"starts from, teacher: {config.model}, at the cost of a second model in memory), or train an adapter "
            "(parametrization: lora), which is switched off for the teacher"
        )
    return unpruned


def _unpruned(model: str, revision: str | None) -> str | None:
    """The model that the pruning report of ``model`` names; None where there is no report."""
    where = {"revision": revision} if revision else {}
    try:
        file = Path(
            cached_file(str(Path(model).expanduser()) if Path(model).exists() else model, PRUNING_REPORT, **where)
        )
    except OSError:
        return None  # Neither a folder nor a repository on the Hub with such a file.
    try:
        report = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} cannot be read ({error}). Write teacher: the unpruned model") from error
    named = report.get("model") if isinstance(report, dict) else None
    if not isinstance(named, str):
        raise ModelError(f"{file} names no model that was pruned. Write teacher: the unpruned model")
    if problem := model_problem(named):
        raise ModelError(f"teacher: base is {named!r}, says {file}, but {problem}. Write teacher: where it is now")
    return named
