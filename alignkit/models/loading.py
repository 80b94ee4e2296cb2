"""Load a model, its tokenizer and an adapter for use, with errors that say what to do; nothing is left half loaded."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN_QUANTIZERS

from alignkit.bounded import TEMPLATE_ERRORS, slow_pattern, too_much
from alignkit.errors import ModelError
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.files import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    RUN_MARKS,
    AdapterFiles,
    check_tensors,
    content_problem,
    model_problem,
    module_patterns,
    quantization_problem,
    stored_quantization,
    tensor_shapes,
)
from alignkit.models.fingerprints import ORIGIN_FILE, QUANTIZATION, BaseFingerprint, base_fingerprint, read_origin
from alignkit.models.quantization import keep_trainable_on_cpu, quantization_config
from alignkit.models.reward_head import REWARD_HEAD as REWARD_HEAD
from alignkit.models.reward_head import RewardHead as RewardHead
from alignkit.models.reward_head import head_of_adapter as head_of_adapter
from alignkit.models.reward_head import head_width
from alignkit.models.saved_comparison import adapter_difference, model_difference
from alignkit.models.sparse_adapter import load_sparse_adapter

logger = logging.getLogger(__name__)

_REPORT = "This is a fault of the software and not of yours: please report it with the model's config.json"
MOST_TOKEN_ID = 2**31 - 1
"""Rows hold ids of 32 bits."""
MOST_OF_TWO_MESSAGES = 2**17
"""Characters that a chat template may make of two messages of one letter; long system prompts have a tenth of it."""
FROM_CONTENT = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and PEFT raise over the content of a file: they check little of it, and fail where it is used."""
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
        reward_head: Of a reward model; None is a causal language model.
    """

    model: str
    revision: str | None = None
    dtype: str = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    reward_head: RewardHead | None = None


def load_model(source: ModelSource, device: torch.device | str | None = None) -> PreTrainedModel:
    """Load a causal language model, or a reward model, in evaluation mode.

    Args:
        source: Which and how.
        device: Where to; None leaves it to a trainer to place (a quantised model goes to this process's device).

    Raises:
        ModelError: It does not exist, is no causal language model, is quantised otherwise than asked, its checkpoint
            lacks weights, or a run saved it and it does not come out as it was saved.
    """
    if problem := model_problem(source.model):
        raise ModelError(problem)
    options: dict[str, Any] = {"revision": source.revision} if source.revision else {}
    dtype = DTYPES.get(source.dtype)
    stored = quantization_of(source)
    if stored is None and source.quantization != "none":
        compute_dtype = dtype or torch.bfloat16
        options["quantization_config"] = quantization_config(source.quantization, compute_dtype)
    quantization = stored or source.quantization
    if quantization != "none":
        # bitsandbytes quantises while moving weights to their device, so they must be sent there one by one.
        options["device_map"] = {"": PartialState().device if device is None else device}
    try:
        model, report = _from_pretrained(source, dtype=dtype or "auto", **options)
    except FROM_CONTENT as error:
        raise ModelError(f"the model {source.model!r} cannot be loaded: {_cause(source.model, error)}") from error
    except (UnpicklingError, EOFError) as error:
        raise ModelError(_refused_pickle(source.model)) from error
    _refuse_missing_weights(source, report["missing_keys"])
    folder = Path(source.model)
    is_of_a_run = any((folder / mark).is_file() for mark in RUN_MARKS)
    if is_of_a_run and quantization == "none" and (difference := model_difference(model, folder)):
        raise ModelError(f"the model {source.model!r} was not loaded as it was saved: {difference}. {_REPORT}")
    if quantization == "nf4":
        keep_trainable_on_cpu(model)
    is_placed = device is None or quantization != "none"
    return model.eval() if is_placed else model.to(device).eval()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _from_pretrained(source: ModelSource, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers has to say of its weights."""
    options |= {
        "attn_implementation": source.attn_implementation,
        "trust_remote_code": source.trust_remote_code,
        "output_loading_info": True,
    }
    head = source.reward_head
    if head is None:
        found: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(source.model, **options)
        return found
    told = logging.getLogger("transformers.modeling_utils")
    # That the head is new is meant, and said below in one line. A filter: once a level is set, transformers says more.
    told.addFilter(_is_error)
    with torch.random.fork_rng([]):
        # A new head is drawn while the model is loaded, the same one in every process.
        torch.manual_seed(head.seed or 0)
        try:
            revision = {"revision": source.revision} if source.revision else {}
            config = AutoConfig.from_pretrained(source.model, trust_remote_code=source.trust_remote_code, **revision)
            width = head_width(config, head, source.model)
            found = AutoModelForSequenceClassification.from_pretrained(source.model, num_labels=width, **options)
        finally:
            told.removeFilter(_is_error)
    is_new = head.seed is not None and f"{REWARD_HEAD}.weight" in found[1]["missing_keys"]
    if is_new and PartialState().is_main_process:
        print(f"{source.model}: a new head of rewards, drawn from seed {head.seed}")
    return found


def _refuse_missing_weights(source: ModelSource, names: Iterable[str]) -> None:
    """Refuse a checkpoint without all weights of the model, but for a head that is to be new."""
    head, own = source.reward_head, f"{REWARD_HEAD}.weight"
    new = (own,) if head is not None and (head.seed is not None or head.from_adapter) else ()
    if missing := sorted(set(names).difference(new)):
        if head is not None and missing == [own]:
            raise ModelError(
                f"{source.model!r} is no reward model: it has no head of rewards ({own}). Give one that "
                "trainers/reward.py has made, or train one from this model (method: bradley_terry)."
            )
        kind = "causal language model" if head is None else "decoder"
        raise ModelError(
            f"the checkpoint of {source.model!r} lacks {len(missing)} weights, such as {missing[0]}; they would be "
            f"random. Give a {kind} with all its weights."
        )


def quantization_of(source: ModelSource, *, in_full: bool = False) -> str | None:
    """How the checkpoint of a model is quantised itself, before anything is loaded; None if it is not.

    Args:
        source: The model.
        in_full: Whether all its weights are to be trained.

    Raises:
        ModelError: It is quantised otherwise than ``source`` asks, or cannot be trained, or there is no such model.
    """
    options = {"revision": source.revision} if source.revision else {}
    try:
        config = AutoConfig.from_pretrained(source.model, trust_remote_code=source.trust_remote_code, **options)
    except FROM_CONTENT as error:
        raise ModelError(f"the model {source.model!r} cannot be loaded: {_cause(source.model, error)}") from error
    content = config.to_dict()
    stored = stored_quantization(content)
    method = None if stored is None else content["quantization_config"].get("quant_method")
    if method not in (None, "bitsandbytes", *KNOWN_QUANTIZERS):
        known = ", ".join(sorted(KNOWN_QUANTIZERS))
        raise ModelError(
            f"the model {source.model!r} is quantised by {method!r}, which transformers does not know (it knows "
            f"{known}) and would pass over. Give the model before it was quantised."
        )
    if problem := quantization_problem(stored, wanted=source.quantization, in_full=in_full):
        why, fix = problem
        raise ModelError(f"the model {source.model!r} cannot be used like this: {why}. {fix}.")
    return stored


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
    folder = Path(model).expanduser()
    if (folder / MODEL_CONFIG).is_file() and (problem := content_problem(folder)):
        raise ModelError(problem)  # The config is read with the tokenizer, and lists its layers.
    if trust_remote_code:
        _say_that_code_runs(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # The tokenizers of Rust raise nothing more precise over their file.
        raise ModelError(f"the tokenizer of {model!r} cannot be loaded: {_cause(model, error)}") from error
    if (largest := max(tokenizer.get_vocab().values(), default=0)) > MOST_TOKEN_ID:
        raise ModelError(f"the tokenizer of {model!r} has a token with the id {largest:,}, which no model has")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    if tokenizer.chat_template is not None and (problem := _template_problem(tokenizer)):
        raise ModelError(
            f"the chat template of {str(chat_template or model)!r} {problem} with two short messages, so rows could "
            "not be rendered with it. Write chat_template with a jinja file that ends."
        )
    return tokenizer


def _template_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the chat template {str(file)!r} cannot be read: {error}. Write a jinja file in UTF-8."
        ) from error


def _template_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What keeps a chat template from being used for thousands of rows, tried where it can do no harm; or None."""
    if (problem := too_much(lambda: _longest_rendering(tokenizer))) is not None:
        return problem
    if (longest := _longest_rendering(tokenizer)) > MOST_OF_TWO_MESSAGES:
        return f"writes {longest:,} characters"
    return None


def _longest_rendering(tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of what the templates there are make of a short conversation, at most."""
    longest = 0
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        for count in (1, 2):
            # A template may refuse these messages, which is no reason not to try it with the others.
            with contextlib.suppress(*TEMPLATE_ERRORS):
                text = tokenizer.apply_chat_template(
                    messages[:count], chat_template=template, tokenize=False, add_generation_prompt=count == 1
                )
                longest = max(longest, len(text))
    return longest


def generation_stop_ids(model: str, revision: str | None = None) -> list[int]:
    """Tokens at which a saved model stops besides its tokenizer's EOS; none when it has no generation config.

    Args:
        model: Folder of a saved model, or Hub id.
        revision: Branch, tag or commit of a Hub model.
    """
    ids = saved_generation_config(model, revision).eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) for token in listed):
        problem = f"eos_token_id is {ids!r:.60}, expected a whole number or a list of these"
        raise ModelError(f"the generation config of {model!r} cannot be used: {problem}.")
    return listed


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
    except FROM_CONTENT as error:
        raise ModelError(f"the generation config of {model!r} cannot be read: {_first_line(error)}") from error


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights of a loaded model are quantised, by alignkit or in its checkpoint.

    Args:
        model: The model, plain or with an adapter.
    """
    return "quantization_config" in model.config.to_dict()


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
    except FROM_CONTENT as error:
        raise ModelError(f"the model {source.model!r} cannot be loaded: {_cause(source.model, error)}") from error


def check_base(adapter: AdapterFiles, source: ModelSource) -> None:
    """Compare a model with the base that an adapter was trained on, before either is loaded.

    An adapter of which alignkit has no record, made by PEFT alone, is let through with a line that says so. So is one
    on its own base when that is quantised otherwise than in training.

    Args:
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
    trained, used = origin.get(QUANTIZATION), source.quantization
    # A base that is quantised in its files was so in training, whatever was asked for.
    if trained not in (None, used) and quantization_of(source) is None and PartialState().is_main_process:
        print(
            f"adapter {str(adapter.directory)!r}: TRAINED WITH quantization {trained} AND USED WITH {used}: the base "
            f"has other weights than in training, so the figures are not those of what was trained; quantization "
            f"{trained} gives these"
        )


