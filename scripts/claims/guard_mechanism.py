"""The mechanism of GRPO-Guard-style clipping, on ratios drawn from known distributions: no training, seconds.

Every token has logits z of its own, of a spread that makes it certain or not, and a policy that has moved them by a
little noise. Three facts, and what the guard makes of each:

1. Of a token, the ratio has the mean 1 exactly; its logarithm has the mean -KL and about the variance 2 KL.
2. Of a completion, the geometric mean of the ratios (GSPO) has a mean below 1, so that completions better than
   expected are hardly clipped and others are; and its spread falls with the length: short ones are clipped most.
3. Of tokens, the spread of the log-ratio follows the entropy, by sqrt(1 - sum p^2).

    python scripts/claims/guard_mechanism.py
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignkit.losses.grpo import grpo_loss, log_ratios
from alignkit.losses.grpo_guard import Guard, grpo_guard_loss, normalization
from alignkit.losses.types import LossOutput, PolicyBatch
from pages import origin, replace_section, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "grpo_guard.md"
VOCABULARY, MOVED = 16, 0.2
"""V, and the standard deviation of what is added to logits."""
SHARPNESS = (6.0, 2.0, 0.7)
"""Standard deviations of logits: certain, in between, open."""
LENGTHS = (8, 16, 32, 64)
SEQUENCE_CLIP, TOKEN_CLIP = 0.03, 0.2
SEQUENCE_GUARD = Guard("length", 1, "sqrt_length", "logmean")
"""The defaults at level sequence, and the band of FSPO."""
TOKEN_GUARD = Guard("entropy", 3)


@dataclass(frozen=True)
class Drawn:
    """Tokens in completions, drawn from the old policy.

    Attributes:
        batch: With advantages of either sign that have nothing to do with the ratios.
        kinds: Index into ``SHARPNESS`` of every token.
        mean_ratio: Exact mean of the ratio of every token, over what could have been drawn.
        kl: Exact KL(pi_old || pi) of every token, nats.
        log_variance: Exact variance of the log-ratio of every token.
    """

    batch: PolicyBatch
    kinds: Tensor
    mean_ratio: Tensor
    kl: Tensor
    log_variance: Tensor


def draw(seed: int, count: int = 8000) -> Drawn:
    """Completions of the lengths of ``LENGTHS``, equally many of each."""
    gen = torch.Generator().manual_seed(seed)
    shape = (count, max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS).repeat(count // len(LENGTHS))[:, None]
    kinds = torch.randint(len(SHARPNESS), shape, generator=gen)
    scale = torch.tensor(SHARPNESS)[kinds]
    old = (torch.randn(*shape, VOCABULARY, generator=gen) * scale[..., None]).log_softmax(-1)
    new = (old + MOVED * torch.randn(*shape, VOCABULARY, generator=gen)).log_softmax(-1)
    probs, gap = old.exp(), new - old
    tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=gen).view(*shape, 1)
    mean = (probs * gap).sum(-1)
    batch = PolicyBatch(
        policy_token_logps=new.gather(-1, tokens)[..., 0],
        completion_mask=mask,
        advantages=torch.randint(2, (count,), generator=gen) * 2.0 - 1.0,
        max_completion_length=shape[1],
        old_token_logps=old.gather(-1, tokens)[..., 0],
        old_entropies=-(probs * old).sum(-1),
        old_sum_sq_probs=probs.square().sum(-1),
    )
    return Drawn(batch, kinds, (probs * gap.exp()).sum(-1), -mean, (probs * (gap - mean[..., None]).square()).sum(-1))


def token_facts(drawn: Drawn) -> dict[str, float]:
    """Largest distance of a token's mean ratio from 1; and twice the divergence over the variance, on average."""
    mask = drawn.batch.completion_mask
    return {
        "largest |E r - 1|": (drawn.mean_ratio - 1)[mask].abs().max().item(),
        "2 KL / Var log r": (2 * drawn.kl[mask].mean() / drawn.log_variance[mask].mean()).item(),
    }


def clip_rates(output: LossOutput, drawn: Drawn, groups: Tensor) -> dict[str, list[float]]:
    """Share of better and of worse completions that are clipped, and of all by group.

    Args:
        output: Of a loss at level sequence.
        drawn: Its batch.
        groups: A group of every completion, from 0.
    """
    better = drawn.batch.advantages > 0
    high, low = (output.metrics[f"clip_ratio/{side}_mean"].values for side in ("high", "low"))
    either = output.metrics["clip_ratio/region_mean"].values
    return {
        "sides": [high[better].mean().item(), low[~better].mean().item()],
        "groups": [either[groups == g].mean().item() for g in range(int(groups.max()) + 1)],
    }


