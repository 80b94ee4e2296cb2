"""Claim experiment for GRPO-Guard (arXiv 2510.22319), in its analogue: does the mechanism show while a policy learns?

    python scripts/claims/guard_policy.py

trains a small policy with plain and with guarded clipping, and writes its section of grpo_guard.md in the output
directory. Drawn ratios without training are in guard_mechanism.py. About a minute of processor time; finished runs are
kept.

The mechanism claimed, of ratios of whole completions (geometric mean over tokens, as in GSPO), after six updates on the
same words:

1. Plain ratios have a mean below 1, and normalised ones a mean nearer to 1.
2. So plain clipping meets completions with a negative advantage more often than those with a positive one; the guard
   lessens that imbalance.
3. Plain clipping meets short completions more often than long ones: the highest clip rate of three length bins is more
   than 1.2 times the lowest. Under the guard it is less than 1.2 times.
4. At token level, where E r = 1 anyway and all positions of this task have like entropies, nothing of this happens; the
   figures are reported, and no claim is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from alignkit.losses.grpo import log_ratios
from alignkit.losses.grpo_guard import Guard, normalization, normalized_ratio
from alignkit.losses.types import PolicyBatch
from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from guard_mechanism import HEADER, PAGE
from guard_toy import Clipping, Rollout, Schedule, train
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import timed, total_seconds, values

BINS = 3
POOLED = Guard(step_axis="length", num_steps=4, scale="pooled", center="logmean", mode="full", min_count=16)
POOLED_GATE = Guard(step_axis="length", num_steps=4, scale="pooled", center="logmean", mode="gate", min_count=16)
DEFAULT = Guard(step_axis="length", num_steps=1, scale="sqrt_length", center="logmean", mode="gate", min_count=16)
"""What ``grpo_guard`` takes at level ``sequence`` where nothing else is asked for."""
ARMS: Mapping[str, Clipping] = {
    "GSPO": Clipping("sequence", 0.02),
    "guard, pooled, full": Clipping("sequence", 0.02, POOLED),
    "guard, pooled, gate": Clipping("sequence", 0.02, POOLED_GATE),
    "guard, sqrt_length, gate": Clipping("sequence", 0.02, DEFAULT),
    "GRPO, tokens": Clipping("token", 0.2),
    "guard, tokens": Clipping("token", 0.2, Guard()),
}
Runs = Mapping[str, Sequence[Mapping[str, float]]]
"""The figures of each arm, one set a seed; seed s of all arms has the same policy and prompts at the start."""


def share_of_one_letter(rollout: Rollout) -> Tensor:
    """The reward: share of the first letter among what was written [B]."""
    written = rollout.words[:, 1:]
    return ((written == 0) & rollout.mask).sum(-1) / rollout.mask.sum(-1)


def ratios(batch: PolicyBatch, clipping: Clipping) -> Tensor:
    """The ratios that clipping looks at [B, T], or [B, 1] at level ``sequence``.

    Args:
        batch: Of any policy, trained by whatever.
        clipping: Whose ratios.
    """
    log_ratio = log_ratios(batch, clipping.level)
    if clipping.guard is None:
        return log_ratio.exp()
    found = normalization(batch, log_ratio, clipping.level, clipping.guard)
    return normalized_ratio(log_ratio, found.kappa, found.offset)


def clip_figures(batches: Sequence[PolicyBatch], clipping: Clipping) -> dict[str, float]:
    """Mean ratio, how often clipping meets either sign of the advantage, and how often each of three length bins.

    The bins hold a third of all completions each, over all batches; the guard's own are of one batch and are four.

    Args:
        batches: After the last update on their words.
        clipping: Whose ratios and bounds.
    """
    rows = [counted(batch, clipping) for batch in batches]
    ratio, advantage, length = (torch.cat(part) for part in zip(*rows, strict=True))
    is_above, is_below = ratio > 1 + clipping.epsilon, ratio < 1 - clipping.epsilon
    is_clipped = ((is_above & (advantage > 0)) | (is_below & (advantage < 0))).double()
    # By rank, so that no bin is empty where many words are as long as words can be.
    bins = torch.empty(len(length), dtype=torch.long)
    bins[length.argsort(stable=True)] = torch.arange(len(length)) * BINS // len(length)
    by_length = [float(is_clipped[bins == k].mean()) for k in range(BINS)]
    above = float(is_above[advantage > 0].double().mean())
    below = float(is_below[advantage < 0].double().mean())
    return {
        "mean ratio": float(ratio.mean()),
        "positive above": above,
        "negative below": below,
        "imbalance": below - above,
        **{f"clipped, bin {k}": share for k, share in enumerate(by_length)},
        "largest / smallest": max(by_length) / min(by_length),
    }


def counted(batch: PolicyBatch, clipping: Clipping) -> tuple[Tensor, Tensor, Tensor]:
    """Ratio, advantage and length of every row that is written.

    Args:
        batch: Words.
        clipping: Whose ratios; its level says what a row is.
    """
    ratio = ratios(batch, clipping).double()
    mask = batch.completion_mask if ratio.shape[-1] > 1 else batch.completion_mask.any(-1, keepdim=True)
    lengths = batch.completion_mask.sum(-1, keepdim=True).double()
    advantages = batch.advantages.unsqueeze(-1)
    return ratio[mask], advantages.expand_as(ratio)[mask], lengths.expand_as(ratio)[mask]


def run(clipping: Clipping, schedule: Schedule, seed: int) -> dict[str, float]:
    """Train once, and look at the ratios after the last update on the words of each rollout.

    Args:
        clipping: How steps are bounded.
        schedule: How many there are.
        seed: Of the run.
    """
    trace = train(clipping, schedule, seed, {"reward": share_of_one_letter}, keeps_batches=True)
    return {**clip_figures(trace.batches, clipping), "reward at the end": trace.rewards["reward"][-1]}


def run_all(num_seeds: int, schedule: Schedule, kept: Path) -> dict[str, list[dict[str, float]]]:
    """Every arm from every seed, with the processor time of each run."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tqdm(total=num_seeds * len(ARMS), desc="mechanism", unit="run") as progress:
        for seed in range(num_seeds):
            for number, (name, clipping) in enumerate(ARMS.items()):
                settings = {"clipping": str(clipping), "seed": seed} | vars(schedule)
                where = kept / f"seed{seed}_{number}.json"
                runs[name].append(kept_run(where, settings, partial(timed, partial(run, clipping, schedule, seed))))
                progress.update()
    return runs