def load_adapter(model: PreTrainedModel, adapter: AdapterFiles, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base, in evaluation mode; every stored tensor must find its place.

    PEFT itself ignores tensors that have no place and leaves missing ones at their random start. An adapter that brings
    embeddings of another size, as after tokens were added, gives the model their size.

    Args:
        model: The base.
        adapter: The saved adapter.
        is_trainable: Whether its training is to be continued.

    Raises:
        ModelError: The adapter does not belong to this base.
    """
    misfit = f"the adapter {str(adapter.directory)!r} does not fit the model:"
    if slow := slow_pattern(module_patterns(adapter), [name for name, _ in model.named_modules()]):
        pattern = f"its {ADAPTER_CONFIG} has a pattern, {slow}"
        raise ModelError(f"the adapter {str(adapter.directory)!r} cannot be used: {pattern}. Write the names instead.")
    if not is_sparse_kind(adapter.kind) and adapter.kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        kinds = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ModelError(f"the adapter {str(adapter.directory)!r} is of kind {adapter.kind!r}; PEFT knows {kinds}")
    _resize_embeddings(model, adapter)
    belongs = f"It was trained on {adapter.base!r}; is that the model given?"
    try:
        if is_sparse_kind(adapter.kind):
            wrapped = load_sparse_adapter(model, adapter)
        else:
            wrapped = PeftModel.from_pretrained(model, str(adapter.directory), is_trainable=is_trainable)
    except FROM_CONTENT as error:
        detail = next((line for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise ModelError(f"{misfit} {detail.strip().rstrip('.')}. {belongs}") from error
    check_tensors(adapter.weights)
    if problem := adapter_difference(wrapped, adapter.weights):
        raise ModelError(f"{misfit} {problem}. {belongs}")
    return wrapped.eval()


def _resize_embeddings(model: PreTrainedModel, adapter: AdapterFiles) -> None:
    """Give the model as many embeddings as the adapter brings with it."""
    rows = model.get_input_embeddings().num_embeddings  # The shape of the weight does not say: DeepSpeed shards it.
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"base_model.model.{name}." for name, module in model.named_modules() if module in modules]
    shapes = tensor_shapes(adapter.weights)
    own = {key: shape for key, shape in shapes.items() if key.startswith(tuple(names))}
    brought = {shape[0] for key, shape in own.items() if key.endswith(".weight") and "lora_" not in key}
    adapted = {shape[-1] for key, shape in own.items() if "lora_embedding_A" in key}
    if len(brought) == 1 and brought != {rows}:
        # The new rows are the adapter's own and read with it.
        model.resize_token_embeddings(brought.pop(), mean_resizing=False)
    elif not brought and adapted - {rows}:
        raise ModelError(
            f"the adapter {str(adapter.directory)!r} was trained on {adapted.pop()} embeddings, of which the model has "
            f"{rows}, and does not bring the others. Save it with them (PEFT: save_embedding_layers=True), or give the "
            "model with the embeddings it was trained on."
        )


def _cause(model: str, error: BaseException) -> str:
    """Why loading failed, and what to do."""
    if isinstance(error, SafetensorError):
        return f"{_first_line(error)}. A file is truncated or damaged: save or download it again."
    if isinstance(error, OSError) and not Path(model).exists():
        return (
            f"{_first_line(error)} No folder of that name is here either. Write the path of a saved model; or check "
            "the Hub id, the connection, HF_HUB_OFFLINE and, for gated models, `hf auth login`."
        )
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other sizes than its config.json says. Give the config.json they were saved with."
    if isinstance(error, ValueError) and "custom code" in str(error):
        advice = "look at it, and where you trust it write trust_remote_code: true (--trust_remote_code)"
        return f"it needs Python code that comes with it: {advice}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    """What an error says; where that is meant for programmers, such as the key of a KeyError, with its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError, SafetensorError)):
        lines = [": ".join([type(error).__name__, *lines])]
    return lines[0] if lines else type(error).__name__


def _refused_pickle(model: str) -> str:
    """What to say of weights that are a pickle with more than tensors in it, or a damaged one."""
    named = ", ".join(sorted(path.name for path in Path(model).expanduser().glob("pytorch_model*.bin")))
    return (
        f"the model {model!r} is not loaded: {named or 'its weights'} is a pickle that holds more than tensors, such "
        "as code, or is damaged. Ask its author for safetensors, or load it where you trust it and save it again"
    )


@functools.cache
def _say_that_code_runs(model: str) -> None:
    """Once a process, for each model; nothing is asked, which would wait for ever where nobody sits at a terminal."""
    files = sorted(path.name for path in Path(model).expanduser().glob("*.py"))
    named = f" ({', '.join(files)})" if files else ""
    logger.warning("trust_remote_code: Python code that comes with %r%s runs with all your rights", model, named)
