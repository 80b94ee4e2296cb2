"""Which rows the model solves: their choices, its greedy answers, a column of the data, or all.

RoMA (arXiv 2511.07419v2), equation 2: S = {j : f(x_j, r_j) = y_j} under the base model. Fidelity: paper text, which
does not say how an answer is read off; here a choice is its likeliest text, and an answer is judged by a reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import nn

from alignkit.errors import ConfigError, DataError
from alignkit.models._forward import score_rows
from alignkit.models.files import sha256
from alignkit.models.modes import evaluating
from alignkit.rewards import ChosenReward, load_rewards
from alignkit.routing.options import BankOptions
from alignkit.routing.shards import Compute
from alignkit.sampling.engines import Drawing, HuggingFaceEngine, Request

Rows = Sequence[Mapping[str, Any]]
"""A list of rows; a ``Dataset`` is one too."""


def success_rule(options: BankOptions) -> dict[str, Any]:
    """What decides which rows are solved, besides the model and the rows; JSON values."""
    own = {
        "choices": ("bank_choice_score",),
        "generation": ("bank_success_reward", "bank_success_threshold", "bank_success_max_new_tokens"),
    }
    names = ("bank_success", *own.get(options.bank_success, ()))
    rule = {name: vars(options)[name] for name in names}
    path, _, function = (options.bank_success_reward or "").rpartition(":")
    if options.bank_success == "generation" and path:
        rule |= {"bank_success_reward": function, "file": sha256(Path(path).expanduser())}
    return rule


def success_columns(options: BankOptions) -> tuple[str, ...]:
    """Columns of the rows that decide success, beside the prompt.

    Raises:
        ConfigError: The reward cannot be used.
    """
    if options.bank_success == "generation":
        return ("prompt", *_reward(options).needs_columns)
    return {"choices": ("choices_ids", "completion_ids"), "column": ("success",)}.get(options.bank_success, ())


def check_success(rows: Rows, options: BankOptions) -> None:
    """Refuse rows whose success could not be told, before a model is run.

    Args:
        rows: Tokenised rows.
        options: Of the bank.

    Raises:
        DataError: A column is missing, or a row's values do not fit; every kind of problem is told once.
        ConfigError: The reward cannot be used.
    """
    instead = {
        "choices": "give each row its choices, or write bank_success: generation, column or all",
        "generation": "keep these columns of the data",
        "column": "add it, true or false, or write bank_success: choices",
    }
    if missing := [name for name in success_columns(options) if name not in rows[0]]:
        advice = instead[options.bank_success]
        raise DataError("the bank", [f"bank_success: {options.bank_success} reads {', '.join(missing)}; {advice}"])
    problem = {"choices": _choices_problem, "column": _column_problem}.get(options.bank_success)
    found = [] if problem is None else [(i, problem(row)) for i, row in enumerate(rows)]
    told = {text: i for i, text in reversed(found) if text is not None}
    if told:
        raise DataError("the bank", [f"row {i}: {text}" for text, i in told.items()])


def _choices_problem(row: Mapping[str, Any]) -> str | None:
    choices = row["choices_ids"]
    if not choices or len(choices) < 2:
        return "it has fewer than two choices; leave it out, or write bank_success: generation"
    if not all(choices):
        return "one of its choices is empty"
    if list(row["completion_ids"]) not in [list(choice) for choice in choices]:
        return "its completion is none of its choices; write one of them, to the letter"
    return None


def _column_problem(row: Mapping[str, Any]) -> str | None:
    return None if isinstance(row["success"], bool) else f"success is {row['success']!r}; write true or false"


def success_by_choices(
    model: nn.Module, rows: Rows, options: BankOptions, *, pad_token_id: int, batch_size: int
) -> Compute:
    """A row is solved where no choice is likelier than the right one.

    Args:
        model: As it is called; with a completion head.
        rows: With ``prompt_ids``, ``choices_ids`` and ``completion_ids``.
        options: Of the bank.
        pad_token_id: Fills batches.
        batch_size: Rows a forward pass, each with all its choices.
    """

    def scores(numbers: Sequence[int]) -> list[list[list[float]]]:
        chosen = [rows[i] for i in numbers]
        return score_rows(
            model,
            [{"prompt_ids": row["prompt_ids"], "completion_ids": row["choices_ids"]} for row in chosen],
            pad_token_id=pad_token_id,
            layout="padded",
            batch_size=batch_size,
            device=PartialState().device,
        )

    def compute(numbers: Sequence[int], most_rows: int) -> dict[str, torch.Tensor]:
        with evaluating(model):
            logps = scores(numbers)
            for _ in range(-(-most_rows // batch_size) - -(-len(numbers) // batch_size)):
                scores(numbers[-1:])
        solved = [
            _is_best(rows[i]["choices_ids"], rows[i]["completion_ids"], choices, options.bank_choice_score)
            for i, choices in zip(numbers, logps, strict=True)
        ]
        return {"success": torch.tensor(solved)}

    return compute


def _is_best(choices: Sequence[Any], right: Sequence[int], logps: Sequence[Sequence[float]], score: str) -> bool:
    totals = [sum(tokens) / (len(tokens) if score == "mean" else 1) for tokens in logps]
    return list(choices[max(range(len(totals)), key=totals.__getitem__)]) == list(right)


def success_by_generation(
    model: nn.Module, tokenizer: Any, rows: Rows, options: BankOptions, batch_size: int
) -> Compute:
    """A row is solved where its greedy answer has a large enough reward; an answer that is not judged is no success.

    All processes answer every shard together.

    Args:
        model: As it is called.
        tokenizer: Decodes the answers.
        rows: With ``prompt_ids``, ``prompt`` and the columns of the reward.
        options: Of the bank.
        batch_size: Prompts at once.
    """
    reward, state = _reward(options), PartialState()
    drawing = Drawing(options.bank_success_max_new_tokens, 0.0, 1.0, 0, batch_size)
    engine = HuggingFaceEngine(extract_model_from_parallel(model), tokenizer, drawing, state)

    def compute(numbers: Sequence[int], most_rows: int) -> dict[str, torch.Tensor]:
        chosen = [rows[i] for i in numbers]
        answers = engine([Request(i, 0, 0, row["prompt_ids"]) for i, row in zip(numbers, chosen, strict=True)])
        texts = [answer.text for answer in answers]
        values = reward.function(
            prompts=[row["prompt"] for row in chosen],
            completions=[_like(row["prompt"], text) for row, text in zip(chosen, texts, strict=True)],
            completion_ids=tokenizer(texts, add_special_tokens=False)["input_ids"],
            **{name: [row[name] for row in chosen] for name in reward.needs_columns},
        )
        return {"success": torch.tensor([v is not None and v >= options.bank_success_threshold for v in values])}

    return compute


def _like(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: text, or a message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _reward(options: BankOptions) -> ChosenReward:
    name = options.bank_success_reward
    if name is None:
        advice = "name one, such as gsm8k_answer (`alignkit rewards list` shows those there are)"
        raise ConfigError("bank_success_reward", [f"nothing says which answers are right: {advice}"])
    reward = load_rewards([name])[0]
    if inspect.iscoroutinefunction(type(reward.function).__call__):
        raise ConfigError(
            "bank_success_reward", [f"{name} is awaited, which a bank does not do: write a plain function"]
        )
    return reward
