"""One batch of supervised rows to token ids and labels, with what is counted on the way.

Rows become, token for token, what ``trl.SFTTrainer`` 1.16 trains on (its ``_prepare_dataset``):

- plain text gets one EOS unless it ends in it; messages get what the chat template writes;
- prompt and prompt + completion are tokenised separately, and the completion starts where they part;
- a label is -100 where nothing is trained: in prompts, and outside the assistant's turns if only these are trained;
  where the config says nothing of it, these alone are in conversations (:mod:`alignkit.data.turns`), TRL's whole ones;
- a row is cut at ``max_length``, and dropped when no trained token is left of it.

A row whose only trained token is its first is dropped too: no position predicts it. A tokenizer that ends every text in
EOS adds none here, where TRL trains two of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data import conversion
from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.problems import Problem
from alignkit.data.rendering import RenderingError, render, render_marked
from alignkit.data.supervised_report import CUT_AWAY, NOTHING_TRAINED
from alignkit.data.supervised_schema import SupervisedKind
from alignkit.data.templates import has_doubled_token
from alignkit.data.tokenization import endings, rendered_ids, template_arguments, text_ids, with_eos
from alignkit.data.turns import Encoded, encode_turns

TOKEN_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
COUNT_FEATURES = Features(
    {
        "cause": Value("string"),
        **conversion.MISFIT_FEATURES,
        "length": Value("int32"),
        "num_trained": Value("int32"),
        "num_trained_kept": Value("int32"),
        "needed_length": Value("int32"),
        "is_cut": Value("bool"),
        "num_stopped": Value("int32"),
        "text_after_stop": Value("string"),
        "unstopped_end": Value("string"),
        "cut_prompt_end": Value("string"),
        "doubled": Value("bool"),
        "num_turns": Value("int32"),
        "num_turns_left": Value("int32"),
    }
)
"""Columns beside the tokens, counted and then removed; ``needed_length`` is the least max_length that keeps a row."""


@dataclass(frozen=True)
class TrainedTokens:
    """Which tokens are trained.

    Attributes:
        completion_only: The completion alone, where it is told apart; None is True there.
        assistant_only: The assistant's turns alone. None is True for conversations without a prompt of their own, in
            any template: by its marks, or turn by turn; not where ``completion_only`` is False.
        chat_template: Template with ``{% generation %}`` marks in place of the tokenizer's; None takes its own. Where
            ``assistant_only`` is None, it marks those conversations that it writes as the tokenizer's template does.
    """

    completion_only: bool | None = None
    assistant_only: bool | None = None
    chat_template: str | None = None


DEFAULT_TRAINED = TrainedTokens()


@dataclass(frozen=True)
class Settings:
    """What tokens depend on besides the rows and the tokenizer."""

    kind: SupervisedKind
    trained: TrainedTokens
    max_length: int | None
    stop_token_ids: frozenset[int]

    @property
    def tells_turns_apart(self) -> bool:
        """Whether the assistant's turns are trained without having been asked for."""
        asked = self.trained.assistant_only is not None or self.trained.completion_only is False
        return self.kind.columns == ("messages",) and not asked


def convert_batch(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, list[Any]]:
    """Tokenise a batch of valid rows.

    Args:
        batch: Columns of the batch.
        settings: What else the result depends on.

    Returns:
        Columns of ``TOKEN_FEATURES`` and ``COUNT_FEATURES``; dropped rows have empty token columns.
    """
    rows = list(conversion.rows_of(batch))
    features = {**TOKEN_FEATURES, **COUNT_FEATURES}
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for tokens in _tokenise(rows, tokenizer, settings):
        is_misfit = isinstance(tokens, Problem)
        row = conversion.misfit_row(features, tokens) if is_misfit else _convert_row(tokens, tokenizer, settings)
        for name, value in row.items():
            columns[name].append(value)
    return columns


@dataclass(frozen=True)
class Tokens:
    """A tokenised row.

    Attributes:
        input_ids: Its tokens.
        is_trained: Which of them are trained, 1 or 0.
        prompt_ids: The prompt tokenised on its own, empty where there is none.
        start: Where the completion starts, 0 without a prompt.
        num_turns, num_turns_left: Turns of the assistant, and those of them that are not trained, where they are
            told apart.
    """

    input_ids: list[int]
    is_trained: list[int]
    prompt_ids: list[int]
    start: int
    num_turns: int
    num_turns_left: int


