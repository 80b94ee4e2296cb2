"""Claim experiment for GRPO-Guard (arXiv 2510.22319), in its analogue: is the gold reward higher at the same proxy?

    python scripts/claims/guard_outcome.py

trains the small policy of guard_toy.py on a proxy that can be had honestly or by a shortcut, with plain and with
guarded clipping, and writes its section of grpo_guard.md in the output directory. Some minutes of processor time;
finished runs are kept.

The task. Three of eleven letters are targets. With t the share of targets and r the share of letters that repeat the
one before, gold = t - 1.5 r, and proxy = min(1, t + 0.5 r): the proxy mistakes a repeat for half a target. A word that
goes through the targets in turn has proxy 1 and gold 1, so both can be high together; a word of one target letter has
proxy 1 and gold near -0.5. The policy starts from a grammar in which a letter repeats with the chance 0.1.

Written down before any run with a guard was made on this task. Plain clipping at level sequence had been run with the
seeds 100 and 101, to see that it reaches a proxy of .95 within 20 rollouts, and that its gold first rises and then
falls while the proxy goes on rising; a simpler task without the shortcut had been dropped because gold followed the
proxy.

- Primary: gold at the first rollout, linearly interpolated, at which the proxy reaches 0.85, level sequence, the guard
  with pooled scale in mode full less plain GSPO, paired by seed, 8 seeds, Student's 95 % interval. The paper's claim is
  that this is positive. Holds, reversed or not shown: reported as it is.
- Secondary, without correction for their number: the same at 0.6 and 0.95; for the two other guards at level sequence;
  for tokens (clip 0.2); and the repeats at 0.85.
- Beside it, so that a difference in speed is seen: rollouts until 0.85, and proxy and gold after the last rollout.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from guard_mechanism import HEADER, PAGE
from guard_policy import ARMS
from guard_toy import STOP, Clipping, Rollout, Schedule, train
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import timed, total_seconds, values

TARGETS = 3
"""The first letters."""
BONUS, PENALTY = 0.5, 1.5
"""What a repeat is worth to the proxy, and costs the gold."""
LEVELS = (0.6, 0.85, 0.95)
PRIMARY = 0.85
PAIRS: Mapping[str, str] = {
    "guard, pooled, full": "GSPO",
    "guard, pooled, gate": "GSPO",
    "guard, sqrt_length, gate": "GSPO",
    "guard, tokens": "GRPO, tokens",
}
"""Each guard, and the plain clipping it is compared with."""
SCHEDULE = Schedule(rollouts=25, grammar_steps=150, repeats=0.1)
Runs = Mapping[str, Sequence[Mapping[str, float]]]


def shares(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Shares of targets, and of letters that repeat the one before, among the letters written; 0 of none [B]."""
    written, before = rollout.words[:, 1:], rollout.words[:, :-1]
    letters = rollout.mask & (written != STOP)
    count = letters.sum(-1).clamp(min=1)
    return ((written < TARGETS) & letters).sum(-1) / count, ((written == before) & letters).sum(-1) / count


def proxy(rollout: Rollout) -> Tensor:
    """What is trained on [B]."""
    targets, repeats = shares(rollout)
    return (targets + BONUS * repeats).clamp(max=1)


def gold(rollout: Rollout) -> Tensor:
    """What is meant [B]."""
    targets, repeats = shares(rollout)
    return targets - PENALTY * repeats


def repeats(rollout: Rollout) -> Tensor:
    """Share of letters that repeat the one before [B]."""
    return shares(rollout)[1]


def at_level(proxies: Sequence[float], followed: Sequence[float], level: float) -> float:
    """What the followed curve is where the proxy first reaches a level, both taken for linear between rollouts.

    Args:
        proxies: Mean proxy of each rollout.
        followed: Another figure of each rollout.
        level: One that is reached after the first rollout.

    Raises:
        ValueError: The level is not crossed.
    """
    reached = np.flatnonzero(np.asarray(proxies) >= level)
    if not len(reached) or reached[0] == 0:
        raise ValueError(f"the proxy, from {proxies[0]:.3f} to {max(proxies):.3f} at most, never crosses {level}")
    after = int(reached[0])
    way = (level - proxies[after - 1]) / (proxies[after] - proxies[after - 1])
    return float(followed[after - 1] + way * (followed[after] - followed[after - 1]))


