"""What models are evaluated on, and a model before it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.candidate_report import ConversionReport
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.checks import check_template
from alignkit.data.lengths import RowLengths
from alignkit.data.load import load_rows
from alignkit.data.messages import as_messages
from alignkit.data.prefix import Layout
from alignkit.environment import environment
from alignkit.errors import ConfigError
from alignkit.models._comparison import compare_with_itself
from alignkit.models._forward import use_packed_attention
from alignkit.models._layouts import Requested, choose_layout, confirmed
from alignkit.models.files import AdapterFiles, sha256
from alignkit.models.loading import ModelSource
from alignkit.models.positions import positions_of
from alignkit.models.sharding import score_over_ranks
from alignkit.models.vocabulary import check_token_ids
from alignkit.references._cache import token_ids_fingerprint
from alignkit.sampling.generation import Sampling

TokenLogps = Sequence[Sequence[float]]
"""Token log-probs of the candidates of one row, nats."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationData:
    """What a model is evaluated on.

    Attributes:
        rows: Held-out candidate rows.
        probe: Candidate rows of which every response is a probe, or None.
        prompts: Token ids of the prompts to answer.
        reports: What happened to the rows on the way, by name.
    """

    rows: Dataset
    probe: Dataset | None
    prompts: list[list[int]]
    reports: dict[str, ConversionReport]


def prepare_data(
    sources: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column_map: Mapping[str, str],
    max_rows: int | None,
    max_length: int,
    num_samples: int,
    apply_chat_template: bool,
    state: PartialState,
) -> EvaluationData:
    """Load, check and tokenise the rows; the first process first, so that the others read its cache.

    Args:
        sources: Files or Hub ids under ``held-out`` and, if there are probe rows, ``probe``.
        column_map: Our column names to those of the data.
        max_rows: Keep at most so many rows of each, or None.
        max_length: Limit on prompt + completion, tokens.
        num_samples: Distinct prompts to answer, the first ones of the held-out rows.
        apply_chat_template: Turn plain prompts and answers into messages.
        state: This process among the others.

    Raises:
        DataError: The rows cannot be used; every kind of problem.
    """
    rows, reports = {}, {}
    with state.main_process_first():
        for name, paths in sources.items():
            loaded = load_rows(list(paths), column_map=column_map, max_rows=max_rows)
            loaded = as_messages(loaded, tokenizer, name) if apply_chat_template else loaded
            rows[name], reports[name] = to_candidate_rows(
                loaded, tokenizer, max_length=max_length, num_candidates=None, name=name
            )
    check = check_template(tokenizer, conversational=reports["held-out"].conversational)
    if state.is_main_process and check.status != "ok":
        logger.warning("held-out: %s: %s", check.name, check.message)
    distinct = {tuple(row["prompt_ids"]): None for row in rows["held-out"]}
    prompts = [list(ids) for ids in distinct][:num_samples]
    return EvaluationData(rows["held-out"], rows.get("probe"), prompts, reports)


def check_positions(model: PreTrainedModel | PeftModel, data: EvaluationData, max_new_tokens: int) -> None:
    """Refuse answers that would run past the last position of the model.

    Args:
        data: With the prompts to answer.
        max_new_tokens: Longest answer, tokens.

    Raises:
        ConfigError: A prompt and its answer can be longer than the model is made for.
    """
    positions, longest = positions_of(model.config), max(map(len, data.prompts), default=0)
    if data.prompts and positions is not None and longest + max_new_tokens > positions:
        problem = (
            f"--max_new_tokens: {max_new_tokens} behind a prompt of {longest} tokens is more than the {positions} "
            f"positions of the model. Write at most {positions - longest}, or --num_samples 0 for no answers"
        )
        raise ConfigError("the answers have no room", [problem])


def check_vocabulary(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: EvaluationData
) -> None:
    """Refuse a model that lacks the embedding of a token of the rows or prompts.

    Args:
        model: What :func:`alignkit.programs.models.load_for_scoring` returned.
        tokenizer: The tokenizer of the rows.
        data: What the model is to be evaluated on.

    Raises:
        ModelError: Names the token.
    """
    used = {"a held-out row": data.rows, "a probe row": data.probe, "a prompt": data.prompts}
    check_token_ids(model, tokenizer, used, name=repr(model.name_or_path))