def _convert_row(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> dict[str, Any]:
    input_ids, is_trained, start = tokens.input_ids, tokens.is_trained, tokens.start
    trained_at = list(compress(range(1, len(input_ids)), is_trained[1:]))
    limit = len(input_ids) if settings.max_length is None else settings.max_length
    is_cut = len(input_ids) > limit
    cause = NOTHING_TRAINED if not trained_at else CUT_AWAY if trained_at[0] >= limit else ""
    labels = [token if trained else IGNORE_INDEX for token, trained in zip(input_ids, is_trained, strict=True)]
    last_run = _last_run(is_trained)
    answer = input_ids[last_run.start : last_run.stop]
    counts = {
        "cause": cause,
        "misfit": "",
        "misfit_shown": "",
        "length": len(input_ids),
        "num_trained": len(trained_at),
        "num_trained_kept": 0 if cause else bisect_left(trained_at, limit),
        "needed_length": trained_at[0] + 1 if trained_at else 0,
        "is_cut": is_cut,
        "cut_prompt_end": tokenizer.decode(tokens.prompt_ids[start:]) if start < len(tokens.prompt_ids) else "",
        "doubled": has_doubled_token(input_ids[:start] or input_ids, input_ids[start:], tokenizer),
        "num_turns": tokens.num_turns,
        "num_turns_left": tokens.num_turns_left,
    }
    kept = 0 if cause else limit
    columns = {"input_ids": input_ids[:kept], "labels": labels[:kept]}
    return columns | counts | endings([] if is_cut or cause else [answer], tokenizer, settings.stop_token_ids)


def _tokenise(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[Tokens | Problem]:
    """Tokenise rows, whole and their prompts alone; one call for all texts is what makes this fast."""
    kind, trained = settings.kind, settings.trained
    wholes = [_whole(row, tokenizer, kind) for row in rows]
    part = "prompt + completion" if kind.has_prompt else "messages"
    if settings.tells_turns_apart:
        encoded = encode_turns(
            wholes, rows, tokenizer, trained.chat_template, stop_token_ids=settings.stop_token_ids, part=part
        )
    else:
        encoded = encode(wholes, rows, tokenizer, trained, part=part)
    prompts: Sequence[Encoded | Problem] = [Encoded([], [])] * len(rows)
    if kind.has_prompt:
        how = replace(trained, assistant_only=False)
        prompts = encode([row["prompt"] for row in rows], rows, tokenizer, how, part="prompt", is_prompt=True)
    tokenised: list[Tokens | Problem] = []
    for whole, prompt in zip(encoded, prompts, strict=True):
        if isinstance(prompt, Problem) or isinstance(whole, Problem):
            tokenised.append(whole if isinstance(whole, Problem) else prompt)
            continue
        start = conversion.common_prefix_length(prompt.ids, whole.ids)
        mask = whole.is_trained if trained.completion_only is False else [0] * start + whole.is_trained[start:]
        tokenised.append(Tokens(whole.ids, mask, prompt.ids, start, whole.num_turns, whole.num_turns_left))
    return tokenised


def _whole(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, kind: SupervisedKind) -> Any:
    """The text or the messages of a whole row."""
    if kind.conversational:
        return row["prompt"] + row["completion"] if kind.has_prompt else row["messages"]
    eos = tokenizer.eos_token
    return row["prompt"] + with_eos(row["completion"], eos) if kind.has_prompt else with_eos(row["text"], eos)


def encode(
    values: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    trained: TrainedTokens,
    *,
    part: str,
    is_prompt: bool = False,
) -> list[Encoded | Problem]:
    """Token ids of texts or messages, and a mask of ones, or of the assistant's turns where these alone are trained.

    Args:
        values: All texts, or all lists of messages.
        rows: The rows they are of, which may hold arguments of the chat template.
        trained: Which tokens are trained.
        part: What the messages are called in a problem.
        is_prompt: Whether messages end in the generation prompt.

    Returns:
        For each value ids and mask, or why the chat template cannot render it.
    """
    if values and isinstance(values[0], str):
        return [_with_ones(ids) for ids in text_ids(values, tokenizer)]
    found: list[Any] = []
    for messages, row in zip(values, rows, strict=True):
        how = {"part": part, "chat_template": trained.chat_template}
        try:
            if trained.assistant_only:
                found.append(Encoded(*render_marked(messages, tokenizer, template_arguments(row), **how)))
            else:
                how["add_generation_prompt"] = is_prompt
                found.append(render(messages, tokenizer, template_arguments(row), **how))
        except RenderingError as error:
            found.append(error.problem)
    texts = [text for text in found if isinstance(text, str)]
    ids = iter(rendered_ids(texts, tokenizer) if texts else [])
    return [_with_ones(next(ids)) if isinstance(value, str) else value for value in found]


def _with_ones(ids: list[int]) -> Encoded:
    return Encoded(ids, [1] * len(ids))


def _last_run(is_trained: list[int]) -> range:
    """The last positions that are trained one behind the other."""
    if 1 not in is_trained:
        return range(0)
    backwards = is_trained[::-1]
    first = backwards.index(1)
    end = backwards.index(0, first) if 0 in backwards[first:] else len(backwards)
    return range(len(backwards) - end, len(backwards) - first)
