"""The figures of a calibration, and how answers are judged; see :mod:`alignkit.reports.calibration`.

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
<what>/confidence      mean confidence
<what>/ece             expected calibration error over 15 bins of equal width; ``mce``: that of the worst bin
<what>/brier           mean squared difference of confidence and correctness
<what>/auroc           chance that a right item has the higher confidence than a wrong one
<what>/aurc            error rate averaged over all coverages, the most confident items first
<what>/accuracy_at_80  accuracy on the 80 % of the items that the model is most sure of; ``accuracy_at_50`` likewise
=====================  ===============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.evals.generation import indented
from alignkit.parts.evaluation import Calibrated, Figure, Found
from alignkit.reports.calibration import (
    area_under_risks,
    brier_score,
    expected_error,
    largest_error,
    ranking_quality,
    selective_accuracy,
)
from alignkit.reports.estimates import row_sums
from alignkit.reports.resampling import resampled

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial

COVERAGES = (80, 50)
"""Percent."""
MOST_RECORDED = 1000
"""Judged answers in a record, the first ones."""
SHOWN = 3
"""Judged answers on the screen."""
SURE_OF_ANSWER = "exp of the mean log-prob of an answer's tokens, its stop token included"


def calibration_figures(what: str, rows: Sequence[int], items: Calibrated) -> dict[str, Figure]:
    """How far confidence and correctness agree, with intervals by a bootstrap over rows.

    Args:
        what: First part of the keys.
        rows: The row that each item belongs to.
    """
    confidence, right = np.array(items.confidence), np.array(items.right)
    statistics: dict[str, Callable[..., float]] = {
        "ece": expected_error,
        "mce": largest_error,
        "brier": brier_score,
        "auroc": ranking_quality,
        "aurc": area_under_risks,
        **{f"accuracy_at_{percent}": partial(selective_accuracy, coverage=percent / 100) for percent in COVERAGES},
    }
    numbers = np.array(rows)
    return {f"{what}/{key}": resampled(of, numbers, confidence, right) for key, of in statistics.items()}


def judged(trial: Trial, what: str, judge: Callable[[str, Any], bool]) -> Found:
    """Every answer judged, with the confidence of the model in it.

    Args:
        what: Key of the share that is right, and first part of the other keys.
        judge: ``(answer, reference)`` to whether it is right.
    """
    questions = trial.data.questions
    assert questions is not None
    samples = [answer.sample(trial.tokenizer) for answer in trial.answers]
    right = [float(judge(s.text, reference)) for s, reference in zip(samples, questions.references, strict=True)]
    confidence = [math.exp(math.fsum(logps) / len(logps)) for logps in trial.answer_logps]
    items = Calibrated(SURE_OF_ANSWER, confidence, right)
    sums: dict[str, Figure] = {
        what: row_sums([(value, 1.0) for value in right]),
        f"{what}/finished": row_sums([(float(sample.finished), 1.0) for sample in samples]),
        f"{what}/confidence": row_sums([(value, 1.0) for value in confidence]),
        **calibration_figures(what, range(len(right)), items),
    }
    examples = [
        {"reference": str(reference), "answer": s.text, "finished": s.finished, "right": bool(y), "confidence": c}
        for s, reference, y, c in zip(samples, questions.references, right, confidence, strict=True)
    ]
    asked = [trial.tokenizer.decode(ids) for ids in questions.prompts[:MOST_RECORDED]]
    shown = [{"prompt": prompt, **example} for prompt, example in zip(asked, examples, strict=False)]
    return Found(sums, examples=shown, calibrated=items)


def judged_record(found: Found, before: Mapping[str, Found]) -> list[dict[str, Any]]:
    """The first answers as JSON has them, with those of other models under their names."""
    others = {
        name: [{key: example[key] for key in ("answer", "finished", "right", "confidence")} for example in of.examples]
        for name, of in before.items()
    }
    rows = enumerate(found.examples)
    return [{**example, **{name: of[index] for name, of in others.items()}} for index, example in rows]


def judged_text(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> str:
    """The first answers, with what was expected.

    Args:
        prompts: Not read: every prompt was answered.
    """
    cut = sum(not example["finished"] for example in found.examples)
    lines = [f"{cut} of the first {len(found.examples)} answers did not end within --max_new_tokens"] * (cut > 0)
    for index, example in enumerate(found.examples[:SHOWN]):
        lines += [f"question {index + 1}", indented(example["prompt"]), "reference", indented(example["reference"])]
        for name, results in {**before, "model": found}.items():
            given = results.examples[index]
            verdict = "right" if given["right"] else "wrong"
            end = "" if given["finished"] else ", not finished"
            lines += [f"{name} ({verdict}, confidence {given['confidence']:.2f}{end})", indented(given["answer"])]
    return "\n".join(lines)
