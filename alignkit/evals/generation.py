"""What the model answers to a few prompts: does it end, and does it repeat itself?

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
generation/finished    share of answers that end with a stop token
generation/repetition  mean share of 4-grams of tokens that occurred earlier in their answer; near 1 is a loop
generation/tokens      mean length of an answer, tokens
=====================  ===============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from alignkit.parts.evaluation import Evaluation, Found

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial

PROMPT_SHOWN = 300
"""Characters of a prompt shown on the screen, its end."""


def _compute(trial: Trial) -> Found:
    from alignkit.sampling.generation import generate_samples, generation_sums

    prompts, progress = trial.data.prompts, f"{trial.name}: samples"
    if not prompts:
        return Found({})
    samples = generate_samples(
        trial.model, trial.tokenizer, prompts, trial.sampling, state=trial.state, progress=progress
    )
    sums = generation_sums(samples)
    return Found(sums, examples=samples, elsewhere=frozenset(sums))


def _render(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> str:
    lines = []
    for index, prompt in enumerate(prompts):
        shown = prompt if len(prompt) <= PROMPT_SHOWN else f"... {prompt[-PROMPT_SHOWN:]}"
        lines += [f"prompt {index + 1}", indented(shown)]
        for name, results in {**before, "model": found}.items():
            sample = results.examples[index]
            end = "finished" if sample.finished else "not finished"
            lines += [f"{name} ({sample.num_tokens} tokens, {end}, repetition {sample.repetition:.2f})"]
            lines += [indented(sample.text)]
    return "\n".join(lines)


def _record(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> dict[str, Any]:
    samples = [{"prompt": p, "model": asdict(s)} for p, s in zip(prompts, found.examples, strict=True)]
    for name, results in before.items():
        samples = [{**sample, name: asdict(s)} for sample, s in zip(samples, results.examples, strict=True)]
    return {"samples": samples}


def indented(text: str) -> str:
    """A text as it stands below a line that says what it is."""
    return "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n"))


EVALUATION = Evaluation(
    name="generation",
    summary="Answers to a few prompts: whether they end, how long they are, and whether they repeat themselves.",
    reads=frozenset({"prompts"}),
    compute=_compute,
    render=_render,
    record=_record,
)
