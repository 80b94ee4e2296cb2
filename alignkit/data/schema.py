"""The rows a user may bring, and everything that can be wrong with one.

Five forms, recognised from the columns and the first rows:

======================  ===========================================  =============================================
form                    columns                                      values
======================  ===========================================  =============================================
pair, explicit prompt   ``prompt``, ``chosen``, ``rejected``         text, or lists of ``{role, content}`` messages
pair, implicit prompt   ``chosen``, ``rejected``                     the same; the shared beginning is the prompt
candidate list          ``prompt``, ``completions``, ``scores``      K >= 2 completions and K numbers, K free by row
======================  ===========================================  =============================================

With a prompt of messages the completions may be plain text; each is then one assistant message. ``tools`` and
``chat_template_kwargs`` are passed on to the chat template. A list is trained on by descending score; completions of
equal score keep their order.

Rows may carry a reward for every completion token, its EOS included: ``chosen_token_rewards`` and
``rejected_token_rewards`` beside a pair, ``token_rewards`` (one list a completion, in the order of ``completions``)
beside a candidate list. They are cut at ``max_length`` with the tokens they belong to. Any other column is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from alignkit.data.columns import (
    LIST_COLUMNS,
    LIST_REWARD_COLUMNS,
    PAIR_COLUMNS,
    PAIR_REWARD_COLUMNS,
    PREFERENCE_FORMS,
    REWARD_FORMS,
    RowFamily,
    misnamed_prompt,
    missing_columns,
    refused_columns,
)
from alignkit.data.problems import Problem, is_blank, is_finite, shorten, template_problems, value_problems
from alignkit.errors import DataError

EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class RowKind:
    """The form of a dataset's rows.

    Attributes:
        lists: Candidate lists rather than chosen/rejected pairs.
        conversational: Messages rather than plain text.
        prompt: ``explicit`` (own column), ``implicit`` (shared beginning of the completions), or ``repeated`` (a text
            column beside completions that already hold the whole conversation; the column is not needed).
        text_completions: Plain-text completions to a prompt of messages.
        token_rewards: Rows carry a reward for every completion token.
    """

    lists: bool
    conversational: bool
    prompt: Literal["explicit", "implicit", "repeated"] = "explicit"
    text_completions: bool = False
    token_rewards: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns these rows are read from."""
        columns = LIST_COLUMNS if self.lists else PAIR_COLUMNS
        return columns if self.prompt == "explicit" else columns[1:]

    @property
    def reward_columns(self) -> tuple[str, ...]:
        """The columns token rewards are read from, where there are any."""
        return LIST_REWARD_COLUMNS if self.lists else PAIR_REWARD_COLUMNS

    @property
    def message_completions(self) -> bool:
        """Whether each completion is a list of messages."""
        return self.conversational and not self.text_completions

    def __str__(self) -> str:
        form = "conversational" if self.conversational else "standard"
        rewards = ", token rewards" if self.token_rewards else ""
        return f"{form} {'candidate lists' if self.lists else 'pairs'}, {self.prompt} prompt{rewards}"