def sequences(drawn: Drawn) -> dict[str, dict[str, object]]:
    """Ratios and clipping at level sequence, with and without the guard."""
    lengths = drawn.batch.completion_mask.sum(-1)
    groups = torch.tensor([LENGTHS.index(int(n)) for n in lengths])
    bounds = {"level": "sequence", "epsilon_low": SEQUENCE_CLIP, "epsilon_high": SEQUENCE_CLIP}
    plain = log_ratios(drawn.batch, "sequence")
    found = normalization(drawn.batch, plain, "sequence", SEQUENCE_GUARD)
    guarded = found.kappa * plain + found.offset
    losses: dict[str, tuple[Tensor, LossOutput]] = {
        "plain": (plain, grpo_loss(drawn.batch, **bounds)),
        "guard": (guarded, grpo_guard_loss(drawn.batch, guard=SEQUENCE_GUARD, **bounds)),
    }
    return {
        name: {
            "mean ratio": log_ratio.exp().mean().item(),
            "above 1": (log_ratio > 0).float().mean().item(),
            **clip_rates(output, drawn, groups),
        }
        for name, (log_ratio, output) in losses.items()
    }


def tokens(drawn: Drawn) -> dict[str, dict[str, list[float]]]:
    """Spread of the log-ratio and share outside the clip, by kind of token; plain, by certainty, and pooled."""
    mask, plain = drawn.batch.completion_mask, log_ratios(drawn.batch, "token")

    def by_kind(values: Tensor, function: Callable[[Tensor], Tensor]) -> list[float]:
        return [function(values[mask & (drawn.kinds == k)]).item() for k in range(len(SHARPNESS))]

    results = {}
    for name, guard in {
        "plain": None,
        "fisher": dataclasses.replace(TOKEN_GUARD, scale="fisher", num_steps=1),
        "pooled": TOKEN_GUARD,
    }.items():
        values = plain
        if guard is not None:
            found = normalization(drawn.batch, plain, "token", guard)
            values = found.kappa * plain + found.offset
        outside = ((values.exp() - 1).abs() > TOKEN_CLIP).float()
        results[name] = {"spread": by_kind(values, torch.std), "outside": by_kind(outside, torch.mean)}
    return results


def ratio(values: list[float]) -> float:
    """Largest over least."""
    return max(values) / min(values) if min(values) > 0 else math.inf


def page(drawn: Drawn) -> str:
    """The section of the page."""
    facts, of_sequences, of_tokens = token_facts(drawn), sequences(drawn), tokens(drawn)

    def joined(values: list[float], digits: int = 3) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    rows = [
        [
            name,
            f"{found['mean ratio']:.4f}",
            f"{found['above 1']:.2f}",
            joined(found["sides"]),
            joined(found["groups"]),
            f"{ratio(found['groups']):.2f}",
        ]
        for name, found in of_sequences.items()
    ]
    token_rows = [
        [name, joined(found["spread"]), joined(found["outside"]), f"{ratio(found['spread']):.2f}"]
        for name, found in of_tokens.items()
    ]
    return "\n\n".join(
        [
            f"A token's ratio has the mean 1 (largest distance {facts['largest |E r - 1|']:.0e}), and 2 KL is "
            f"{facts['2 KL / Var log r']:.2f} times the variance\nof its logarithm: the mean below 1 that GRPO-Guard "
            "corrects does not exist for tokens. All of this is of ratios\ndrawn at random: it shows what the guard "
            "does to clipping, not that a model is the better for it.",
            f"Level sequence, epsilon {SEQUENCE_CLIP}; completions of {', '.join(map(str, LENGTHS))} tokens:",
            table(
                ["", "mean ratio", "above 1", "clipped: better / worse", "clipped by length", "most over least"], rows
            ),
            f"Level token, epsilon {TOKEN_CLIP}; tokens that the old policy is certain of, less so, and not:",
            table(["", "spread of the log-ratio", "outside the clip", "largest over least spread"], token_rows),
        ]
    )


HEADER = """\
# GRPO-Guard-style clipping: what was measured

The form for language models is an analogue; no other is published.
"""


def main() -> None:
    """Draw, measure, and write the section."""
    start = time.perf_counter()
    text = page(draw(seed=0))
    found = origin("scripts/claims/guard_mechanism.py", time.perf_counter() - start)
    replace_section(PAGE, "Mechanism", f"{text}\n\n{found}", HEADER)
    print(text)


if __name__ == "__main__":
    main()
