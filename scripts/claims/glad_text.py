"""The sections of the page on ``glad``: set-up and tables of each study."""

from __future__ import annotations

from typing import Any

import glad_study as study
from glad_adapt import Budget
from glad_domains import NOISE, SHIFT
from glad_gsm8k import RealBudget
from glad_study import Choice, Runs

READING = """\
*Best* is the checkpoint with the lowest validation loss, the one before training included; the choice sees no test row.
*Final* is the last. Losses are means over the tokens of a set, in nats; differences are paired by seed, and below 0 is
better. Figures are means with Student's 95 % intervals over seeds; nothing is corrected for multiple comparisons.\
"""

TOY = """\
## A new Markov domain

{origin}

A causal language model (2 layers, width 64, vocabulary 64) is pretrained on four Markov domains and then adapted to a
fifth by LoRA (r = 8 on every linear layer, 12 layers, alpha 16) from 48 sequences of 24 tokens, {noise:.0%} of the
tokens replaced at random. The domains share features of the tokens; each has a core of its own. Each run takes {steps}
AdamW steps of {batch_size} sequences at a constant {learning_rate:g}, no weight decay, a checkpoint every
{measure_every} steps. Tests are without noise: 128 sequences of the new domain (*in domain*), of a domain near it
(*out of domain*; its core is the new one plus {shift:g} of another, scaled back), and of the four old ones. Validation
is 96 more noisy sequences. {seeds} seeds, each with its own new domain, sequences, adapters and batches, the same for
all arms; the pretrained model is one. The rules are those of `alignkit.gradients` with their default options but for
rho.

One seed more decided what was left open, by its lowest validation loss:
{tuning}.
So rho is {rho:g} for `glad`, for `sam` and for the control `random_perturbation`, and "the tuned rate" is x {rate:g}.
The *sharpness gap* is the growth of the loss on all 48 sequences when the adapters move by {gap_rho:g} along its
gradient; it is the same measurement in every arm.

{reading}

![Losses over steps](glad.png)

### Claims on Markov domains

{claims}

### Figures on Markov domains

{best}

{final}

{diagnostics}
"""

REAL = """\
## A few GSM8K solutions, a small trained model

{origin}

The model is `gsm-tiny` (2.8 M parameters), trained on GSM8K's *training* questions four times over: adapting it to a
few of those would be no adaptation. It is tuned instead on {train_rows} correct solutions that other models wrote for
*test* questions, which it has not seen and which end in `A: 18` where it knows `#### 18`. *In domain* are such
solutions of {test_rows} other test questions; *old domain* the reference solutions, in the old format, of the same
{test_rows}; *out of domain* the best answers of {test_rows} TruthfulQA questions. Validation is another {test_rows}
solutions. No question is in two of the sets but in domain and old domain. Only likelihoods are reported: after
training on solutions of its test questions, accuracy on GSM8K would mean nothing.

`SupervisedTrainer`, LoRA r = 8 (alpha 16, every linear layer), completion-only loss, float32; {steps} AdamW steps of
{batch_size} rows of at most {max_length} tokens at a constant {learning_rate:g} ({passes:.1f} passes), measured every
{measure_every}. {seeds} seeds, shared by all arms. One seed more decided by its lowest validation loss:
{tuning}.
So rho is {rho:g} and "the tuned rate" x {rate:g}.

{reading}

![Losses over steps](glad_gsm8k.png)

### Claims on GSM8K solutions

{claims}

### Figures on GSM8K solutions

{best}

{final}

{diagnostics}
"""


def _common(runs: Runs, choice: Choice, origin: str) -> dict[str, Any]:
    return {
        "origin": origin,
        "reading": READING,
        "seeds": len(next(iter(runs.values()))),
        "tuning": ", ".join(f"{name} {loss:.3f}" for name, loss in choice.losses.items()),
        "rho": choice.rho,
        "rate": choice.rate_factor,
        "claims": study.claim_table(runs, choice),
        "best": study.change_table(runs, final=False),
        "final": study.change_table(runs, final=True),
    }


def toy_text(runs: Runs, choice: Choice, budget: Budget, origin: str) -> str:
    """The section of the study on Markov domains."""
    diagnostics = study.diagnostics_table(runs, has_gap=True)
    return TOY.format(
        noise=NOISE, shift=SHIFT, diagnostics=diagnostics, **_common(runs, choice, origin), **vars(budget)
    )


def real_text(runs: Runs, choice: Choice, budget: RealBudget, origin: str) -> str:
    """The section of the study on GSM8K solutions."""
    diagnostics = study.diagnostics_table(runs, has_gap=False)
    passes = budget.steps * budget.batch_size / budget.train_rows
    return REAL.format(diagnostics=diagnostics, passes=passes, **_common(runs, choice, origin), **vars(budget))
