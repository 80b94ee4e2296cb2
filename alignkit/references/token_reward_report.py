"""What token rewards are like: a few figures, a warning when they are noise, and a heat map to look at.

The gap is the mean reward of the chosen tokens (candidates with the row's highest score) minus that of the rejected
ones (all others), averaged over rows. A reference that can tell better from worse gives a gap above 0.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.plain_text import visible
from alignkit.reports.estimates import row_sums
from alignkit.storage.durability import write_whole

MIN_SPREAD = 1e-3
"""Standard deviation below which the rewards say nothing whatever their gap."""
MAX_REWARD = 0.5
"""Largest magnitude of sigma(d) - 1/2."""
NUM_SHOWN = 6
PROMPT_SHOWN = 1500
"""Characters of a prompt in the heat map, its end."""


@dataclass(frozen=True)
class TokenRewardReport:
    """Token rewards in figures; those that a reference gives lie in [-1/2, 1/2].

    Attributes:
        num_rows, num_tokens: What they are over.
        mean, std: Over all tokens.
        share_positive: Share of tokens with a reward above 0.
        gap: Mean of chosen tokens minus mean of rejected tokens, averaged over rows.
        gap_standard_error: Its standard error over rows, None for a single row.
        largest: Largest magnitude.
    """

    num_rows: int
    num_tokens: int
    mean: float
    std: float
    share_positive: float
    gap: float
    gap_standard_error: float | None
    largest: float

    @property
    def warning(self) -> str | None:
        """What is wrong with these rewards, or None."""
        return "; ".join(self._warnings()) or None

    def _warnings(self) -> list[str]:
        return [problem for problem in (self._noise(), self._excess()) if problem is not None]

    def _excess(self) -> str | None:
        if self.largest <= MAX_REWARD:
            return None
        return (
            f"the largest token reward is {self.largest:.3g} in magnitude, and they are defined in (-1/2, 1/2): where "
            "alpha times it exceeds 1, a token is pushed the wrong way. Divide all of them by one number"
        )

    def _noise(self) -> str | None:
        if self.std < MIN_SPREAD:
            cause = f"all token rewards are nearly the same (standard deviation {self.std:.2g})"
        elif self.gap_standard_error is None or abs(self.gap) < 2 * self.gap_standard_error:
            cause = "chosen and rejected tokens get the same reward, within two standard errors"
        elif self.gap < 0:
            cause = "rejected tokens get a higher reward than chosen ones"
        else:
            return None
        advice = "take a stronger reference, other templates, or a method without token rewards"
        return f"{cause}: the reference does not tell better from worse on these rows; {advice}"

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, with the warning."""
        return {**asdict(self), "warning": self.warning}

    def __str__(self) -> str:
        error = "" if self.gap_standard_error is None else f" ± {1.96 * self.gap_standard_error:.4f}"
        lines = [
            f"token rewards of {self.num_tokens} tokens in {self.num_rows} rows: mean {self.mean:+.4f}, "
            f"standard deviation {self.std:.4f}, {self.share_positive:.1%} positive",
            f"  chosen minus rejected {self.gap:+.4f}{error} (1.96 standard errors over rows)",
        ]
        return "\n".join(lines + [f"  warning: {problem}" for problem in self._warnings()])


def token_reward_report(rows: Iterable[Mapping[str, Any]]) -> TokenRewardReport:
    """Describe token rewards.

    Args:
        rows: Candidate rows with ``token_rewards`` [K][tokens] and ``scores`` [K]; at least one token.
    """
    gaps, sums, squares, positive, count, largest = [], [], [], 0, 0, 0.0
    for row in rows:
        best = max(row["scores"])
        sides: dict[bool, list[float]] = {True: [], False: []}
        for score, rewards in zip(row["scores"], row["token_rewards"], strict=True):
            sides[score == best] += rewards
        values = sides[True] + sides[False]
        if sides[True] and sides[False]:
            gaps.append((math.fsum(sides[True]) / len(sides[True]) - math.fsum(sides[False]) / len(sides[False]), 1.0))
        sums.append(math.fsum(values))
        squares.append(math.fsum(value * value for value in values))
        positive += sum(value > 0 for value in values)
        largest = max(largest, max(map(abs, values), default=0.0))
        count += len(values)
    mean = math.fsum(sums) / count
    spread = math.sqrt(max(math.fsum(squares) / count - mean * mean, 0.0))
    gap = row_sums(gaps).estimate()
    return TokenRewardReport(
        num_rows=len(sums),
        num_tokens=count,
        mean=mean,
        std=spread,
        share_positive=positive / count,
        gap=0.0 if gap is None else gap.mean,
        gap_standard_error=None if gap is None else gap.standard_error,
        largest=largest,
    )


