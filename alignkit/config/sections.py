"""The keys that say what is trained: model, parametrisation, data, method, reference and layout.

Every key carries its help, bounds and the source of its default; nothing else knows them. Sections only group keys for
the reader: in a config file all keys are flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

from alignkit.parametrizations import DEFAULT
from alignkit.parts.options import option
from alignkit.parts.parametrization import parametrizations

DTYPES = ("auto", "float32", "bfloat16", "float16")
TRL, TRANSFORMERS = "TRL 1.16", "transformers"


class _Place(TypedDict):
    path: str


class DataSource(_Place, total=False):
    """One source of ``data`` or ``eval_data``, where a path alone does not say enough."""

    weight: float
    split: str
    config: str


DataValue = str | DataSource | list[str | DataSource]
"""A file, a folder, a Hub id, or a list of them."""


class Section:
    """A group of keys."""

    title: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """Which model is loaded, and how."""

    title: ClassVar[str] = "Model"

    model: str = option(help="Directory of a saved model, or Hub id such as Qwen/Qwen3-0.6B.", is_path=True)
    model_revision: str | None = option(None, help="Branch, tag or commit of the Hub model; null is main.")
    dtype: str | None = option(
        None,
        choices=DTYPES,
        help="Precision the weights are loaded in; auto takes the checkpoint's. null is bfloat16 for frozen weights "
        "under an adapter where bf16 is in force, and float32 elsewhere. What trains is held in float32 all the same, "
        "except under DeepSpeed, which steps float32 copies.",
        source="alignkit (TRL 1.16: float32)",
    )
    attn_implementation: str | None = option(
        None,
        help="Attention kernel: eager, sdpa, flash_attention_2, flash_attention_3, flex_attention, or one of the Hub "
        "such as kernels-community/flash-attn2, whose code then runs; null leaves the choice to transformers.",
        source=TRANSFORMERS,
    )
    trust_remote_code: bool = option(
        False,
        help="Run the Python code that the model repository ships. Only for authors you trust.",
        source=TRL,
        passes_to_trainer=True,
    )
    tokenizer: str | None = option(
        None,
        help="Directory or Hub id of a tokenizer to use in place of the model's, or of that of the adapter that is "
        "continued.",
        is_path=True,
    )
    new_tokens: list[str] = option(
        default_factory=list,
        help="Texts that become tokens of their own, such as [<think>, </think>]: each gets an embedding, which begins "
        "as the mean of the others. Under lora the embeddings (and a head of their own) train in full and are saved "
        "with the adapter.",
    )
    chat_template: str | None = option(
        None, help="Path of a Jinja file to use in place of the tokenizer's chat template.", is_path=True
    )


@dataclass(frozen=True, kw_only=True)
class _ParametrizationKeys(Section):
    parametrization: str = option(
        DEFAULT,
        help="Train every weight (full), low-rank adapters (lora) or other adapters (peft) on frozen weights, or "
        "the routers of a mixture of experts alone (routers).",
    )
    quantization: str = option(
        "none",
        choices=("none", "nf4", "int8"),
        help="Precision of the frozen weights under lora: nf4 (QLoRA) or int8, through bitsandbytes.",
    )


@dataclass(frozen=True, kw_only=True)
class _AdapterKeys(Section):
    adapter: str | None = option(
        None, help="Directory of a saved LoRA adapter to continue from; its own rank and targets apply.", is_path=True
    )


_OPTIONS = [record.options for record in parametrizations()]


# Fields are in the order of the bases read backwards.
@dataclass(frozen=True, kw_only=True)
class ParametrizationSection(_AdapterKeys, *reversed(_OPTIONS), _ParametrizationKeys):  # type: ignore[misc]
    """Which numbers may move, with the options of every parametrisation."""

    title: ClassVar[str] = "Parametrization"


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """Which rows are trained on and held out."""

    title: ClassVar[str] = "Data"

    data: DataValue = option(
        help="Training rows: a jsonl, json, csv or parquet file, a folder of them, a Hub id, or a list of these. A "
        "source may be {path, weight, split, config}: weight is its share of the mixture, config a subset on the Hub."
    )
    data_split: str = option("train", help="Split of a Hub data set, where an entry names none.", source=TRL)
    eval_data: DataValue | None = option(None, help="Held-out rows, written like data.")
    eval_split: str = option("train", help="Split of eval_data, where an entry names none.")
    eval_fraction: float = option(0.0, ge=0, lt=1, help="Share of data held out when there is no eval_data.")
    column_map: dict[str, str] = option(
        default_factory=dict, help="Rename columns, ours: theirs, such as {prompt: question}."
    )
    apply_chat_template: bool = option(
        False,
        help="Turn plain prompts and answers into messages of user and assistant, for the chat template to write; "
        "without it plain text is trained as it stands.",
    )
    streaming: bool = option(
        False, help="Read rows while training instead of preparing them all first; needs max_steps.", source=TRL
    )
    max_rows: int | None = option(None, ge=1, help="Use only that many training rows.")
    max_eval_rows: int | None = option(None, ge=1, help="Use only that many rows of eval_data.", free_on_resume=True)
    data_seed: int | None = option(
        None,
        ge=0,
        lt=2**32,
        help="Seed of mixing, splitting and shuffling; null takes seed.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    max_length: int = option(
        1024,
        ge=2,
        help="Longest prompt + completion, in tokens: completions are cut there, and a row whose prompt fills it is "
        "dropped.",
        source=TRL,
    )
    max_dropped_fraction: float = option(
        0.1, ge=0, le=1, help="Refuse to train when a larger share of the rows cannot be used.", free_on_resume=True
    )
    max_truncated_fraction: float = option(
        0.5,
        ge=0,
        le=1,
        help="Refuse to train when a larger share of the rows is cut at max_length.",
        free_on_resume=True,
    )
    allow_overlap: bool = option(
        False,
        help="Evaluate although held-out rows are trained on; they are compared token for token.",
        free_on_resume=True,
    )
    dataset_num_proc: Literal["auto"] | int = option(
        "auto",
        ge=1,
        le=256,
        help="Processes that check and tokenise the rows; auto takes one for every 5,000 rows, up to the cores that "
        "this process may use. The tokens are the same with any number.",
        source="alignkit (TRL 1.16: null, one)",
        free_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class SupervisedDataSection(DataSection):
    """Which rows are trained on and held out, and which of their tokens."""

    max_length: int = option(
        1024,
        ge=2,
        help="Longest row, in tokens: rows are cut there, and dropped if nothing trained is left.",
        source=TRL,
    )
    completion_only_loss: bool | None = option(
        None,
        help="Train the completions alone, or with false the prompts too; null trains the completions where rows have "
        "prompt and completion, and whole texts.",
        source=TRL,
    )
    assistant_only_loss: bool | None = option(
        None,
        help="Train the assistant's turns of messages alone, as the chat template or TRL's variant of it marks them, "
        "or with false all of them. null trains the assistant's turns of conversations in any template, told apart "
        "turn by turn where nothing marks them.",
        source="alignkit (TRL 1.16: false)",
    )
    layout: str = option(
        "auto",
        choices=("auto", "padded", "packed"),
        help="One row per example (padded), or one row for all examples of a micro-batch, which do not see each other, "
        "without padding (packed); auto is packed where the architecture allows it.",
        free_on_resume=True,
    )
    packing: bool = option(
        False,
        help="Fill every row of a micro-batch up to max_length with several examples, which do not see each other. "
        "layout: packed leaves padding out without it, and without changing which examples a step is made of.",
        source=TRL,
    )
    packing_strategy: str = option(
        "bfd",
        choices=("bfd", "bfd_split"),
        help="bfd cuts examples at max_length, bfd_split goes on with the rest of them as further examples.",
        source=TRL,
    )
    pad_to_multiple_of: int | None = option(
        None,
        ge=1,
        le=4096,
        help="Round row lengths up to a multiple of this.",
        source="alignkit (TRL 1.16: auto)",
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class MethodSection(Section):
    """The objective. The options of the chosen method stand beside it, in the same file, at the same level."""

    title: ClassVar[str] = "Method"

    method: str = option(help="Objective to train with; its own options are keys beside this one.")


@dataclass(frozen=True, kw_only=True)
class GradientSection(Section):
    """What is done to the gradient. The options of the chosen rule stand beside it, like those of the method."""

    title: ClassVar[str] = "Gradient rule"

    gradient_rule: str | None = option(
        None,
        help="What is done to the gradient before the optimizer sees it; its own options are keys beside this one. "
        "null leaves it as it is.",
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceSection(Section):
    """The frozen model that log-ratios are taken against."""

    title: ClassVar[str] = "Reference"

    reference: str = option(
        "auto",
        choices=("auto", "adapter_disabled", "copy", "precomputed"),
        help="Where reference log-probs come from: the policy with its adapter switched off, a second model in memory, "
        "or one pass before training, cached on disk. auto is precomputed where rows would be scored several times, or "
        "an earlier run has scored them; otherwise copy under full, adapter_disabled under lora, and a frozen copy of "
        "the adapter when one is continued.",
    )
    reference_model: str | None = option(
        None, help="Directory or Hub id of another model as the reference; null takes the starting model.", is_path=True
    )
    reference_batch_size: int | None = option(
        None,
        ge=1,
        help="Rows per device in the precomputing pass; null takes per_device_train_batch_size.",
        source=TRL,
        free_on_resume=True,
    )
    reference_cache: str | None = option(
        None,
        help="Directory of precomputed log-probs; null is $ALIGNKIT_CACHE or ~/.cache/alignkit/reference.",
        free_on_resume=True,
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class LayoutSection(Section):
    """The shape of a batch in memory. It changes speed, not results."""

    title: ClassVar[str] = "Layout"

    layout: str = option(
        "auto",
        choices=("auto", "padded", "packed"),
        help="One row per completion (padded), or one row for all of a batch without padding, in which every prompt "
        "stands once with its completions behind it (packed); auto is packed where the architecture allows it.",
        free_on_resume=True,
    )
    pad_to_multiple_of: int | None = option(
        None,
        ge=1,
        le=4096,
        help="Round row lengths up to a multiple of this.",
        source="alignkit (TRL 1.16: auto)",
        passes_to_trainer=True,
    )
