"""One batch of rows of text to candidate rows of token ids, with what is counted on the way.

Pairs become, token for token, what ``trl.DPOTrainer`` 1.16 trains on (its ``_prepare_dataset`` followed by
``DataCollatorForPreference`` with ``truncation_mode="keep_start"``):

- plain text gets one EOS unless it ends in it; messages get what the chat template writes;
- prompt and prompt + completion are tokenised separately, and the completions start where the first of them leaves the
  tokenised prompt, so that a token merged across the boundary is trained;
- a completion is cut where prompt + completion reaches ``max_length``; a row whose prompt fills it is dropped.

A tokenizer that ends every text in EOS adds none here: TRL trains two of them, and a prompt that ends in one.

Beyond TRL, rows without a preference (identical candidates, equal scores) are dropped too, lists are sorted by
descending score, token rewards are cut with their tokens, and contrast prompts are tokenised beside the plain ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.candidate_report import EQUAL_AFTER_CUT, EQUAL_SCORES, IDENTICAL, LOST_PROMPT, NO_ROOM, NO_TOKENS
from alignkit.data.columns import DIMENSIONS_COLUMN, MARGIN_COLUMN
from alignkit.data.contrast import ContrastPrompts
from alignkit.data.conversion import MISFIT_FEATURES, common_prefix_length, misfit_row, rows_of
from alignkit.data.problems import Problem
from alignkit.data.rendering import RenderingError, render
from alignkit.data.reward_rows import preference_labels
from alignkit.data.schema import RowKind, split_shared_prefix
from alignkit.data.templates import has_doubled_token, tokens_after_stop

CANDIDATE_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(List(Value("int32"))),
        "scores": List(Value("float64")),
    }
)
REWARD_FEATURES = Features({"token_rewards": List(List(Value("float32")))})
CONTRAST_FEATURES = Features(
    {"better_prompt_ids": List(List(Value("int32"))), "worse_prompt_ids": List(List(Value("int32")))}
)
"""For each completion the prompt that asks for a better response, and the one that asks for a worse one."""
COUNT_FEATURES = Features(
    {
        "cause": Value("string"),
        **MISFIT_FEATURES,
        "prompt_length": Value("int32"),
        "completion_lengths": List(Value("int32")),
        "needed_length": Value("int32"),
        "num_truncated": Value("int32"),
        "num_stopped": Value("int32"),
        "text_after_stop": Value("string"),
        "unstopped_end": Value("string"),
        "cut_prompt_end": Value("string"),
        "doubled": Value("bool"),
        "score_gap": Value("float64"),
    }
)
"""Columns beside the candidate columns, counted and then removed. ``cause`` is empty for a row that is kept;
``needed_length`` is the smallest max_length that keeps it, 0 when none does. A misfit is a row that cannot be rendered,
or has another number of token rewards than tokens."""

END_TOKENS = 4

_IDS_ALONE: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
"""Lists of ones, which nobody reads, would be made of every text as well."""

_WRONG_LENGTH = (
    "token rewards are not as many as the tokens of their completion: give one number a token, EOS included, counted "
    "before truncation with the tokenizer and chat template of this run (alignkit score writes such rows)"
)


@dataclass(frozen=True)
class Settings:
    """What candidate rows depend on besides the rows and the tokenizer.

    Attributes:
        kind: Form of the rows.
        max_length: Limit on prompt + completion in tokens, or None.
        num_candidates: Exact number of candidates the method takes, or None.
        stop_token_ids: Ids at which generation stops.
        contrast: Templates of the contrast prompts, or None for none.
        margin: Whether rows carry a margin that is kept.
        dimensions: Along which rows get labels; empty is one without a name, None no labels.
    """

    kind: RowKind
    max_length: int | None
    num_candidates: int | None
    stop_token_ids: frozenset[int]
    contrast: ContrastPrompts | None = None
    margin: bool = False
    dimensions: tuple[str, ...] | None = None

    @property
    def features(self) -> Features:
        """The candidate columns that rows get."""
        rewards = REWARD_FEATURES if self.kind.token_rewards else {}
        beside = {MARGIN_COLUMN: Value("float64")} if self.margin else {}
        beside |= {} if self.dimensions is None else {"labels": List(Value("float32"))}
        return Features({**CANDIDATE_FEATURES, **rewards, **(CONTRAST_FEATURES if self.contrast else {}), **beside})


@dataclass(frozen=True)
class TextRow:
    """One row in its general form: a prompt with K scored completions, text or messages, by descending score.

    Attributes:
        prompt, completions, scores: As in a candidate list; a pair is (chosen, rejected) with scores (1, 0).
        token_rewards: One list a completion, or None.
        score_gap: Highest minus lowest score given.
        template: Keyword arguments of the chat template.
        margin: By how much the best is better than the worst, where rows say so.
        labels: Along each dimension whether the first is better, where there are dimensions.
    """

    prompt: Any
    completions: list[Any]
    scores: list[float]
    token_rewards: list[list[float]] | None
    score_gap: float
    template: dict[str, Any]
    margin: float | None = None
    labels: list[float] | None = None


def convert_batch(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, list[Any]]:
    """Tokenise a batch of valid rows.

    Args:
        batch: Columns of the batch.
        settings: What else the result depends on.

    Returns:
        Columns of ``settings.features`` and ``COUNT_FEATURES``; dropped rows have empty candidate columns.
    """
    rows = [_text_row(row, settings) for row in rows_of(batch)]
    texts = [_texts_or_problem(row, tokenizer, settings) for row in rows]
    # One call for the whole batch is what makes this fast.
    flat = [text for row in texts if isinstance(row, list) for text in row]
    tokenise = rendered_ids if settings.kind.conversational else text_ids
    encoded = iter(tokenise(flat, tokenizer) if flat else [])
    features = {**settings.features, **COUNT_FEATURES}
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for row, found in zip(rows, texts, strict=True):
        if isinstance(found, Problem):
            converted = misfit_row(features, found)
        else:
            converted = _convert_row(row, list(islice(encoded, len(found))), tokenizer, settings)
        for name, value in converted.items():
            columns[name].append(value)
    return columns


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the chat template: ``tools`` and what ``chat_template_kwargs`` holds; JSON text is parsed.

    Args:
        row: A row as loaded.
    """
    # A table of texts says with an empty cell that there is none.
    values = [row.get(name) for name in ("tools", "chat_template_kwargs")]
    values = [None if isinstance(value, str) and not value.strip() else value for value in values]
    tools, kwargs = (json.loads(value) if isinstance(value, str) else value for value in values)
    return {"tools": tools, **(kwargs or {})}


