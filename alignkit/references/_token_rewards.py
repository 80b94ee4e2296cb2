"""Token rewards by contrastive prompting: one pass over the rows before training, under the frozen reference.

Every completion token is scored twice, after a prompt that asks for a better response and after one that asks for a
worse one (columns ``better_prompt_ids`` and ``worse_prompt_ids`` of :mod:`alignkit.data.candidates`)::

    r_hat(y_t) = sigma( log pi_ref(y_t | x_better, y_<t) - log pi_ref(y_t | x_worse, y_<t) ) - 1/2

The completion's ids are the same under both prompts. K completions make 2K sequences a row; those that begin alike are
packed behind the beginning they share, so that it is computed once. What is kept on disk are the log-probs, in chunks
of rows under the keys of :mod:`alignkit.references._cache`: an interrupted pass goes on with the first missing chunk.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from alignkit.data.candidates import SOURCE_COLUMNS
from alignkit.data.prefix import Layout, packed_length
from alignkit.data.schema import EXAMPLES_SHOWN
from alignkit.data.tokenization import CONTRAST_FEATURES
from alignkit.errors import DataError, ModelError
from alignkit.models._comparison import ScoringRun, layout_problem
from alignkit.models._forward import base_model, compute_precision, use_packed_attention
from alignkit.models._layouts import ASKED_FOR, CHEAPER, Requested, packing_obstacle, refusal
from alignkit.models.positions import positions_of
from alignkit.references import _cache as reference
from alignkit.references.token_reward_report import TokenRewardReport, token_reward_report

COLUMN = "token_rewards"
CHUNK_ROWS = 256

Score = Callable[[Dataset, str], reference.Scores]
"""Scores rows (``prompt_ids``, ``completion_ids``) under the reference with all ranks, returning all scores on every
rank; the text titles a progress bar. A collective."""


@dataclass(frozen=True)
class PassLayout:
    """How the sequences of a row become rows for the model.

    Attributes:
        layout: ``packed`` packs them, ``padded`` makes each a row of its own.
        reason: Why.
        width: Hidden size of the model.
    """

    layout: Layout
    reason: str
    width: int

    def cost(self, rows: Sequence[ScoredRow]) -> float:
        """What a forward pass over ``rows`` costs, in tokens: a pair of positions costs 1 / (6 width) of a token."""
        return sum(row.num_tokens + row.num_pairs / (6 * self.width) for row in rows)


@dataclass(frozen=True)
class ScoredRow:
    """One row for the model: a beginning, and the sequences that go on from it.

    Attributes:
        prompt_ids: The shared beginning, at least one token.
        completion_ids: What follows it in each sequence: the rest of the prompt, then the completion.
        members: Which of the 2K sequences these are: k under the better prompt, K + k under the worse one.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    members: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes in a packed row."""
        return packed_length(self.prompt_ids, self.completion_ids)

    @property
    def num_pairs(self) -> float:
        """Pairs of positions that attention computes in a packed row: every part apart."""
        prefix, branches = len(self.prompt_ids) - 1, [len(ids) for ids in self.completion_ids]
        return prefix**2 / 2 + sum(branch * (prefix + branch) for branch in branches)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids))

    def candidate_row(self) -> dict[str, Any]:
        """The row as the collator takes it; the scores mean nothing."""
        scores = [0.0] * len(self.completion_ids)
        return {"prompt_ids": self.prompt_ids, "completion_ids": self.completion_ids, "scores": scores}


def default_cache_dir() -> Path:
    """``$ALIGNKIT_CACHE/token_rewards``, by default ``~/.cache/alignkit/token_rewards``."""
    return reference.default_cache_dir().with_name("token_rewards")


def token_rewards_of(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """r_hat of tokens from their log-probs under the two prompts, any shape, float32; in [-1/2, 1/2].

    Computed as tanh(d / 2) / 2, which is sigma(d) - 1/2 and exactly antisymmetric in floating point.
    """
    return torch.tanh((better_logps.float() - worse_logps.float()) / 2) / 2


def with_token_rewards(
    rows: Dataset,
    *,
    cache: reference.ReferenceCache,
    weights: str,
    precision: str,
    layout: PassLayout,
    score: Score,
) -> tuple[Dataset, TokenRewardReport]:
    """Attach ``token_rewards`` [K][tokens], from the cache where every rank has it, otherwise computed and stored.

    A collective. A few of the rows that come from the cache are scored again and compared.

    Args:
        rows: Candidate rows with contrast prompts; these columns are removed.
        weights: ``model_fingerprint`` of the reference.
        precision: Key of ``LOGP_TOLERANCE``.
        layout: What :func:`choose_pass_layout` returned.
        score: Scores rows in that layout.

    Returns:
        The rows, and what the rewards are like.

    Raises:
        CheckpointError: A file of the cache is damaged or stale.
    """
    counts = [sum(map(len, completions)) for completions in rows["completion_ids"]]
    spans = [range(start, min(start + CHUNK_ROWS, len(rows))) for start in range(0, len(rows), CHUNK_ROWS)]
    paths = [cache.path(weights, precision, _fingerprint(rows.select(span))) for span in spans]
    found = [cache.load(path, 2 * sum(counts[i] for i in span)) for path, span in zip(paths, spans, strict=True)]
    everywhere = np.all(gather_object([[values is not None for values in found]]), axis=0)
    blocks: list[Tensor] = []
    for span, path, values, is_cached in zip(spans, paths, found, everywhere, strict=True):
        if values is None or not is_cached:
            title = f"Token rewards, rows {span.start + 1} to {span.stop} of {len(rows)}"
            values = reference.flat(_score_sequences(rows.select(span), layout, score, title))
            if PartialState().is_main_process:
                cache.store(path, values)
            PartialState().wait_for_everyone()
        blocks += torch.split(values, [2 * counts[i] for i in span])
    reused = [i for span, is_cached in zip(spans, everywhere, strict=True) if is_cached for i in span]
    if reused:
        sample = [reused[i] for i in reference.check_sample(len(reused))]
        fresh = _score_sequences(rows.select(sample), layout, score, "Token rewards, checking the cache")
        for i, scores in zip(sample, fresh, strict=True):
            reference.check_reused(paths[i // CHUNK_ROWS], blocks[i], reference.flat([scores]), precision)
    rewards = torch.cat([token_rewards_of(*block.chunk(2)) for block in blocks])
    used = [*CONTRAST_FEATURES, *SOURCE_COLUMNS]
    plain = rows.remove_columns([column for column in used if column in rows.column_names])
    rewarded = reference.attach_tokens(plain, rewards, COLUMN)
    return rewarded, token_reward_report(rewarded)


def choose_pass_layout(
    requested: Requested,
    model: nn.Module,
    rows: Dataset,
    *,
    run: ScoringRun | None = None,
) -> PassLayout:
    """Whether the sequences of rows are packed: where the architecture allows it.

    A collective. The model is given the attention that it takes.

    Args:
        requested: The config's ``layout``.
        model: The reference, with a completion head.
        rows: Candidate rows with contrast prompts.
        run: How it will be run; None is as it is.

    Raises:
        ModelError: ``packed`` was asked for and the architecture does not allow it.
    """
    run = run or ScoringRun("the reference", model, compute_precision(model))
    config: Any = run.base.config.get_text_config()  # type: ignore[operator, union-attr]
    padded = PassLayout("padded", ASKED_FOR, config.hidden_size)
    if requested == "padded":
        return padded
    packed = PassLayout("packed", ASKED_FOR if requested == "packed" else CHEAPER, config.hidden_size)
    scored = [each for row in rows for each in scored_rows(row, packed)]
    obstacle = packing_obstacle(model, longest=max(each.longest for each in scored))
    if obstacle is None:
        obstacle = layout_problem(run, max(scored, key=lambda each: each.num_tokens).candidate_row())
    if obstacle and requested == "packed":
        raise ModelError(refusal(obstacle))
    if obstacle:
        return replace(padded, reason=obstacle)
    use_packed_attention(run.base)
    return packed


def refuse_long_sequences(rows: Dataset, model: nn.Module, name: str) -> None:
    """Raise where a contrast prompt and its completion have more tokens than the model has positions.

    Args:
        rows: Candidate rows with contrast prompts.
        model: The reference.
        name: What the rows are called.

    Raises:
        DataError: Names such rows, their lengths, and the ways out.
    """
    base: Any = base_model(model)
    limit = positions_of(base.config)
    if limit is None:
        return
    lengths = [max(len(p) + len(c) for p, c in _sequences(row)) for row in rows]
    numbers = rows["source_row"] if "source_row" in rows.column_names else range(len(rows))
    long = {number: length for number, length in zip(numbers, lengths, strict=True) if length > limit}
    if not long:
        return
    shown = "; ".join(f"row {number}: {length} tokens" for number, length in list(long.items())[:EXAMPLES_SHOWN])
    problem = (
        f"the model has {limit} positions, and in {len(long)} of {len(rows)} rows a contrast prompt with its response "
        f"is longer: {shown}{'; ...' if len(long) > EXAMPLES_SHOWN else ''}; at most {max(long.values())}. Nothing is "
        "cut here, or the tokens at the end would have no reward. Leave the response out of the prompts "
        "(include_response: false), lower max_length, shorten the templates (contrast_prompts), or remove these rows"
    )
    raise DataError(f"{name}: no room for the contrast prompts", [problem])


def scored_rows(row: Mapping[str, Any], layout: PassLayout) -> list[ScoredRow]:
    """The rows that score the 2K sequences of one candidate row.

    Args:
        row: A candidate row with contrast prompts.
        layout: ``packed`` takes the cheapest grouping: the sequences of each completion, those of each prompt,
            all together, or each alone; ``padded`` the last.
    """
    sequences = _sequences(row)
    every, count = range(len(sequences)), len(sequences) // 2
    alone = [_share(sequences, range(i, i + 1)) for i in every]
    if layout.layout == "padded":
        return alone
    # A completion's two sequences are k and K + k.
    groupings = [[range(k, len(sequences), count) for k in range(count)], [every[:count], every[count:]], [every]]
    plans = [[_share(sequences, members) for members in grouping] for grouping in groupings]
    possible = [plan for plan in plans if all(scored.prompt_ids for scored in plan)]
    return min([*possible, alone], key=layout.cost)


def _share(sequences: Sequence[tuple[list[int], list[int]]], members: range) -> ScoredRow:
    prompts = [sequences[i][0] for i in members]
    shared = list(os.path.commonprefix(prompts))
    rests = [prompt[len(shared) :] + sequences[i][1] for prompt, i in zip(prompts, members, strict=True)]
    return ScoredRow(shared, rests, list(members))


def _sequences(row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every completion under its better prompt, then of every one under its worse one."""
    prompts = [*row["better_prompt_ids"], *row["worse_prompt_ids"]]
    return list(zip(prompts, [*row["completion_ids"], *row["completion_ids"]], strict=True))


def _score_sequences(rows: Dataset, layout: PassLayout, score: Score, title: str) -> reference.Scores:
    """Per row and sequence the log-probs of the completion's tokens, nats."""
    planned = [(i, scored) for i, row in enumerate(rows) for scored in scored_rows(row, layout)]
    table = Dataset.from_list([scored.candidate_row() for _, scored in planned])
    lengths = [[len(completion) for completion in row] for row in rows["completion_ids"]]
    results: reference.Scores = [[[] for _ in range(2 * len(row))] for row in lengths]
    for (i, scored), branches in zip(planned, score(table, title), strict=True):
        for member, logps in zip(scored.members, branches, strict=True):
            results[i][member] = logps[-lengths[i][member % len(lengths[i])] :]
    return results


def _fingerprint(rows: Dataset) -> str:
    """Hash of the ids of exactly the sequences scored, however they are packed."""
    flat = ([ids for sequence in _sequences(row) for ids in sequence] for row in rows)
    return reference.token_ids_fingerprint({"prompt_ids": [], "completion_ids": ids} for ids in flat)