def run(clipping: Clipping, schedule: Schedule, seed: int) -> dict[str, float]:
    """Train once on the proxy; what the gold was at each level, and at the end.

    Args:
        clipping: How steps are bounded.
        schedule: How many there are.
        seed: Of the run.
    """
    trace = train(clipping, schedule, seed, {"proxy": proxy, "gold": gold, "repeats": repeats}).rewards
    crossed = {
        f"{name} at {level}": at_level(trace["proxy"], trace[name], level)
        for name in ("gold", "repeats")
        for level in LEVELS
    }
    count = at_level(trace["proxy"], list(range(len(trace["proxy"]))), PRIMARY)
    return {
        **crossed,
        "rollouts": count,
        "best gold": max(trace["gold"]),
        **{f"{name} at the end": trace[name][-1] for name in ("proxy", "gold")},
    }


def run_all(num_seeds: int, schedule: Schedule, kept: Path) -> dict[str, list[dict[str, float]]]:
    """Every arm from every seed, with the processor time of each run."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tqdm(total=num_seeds * len(ARMS), desc="outcome", unit="run") as progress:
        for seed in range(num_seeds):
            for number, (name, clipping) in enumerate(ARMS.items()):
                settings = {"clipping": str(clipping), "seed": seed} | vars(schedule)
                where = kept / f"seed{seed}_{number}.json"
                runs[name].append(kept_run(where, settings, partial(timed, partial(run, clipping, schedule, seed))))
                progress.update()
    return runs


def claim_lines(runs: Runs) -> dict[str, list[str]]:
    """Each comparison at matched proxy, the primary one first."""
    first = next(iter(PAIRS))
    others = [(name, level) for name in PAIRS for level in LEVELS if (name, level) != (first, PRIMARY)]
    lines = {}
    for number, (name, level) in enumerate([(first, PRIMARY), *others]):
        key = f"gold at {level}"
        difference = values(runs[name], key) - values(runs[PAIRS[name]], key)
        text = f"{'**primary**' if number == 0 else 'secondary'}: {name} - {PAIRS[name]}, proxy {level}"
        lines[text] = [figure_text(difference), verdict(difference, student_interval)]
    return lines


def figure_lines(runs: Runs) -> dict[str, list[str]]:
    """Each arm's figures."""
    keys = [f"gold at {level}" for level in LEVELS]
    keys += [f"repeats at {PRIMARY}", "rollouts", "best gold", "proxy at the end", "gold at the end"]
    digits = {"rollouts": 2}
    return {name: [figure_text(values(own, key), digits.get(key, 3)) for key in keys] for name, own in runs.items()}


TEXT = """\
## The outcome: gold at matched proxy

{origin}

Is the gold reward higher at the same proxy? The task, the comparison and its verdict were written down in the script
before a guard was run on it. The small policy of the section before, from a grammar in which letters repeat with the
chance 0.1; three of eleven letters are targets, t their share, r the share of repeated letters: proxy = min(1, t +
0.5 r), gold = t - 1.5 r. Targets in turn have proxy 1 and gold 1, so that both can be had; the shortcut, repeats, has
the proxy alone. {rollouts} rollouts of 16 x 16 words, {epochs} updates on each, AdamW {learning_rate:g}; clip 0.02 at
level sequence, 0.2 for tokens. {seeds} seeds, means with Student's 95 % intervals; differences are paired by seed,
positive in favour of the guard, and not corrected for their number.

{claims}

{figures}
"""


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (2 to 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    torch.set_num_threads(1)
    runs = run_all(arguments.seeds, SCHEDULE, KEPT / "guard_outcome")
    columns = [f"gold at proxy {level}" for level in LEVELS]
    columns += [f"repeats at {PRIMARY}", f"rollouts until {PRIMARY}", "highest gold", "proxy, end", "gold, end"]
    text = TEXT.format(
        origin=origin("python scripts/claims/guard_outcome.py", total_seconds(runs)),
        claims=table("gold at matched proxy", ["difference", "verdict"], claim_lines(runs)),
        figures=table("each arm", columns, figure_lines(runs)),
        seeds=arguments.seeds,
        **vars(SCHEDULE),
    )
    write_section(arguments.output_dir / PAGE.name, HEADER, "outcome", text)


if __name__ == "__main__":
    main()
