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


def load_named_reference(config: Any) -> PreTrainedModel | None:
    """The model that ``reference_model`` names; None where the reference is what the policy starts as.

    Raises:
        ModelError: It cannot be loaded.
    """
    path = other_models(config).get("reference_model")
    return None if path is None else load_other(config, "reference_model", path)


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
