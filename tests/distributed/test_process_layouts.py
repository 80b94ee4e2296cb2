"""One step is one step: the process layouts agree, on real rows, through ``accelerate launch`` and the shipped configs.

Losses are compared to 6 decimals and gradient norms to 5 (a wrong normaliser hides in the loss, not in the gradient).
The token-level SFT term has a denominator that differs from rank to rank. Every run first shows which layout ran.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, SHARDED, logged_steps, record_of, saved_weights

pytestmark = pytest.mark.xdist_group("distributed")

STEPS = 3
DIRECT = ("flex_dpo full", "zero3 2x2")
"""The run whose program is launched by itself; the others are forked and have only the variables of a launch. That a
process of its own gives the same bits is shown by ``tests/programs/test_resume.py``, what every shipped config makes of
a launch by all runs here."""
OTHERS = ["1x1 accumulation 4", "ddp 2x2", *SHARDED]


@dataclass(frozen=True)
class Run:
    """What is trained: a method with its options, the form of its rows, and how."""

    options: Mapping[str, Any]
    rows: str
    parametrization: str
    term: str = "loss/preference"
    program: str = "preference"
    has_teacher: bool = False
    like: str | None = None
    """The run in one process that it is compared with, where that is another one."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is compared beside the loss."""
        if self.parametrization == "atp":
            return (self.term, "atp/ffn_kept", "atp/ffn_kept_least", "atp/ffn_kept_most", "atp/pruned_norms")
        if self.parametrization == "pat":
            return (self.term, "loss/identity", "loss/active", "pat/open_channels", "pat/soft_distance")
        if self.program == "sft":
            return (self.term, "entropy", "mean_token_accuracy", "num_tokens")
        return (self.term, "rewards/margins", "mean_logps/chosen", "entropy")


RUNS = {
    "flex_dpo full": Run({"method": "flex_dpo", "eta": 0.2}, "pairs", "full", "loss/sft"),
    "flex_dpo lora": Run({"method": "flex_dpo", "eta": 0.2}, "pairs", "lora", "loss/sft"),
    # Two passes over the rows, which are scored ahead: each process scores its share.
    "dpo full ahead": Run({"method": "dpo", "max_rows": 6}, "pairs", "full", like="dpo full live"),
    "dpo lora ahead": Run({"method": "dpo", "max_rows": 6}, "pairs", "lora", like="dpo lora live"),
    "dpo full live": Run({"method": "dpo", "max_rows": 6, "reference": "copy"}, "pairs", "full"),
    "dpo lora live": Run({"method": "dpo", "max_rows": 6, "reference": "adapter_disabled"}, "pairs", "lora"),
    # Lists of different lengths, and an anchor that has moved before the second step.
    "adpo ema lora": Run(
        {"method": "adpo", "beta": 0.1, "anchor": "ema", "anchor_decay": 0.5, "eta": 0.1}, "lists", "lora"
    ),
    "adpo ema full": Run({"method": "adpo", "beta": 0.1, "anchor": "ema", "anchor_decay": 0.5}, "lists", "full"),
    # Rewards are made by the run itself, each rank making its share.
    "treg lora": Run({"method": "treg"}, "pairs", "lora", "loss/token_regularizer"),
    "d2o lora": Run({"method": "d2o"}, "negatives", "lora"),
    "sft lora": Run({"method": "sft", "column_map": "{completion: chosen}"}, "pairs", "lora", "loss/nll", "sft"),
    # A second model beside the policy, whose own head is whole in no process under ZeRO-3 either.
    "distill full": Run(
        {"method": "distill", "column_map": "{completion: chosen}"}, "pairs", "full", "loss/kl", "sft", has_teacher=True
    ),
    "distill lora": Run(
        {"method": "distill", "column_map": "{completion: chosen}", "learning_rate": 1e-2},
        "pairs",
        "lora",
        "loss/kl",
        "sft",
    ),
    # Without a bias to keep, decisions cut from the first step on; they are settled before the last.
    "sft atp": Run(
        {
            "method": "sft",
            "column_map": "{completion: chosen}",
            "atp_kv_groups": 0.0,
            "atp_keep_bias": 0.0,
            "atp_control_fraction": 0.5,
        },
        "pairs",
        "atp",
        "loss/nll",
        "sft",
    ),
    # Terms that read weights outside the forward pass; a mask that the forward pass no longer moves, then a hard one.
    "sft pat": Run(
        {
            "method": "sft",
            "column_map": "{completion: chosen}",
            "pat_rank": 4,
            "pat_milestone_steps": 2,
            "pat_form": "paper",
            "pat_freeze_fraction": 0.5,
        },
        "pairs",
        "pat",
        "loss/nll",
        "sft",
    ),
    "sft full": Run({"method": "sft", "column_map": "{completion: chosen}"}, "pairs", "full", "loss/nll", "sft"),
}
CASES = [
    *(("flex_dpo full", name) for name in OTHERS),
    *(("flex_dpo lora", name) for name in SHARDED),
    ("dpo lora ahead", "ddp 2x2"),
    *(
        pytest.param(what, name, marks=pytest.mark.slow)
        for what, name in (
            ("dpo full ahead", "ddp 2x2"),
            ("dpo lora ahead", "zero2 2x2"),
            ("dpo lora ahead", "zero3 2x2"),
        )
    ),
    *(("adpo ema lora", name) for name in OTHERS),
    ("adpo ema full", "zero3 2x2"),
    *(("treg lora", name) for name in ("ddp 2x2", *SHARDED)),
    ("d2o lora", "zero2 2x2"),
    ("sft lora", "ddp 2x2"),
    ("sft full", "zero2 2x2"),
    ("sft atp", "zero2 2x2"),
    ("sft pat", "ddp 2x2"),
    ("sft pat", "zero3 2x2"),
    ("distill full", "zero3 2x2"),
    *(
        pytest.param(what, name, marks=pytest.mark.slow)
        for what, name in (("distill full", "ddp 2x2"), ("distill full", "zero2 2x2"), ("distill lora", "zero3 2x2"))
    ),
]


