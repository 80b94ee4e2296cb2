"""Ways to run candidate rows, timed: what is compared, what is left out, and what a run does with the answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from alignkit.data.prefix import CandidateCollator
from alignkit.models import _layout_timing
from alignkit.models._forward import add_completion_head
from alignkit.models._layout_timing import SPLIT, Timing, Way, agreed, choose_fastest, time_ways, ways_of
from alignkit.models._layouts import LayoutChoice
from alignkit.shapes import _candidates as _preference
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from tests.models.test_comparison import own_logps, with_window
from tests.models.test_layouts import FAMILIES, build
from tests.trainers import random_rows

ROWS = random_rows([(24, (5, 3)), (9, (4, 2)), (14, (1, 6)), (6, (3, 4)), (8, (2, 2))], seed=3)
PADDED, DENSE = Way("padded", "sdpa"), Way("shared_prefix", "sdpa")
SPLIT_WAY, FLEX = Way("shared_prefix", SPLIT), Way("shared_prefix", "flex_attention")
ALL = [PADDED, DENSE, SPLIT_WAY, FLEX]


def timed(model: Any, ways: list[Way], mixed_precision: str = "no") -> dict[Way, Timing]:
    collator = CandidateCollator(0, "padded")
    return time_ways(model, ways, ROWS, batch_size=2, collator=collator, mixed_precision=mixed_precision)


def ready_model() -> Any:
    model = build("qwen3", FAMILIES["qwen3"])
    add_completion_head(model)
    return model


def test_other_attention_is_tried_in_place_of_sdpa_alone() -> None:
    model = build("qwen3", FAMILIES["qwen3"])
    for attention in ("sdpa", SPLIT):
        model.set_attn_implementation(attention)
        assert ways_of(model) == ALL
    model.set_attn_implementation("eager")
    assert ways_of(model) == [Way("padded", "eager"), Way("shared_prefix", "eager")]


def test_ways_are_timed_and_one_that_cannot_run_says_why() -> None:
    timings = timed(ready_model(), ALL)
    for way in (PADDED, DENSE, SPLIT_WAY):
        assert 0 < timings[way].seconds < 60 and not timings[way].problem
    assert timings[FLEX] == Timing(math.inf, timings[FLEX].problem)
    assert "NotImplementedError: FlexAttention does not support backward on CPU" in timings[FLEX].problem


def test_every_micro_batch_is_passed_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = _layout_timing.completion_forward

    def counted(model: Any, inputs: Any) -> Any:
        seen.append(len(inputs["candidate_mask"]))
        output = original(model, inputs)
        output.token_logps.register_hook(lambda gradient: seen.append(0))
        return output

    monkeypatch.setattr(_layout_timing, "completion_forward", counted)
    timed(ready_model(), [PADDED])
    assert seen == [2, 0, 2, 0, 1, 0] * (1 + _layout_timing.REPEATS)


@pytest.mark.parametrize(("precision", "computed"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_passes_are_made_in_the_precision_of_the_run(precision: str, computed: torch.dtype) -> None:
    model, seen = ready_model(), set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    assert not timed(model, [PADDED, SPLIT_WAY], precision)[SPLIT_WAY].problem
    assert seen == {computed}


def test_the_slower_way_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = ready_model(), [0.0]
    original = _layout_timing.completion_forward

    def forward(model: Any, inputs: Any) -> Any:
        clock[0] += inputs["input_ids"].numel()
        return original(model, inputs)

    monkeypatch.setattr(_layout_timing, "completion_forward", forward)
    monkeypatch.setattr(_layout_timing, "_now", lambda device: clock[0])
    timings = timed(model, [PADDED, DENSE])
    tokens = {
        w: sum(CandidateCollator(0, w.layout)(ROWS[i : i + 2])["input_ids"].numel() for i in (0, 2, 4)) for w in timings
    }
    assert {way: timing.seconds for way, timing in timings.items()} == tokens
    assert choose_fastest(timings).layout == "shared_prefix"


def test_the_model_is_left_as_it_was() -> None:
    model = ready_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    model.model.embed_tokens.eval()
    timed(model, ALL)
    assert model.training and not model.model.embed_tokens.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_way_with_other_log_probs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready_model()
    original = model.model.rotary_emb.forward
    # An architecture that ignores position ids runs packed rows fast, and wrongly.
    model.model.rotary_emb.forward = lambda x, position_ids: original(x, torch.arange(x.shape[1])[None])
    timings = timed(model, [PADDED, DENSE])
    assert "nats a token off" in timings[DENSE].problem
    assert not timings[PADDED].problem
    assert choose_fastest(timings).layout == "padded"


def test_the_choice_is_the_fastest_and_says_what_was_measured() -> None:
    timings = {PADDED: Timing(0.05), DENSE: Timing(0.03), SPLIT_WAY: Timing(0.02), FLEX: Timing(math.inf, "no kernel")}
    choice = choose_fastest(timings)
    assert (choice.layout, choice.attention) == ("shared_prefix", SPLIT)
    assert choice.reason.endswith(
        f"shared_prefix with {SPLIT} 20 ms; shared_prefix with sdpa 30 ms; padded 50 ms; "
        "shared_prefix with flex_attention no kernel"
    )
    none = choose_fastest({way: Timing(math.inf, "out of memory") for way in timings})
    assert none.layout == "padded" and none.reason.count("out of memory") == 4


def test_processes_agree_on_mean_times_and_on_what_failed_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [(3.0, ""), (1.0, ""), (math.inf, "out of memory")]
    monkeypatch.setattr(_layout_timing, "gather_object", lambda own: [*own, other])
    merged = agreed({PADDED: Timing(1.0), DENSE: Timing(2.0), SPLIT_WAY: Timing(0.5)})
    assert merged == {PADDED: Timing(2.0), DENSE: Timing(1.5), SPLIT_WAY: Timing(math.inf, "out of memory")}


# --- in a run --------------------------------------------------------------------------------------------------------

BEST = {"padded": PADDED, "dense": DENSE, "split": SPLIT_WAY}


@pytest.mark.parametrize("adapter", [None, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])])
@pytest.mark.parametrize("best", BEST)
def test_a_run_goes_on_in_the_fastest_way_and_learns_the_same(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, best: str, adapter: LoraConfig | None
) -> None:
    given = {way: Timing(1.0 if way == BEST[best] else 2.0) for way in BEST.values()}
    losses = {}
    for measures in (False, True):
        monkeypatch.setattr(PreferenceTrainer, "_measures_layout", lambda self, measures=measures: measures)
        monkeypatch.setattr(_preference, "time_ways", lambda model, ways, rows, **unused: given)
        settings = BridgeSettings("auto" if measures else "padded")
        trainer = make_trainer(settings=settings, arguments={"max_steps": 2}, peft_config=adapter)
        trainer.train()
        losses[measures] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert (trainer.layout.layout, trainer.layout.attention) == (BEST[best].layout, BEST[best].attention)
    assert trainer.data_collator.layout == BEST[best].layout
    assert trainer.model.config._attn_implementation == BEST[best].attention
    if trainer.ref_model is not None and best != "padded":
        assert trainer.ref_model.config._attn_implementation == BEST[best].attention
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_a_run_times_its_own_rows(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreferenceTrainer, "_measures_layout", lambda self: True)
    trainer = make_trainer(settings=BridgeSettings("auto"), arguments={"max_steps": 1})
    assert trainer.layout.reason.startswith("the fastest on rows of this run: ")
    assert "FlexAttention does not support backward on CPU" in trainer.layout.reason
    assert trainer.layout.attention in ("sdpa", SPLIT)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


LONG_ANSWERS = Dataset.from_list(random_rows([(2, (20, 20)), (3, (18, 18)), (2, (17, 17)), (3, (19, 19))], seed=5))
"""For which padded rows take fewer FLOPs, so that no model has been run on packed ones before they are timed."""


@pytest.mark.parametrize("whose", ["the policy", "the reference", "the helpful reference"])
def test_the_fastest_way_is_one_that_every_model_of_the_run_can_do(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    def make(whose: str | None) -> PreferenceTrainer:
        """A run in which one model sees 12 tokens; the policy is timed on rows that do not show it."""
        models = {name: build("qwen3", FAMILIES["qwen3"], "eager") for name in ("the policy", "the reference")}
        helpful = build("qwen3", FAMILIES["qwen3"], "eager") if whose == "the helpful reference" else None
        if whose is not None:
            with_window({**models, "the helpful reference": helpful}[whose])
        return make_trainer(
            model=models["the policy"],
            ref_model=models["the reference"],
            settings=BridgeSettings("auto", negative_reference=helpful),
            train_dataset=LONG_ANSWERS,
        )

    timings = {Way("padded", "eager"): Timing(2.0), Way("shared_prefix", "eager"): Timing(1.0)}
    monkeypatch.setattr(PreferenceTrainer, "_measures_layout", lambda self: self.layout.attention is not None)
    monkeypatch.setattr(_preference, "time_ways", lambda model, ways, rows, **unused: timings)
    assert make(None).layout.layout == "shared_prefix"
    trainer = make(whose)
    assert trainer.layout.layout == trainer.data_collator.layout == "padded"
    assert f"a token on {whose}, Qwen3ForCausalLM" in trainer.layout.reason
    assert trainer.model.config._attn_implementation == "eager"
    inputs = trainer.data_collator(list(LONG_ANSWERS))
    found = trainer.reference.token_logps(inputs)
    for b, row in enumerate(LONG_ANSWERS):
        for k in (0, 1):
            by_helpful = k == 1 and whose == "the helpful reference"
            other = trainer.settings.negative_reference if by_helpful else trainer.ref_model
            assert float(found[b, k].sum()) == pytest.approx(float(own_logps(other, row, k).sum()), abs=1e-4)


def test_ways_are_timed_as_training_will_compute(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same autocast and recomputation, on rows from all over the data."""
    seen: list[Any] = []

    def watched(model: Any, ways: Any, rows: Any, **settings: Any) -> Any:
        seen.append((model.is_gradient_checkpointing, settings["mixed_precision"], rows))
        return {PADDED: Timing(1.0)}

    monkeypatch.setattr(PreferenceTrainer, "_measures_layout", lambda self: True)
    monkeypatch.setattr(_preference, "time_ways", watched)
    trainer = make_trainer(
        settings=BridgeSettings("auto"),
        arguments={"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 2},
    )
    assert not trainer.model.is_gradient_checkpointing, "until training begins"
    (is_checkpointing, precision, rows) = seen[0]
    assert is_checkpointing and precision == "bf16"
    data = trainer.train_dataset
    assert [row["prompt_ids"] for row in rows] == [data[i]["prompt_ids"] for i in range(0, len(data), len(data) // 6)][
        :6
    ]


def test_only_an_open_choice_on_an_accelerator_is_measured(make_trainer: Any) -> None:
    trainer = make_trainer(settings=BridgeSettings("auto"))
    assert not trainer._measures_layout(), "a CPU goes by FLOPs"
    trainer.accelerator.state.device, device = torch.device("cuda"), trainer.accelerator.state.device
    try:
        assert trainer._measures_layout()
        trainer.layout = LayoutChoice("padded", "an obstacle")
        assert not trainer._measures_layout()
        trainer.layout = LayoutChoice("padded", "asked for", "sdpa")
        trainer.settings = BridgeSettings("padded")
        assert not trainer._measures_layout()
    finally:
        trainer.accelerator.state.device = device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels of a GPU cannot be compared here")
def test_on_a_gpu_all_four_ways_run_and_agree(make_trainer: Any) -> None:
    # FlexAttention needs a head size of 16.
    models = [build("qwen3", FAMILIES["qwen3"] | {"head_dim": 16}) for _ in range(2)]
    trainer = make_trainer(
        model=models[0],
        ref_model=models[1],
        settings=BridgeSettings("auto"),
        arguments={"max_steps": 2, "use_cpu": False, "gradient_checkpointing": True},
    )
    assert trainer.layout.reason.count(" ms") == 4, trainer.layout.reason
    trainer.train()
