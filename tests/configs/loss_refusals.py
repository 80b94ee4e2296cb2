"""Examples for ``test_refusals.py``: what losses on pairs without a reference refuse, and how that is mended."""

from __future__ import annotations

from typing import Any

Examples = dict[str, tuple[dict[str, Any], dict[str, Any]]]

CONFLICTS: Examples = {
    f"reference of {name}": ({"method": name, "reference": "copy"}, {"reference": "auto"})
    for name in ("alphapo", "cpo", "orpo", "pro", "simpo")
} | {
    "answers to other prompts of a stream": (
        {"method": "kto", "streaming": True, "max_steps": 10},
        {"streaming": False},
    ),
}
IGNORED: Examples = {
    "sft_normalization of pro without eta": (
        {"method": "pro", "eta": 0.0, "sft_normalization": "sequence_sum"},
        {"eta": 0.1},
    ),
    "label_smoothing of cpo without form: sigmoid": (
        {"method": "cpo", "form": "hinge", "label_smoothing": 0.1},
        {"form": "sigmoid"},
    ),
}