@pytest.fixture(scope="session")
def run(launch: Launch, inputs: dict[str, str]) -> Callable[[str, str], Path]:
    """Train in a layout once; returns the run directory."""

    @functools.cache
    def train(name: str, layout: str) -> Path:
        what = RUNS[name]
        options = {
            "model": inputs["model"],
            "data": inputs[what.rows],
            "learning_rate": 1e-4,
            **what.options,
            "parametrization": what.parametrization,
            "max_steps": STEPS,
            # Seven rows in batches of two: the ranks' last batches are filled up with repeated rows, which must not
            # count.
            "eval_data": inputs[what.rows],
            "max_eval_rows": 7,
            "allow_overlap": True,
            "per_device_eval_batch_size": 2,
            **({"probe_steps": 0} if what.program == "preference" else {}),
            **({"teacher": inputs["teacher"]} if what.has_teacher else {}),
        }
        return launch(LAYOUTS[layout], options, what.program, direct=(name, layout) == DIRECT)

    return train


@pytest.mark.parametrize(("what", "name"), CASES)
def test_layouts_agree(run: Callable[[str, str], Path], what: str, name: str) -> None:
    layout = LAYOUTS[name]
    ours, theirs = run(what, name), run(RUNS[what].like or what, "1x4")
    record, base_record = record_of(ours), record_of(theirs)
    if RUNS[what].like:
        assert [each["choices"]["reference"]["value"] for each in (record, base_record)] == [
            "precomputed", RUNS[RUNS[what].like].options["reference"]
        ]  # fmt: skip
    steps, base = logged_steps(ours), logged_steps(theirs)

    ran = record["process_layout"]
    assert ran["world_size"] == layout.world_size
    assert ran["backend"] == ("gloo" if layout.world_size > 1 else None)
    assert ran["zero_stage"] == layout.zero_stage
    if layout.wrapper:
        assert ran["wrapper"] == layout.wrapper
    whole = base_record["process_layout"]["local_parameters"]
    assert ran["local_parameters"] < 0.6 * whole if layout.zero_stage == 3 else ran["local_parameters"] == whole
    assert ran["per_device_train_batch_size"] * ran["gradient_accumulation_steps"] * ran["world_size"] == 4

    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step, expected in zip(steps, base, strict=True):
        # Six decimals, and one unit of the last for rounding: a float32 sum over 150 tokens is good to about 1e-5 nats,
        # of which beta lets a tenth through.
        assert step["loss"] == pytest.approx(expected["loss"], abs=2e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5, rel=1e-5)
        for key in RUNS[what].metrics:
            assert step[key] == pytest.approx(expected[key], abs=2e-5, rel=1e-5), key
    assert base[0]["grad_norm"] > 0.1
    # Of the weights the optimizer steps, in shards or float32 masters; the first step is at the full rate.
    assert steps[0]["unmoved_weights"] < 0.02
    assert record["results_before"].keys() == record["results"].keys()
    assert record["results"].keys() == base_record["results"].keys()
    for key, value in base_record["results"].items():
        assert record["results"][key] == pytest.approx(value, abs=2e-5, rel=1e-5), key
    ours_saved, theirs_saved = saved_weights(ours), saved_weights(theirs)
    # ZeRO-2 writes a tied head as a tensor of its own; loading ties it again.
    assert set(ours_saved) - {"lm_head.weight"} == set(theirs_saved)
    for key, tensor in theirs_saved.items():
        torch.testing.assert_close(ours_saved[key], tensor, atol=2e-6, rtol=1e-4, msg=key)


def test_sft_denominators_differ_between_ranks(inputs: dict[str, str]) -> None:
    """Otherwise a mean of means would pass: chosen responses must differ in length."""
    rows = [json.loads(line) for line in Path(inputs["pairs"]).read_text().splitlines()]
    assert len({len(row["chosen"][0]["content"]) for row in rows}) > len(rows) // 2