def detect_kind(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str, num_candidates: int | None = None
) -> RowKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows; the first value that is not null decides between text and messages.
        name: What the rows are called in an error.
        num_candidates: What the method takes. It decides when the columns of pairs and of lists are both there: pairs
            for 2, lists for None.

    Raises:
        DataError: Columns are missing or cannot be trained on, or the prompt and the completions do not fit together.
    """
    if refused := refused_columns(columns):
        raise DataError(f"{name}: rows are not text alone", refused)
    kind = _detect_form(columns, head, name, num_candidates)
    given = [column for column in kind.reward_columns if column in columns]
    foreign = [column for column in PAIR_REWARD_COLUMNS + LIST_REWARD_COLUMNS if column in columns]
    if foreign and len(given) < len(kind.reward_columns):
        wanted = " and ".join(kind.reward_columns)
        advice = f"{'candidate lists' if kind.lists else 'pairs'} take {wanted}. Add what is missing, or remove it"
        raise DataError(
            f"{name}: token rewards are incomplete", [f"the columns hold {', '.join(foreign)}, but {advice}"]
        )
    return replace(kind, token_rewards=bool(given))


def _detect_form(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], name: str, num_candidates: int | None
) -> RowKind:
    has_pairs, has_lists = {"chosen", "rejected"} <= set(columns), set(LIST_COLUMNS) <= set(columns)
    if not has_pairs and not has_lists:
        raise DataError(f"{name}: columns do not form preference rows", missing_columns(columns))
    lists = has_lists and (num_candidates is None or not has_pairs)
    completion = first_value(head, "completions" if lists else "chosen")
    if lists and isinstance(completion, list) and completion:
        completion = completion[0]
    messages = isinstance(completion, list)
    if "prompt" not in columns:
        if (not messages or _opens_with_answer(completion)) and (problem := misnamed_prompt(columns)):
            raise DataError(f"{name}: unclear where the prompt is", [problem])
        return RowKind(lists=False, conversational=messages, prompt="implicit")
    prompt_messages = isinstance(first_value(head, "prompt"), list)
    if messages and not prompt_messages:
        if lists or _opens_with_answer(completion):
            advice = 'write the prompt as messages too: [{"role": "user", "content": "..."}]'
            raise DataError(f"{name}: rows mix two forms", [f"the prompt is text, completions are messages: {advice}"])
        return RowKind(lists=False, conversational=True, prompt="repeated")
    return RowKind(lists, conversational=prompt_messages, text_completions=prompt_messages and not messages)


def preference_rows(num_candidates: int | None = None) -> RowFamily:
    """The rows of preference methods.

    Args:
        num_candidates: What the method takes, as in :func:`detect_kind`.
    """
    expected = (
        "Expected prompt, chosen, rejected; or chosen, rejected with a shared beginning; or prompt, completions, scores"
    )
    return RowFamily(PREFERENCE_FORMS, expected, partial(detect_kind, num_candidates=num_candidates), _prompt_of)


def reward_model_rows(num_candidates: int | None = None) -> RowFamily:
    """The rows of reward models on answers: those of preference methods, which may carry a margin.

    Args:
        num_candidates: What the method takes, as in :func:`detect_kind`.
    """
    expected = preference_rows().expected
    return RowFamily(REWARD_FORMS, expected, partial(detect_kind, num_candidates=num_candidates), _prompt_of)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    if "prompt_ids" in row:
        return row["prompt_ids"]
    return row["prompt"] if "prompt" in row else split_shared_prefix(row["chosen"], row["rejected"])[0]


def row_problems(row: Mapping[str, Any], kind: RowKind, num_candidates: int | None = None) -> list[Problem]:
    """Everything wrong with the texts and scores of one row; empty when it can be trained on.

    Args:
        row: The row, with the columns of ``kind``.
        kind: The form of the dataset.
        num_candidates: Exact number of completions the method takes, or None for any number from 2.
    """
    problems = template_problems(row) if kind.conversational else []
    if kind.prompt == "explicit":
        problems += value_problems("prompt", row["prompt"], kind.conversational)
    if kind.lists:
        return problems + _list_problems(row, kind, num_candidates)
    for column in ("chosen", "rejected"):
        problems += value_problems(column, row[column], kind.message_completions)
    if problems:
        return problems
    if row["chosen"] == row["rejected"]:
        return [Problem("chosen and rejected are identical: there is no preference", shorten(row["chosen"]), False)]
    if kind.prompt != "explicit" and is_blank(split_shared_prefix(row["chosen"], row["rejected"])[0]):
        advice = "add a prompt column, or begin both with the prompt"
        return [Problem(f"chosen and rejected share no beginning: {advice}", shorten(row["chosen"]))]
    return []


def split_shared_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split an implicit-prompt pair into (prompt, chosen, rejected), exactly as TRL's ``extract_prompt`` does.

    The prompt is the longest common beginning, in characters or in messages; a space just before the difference goes
    to the completions. When one side is the beginning of the other, its last element stays a completion.
    """
    shared = 0
    for shared in range(min(len(chosen), len(rejected))):
        if chosen[shared] != rejected[shared]:
            if shared > 0 and chosen[shared - 1] == " ":
                shared -= 1
            break
    return chosen[:shared], chosen[shared:], rejected[shared:]


def describe_problems(found: Iterable[tuple[int, Problem]]) -> list[str]:
    """One line for every kind of problem: how many rows, and the first few with their values.

    Args:
        found: Pairs of row number and problem, in row order.
    """
    by_kind: dict[str, dict[int, str]] = {}
    for number, problem in found:
        by_kind.setdefault(problem.kind, {}).setdefault(number, problem.shown)
    lines = []
    for kind, rows in by_kind.items():
        shown = "; ".join(f"row {number}: {value}" for number, value in list(rows.items())[:EXAMPLES_SHOWN])
        more = "; ..." if len(rows) > EXAMPLES_SHOWN else ""
        lines.append(f"{kind}\n     {len(rows)} row{'s' if len(rows) > 1 else ''}: {shown}{more}")
    return lines


def first_value(head: Sequence[Mapping[str, Any]], column: str) -> Any:
    """The first value of a column that is neither absent nor null; None where all are."""
    return next((row[column] for row in head if row.get(column) is not None), None)


def _opens_with_answer(messages: Sequence[Any]) -> bool:
    """Whether the conversation begins with the assistant, so that the question must be elsewhere."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and first.get("role") == "assistant"


def _list_problems(row: Mapping[str, Any], kind: RowKind, num_candidates: int | None) -> list[Problem]:
    completions, scores = row["completions"], row["scores"]
    problems = []
    for column, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list):
            problems.append(Problem(f"{column} is {type(value).__name__}, expected a list", shorten(value)))
    if problems:
        return problems
    problems += _count_problems(len(completions), num_candidates)
    if len(completions) != len(scores):
        shown = f"{len(completions)} completions, {len(scores)} scores"
        problems.append(Problem("completions and scores differ in number: give each completion one score", shown))
    for completion in completions:
        problems += value_problems("a completion", completion, kind.message_completions)
    for score in scores:
        if not isinstance(score, (int, float)):
            problems.append(Problem("a score is not a number", shorten(score)))
        elif not is_finite(score):
            what = "beyond the range of a number" if isinstance(score, int) else "NaN or infinite"
            problems.append(Problem(f"a score is {what}: every score must be finite", shorten(score)))
    if problems:
        return problems
    if len(set(scores)) == 1:
        problems.append(Problem("all scores are equal: there is no preference", shorten(scores), False))
    if all(completion == completions[0] for completion in completions):
        kind_of_row = "all completions are identical: there is no preference"
        problems.append(Problem(kind_of_row, shorten(completions[0]), False))
    return problems


def _count_problems(count: int, num_candidates: int | None) -> list[Problem]:
    if count < 2:
        kind = "fewer than 2 completions: a preference needs at least two. Add one, or remove the row"
        return [Problem(kind, f"{count} completions")]
    if num_candidates is not None and count != num_candidates:
        advice = f"keep {num_candidates} a row (say the best and the worst), or take a method for lists, such as lipo"
        kind = f"the method takes exactly {num_candidates} completions a row: {advice}"
        return [Problem(kind, f"{count} completions")]
    return []
