"""The study of pruning: what is counted as right, what its arms train and leave, and that tune -> prune loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from gsm8k_pairs import MODEL
from pruning import Results, best_two, claim_rows, figure_rows, size_rows
from pruning_arms import AFTER, ARMS, BEFORE, DENSE, DROP, FIRST, PAT_FROZEN, UNTUNED, Arm, Budget, Study
from pruning_rows import IGNORED, MATHS, Sizes, Split, draw_split, measure, measured_row, missing, row

pytestmark = pytest.mark.skipif(bool(missing()) or not MODEL.exists(), reason="the shared model and data are absent")

FEW = Sizes(train=64, validation=2, test=6, max_length=120)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(MODEL))


@pytest.fixture(scope="module")
def split(tokenizer: PreTrainedTokenizerBase) -> Split:
    return draw_split(MATHS, tokenizer, FEW, seed=7)


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    yield load_model(ModelSource(model=str(MODEL), dtype="float32")).eval()


def test_only_the_digits_of_results_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 and 3 * 2.5 = <<3*2.5=7.5>>7.5 of 1 = one.\n#### 24"
    found = measured_row(row("How many of <<1=1>>?", answer), tokenizer, results=True)
    texts = [tokenizer.decode([found.input_ids[place] for place in span]) for span in found.spans]
    assert texts == ["24", "7.5"]
    whole = measured_row(row("How many?", "24 of them"), tokenizer, results=False)
    counted = [place for place, label in enumerate(whole.labels) if label != IGNORED]
    assert whole.spans == [[place] for place in counted]


@torch.no_grad()
def test_loss_and_right_answers_are_those_of_each_row_alone(model: PreTrainedModel, split: Split) -> None:
    nats, tokens, right, spans = 0.0, 0, 0, 0
    for each in split.test:
        logps = model(input_ids=torch.tensor([each.input_ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(each.labels) if label != IGNORED]
        nats -= sum(float(logps[place - 1, each.input_ids[place]]) for place in places)
        tokens += len(places)
        best = [0, *logps.argmax(-1).tolist()]
        right += sum(all(best[place] == each.input_ids[place] for place in span) for span in each.spans)
        spans += len(each.spans)
    found = measure(model, split.test, batch_size=4)
    assert found["nats"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["right"] == right / spans
    assert 0 < right < spans, "rows on which both happen"


def test_rows_to_measure_are_of_questions_that_are_not_trained_on(split: Split) -> None:
    trained = {each["prompt"][0]["content"] for each in split.train}
    texts = [tuple(each.input_ids) for each in (*split.validation, *split.test)]
    assert len(trained) == FEW.train and len(set(texts)) == len(texts) == FEW.validation + FEW.test
    tokenizer = load_tokenizer(str(MODEL))
    assert not any(question in tokenizer.decode(ids) for ids in texts for question in trained)


@pytest.mark.parametrize(("name", "parameters"), [(PAT_FROZEN, 2121936), (DROP, 2017216)])
def test_an_arm_trains_its_budget_and_leaves_its_size(split: Split, name: str, parameters: int) -> None:
    """Sizes from the formula: 2,829,120 parameters; a layer has 405,952; hidden channels 14,733 each, and 48 stay."""
    study = Study(split, seed=0, budget=Budget(steps=1, batch_size=2, max_length=FEW.max_length))
    found = study.run(ARMS[name], 1e-3, "test")
    assert found["parameters"] == parameters
    assert found["trained"] == pytest.approx(248832, rel=0.03)
    assert found["loss of export"] < 1e-4


def test_teachers_are_the_unpruned_model() -> None:
    assert ARMS[BEFORE].taught().keys["teacher"] == str(MODEL)
    taught = ARMS[PAT_FROZEN].taught()
    assert (taught.keys["teacher"], taught.keys["method"]) == ("base", "distill")
    assert replace(taught, keys=ARMS[PAT_FROZEN].keys) == ARMS[PAT_FROZEN]


def test_the_two_best_pruned_arms_are_taught() -> None:
    trials = {DENSE: {1e-3: 0.1}, BEFORE: {1e-3: 3.0, 1e-2: 1.0}, FIRST: {1e-3: 2.0}, DROP: {1e-3: 1.5}}
    assert best_two(trials) == [BEFORE, DROP]


def test_tables_name_every_arm_and_claims_have_their_sign() -> None:
    run = {"nats": 1.0, "right": 0.5, "trained": 1, "parameters": 2, "loss of export": 0.0, "bytes": 3}
    run |= {"loss in a fresh process": 1e-5, "solved": 1}
    taught = f"{BEFORE}, distilled"
    runs = {name: [dict(run), dict(run)] for name in (*UNTUNED, *ARMS, taught)}
    for found, seed in zip(runs[AFTER], (0.0, 0.1), strict=True):
        found["nats"] = 2.0 + seed
    results = Results(dict.fromkeys((*ARMS, taught), 0.001), runs, 1.0)
    assert set(figure_rows(results)) == set(size_rows(results)) == set(runs)
    claims = claim_rows(results)
    assert claims[f"1: {AFTER} - {BEFORE}"][1] == "holds"
    assert f"8: {BEFORE} - {taught}" in claims
    assert np.allclose(results.values(AFTER), [2.0, 2.1])


@pytest.mark.experiment
def test_pruning_after_tuning_loses_to_pruning_before_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """The direction that the pilot and the paper agree on, with three seeds."""
    budget = Budget(steps=40, batch_size=4, max_length=160)

    def loss(arm: Arm, seed: int) -> float:
        rows = draw_split(MATHS, tokenizer, Sizes(160, 2, 48, 160), seed)
        return float(Study(rows, seed, budget).run(arm, 3e-3, "test")["nats"])

    assert all(loss(ARMS[AFTER], seed) > loss(ARMS[BEFORE], seed) + 0.1 for seed in range(3))
