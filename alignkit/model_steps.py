"""The models of a run: the policy, its adapter, and of a preference run its references."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.config import PreferenceConfig, SFTConfig
from alignkit.errors import ModelError
from alignkit.methods.method import load_method
from alignkit.parametrizations import loading
from alignkit.parametrizations.files import read_adapter
from alignkit.parametrizations.lora import check_modules, lora_config

RunConfig = PreferenceConfig | SFTConfig


def load_model(config: RunConfig, path: str, revision: str | None = None) -> PreTrainedModel:
    """Load the policy or a reference as the config describes it; a trainer places it.

    Raises:
        ModelError: It cannot be loaded; the message says why.
    """
    return loading.load_model(
        loading.ModelSource(
            model=path,
            revision=revision,
            dtype=config.dtype,
            quantization=config.quantization,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    )


def load_policy(config: RunConfig) -> PreTrainedModel | PeftModel:
    """The model to train; with ``adapter``, wrapped with that adapter and ready to continue it."""
    model = load_model(config, config.model, config.model_revision)
    if config.adapter is None:
        return model
    return loading.load_adapter(model, read_adapter(config.adapter), is_trainable=True)


def load_reference(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The reference where it is a model of its own; None where the policy's own weights serve.

    Raises:
        ModelError: It cannot be loaded, or its token ids differ from the policy's.
    """
    wants_copy = config.reference == "copy" or (config.reference == "auto" and config.parametrization == "full")
    needs = load_method(config.method).needs(config.method_options)
    if "reference" not in needs or not (wants_copy or config.reference_model):
        return None
    if config.reference_model is None:
        return load_model(config, config.model, config.model_revision)
    return _load_other(config, tokenizer, "reference_model", config.reference_model)


def load_negative_reference(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The model that scores the negative, where the method has one of its own (``helpful_reference_model`` of d2o).

    Raises:
        ModelError: It cannot be loaded, or its token ids differ from the policy's.
    """
    if load_method(config.method).rows != "negatives" or config.method_options.helpful_reference_model is None:
        return None
    return _load_other(config, tokenizer, "helpful_reference_model", config.method_options.helpful_reference_model)


def _load_other(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> PreTrainedModel:
    """Another model than the policy. The policy's token ids must mean the same to it."""
    theirs = loading.load_tokenizer(path, trust_remote_code=config.trust_remote_code).get_vocab()
    different = [token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index]
    if different:
        raise ModelError(
            f"the reference model {path!r} has other token ids than {config.model!r}: {len(different)} tokens differ, "
            f"such as {different[0]!r}. Write a {key} with the same tokenizer, or remove it to take the starting model."
        )
    return load_model(config, path)


def new_adapter(config: RunConfig, model: PreTrainedModel | PeftModel) -> Any:
    """PEFT's configuration of the adapter the run starts; None where it starts none.

    Raises:
        ModelError: It names modules that the model does not have.
    """
    if config.parametrization != "lora" or config.adapter is not None:
        return None
    check_modules(model, config.lora_target_modules, config.lora_modules_to_save)
    return lora_config(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
