"""Knowledge distillation: cross-entropy, and the KL from a teacher's next-token distributions."""

from __future__ import annotations

from dataclasses import replace

from alignkit.losses.sft import sft_loss
from alignkit.losses.types import LossOutput, LossTerm, Metric, TokenBatch


def distill_loss(batch: TokenBatch, *, kd_alpha: float, kd_temperature: float) -> LossOutput:
    r"""Distillation of the trained tokens: between the text as it is, and the teacher's distribution at each token.

    Equation (Hinton et al. 2015, arXiv 1503.02531, section 2)::

        L    = (1 - alpha) * L_CE  +  alpha * T^2 * L_KD
        L_KD = (1/N) * sum over trained tokens of KL( p_T(. | y_<t) || q_T(. | y_<t) )

    Symbols: ``p_T`` and ``q_T`` are the distributions of teacher and student, the logits divided by T; ``alpha`` is
    ``kd_alpha``, T is ``kd_temperature``; L_CE is :func:`alignkit.losses.sft.sft_loss`, at temperature 1; N is the
    number of trained tokens in the global batch, over ranks and accumulation steps. The gradient of the KL shrinks as
    1/T^2, which the factor T^2 makes up for, so that alpha means the same at every temperature.

    Deviations: the paper weighs its two terms by any two numbers; here they sum to 1, as in NeMo-Automodel and
    torchtune (``kd_ratio``). It writes the second term as the cross-entropy with soft targets, which differs from the
    KL by the teacher's entropy: the gradient is the same, and the KL is 0 where the student is the teacher.

    Fidelity: paper text.

    Args:
        batch: Rows [B, T] with ``teacher_kl`` at ``kd_temperature``, unless ``kd_alpha`` is 0.
        kd_alpha: Share of the teacher; 0 is supervised fine-tuning, to the last bit.
        kd_temperature: What the logits of both models are divided by.

    Returns:
        The terms ``nll`` and ``kl`` [B * T] over tokens, in nats; ``nll`` has no gradient where ``kd_alpha`` is 1. The
        metric ``distill/top1_agreement``.
    """
    output = sft_loss(batch)
    if kd_alpha == 0:
        return output
    if batch.teacher_kl is None or batch.teacher_agrees is None:
        raise ValueError("this batch carries no divergence from a teacher (teacher_kl is None)")
    (nll,), mask = output.terms, batch.label_mask
    # A term of weight 0 would still send its zeros back through the head.
    values = nll.values.detach() if kd_alpha == 1 else nll.values
    kl = batch.teacher_kl.masked_fill(~mask, 0.0).flatten()
    terms = (
        replace(nll, values=values, weight=1 - kd_alpha),
        LossTerm("kl", kl, nll.num_items, item="token", weight=kd_alpha * kd_temperature**2),
    )
    agreement = Metric((batch.teacher_agrees & mask).float().flatten(), mask.float().flatten())
    return LossOutput(terms, {"distill/top1_agreement": agreement})
