"""What models are evaluated on, and a model before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import Layout
from alignkit.environment import environment
from alignkit.errors import ConfigError
from alignkit.evals._data import EvaluationData
from alignkit.models._comparison import ScoringRun, compare_with_itself
from alignkit.models._forward import TrainedScore, compute_precision, use_packed_attention
from alignkit.models._layouts import Requested, choose_layout, confirmed
from alignkit.models.files import AdapterFiles, sha256
from alignkit.models.loading import ModelSource
from alignkit.models.positions import positions_of
from alignkit.models.reward_model import RewardModel, refuse_other_rewards
from alignkit.models.sharding import length_batches, map_batches, score_over_ranks, score_trained_over_ranks
from alignkit.models.vocabulary import Tokens, check_token_ids
from alignkit.references._cache import token_ids_fingerprint
from alignkit.sampling.generation import Answer, Sampling, generate_answers

TokenLogps = Sequence[Sequence[float]]
"""Token log-probs of the candidates of one row, nats."""


def check_positions(model: PreTrainedModel | PeftModel, data: EvaluationData, max_new_tokens: int) -> None:
    """Refuse answers that would run past the last position of the model.

    Args:
        data: With the prompts to answer.
        max_new_tokens: Longest answer, tokens.

    Raises:
        ConfigError: A prompt and its answer can be longer than the model is made for.
    """
    positions, longest = positions_of(model.config), max(map(len, data.asked), default=0)
    if data.asked and positions is not None and longest + max_new_tokens > positions:
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
    used: dict[str, Tokens] = {"a held-out row": data.rows, "a probe row": data.probe, "a prompt": data.asked}
    check_token_ids(model, tokenizer, used, name=repr(model.name_or_path))


def prepare_scoring(
    model: PreTrainedModel | PeftModel,
    data: EvaluationData,
    requested: Requested,
    *,
    batch_size: int,
    name: str,
    gives_rewards: bool = False,
) -> Layout | None:
    """Compare a model's scores with its own logits, and choose how its rows are laid out; a collective.

    Args:
        model: What :func:`alignkit.programs.models.load_for_scoring` returned; it is given the attention of training.
        data: What it will be evaluated on.
        requested: The layout asked for.
        batch_size: Rows a forward pass.
        name: What the model is called in messages, without an article.
        gives_rewards: Whether it is a reward model, of which the rewards are compared.

    Returns:
        The layout, or None where nothing is scored.

    Raises:
        ModelError: Its scores would not be its own, or it cannot run the layout asked for.
    """
    asked = [] if data.questions is None else data.questions.prompts
    if not data.scored and not asked:
        return None
    if gives_rewards:
        compared = ScoringRun(f"the {name}", model, compute_precision(model))
        refuse_other_rewards(compared, RowLengths.of(data.held_out), model.config.get_text_config().pad_token_id)
        return "padded"
    # What will be answered is not known; that a confidence is the model's own shows on its questions.
    questions = [{"prompt_ids": ids, "completion_ids": [ids[-1:]]} for ids in asked]
    lengths = RowLengths.of(*(data.scored.values() or [questions]))
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
        layout: ``padded`` or ``packed``; None where no row is scored.
        batch_size: Rows a forward pass.
        state: This process among the others.
        name: What the model is called in progress bars.
        reference: What another model made of the held-out rows, for the log-ratios of an implicit reward; or None.
        beta: What a nat of these log-ratios is worth.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: EvaluationData
    sampling: Sampling
    layout: Layout | None
    batch_size: int
    state: PartialState
    name: str
    reference: list[TokenLogps] | None = None
    beta: float | None = None
    _scored: dict[str, list[TokenLogps]] = field(default_factory=dict, repr=False)

    def token_logps(self, rows: Literal["held-out", "probe"]) -> list[TokenLogps]:
        """Token log-probs of every candidate of the rows, computed on first use.

        Args:
            rows: Which; probe rows only where there are some.
        """
        if rows not in self._scored:
            assert self.layout is not None
            progress = f"{self.name}: {rows} rows"
            self._scored[rows] = score_over_ranks(
                self.model, self.data.scored[rows], layout=self.layout, progress=progress, **self._how
            )
        return self._scored[rows]

    def trained_scores(self) -> list[TrainedScore]:
        """Sums over the trained tokens of every supervised row."""
        assert self.data.rows is not None and self.layout is not None
        progress = f"{self.name}: rows"
        return score_trained_over_ranks(self.model, self.data.rows, layout=self.layout, progress=progress, **self._how)

    @cached_property
    def answers(self) -> list[Answer]:
        """The model's answer to every question, generated on first use."""
        assert self.data.questions is not None
        asked, progress = self.data.questions.prompts, f"{self.name}: answers"
        return generate_answers(self.model, self.tokenizer, asked, self.sampling, state=self.state, progress=progress)

    @cached_property
    def answer_logps(self) -> list[list[float]]:
        """Log-probs of the tokens of every answer, its stop token included, at temperature 1."""
        assert self.data.questions is not None
        rows = [
            {"prompt_ids": ids, "completion_ids": [answer.ids]}
            for ids, answer in zip(self.data.questions.prompts, self.answers, strict=True)
        ]
        scored = score_over_ranks(
            self.model, Dataset.from_list(rows), layout="padded", progress=f"{self.name}: confidence", **self._how
        )
        return [row[0] for row in scored]

    @cached_property
    def rewards(self) -> list[list[float]]:
        """What a reward model gives every candidate of the held-out rows."""
        rows = self.data.held_out
        scorer = RewardModel(self.model, self.tokenizer, self.batch_size)

        def score(batches: list[list[int]]) -> list[list[float]]:
            # All candidates of a batch of rows together: what stands beside a sequence depends on no process.
            return [rewards for batch in batches for rewards in _rewards_of(scorer, rows.select(batch))]

        lengths = [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows]
        return map_batches(length_batches(lengths, self.batch_size), score, self.state)

    @property
    def _how(self) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        pad_token_id = (self.tokenizer.eos_token_id if pad is None else pad) or 0
        return {"pad_token_id": pad_token_id, "batch_size": self.batch_size, "state": self.state}


def _rewards_of(scorer: RewardModel, rows: Dataset) -> list[list[float]]:
    sequences = [[row["prompt_ids"] + ids for ids in row["completion_ids"]] for row in rows]
    found = iter(scorer.score_ids([ids for row in sequences for ids in row]))
    return [[next(found) for _ in row] for row in sequences]


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
    first = next(iter(data.asked), []) if data.rows is None else data.rows[0]["prompt_ids"]
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
        "data": _data_record(data),
    }


def _data_record(data: EvaluationData) -> dict[str, Any]:
    if data.rows is None:
        asked = [{"prompt_ids": ids, "completion_ids": []} for ids in data.asked]
        return {"held-out": {"rows": data.num_prompt_rows, "token_ids_blake2b": token_ids_fingerprint(asked)}}
    return {
        name: {
            "rows": len(rows),
            "dropped": data.reports[name].dropped,
            "cut_at_max_length": data.reports[name].num_truncated_rows,
            "token_ids_blake2b": token_ids_fingerprint(rows),
        }
        for name, rows in data.scored.items()
    }