def with_eos(text: str, eos: str) -> str:
    """Plain text with EOS at its end, unless it ends in it."""
    return text if text.endswith(eos) else text + eos


def answered_ids(
    prompt: Any,
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of a prompt with each of some completions behind it, as candidate rows have them, uncut.

    Args:
        prompt: A text, or messages.
        completions: Texts, or lists of messages behind messages.
        template: Keyword arguments of the chat template.

    Raises:
        RenderingError: The chat template refuses the messages.
    """
    if isinstance(prompt, str):
        return text_ids([prompt + with_eos(text, tokenizer.eos_token) for text in completions], tokenizer)
    turns = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    wholes = [render([*prompt, *turn], tokenizer, template or {}, part="prompt + completion") for turn in turns]
    return rendered_ids(wholes, tokenizer)


def rendered_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of what a chat template wrote, its special tokens included."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, **_IDS_ALONE)["input_ids"]
    return ids


def whole_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of plain texts, with all that the tokenizer adds, an EOS at the end included."""
    ids: list[list[int]] = tokenizer(list(texts), **_IDS_ALONE)["input_ids"]
    return ids


def text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of plain texts, with a BOS that the tokenizer adds but without an EOS that it adds.

    Where a text ends is for :func:`with_eos` to say: a prompt does not, and a completion that says so needs no second.

    Args:
        texts: Texts as they are to be read.
    """
    ids = whole_ids(texts, tokenizer)
    with_special, bare = (tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False))
    adds_eos = with_special[-1] == tokenizer.eos_token_id != bare[-1]
    return [sequence[:-1] for sequence in ids] if adds_eos else ids


def _text_row(row: Mapping[str, Any], settings: Settings) -> TextRow:
    kind = settings.kind
    template = template_arguments(row)
    if kind.lists:
        prompt, completions, scores = row["prompt"], row["completions"], [float(score) for score in row["scores"]]
    else:
        prompt, completions, scores = row.get("prompt"), [row["chosen"], row["rejected"]], [1.0, 0.0]
        if kind.prompt != "explicit":
            prompt, *completions = split_shared_prefix(*completions)
    gap = max(scores) - min(scores)
    if kind.text_completions:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rewards = None
    if kind.token_rewards:
        rewards = row["token_rewards"] if kind.lists else [row[column] for column in kind.reward_columns]
    order = by_descending_score(scores)
    scores = [1.0, 0.0] if settings.num_candidates == 2 and gap > 0 else [scores[k] for k in order]
    rewards = None if rewards is None else [rewards[k] for k in order]
    margin = float(row[MARGIN_COLUMN]) if settings.margin else None
    labels = None if settings.dimensions is None else preference_labels(row.get(DIMENSIONS_COLUMN), settings.dimensions)
    return TextRow(prompt, [completions[k] for k in order], scores, rewards, gap, template, margin, labels)


def by_descending_score(scores: Sequence[float]) -> list[int]:
    """Positions of the highest score, the next one, and so on; equal scores keep their order.

    Args:
        scores: Scores of one row as given.
    """
    return sorted(range(len(scores)), key=lambda k: -scores[k])


def _texts_or_problem(row: TextRow, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str] | Problem:
    try:
        return _texts(row, tokenizer, settings)
    except RenderingError as error:
        return error.problem


def _texts(row: TextRow, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """The prompt, the prompt with each completion, and the contrast prompts."""
    contrast = settings.contrast.prompts(row.prompt, row.completions) if settings.contrast else []
    if not settings.kind.conversational:
        eos = tokenizer.eos_token
        return [row.prompt, *(row.prompt + with_eos(text, eos) for text in row.completions), *contrast]

    def rendered(messages: Any, part: str, *, opens_answer: bool = False) -> str:
        return render(messages, tokenizer, row.template, part=part, add_generation_prompt=opens_answer)

    names = (
        [f"completion of score {score:g}" for score in row.scores] if settings.kind.lists else ["chosen", "rejected"]
    )
    wholes = [rendered(row.prompt + c, f"prompt + {name}") for c, name in zip(row.completions, names, strict=True)]
    prompt = rendered(row.prompt, "prompt", opens_answer=True)
    return [prompt, *wholes, *(rendered(messages, "contrast prompt", opens_answer=True) for messages in contrast)]


def _convert_row(
    row: TextRow, ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, Any]:
    """One row from the ids of its :func:`_texts`."""
    prompt_ids, sequences, contrast = ids[0], ids[1 : 1 + len(row.completions)], ids[1 + len(row.completions) :]
    start = min(common_prefix_length(prompt_ids, sequence) for sequence in sequences)
    whole = [sequence[start:] for sequence in sequences]
    limit = settings.max_length if settings.max_length is not None else start + max(map(len, whole))
    needed = _needed_length(start, whole)
    cause = _drop_cause(row, start, whole, needed, limit)
    room = limit - start
    misfit = _misfit(row.token_rewards, whole)
    candidates = {
        "prompt_ids": prompt_ids[:start],
        "completion_ids": [completion[:room] for completion in whole],
        "scores": row.scores,
    }
    if row.token_rewards is not None:
        candidates["token_rewards"] = [rewards[:room] for rewards in row.token_rewards]
    if settings.contrast is not None:
        candidates |= _contrast_columns(contrast, prompt_ids[start:], len(whole))
    counts = {
        "cause": cause,
        "misfit": _WRONG_LENGTH if misfit else "",
        "misfit_shown": misfit,
        "prompt_length": start,
        "completion_lengths": [len(completion) for completion in whole],
        "needed_length": needed,
        "num_truncated": sum(len(completion) > room for completion in whole),
        "cut_prompt_end": tokenizer.decode(prompt_ids[start:]) if start < len(prompt_ids) else "",
        "doubled": any(has_doubled_token(prompt_ids[:start], completion, tokenizer) for completion in whole),
        "score_gap": row.score_gap,
    }
    untruncated = [completion for completion in whole if 0 < len(completion) <= room]
    kept: dict[str, Any] = dict.fromkeys(candidates, []) if cause else candidates
    if row.margin is not None:
        kept[MARGIN_COLUMN] = row.margin
    if row.labels is not None:
        kept["labels"] = row.labels
    return kept | counts | endings(untruncated, tokenizer, settings.stop_token_ids)


def _contrast_columns(prompts: list[list[int]], lost: list[int], count: int) -> dict[str, Any]:
    """The contrast prompts of every completion, without an end that the plain prompt lost to the completion as well.

    Where a template opens the turn otherwise than it writes it, the completion starts before the end of the tokenised
    prompt; it must follow the same header in all prompts.
    """
    cut = [ids[: len(ids) - common_prefix_length(ids[::-1], lost[::-1])] for ids in prompts]
    better, worse = cut[: len(cut) // 2], cut[len(cut) // 2 :]
    repeats = count // len(better)
    return {"better_prompt_ids": better * repeats, "worse_prompt_ids": worse * repeats}


def _misfit(token_rewards: list[list[float]] | None, completions: list[list[int]]) -> str:
    """How many rewards the first completion has that has not one for every token; empty when all fit."""
    pairs = zip(token_rewards or [], completions, strict=token_rewards is not None)
    shown = (f"{len(r)} rewards for {len(c)} tokens" for r, c in pairs if len(r) != len(c))
    return next(shown, "")


def _needed_length(start: int, completions: list[list[int]]) -> int:
    """Smallest max_length at which the candidates are not all the same; 0 when they are at any length."""
    if all(completion == completions[0] for completion in completions):
        return 0
    return start + 1 + min(common_prefix_length(completions[0], completion) for completion in completions[1:])


def _drop_cause(row: TextRow, start: int, completions: list[list[int]], needed: int, limit: int) -> str:
    if row.score_gap == 0:
        return EQUAL_SCORES
    if needed == 0:
        return IDENTICAL
    if start == 0:
        return LOST_PROMPT
    if not all(completions):
        return NO_TOKENS
    if start >= limit:
        return NO_ROOM
    return EQUAL_AFTER_CUT if needed > limit else ""


def endings(
    completions: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> dict[str, int | str]:
    """How untruncated completions end: how many in a stop token, and the text of one example of either sort.

    Args:
        completions: Token ids.
        tokenizer: Decodes the examples.
        stop_token_ids: Ids at which generation stops.
    """
    after = [tokens_after_stop(completion, stop_token_ids, tokenizer) for completion in completions]
    trailing = next((c[-count:] for c, count in zip(completions, after, strict=True) if count), [])
    unstopped = next((c[-END_TOKENS:] for c, count in zip(completions, after, strict=True) if count is None), [])
    return {
        "num_stopped": sum(count is not None for count in after),
        # Decoding nothing takes as long as decoding a few tokens.
        "text_after_stop": tokenizer.decode(trailing) if trailing else "",
        "unstopped_end": tokenizer.decode(unstopped) if unstopped else "",
    }
