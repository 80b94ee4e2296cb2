"""The models of a run: the policy, its adapter, and of a preference run its references."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.config import PreferenceConfig, SFTConfig
from alignkit.environment import launched_with_deepspeed
from alignkit.errors import ModelError
from alignkit.parts.method import load_method
from alignkit.models import loading
from alignkit.models.files import model_problem, read_adapter
from alignkit.parametrizations.lora import check_modules, check_rank, lora_config, unadaptable
from alignkit.models.precision import HALF

RunConfig = PreferenceConfig | SFTConfig


def load_model(config: RunConfig, path: str, revision: str | None = None) -> PreTrainedModel:
    """Load the policy or a reference as the config describes it; a trainer places it.

    Raises:
        ModelError: It cannot be loaded; the message says why.
    """
    return _load(config, model_source(config, path, revision))


def model_source(config: RunConfig, path: str, revision: str | None = None) -> loading.ModelSource:
    """Which model a run loads, and how."""
    return loading.ModelSource(
        model=path,
        revision=revision,
        dtype=config.dtype,
        quantization=config.quantization,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def _load(config: RunConfig, source: loading.ModelSource) -> PreTrainedModel:
    """A model whose weights are float32 where all of them train, so that no step is lost to rounding.

    A reference follows suit, or it would differ from the policy by the rounding of its arithmetic. DeepSpeed casts
    weights itself and steps float32 copies of its own.
    """
    model = loading.load_model(source)
    held = model.dtype
    if config.parametrization == "lora" or held not in HALF or launched_with_deepspeed():
        return model
    if PartialState().is_main_process:
        print(
            f"{source.model}: loaded in {str(held).removeprefix('torch.')} and held in float32, in which weights can "
            "train" + ("" if config.bf16 or config.fp16 else "; bf16: true would compute in bfloat16, faster")
        )
    return model.float()


def load_policy(config: RunConfig) -> PreTrainedModel | PeftModel:
    """The model to train; with ``adapter``, wrapped with that adapter and ready to continue it.

    Raises:
        ModelError: It cannot be loaded or trained as the config says, or the adapter belongs to another base.
    """
    source = model_source(config, config.model, config.model_revision)
    loading.quantization_of(source, in_full=config.parametrization == "full")
    if config.adapter is None:
        return _load(config, source)
    adapter = read_adapter(config.adapter)
    loading.check_base(adapter, source)
    return loading.load_adapter(_load(config, source), adapter, is_trainable=True)


def check_references(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse reference models of which it can be seen without loading them that they will not do.

    Raises:
        ModelError: There is no such model, or its token ids differ from the policy's.
    """
    for key, path in other_models(config).items():
        _check_other(config, tokenizer, key, path)


def load_reference(config: PreferenceConfig) -> PreTrainedModel | None:
    """The reference where it is a model of its own; None where the policy's own weights serve.

    Raises:
        ModelError: It cannot be loaded.
    """
    if "reference_model" in (others := other_models(config)):
        return _load_other(config, "reference_model", others["reference_model"])
    wants_copy = config.reference == "copy" or (config.reference == "auto" and config.parametrization == "full")
    if not wants_copy or "reference" not in load_method(config.method).needs(config.method_options):
        return None
    return load_model(config, config.model, config.model_revision)


def load_negative_reference(config: PreferenceConfig) -> PreTrainedModel | None:
    """The model that scores the negative, where the method has one of its own (``helpful_reference_model`` of d2o).

    Raises:
        ModelError: It cannot be loaded.
    """
    path = other_models(config).get("helpful_reference_model")
    return None if path is None else _load_other(config, "helpful_reference_model", path)


def other_models(config: PreferenceConfig) -> dict[str, str]:
    """The models beside the policy that the run loads, by the key that names them."""
    method, options = load_method(config.method), config.method_options
    models = {
        "reference_model": config.reference_model if "reference" in method.needs(options) else None,
        "helpful_reference_model": options.helpful_reference_model if method.rows == "negatives" else None,
    }
    return {key: path for key, path in models.items() if path is not None}


def _load_other(config: PreferenceConfig, key: str, path: str) -> PreTrainedModel:
    """Another model than the policy."""
    with _naming(key, path):
        return load_model(config, path)


def _check_other(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> None:
    """There must be such a model, and the policy's token ids must mean the same to it."""
    with _naming(key, path):
        if problem := model_problem(path):
            raise ModelError(problem)
        theirs = loading.load_tokenizer(path, trust_remote_code=config.trust_remote_code).get_vocab()
    different = [token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index]
    if different:
        raise ModelError(
            f"the reference model {path!r} has other token ids than {config.model!r}: {len(different)} tokens differ, "
            f"such as {different[0]!r}. Write a {key} with the same tokenizer, or remove it to take the starting model."
        )


@contextlib.contextmanager
def _naming(key: str, path: str) -> Iterator[None]:
    """Say which key of the config named the model that an error is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"`{key}: {path}`: {error}") from error


def new_adapter(config: RunConfig, model: PreTrainedModel | PeftModel) -> Any:
    """PEFT's configuration of the adapter the run starts; None where it starts none.

    Raises:
        ModelError: It names modules that the model does not have.
    """
    if config.parametrization != "lora" or config.adapter is not None:
        return None
    check_modules(model, config.lora_target_modules, config.lora_modules_to_save)
    check_rank(model, config.lora_r)
    left_out = unadaptable(model) if config.lora_target_modules == "all-linear" else {}
    if left_out and PartialState().is_main_process:
        for reason in dict.fromkeys(left_out.values()):
            names = ", ".join(sorted(name for name, why in left_out.items() if why == reason))
            print(f"lora_target_modules: all-linear leaves out {names}, which {reason}")
    return lora_config(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        exclude=list(left_out),
    )
