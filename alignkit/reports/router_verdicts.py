"""What can go wrong with the routers of a mixture of experts, read off its logs.

:mod:`alignkit.reports.verdicts` says how verdicts are made. What routers do at the start is the measure: some models
come with an expert that nearly every token goes to, or with experts that hardly any does.
"""

from __future__ import annotations

from statistics import median

from alignkit.reports.series import MIN_POINTS, RECENT, LoggedSeries, Verdict

ENTROPY, BUSIEST, DEAD, CHURN = "routing/entropy", "routing/busiest_expert", "routing/dead_experts", "routing/churn"
LOST_ENTROPY = 0.25
"""Share of the entropy at the start; below, a token is given to its experts with next to no alternative."""
ONE_EXPERT = 0.9
"""Share of the tokens of a layer that go to one and the same expert."""
GAINED = 0.2
"""What that share must have grown by: a model may have come near it by itself."""
DIED = 0.1
"""Share of the experts that tokens went to and no longer do; micro-batches of few tokens waver by less."""
HIGH_CHURN = 0.3
"""Share of the choices that differ: of two experts a token gets, more than every other token has lost one."""
LOST_ACCURACY = 0.02
"""Fall on held-out rows; they are the same at every evaluation."""
ACCURACIES = ("eval_mean_token_accuracy", "eval_rewards/accuracies")


def router_collapse(series: LoggedSeries) -> Verdict | None:
    """The routers have become certain of everything, or send every token of a layer to one expert."""
    evidence = _lost_entropy(series) or _one_expert(series)
    if evidence is None:
        return None
    return Verdict(
        "router_collapse",
        series.step,
        "the routers have collapsed",
        evidence,
        "tokens no longer differ in what they are routed to, so that most of the model's weights are out of use, and a "
        "router that is certain has hardly a gradient left that could bring it back",
        _gentler(series),
    )


def _lost_entropy(series: LoggedSeries) -> str | None:
    found = _start_and_now(series, ENTROPY)
    if found is None or not series.trend(ENTROPY).falls or found[1] > LOST_ENTROPY * found[0]:
        return None
    return f"{ENTROPY} fell from {found[0]:.3g} to {found[1]:.3g} nats a token"


def _one_expert(series: LoggedSeries) -> str | None:
    found = _start_and_now(series, BUSIEST)
    if found is None or found[1] < ONE_EXPERT or found[1] - found[0] < GAINED:
        return None
    return f"{BUSIEST} rose from {found[0]:.3g} to {found[1]:.3g}: that share of a layer's tokens goes to one expert"


def experts_died(series: LoggedSeries) -> Verdict | None:
    """Experts that were in use at the start get no token any more."""
    found = _start_and_now(series, DEAD)
    if found is None or found[1] - found[0] < DIED:
        return None
    return Verdict(
        "experts_died",
        series.step,
        "experts that were in use get no tokens any more",
        f"{DEAD} rose from {found[0]:.3g} to {found[1]:.3g} of the experts (medians of {RECENT} logs)",
        "what these experts know is lost to the model, and as they answer nothing, no gradient tells the router to ask "
        "them again",
        ("dense_mixer: true    # lets routers learn from experts they do not choose", *_gentler(series)),
    )


def harmful_churn(series: LoggedSeries) -> Verdict | None:
    """Many tokens are routed otherwise than before training, and held-out rows are the worse for it."""
    churn = series.recent(CHURN)
    if not series.is_evaluation or len(series.window(CHURN)) < RECENT or churn is None or churn < HIGH_CHURN:
        return None
    for key in ACCURACIES:
        values = series.all(key)
        if len(values) >= 2 and max(values) - values[-1] >= LOST_ACCURACY:
            best = series.steps(key)[values.index(max(values))]
            return Verdict(
                "harmful_churn",
                series.step,
                "tokens are routed anew, and held-out rows suffer",
                f"{CHURN} is {churn:.3g} (median of {RECENT} logs), {key} fell from {max(values):.3g} at step {best} "
                f"to {values[-1]:.3g}",
                "experts were trained on the tokens that the old routers sent them; others they answer badly",
                _gentler(series),
            )
    return None


ROUTER_CHECKS = (router_collapse, experts_died, harmful_churn)


def _start_and_now(series: LoggedSeries, key: str) -> tuple[float, float] | None:
    """Medians of the first and of the latest ``RECENT`` logs of all; None as long as there are few."""
    values = series.all(key)
    if len(values) < MIN_POINTS:
        return None
    return median(values[:RECENT]), median(values[-RECENT:])


def _gentler(series: LoggedSeries) -> tuple[str, ...]:
    settings = series.settings
    rate, layers, pull = (settings.get(key) for key in ("learning_rate", "router_layers", "manifold_coef"))
    return (
        f"learning_rate: {'...' if rate is None else f'{rate / 3:.1g}'}   # slower",
        f"router_layers: {'...' if layers is None else max(layers // 2, 1)}   # fewer routers",
        *(() if pull is None else (f"manifold_coef: {pull / 3:.2g}   # a weaker pull to the neighbours",)),
        "router_aux_loss_coef: 0.001   # a price on uneven loads",
    )
