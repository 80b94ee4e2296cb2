"""The policy of a run: the model as its parametrisation trains it, and the adapter that it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.environment import launched_with_deepspeed, launched_with_fsdp
from alignkit.errors import ModelError
from alignkit.models import loading
from alignkit.models.files import read_adapter
from alignkit.models.precision import HALF, mixed_bfloat16
from alignkit.models.vocabulary import add_tokens, embed_tokens
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_half, load_parametrization


def load_model(config: Any, path: str, revision: str | None = None) -> PreTrainedModel:
    """Load the policy or a reference as the config describes it; a trainer places it.

    Raises:
        ModelError: It cannot be loaded; the message says why.
    """
    return _load(config, model_source(config, path, revision))


def model_source(config: Any, path: str, revision: str | None = None) -> loading.ModelSource:
    """Which model a run loads, and how."""
    return loading.ModelSource(
        model=path,
        revision=revision,
        dtype=weights_dtype(config),
        quantization=config.quantization,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        reward_head=_reward_head(config) if config.gives_rewards else None,
    )


def _reward_head(config: Any) -> loading.RewardHead:
    """The head of a reward model, new where the checkpoint has none."""
    if config.adapter is not None:
        return loading.head_of_adapter(read_adapter(config.adapter))
    judged = load_method(config.method).dimensions(config.method_options)
    return loading.RewardHead(1 if judged is None else judged.width, seed=config.seed)


def weights_dtype(config: Any) -> str:
    """Precision that the weights of a run are loaded in.

    Frozen weights are read and never updated: in what is computed in, they take half the memory and need no copy.
    """
    if config.dtype is not None:
        return str(config.dtype)
    is_frozen = load_parametrization(config.parametrization).has_adapter
    return "bfloat16" if is_frozen and mixed_bfloat16(config)[0] else "float32"


def _load(config: Any, source: loading.ModelSource) -> PreTrainedModel:
    """A model whose weights are float32 where all of them train, so that no step is lost to rounding.

    A reference follows suit, or it would differ from the policy by the rounding of its arithmetic. DeepSpeed casts
    weights itself and steps float32 copies of its own.
    """
    model = loading.load_model(source)
    if config.new_tokens and source.model == config.model:
        _embed_new_tokens(config, model)
    held = model.dtype
    if load_parametrization(config.parametrization).has_adapter or held not in HALF or launched_with_deepspeed():
        return model
    if PartialState().is_main_process:
        print(
            f"{source.model}: loaded in {str(held).removeprefix('torch.')} and held in float32, in which weights can "
            "train"
            + ("" if mixed_bfloat16(config)[0] or config.fp16 else "; bf16: true would compute in bfloat16, faster")
        )
    return model.float()


def _embed_new_tokens(config: Any, model: PreTrainedModel) -> None:
    if is_deepspeed_zero3_enabled() or launched_with_fsdp():
        raise ModelError(
            "`new_tokens`: under ZeRO-3 and FSDP no process has whole embeddings when the model is loaded. Launch with "
            "DDP or ZeRO-2, or resize the model's embeddings, save it and name that"
        )
    embed_tokens(model, load_tokenizer(config).convert_tokens_to_ids(config.new_tokens))


def load_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, or that of the adapter that is continued, or the model's.

    The adapter's knows the tokens and the template it was trained with. The config's chat template is put in its place,
    and its new tokens are added.

    Raises:
        ModelError: There is none, it has no end-of-sequence token, or a new token is none.
    """
    adapter = None if config.adapter is None else read_adapter(config.adapter)
    if config.tokenizer is not None:
        source, revision = config.tokenizer, None
    elif adapter is not None and adapter.has_tokenizer:
        source, revision = config.adapter, None
    else:
        source, revision = config.model, config.model_revision
    tokenizer = loading.load_tokenizer(
        source,
        revision=revision,
        chat_template=None if config.chat_template is None else Path(config.chat_template),
        trust_remote_code=config.trust_remote_code,
    )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source!r} has no eos_token, so the model could never learn to stop. Give it one "
            f"and save it: tokenizer.eos_token = '</s>'; tokenizer.save_pretrained({source!r})"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_tokens(tokenizer, config.new_tokens, name=repr(source))
    return tokenizer


def load_policy(config: Any) -> PreTrainedModel | PeftModel:
    """The model to train; with ``adapter``, wrapped with that adapter and ready to continue it.

    Raises:
        ModelError: It cannot be loaded or trained as the config says, or the adapter belongs to another base.
    """
    source = model_source(config, config.model, config.model_revision)
    parametrization = load_parametrization(config.parametrization)
    loading.quantization_of(source, in_full=not parametrization.has_adapter)
    if config.adapter is None:
        return _load(config, source)
    adapter = read_adapter(config.adapter)
    loading.check_base(adapter, source)
    wrapped = loading.load_adapter(_load(config, source), adapter, is_trainable=True)
    load_half(parametrization).go_on(config, wrapped)
    return wrapped


def prepare(config: Any, model: PreTrainedModel | PeftModel) -> Any:
    """Freeze what the parametrisation does not move; PEFT's configuration of the adapter the run starts, or None.

    Raises:
        ModelError: The model has no place for what shall train.
    """
    if config.adapter is not None:  # It is on the model already, and trains.
        return None
    return load_half(load_parametrization(config.parametrization)).prepare(config, model)


def attach(config: Any, trainer: Any) -> None:
    """Give the trainer what the parametrisation does while training."""
    attachment = load_half(load_parametrization(config.parametrization)).attach(config, trainer)
    if attachment is not None:
        trainer.attach(attachment)
