"""Every option changes something, or says under which value of another it does: none is ignored in silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alignkit.config.keys import program_methods
from alignkit.parts.method import Method, load_method
from tests.losses.batches import gradient, random_batch

READ_BEFORE = {
    "treg": {"include_response", "contrast_prompts"},
    "d2o": {
        "helpful_reference_model", "num_samples_per_prompt", "sampling_temperature", "sampling_top_p",
        "sampling_max_new_tokens", "sampling_instruction", "sample_refresh_steps",
    },
}  # fmt: skip
"""Options that make the rows or the reference, and so are not seen by a loss on given rows."""

CASES = [
    (name, item.name)
    for name in program_methods("preference")
    for item in dataclasses.fields(load_method(name).options)
    if item.name not in READ_BEFORE.get(name, ())
]


def effects(method: Method, options: Any) -> list[Any]:
    """All that a method computes under these options: loss, gradient, metrics, needs and how its anchor moves."""
    batch = random_batch(method, seed=3, size=6, options=options, scale=2.0)
    output = method.objective(batch, options)
    metrics = [(name, value.values.tolist()) for name, value in output.metrics.items()]
    terms = [(term.weight, term.values.tolist()) for term in output.terms]
    return [terms, gradient(output, batch).tolist(), metrics, method.needs(options), method.anchor(options)]


def others(item: dataclasses.Field[Any]) -> list[Any]:
    """Values of an option beside its default, each of which should change something; for a bound a far one does."""
    info = item.metadata["option"]
    if info.choices is not None:
        return [choice for choice in info.choices if choice != item.default]
    if isinstance(item.default, bool):
        return [not item.default]
    if isinstance(item.default, int):
        return [item.default + 1]
    return [{"tau_min": 3.0, "tau_max": 0.3}.get(item.name, 0.73 if item.default is None else item.default * 0.7 + 0.2)]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_option_has_an_effect_where_it_is_taken_and_none_where_it_is_refused(name: str, option: str) -> None:
    method = load_method(name)
    (item,) = [item for item in dataclasses.fields(method.options) if item.name == option]
    needed = item.metadata["option"].only_with
    defaults = effects(method, method.options())
    changed = [effects(method, method.options(**{option: value})) != defaults for value in others(item)]
    if needed is None or needed.holds(getattr(method.options(), needed.key)):
        assert all(changed)
        return
    assert not any(changed), f"{option} has an effect without {needed.key}, which its only_with denies"
    enabled = {needed.key: needed.example}
    base = effects(method, method.options(**enabled))
    assert all(effects(method, method.options(**enabled, **{option: value})) != base for value in others(item))


def test_conditions_name_options_and_values_that_exist() -> None:
    for name in program_methods("preference"):
        items = {item.name: item for item in dataclasses.fields(load_method(name).options)}
        for item in items.values():
            needed = item.metadata["option"].only_with
            if needed is not None:
                info = items[needed.key].metadata["option"]
                assert needed.holds(needed.example) and (
                    info.choices is None or set(needed.values) <= set(info.choices)
                )


def test_a_silent_option_would_be_found() -> None:
    """The check itself: gamma of treg changes nothing in the dpo form."""
    method = load_method("treg")
    assert effects(method, method.options(gamma=0.9)) == effects(method, method.options())
    assert torch.isfinite(torch.tensor(effects(method, method.options())[1])).all()