def write_heatmap(
    path: Path, rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, num_rows: int = NUM_SHOWN
) -> None:
    """Write a page that shows the tokens of a few rows coloured by their reward, chosen and rejected side by side.

    The page holds everything it needs. Blue is above 0, red below; the colours are full at the largest reward shown.

    Args:
        path: The HTML file.
        rows: Candidate rows with ``token_rewards``.
        tokenizer: The tokenizer they were made with.
        num_rows: How many of the first rows to show.
    """
    shown = list(islice(rows, num_rows))
    scale = max((abs(x) for row in shown for rewards in row["token_rewards"] for x in rewards), default=0.0) or 1.0
    legend = "".join(_span(f"{share * scale:+.3f}", [share * scale], scale) for share in (-1, -0.5, 0, 0.5, 1))
    body = "\n".join(_section(number, row, tokenizer, scale) for number, row in enumerate(shown, 1))
    write_whole(path, _PAGE.format(legend=legend, body=body))


def _section(number: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, scale: float) -> str:
    prompt = tokenizer.decode(row["prompt_ids"])
    cut = prompt if len(prompt) <= PROMPT_SHOWN else f"... {prompt[-PROMPT_SHOWN:]}"
    is_pair = list(row["scores"]) == [1.0, 0.0]
    labels = ["chosen", "rejected"] if is_pair else [f"score {score:g}" for score in row["scores"]]
    cells = []
    for label, ids, rewards in zip(labels, row["completion_ids"], row["token_rewards"], strict=True):
        tokens = "".join(_span(text, values, scale) for text, values in _pieces(ids, rewards, tokenizer))
        mean = math.fsum(rewards) / len(rewards)
        cells.append(f"<div><h3>{html.escape(label)}, mean {mean:+.4f}</h3><p>{tokens}</p></div>")
    return f'<h2>Row {number}</h2><pre>{html.escape(visible(cut))}</pre><div class="row">{"".join(cells)}</div>'


def _pieces(
    ids: Sequence[int], rewards: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[str, list[float]]]:
    """Text and rewards of each token; tokens that are only together a character are one piece.

    A token is decoded with the piece before it, for some tokenizers write a space only between tokens.
    """
    before: list[int] = []
    piece: list[int] = []
    values: list[float] = []
    for position, (token, reward) in enumerate(zip(ids, rewards, strict=True)):
        piece.append(token)
        values.append(reward)
        text = tokenizer.decode(before + piece)[len(tokenizer.decode(before)) :]
        if text.endswith("\ufffd") and position + 1 < len(ids):
            continue
        yield text, values
        before, piece, values = piece, [], []


def _span(text: str, values: Sequence[float], scale: float) -> str:
    """One piece in its colour; the text stays dark on it, for the strongest colour is still a light one."""
    mean = math.fsum(values) / len(values)
    colour = "37,99,235" if mean > 0 else "220,38,38"
    title = ", ".join(f"{value:+.4f}" for value in values)
    shown = html.escape(visible(text)).replace("\n", "↵\n")
    return f'<span title="{title}" style="background:rgba({colour},{0.6 * abs(mean) / scale:.3f})">{shown}</span>'


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Token rewards</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; color: #111; background: #fff; margin: 2rem auto; max-width: 90rem;
  padding: 0 1rem; }}
pre {{ white-space: pre-wrap; background: #f4f4f5; padding: .7rem; }}
.row {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.5rem; }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }}
span {{ padding: .1em 0; border-radius: .15em; }}
h2 {{ margin-top: 2.5rem; }} h3 {{ margin: .3rem 0; }}
</style></head><body>
<h1>Token rewards</h1>
<p>Blue tokens are likelier when a better response is asked for, red ones when a worse one is. Point at a token to read
its reward. Colours: {legend}</p>
{body}
</body></html>
"""