def claim_lines(runs: Runs) -> dict[str, list[str]]:
    """Each claim with its figure and verdict, for the guard at level ``sequence`` in its three forms."""
    plain = runs["GSPO"]
    claims = {"plain: the mean ratio is below 1 (figure: by how much)": 1 - values(plain, "mean ratio")}
    claims["plain: the clip rate differs between lengths by more than 1.2 x (figure: above 1.2)"] = (
        values(plain, "largest / smallest") - 1.2
    )
    for name in [name for name, clipping in ARMS.items() if clipping.guard and clipping.level == "sequence"]:
        own = runs[name]
        nearer = abs(1 - values(plain, "mean ratio")) - abs(1 - values(own, "mean ratio"))
        claims[f"{name}: the mean ratio is nearer to 1 than plain"] = nearer
        claims[f"{name}: less imbalance than plain"] = abs(values(plain, "imbalance")) - abs(values(own, "imbalance"))
        claims[f"{name}: the clip rate differs by less than 1.2 x (figure: below 1.2)"] = 1.2 - values(
            own, "largest / smallest"
        )
    return {text: [figure_text(found, 4), verdict(found, student_interval)] for text, found in claims.items()}


def figure_lines(runs: Runs) -> dict[str, list[str]]:
    """Each arm's figures."""
    keys = {"mean ratio": 4, "positive above": 3, "negative below": 3, "imbalance": 3}
    bins = [f"clipped, bin {k}" for k in range(BINS)]
    return {
        name: [figure_text(values(own, key), digits) for key, digits in keys.items()]
        + [", ".join(f"{values(own, key).mean():.3f}" for key in bins)]
        + [figure_text(values(own, key), 2) for key in ("largest / smallest", "reward at the end")]
        for name, own in runs.items()
    }


TEXT = """\
## The mechanism while a policy learns

{origin}

A small policy (recurrent, width 48, 11 letters and a stop token, words of up to 24 letters) that has learnt a
grammar without repeated letters and is rewarded for one letter's share: {rollouts} rollouts of 16 prompts x 16 words,
{epochs} updates on each, AdamW {learning_rate:g}, clip 0.02 at level sequence and 0.2 for tokens. Ratios are those
after the last update on their words, as each arm sees them (normalised ones under the guard), pooled over rollouts.
Losses are `alignkit.losses.grpo` and `grpo_guard` on batches built by the script; no trainer. {seeds} seeds, means with
Student's 95 % intervals; differences are paired by seed. `positive above` is the share of rows with a positive
advantage whose ratio is above 1 + eps, `negative below` that of the others below 1 - eps, `imbalance` the second less
the first. `guard, sqrt_length, gate` is what `grpo_guard` takes at level sequence by default.

{claims}

{figures}
"""


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (2 to 10)")
    parser.add_argument("--rollouts", type=int, default=10, help="rollouts of each run")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    torch.set_num_threads(1)
    schedule = Schedule(arguments.rollouts)
    runs = run_all(arguments.seeds, schedule, KEPT / "guard_policy")
    columns = ["mean ratio", "positive above", "negative below", "imbalance"]
    columns += ["clip rate: short, middle, long", "largest / smallest", "reward at the end"]
    text = TEXT.format(
        origin=origin("python scripts/claims/guard_policy.py", total_seconds(runs)),
        claims=table("claim", ["figure", "verdict"], claim_lines(runs)),
        figures=table("after the last update", columns, figure_lines(runs)),
        seeds=arguments.seeds,
        **vars(schedule),
    )
    write_section(arguments.output_dir / PAGE.name, HEADER, "policy", text)


if __name__ == "__main__":
    main()
