"""What can go wrong in an online run, read off its logs; :mod:`alignkit.reports.verdicts` says how verdicts are made.

The loss of completions is relative to one another: it hovers around 0 whatever happens, so that no verdict here looks
at it.
"""

from __future__ import annotations

from statistics import median

from alignkit.reports.series import MIN_POINTS, RECENT, LoggedSeries, Verdict

NO_SPREAD = 0.9
"""Share of the completions without a signal; one prompt in ten is left to learn from."""
LONGER = 1.5
"""Growth of the completions that no prompt asks for by itself."""
GOES_WITH_LENGTH = 0.3
"""Correlation at which length explains a tenth of what rewards differ by."""
LOW_ENTROPY = 0.05
"""Nats a token: nearly every token is certain. A tuned model has 0.2 to 1."""
LOST_ENTROPY = 0.25
"""Share of the entropy at the start; below, completions of a prompt hardly differ."""
GAINED_ENTROPY = 1.0
"""Nats a token by which the next token has become less certain: e times as many choices."""
REUSED = 1e-6
"""Mean distance of the ratio from 1 beyond rounding: completions are trained on by other weights than drew them."""
INERT_STEPS = 50
"""Steps after which warm-up is over and a clip that is going to act has acted."""


def is_online(series: LoggedSeries) -> bool:
    """Whether completions are drawn and rewarded, in place of rows that are given."""
    return bool(series.all("reward")) and bool(series.all("frac_reward_zero_std"))


def no_spread(series: LoggedSeries) -> Verdict | None:
    """The completions of nearly every prompt are worth the same."""
    shares = series.window("frac_reward_zero_std")[-RECENT:]
    if len(shares) < RECENT or median(shares) < NO_SPREAD:
        return None
    reward = median(series.window("reward")[-RECENT:])
    return Verdict(
        "no_spread",
        series.step,
        "no reward has spread: the completions of a prompt are all worth the same",
        f"frac_reward_zero_std is {median(shares):.3g}, reward {reward:.4g} (medians of {RECENT} logs)",
        "advantages compare a prompt's completions with each other. Where all are worth the same they are 0, so that "
        "these prompts give no gradient and the weights rightly stay where they are: every prompt is too hard, too "
        "easy, or the reward does not see what differs",
        (
            "rewards: [...]        # one that gives partial credit; `alignkit rewards try` shows the spread of each",
            "data: ...             # prompts that are solved now and then, or a model that was tuned on such first",
            "num_generations: ...  # more completions find the rare success",
            "temperature: 1.0      # if it is lower",
        ),
    )


def length_hacking(series: LoggedSeries) -> Verdict | None:
    """Completions grow, and the longer ones of a prompt are the better rewarded."""
    key, goes_with = "completions/mean_length", series.window("completions/length_reward_correlation")
    if not (series.trend(key).rises and series.trend("reward").rises) or len(goes_with) < MIN_POINTS:
        return None
    first, last = series.ends(key)
    if last < LONGER * first or median(goes_with) < GOES_WITH_LENGTH:
        return None
    return Verdict(
        "length_hacking",
        series.step,
        "the reward is earned by length",
        f"{series.moved(key)} tokens while {series.moved('reward')} ({series.span(key)}); within a prompt length and "
        f"reward correlate by {median(goes_with):.2f}",
        "longer completions are the better rewarded ones, so the model writes longer ones. That may be what the task "
        "needs; it is also how a reward is exploited. Read rollouts.html before you believe the curve",
        (
            "rewards: [..., {name: soft_overlong, weight: ...}]  # a price on length",
            "loss_type: dr_grpo             # its gradient does not favour long wrong completions",
            "max_completion_length: ...     # what the task needs",
        ),
    )


def entropy_collapse(series: LoggedSeries) -> Verdict | None:
    """The model has become certain of nearly every token."""
    if not is_online(series) or len(series.window("entropy")) < MIN_POINTS:
        return None
    (first, last), found = (median(series.all("entropy")[:RECENT]), series.ends("entropy")[1]), series.trend("entropy")
    if last > LOW_ENTROPY and not (found.falls and last <= LOST_ENTROPY * first):
        return None
    if last >= first:
        return None  # it began there
    return Verdict(
        "entropy_collapse",
        series.step,
        "the model no longer explores",
        f"entropy fell from {first:.3g} to {last:.3g} nats a token",
        "the completions of a prompt become the same one; without differences there is nothing left to learn from",
        (
            "epsilon_high: 0.28    # lets unlikely tokens grow (DAPO)",
            "entropy_coef: 0.001   # a bonus on entropy",
            "temperature: 1.0      # if it is lower",
            _rate(series, 1 / 3, "slower"),
        ),
    )


def entropy_explosion(series: LoggedSeries) -> Verdict | None:
    """The model becomes less and less certain of what to write."""
    if not is_online(series) or not series.trend("entropy").rises:
        return None
    first, last = median(series.all("entropy")[:RECENT]), series.ends("entropy")[1]
    if last - first < GAINED_ENTROPY:
        return None
    return Verdict(
        "entropy_explosion",
        series.step,
        "the model writes more and more at random",
        f"entropy rose from {first:.3g} to {last:.3g} nats a token; {series.moved('reward')}",
        "steps are too large, or pushing down bad completions spreads likelihood over everything else",
        (
            _rate(series, 1 / 3, "smaller steps"),
            "entropy_coef: 0.0     # if there is a bonus on entropy",
            "beta: 0.01            # stay close to the reference",
        ),
    )


def inert_clip(series: LoggedSeries) -> Verdict | None:
    """Completions are reused, and the clip, or the guard before it, has never done anything."""
    clipped, step = series.all("clip_ratio/region_mean"), series.step
    if len(clipped) < MIN_POINTS or step < INERT_STEPS or any(clipped):
        return None
    spread = max(series.all("ratio/spread/position_4") or [0.0])
    has_guard = bool(series.all("grpo_guard/kappa"))
    if spread <= REUSED and not has_guard:
        return None  # strictly on-policy, as the run said when it began
    what = "the guard and the clip never act" if has_guard else "the clip never acts"
    why = (
        "every completion is trained on once, by the weights that drew it, so that all ratios are 1 and there is "
        "nothing to clip"
        if spread <= REUSED
        else "no ratio has come as far as the clip: it bounds nothing, and the run is one without it"
    )
    return Verdict(
        "inert_clip",
        step,
        what,
        f"clip_ratio/region_mean is 0 in all {len(clipped)} logs; tokens lie at most {spread:.2g} from ratio 1 on "
        "average (ratio/spread)",
        why,
        (
            "num_iterations: 2         # trains twice on what was drawn",
            "epsilon: 0.1              # a narrower clip, if ratios do move",
        ),
    )


POLICY_CHECKS = (no_spread, length_hacking, entropy_collapse, entropy_explosion, inert_clip)


def _rate(series: LoggedSeries, factor: float, why: str) -> str:
    rate = series.settings.get("learning_rate")
    return f"learning_rate: {'...' if rate is None else f'{rate * factor:.1g}'}   # {why}"
