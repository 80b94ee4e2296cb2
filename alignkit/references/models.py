"""The models beside the policy that a run scores with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models import loading
from alignkit.models.files import model_problem
from alignkit.parametrizations._policy import load_model
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization


def load_reference(config: Any) -> PreTrainedModel | None:
    """The reference where it is a model of its own; None where the policy's own weights serve.

    Raises:
        ModelError: It cannot be loaded.
    """
    if "reference_model" in (others := other_models(config)):
        return load_other(config, "reference_model", others["reference_model"])
    has_adapter = load_parametrization(config.parametrization).has_adapter
    wants_copy = config.reference == "copy" or (config.reference == "auto" and not has_adapter)
    if not wants_copy or "reference" not in load_method(config.method).needs(config.method_options):
        return None
    return load_model(config, config.model, config.model_revision)


def load_negative_reference(config: Any) -> PreTrainedModel | None:
    """The model that scores the last candidate, where the method has one of its own.

    Raises:
        ModelError: It cannot be loaded.
    """
    key = load_method(config.method).negative_reference
    if key is None or key not in (others := other_models(config)):
        return None
    return load_other(config, key, others[key])


def other_models(config: Any) -> dict[str, str]:
    """The models beside the policy that the run loads, by the key that names them."""
    method, options = load_method(config.method), config.method_options
    models = {"reference_model": config.reference_model if "reference" in method.needs(options) else None}
    if method.negative_reference is not None:
        models[method.negative_reference] = getattr(options, method.negative_reference)
    return {key: path for key, path in models.items() if path is not None}


def load_other(config: Any, key: str, path: str) -> PreTrainedModel:
    """Load a model other than the policy; its errors name the config key."""
    with _naming(key, path):
        return load_model(config, path)


def check_other(config: Any, tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> None:
    """There must be such a model, and the policy's token ids must mean the same to it."""
    with _naming(key, path):
        if problem := model_problem(path):
            raise ModelError(problem)
        theirs = loading.load_tokenizer(path, trust_remote_code=config.trust_remote_code).get_vocab()
    different = [token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index]
    if different:
        raise ModelError(
            f"`{key}: {path}` has other token ids than {config.model!r}: {len(different)} tokens differ, such as "
            f"{different[0]!r}. Write a {key} with the same tokenizer, or remove it to take the starting model."
        )


@contextlib.contextmanager
def _naming(key: str, path: str) -> Iterator[None]:
    """Say which key of the config named the model that an error is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"`{key}: {path}`: {error}") from error
