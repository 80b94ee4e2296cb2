"""Load a model, its tokenizer and an adapter for use, with errors that say what to do; nothing is left half loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.parametrizations.files import AdapterFiles, check_tensors, model_problem
from alignkit.parametrizations.fingerprints import ORIGIN_FILE, BaseFingerprint, base_fingerprint, read_origin
from alignkit.parametrizations.quantization import keep_trainable_on_cpu, quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Which model is loaded, and how.

    Attributes:
        model: Folder of a saved model, or Hub id.
        revision: Branch, tag or commit of a Hub model, or None for its main branch.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        quantization: ``none``, ``nf4`` or ``int8``.
        attn_implementation: Attention kernel, or None for transformers' choice.
        trust_remote_code: Run Python code that comes with the model.
    """

    model: str
    revision: str | None = None
    dtype: str = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def load_model(source: ModelSource, device: torch.device | str | None = None) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        source: Which and how.
        device: Where to; None leaves it to a trainer to place (a quantised model goes to this process's device).

    Raises:
        ModelError: It does not exist, is no causal language model, or its checkpoint lacks weights.
    """
    if problem := model_problem(source.model):
        raise ModelError(problem)
    options: dict[str, Any] = {"revision": source.revision} if source.revision else {}
    dtype = DTYPES.get(source.dtype)
    if source.quantization != "none":
        compute_dtype = dtype or torch.bfloat16
        options["quantization_config"] = quantization_config(source.quantization, compute_dtype)
        # bitsandbytes quantises while moving weights to their device, so they must be sent there one by one.
        options["device_map"] = {"": PartialState().device if device is None else device}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.model,
            dtype=dtype or "auto",
            attn_implementation=source.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model {source.model!r} cannot be loaded: {_cause(source.model, error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the checkpoint of {source.model!r} lacks {len(missing)} weights, such as {missing[0]}; they would be "
            "random. Give a causal language model with all its weights."
        )
    if source.quantization == "nf4":
        keep_trainable_on_cpu(model)
    is_placed = device is None or source.quantization != "none"
    return model.eval() if is_placed else model.to(device).eval()


def load_tokenizer(
    model: str, *, revision: str | None = None, chat_template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        model: Folder of a saved model or adapter, or Hub id.
        revision: Branch, tag or commit of a Hub model.
        chat_template: Jinja file that replaces its chat template.
        trust_remote_code: Run Python code that comes with it.

    Raises:
        ModelError: There is none.
    """
    options = {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the tokenizer of {model!r} cannot be loaded: {_cause(model, error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def generation_stop_ids(model: str, revision: str | None = None) -> list[int]:
    """Tokens at which a saved model stops besides its tokenizer's EOS; none when it has no generation config.

    Args:
        model: Folder of a saved model, or Hub id.
        revision: Branch, tag or commit of a Hub model.
    """
    ids = saved_generation_config(model, revision).eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def saved_generation_config(model: str, revision: str | None = None) -> GenerationConfig:
    """The generation config of a saved model; an empty one when it has none.

    Args:
        model: Folder of a saved model, or Hub id.
        revision: Branch, tag or commit of a Hub model.
    """
    try:
        return GenerationConfig.from_pretrained(model, **({"revision": revision} if revision else {}))
    except OSError:
        return GenerationConfig()


def fingerprint(source: ModelSource) -> BaseFingerprint:
    """What a model is, without loading it; how it is loaded plays no part.

    Args:
        source: The model.

    Raises:
        ModelError: There is no such model.
    """
    if problem := model_problem(source.model):
        raise ModelError(problem)
    try:
        return base_fingerprint(source.model, source.revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the model {source.model!r} cannot be loaded: {_cause(source.model, error)}") from error


def check_base(adapter: AdapterFiles, source: ModelSource) -> None:
    """Compare a model with the base that an adapter was trained on, before either is loaded.

    An adapter of which alignkit has no record, made by PEFT alone, is let through with a line that says so.

    Args:
        adapter: The adapter.
        source: The model it is to be put on.

    Raises:
        ModelError: It is another base.
    """
    origin = read_origin(adapter.directory)
    if origin is None:
        if PartialState().is_main_process:
            named = f"names {adapter.base!r}" if adapter.base else "names no base"
            why = f"it {named} and has no {ORIGIN_FILE}, which alignkit writes"
            print(f"adapter {str(adapter.directory)!r}: not checked whether {source.model!r} is its base: {why}")
        return
    if differences := BaseFingerprint(**origin["base"]).differences(fingerprint(source)):
        raise ModelError(
            f"the adapter {str(adapter.directory)!r} was trained on another base than {source.model!r}: "
            f"{'; '.join(differences)}. Give the model it was trained on, which it calls {adapter.base!r}; or, to use "
            f"it on this one all the same, remove {ORIGIN_FILE} beside it."
        )


def load_adapter(model: PreTrainedModel, adapter: AdapterFiles, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base, in evaluation mode; every stored tensor must find its place.

    PEFT itself ignores tensors that have no place and leaves missing ones at their random start.

    Args:
        model: The base.
        adapter: The saved adapter.
        is_trainable: Whether its training is to be continued.

    Raises:
        ModelError: The adapter does not belong to this base.
    """
    misfit = f"the adapter {str(adapter.directory)!r} does not fit the model:"
    belongs = f"It was trained on {adapter.base!r}; is that the model given?"
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter.directory), is_trainable=is_trainable)
    except (ValueError, RuntimeError, SafetensorError) as error:
        detail = next((line for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise ModelError(f"{misfit} {detail.strip()} {belongs}") from error
    stored = set(check_tensors(adapter.weights))
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    homeless = stored - expected - set(wrapped.state_dict())
    for names, fault in ((homeless, "have no place in"), (expected - stored, "are missing for")):
        if names:
            raise ModelError(f"{misfit} {len(names)} tensors {fault} it, such as {min(names)}. {belongs}")
    return wrapped.eval()


def _cause(model: str, error: BaseException) -> str:
    """Why loading failed, and what to do."""
    if isinstance(error, SafetensorError):
        return f"{_first_line(error)}. A file is truncated or damaged: save or download it again."
    if isinstance(error, OSError) and not Path(model).exists():
        return (
            f"{_first_line(error)} No folder of that name is here either. Write the path of a saved model; or check "
            "the Hub id, the connection, HF_HUB_OFFLINE and, for gated models, `hf auth login`."
        )
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