def prepare_scoring(
    model: PreTrainedModel | PeftModel,
    data: EvaluationData,
    requested: Requested,
    *,
    batch_size: int,
    name: str,
) -> Layout:
    """Compare a model's scores with its own logits, and choose how its rows are laid out; a collective.

    Args:
        model: What :func:`alignkit.programs.models.load_for_scoring` returned; it is given the attention of training.
        data: What it will be evaluated on.
        requested: The layout asked for.
        batch_size: Rows a forward pass.
        name: What the model is called in messages, without an article.

    Raises:
        ModelError: Its scores would not be its own, or it cannot run the layout asked for.
    """
    lengths = RowLengths.of(*(rows for rows in (data.rows, data.probe) if rows is not None))
    run = compare_with_itself(model, lengths, f"the {name}", together=batch_size > 1)
    choice = confirmed(choose_layout(requested, model, lengths), [run], lengths)
    if choice.layout == "packed":
        use_packed_attention(run.base)
    return choice.layout


@dataclass
class Trial:
    """One model before the data of an evaluation. All processes hold one, and call it in the same order.

    Attributes:
        model: What :func:`alignkit.programs.models.load_for_scoring` returned.
        tokenizer: Decodes answers.
        data: What on.
        sampling: How answers are generated.
        layout: ``padded`` or ``packed``.
        batch_size: Rows a forward pass.
        state: This process among the others.
        name: What the model is called in progress bars.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: EvaluationData
    sampling: Sampling
    layout: Layout
    batch_size: int
    state: PartialState
    name: str
    _scored: dict[str, list[TokenLogps]] = field(default_factory=dict, repr=False)

    def token_logps(self, rows: Literal["held-out", "probe"]) -> list[TokenLogps]:
        """Token log-probs of every candidate of the rows, computed on first use.

        Args:
            rows: Which; probe rows only where there are some.
        """
        if rows not in self._scored:
            pad = self.tokenizer.pad_token_id
            scored = {"held-out": self.data.rows, "probe": self.data.probe}[rows]
            self._scored[rows] = score_over_ranks(
                self.model,
                scored,
                pad_token_id=(self.tokenizer.eos_token_id if pad is None else pad) or 0,
                layout=self.layout,
                batch_size=self.batch_size,
                state=self.state,
                progress=f"{self.name}: {rows} rows",
            )
        return self._scored[rows]


def provenance(
    source: ModelSource,
    adapter: AdapterFiles | None,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    state: PartialState,
) -> dict[str, Any]:
    """Everything besides the options that the figures depend on, for the record.

    Args:
        source: The model.
        adapter: The adapter, or None.
        model: The model as loaded.
        data: The rows.
        state: The processes.
    """
    template = tokenizer.chat_template
    weights = {} if adapter is None else {"directory": str(adapter.directory), "sha256": sha256(adapter.weights)}
    first = data.rows[0]["prompt_ids"]
    splits = {"held-out": data.rows} if data.probe is None else {"held-out": data.rows, "probe": data.probe}
    return {
        "environment": environment(),
        "processes": {"world_size": state.num_processes, "device": state.device.type},
        "model": {
            **asdict(source),
            "loaded_dtype": str(model.dtype).removeprefix("torch."),
            "commit": model.config.to_dict().get("_commit_hash"),
            "adapter": None if adapter is None else {**weights, "base": adapter.base, "kind": adapter.kind},
        },
        "tokenizer": {
            "source": tokenizer.name_or_path,
            "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
            "begins_with_bos": tokenizer.bos_token_id is not None and first[:1] == [tokenizer.bos_token_id],
            "first_prompt": tokenizer.decode(first),
        },
        "data": {
            name: {
                "rows": len(rows),
                "dropped": data.reports[name].dropped,
                "cut_at_max_length": data.reports[name].num_truncated_rows,
                "token_ids_blake2b": token_ids_fingerprint(rows),
            }
            for name, rows in splits.items()
        },
    }
