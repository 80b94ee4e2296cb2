"""Which model teaches: the policy without its adapter, the model it was before it was pruned, or one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from alignkit.errors import ModelError
from alignkit.json_text import parse_json
from alignkit.parts.method import STARTING_MODEL, load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.references.models import load_other

PRUNING_REPORT = "pruning_report.json"
"""What ``alignkit prune`` leaves beside a pruned model; of the unpruned one it has the Hub id, or the folder's name."""


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
    """The model on the Hub that the pruning report of ``model`` names; None where there is no report.

    Raises:
        ModelError: The report cannot be read, or what it names cannot be found by that.
    """
    where = {"revision": revision} if revision else {}
    try:
        file = Path(cached_file(model, PRUNING_REPORT, **where))
    except OSError:
        return None  # Neither a folder nor a repository of the Hub that has such a file.
    try:
        made_of = parse_json(file.read_text(encoding="utf-8"))["made_of"]
        name, of_revision = str(made_of["model"]), made_of["revision"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"teacher: base: {file} cannot be read as a pruning report ({error!r}). Write teacher: the unpruned model"
        ) from error
    if "/" not in name:
        raise ModelError(
            f"teacher: base is the model that {model!r} was pruned from, a folder called {name!r} ({file} tells no "
            f"more, so that it can be published). Write teacher: the path of {name}"
        )
    if of_revision is not None:
        raise ModelError(
            f"teacher: base is {name} at revision {of_revision}, says {file}, and a teacher is loaded at the newest "
            f"one. Download it (hf download {name} --revision {of_revision} --local-dir DIR) and write teacher: DIR"
        )
    return name
