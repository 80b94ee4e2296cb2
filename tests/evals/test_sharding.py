"""Batches do not depend on the number of processes, and scores are those of each response alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from alignkit.errors import ModelError
from alignkit.evals.preference import preference_sums
from alignkit.models import sharding
from alignkit.models._forward import add_completion_head, use_packed_attention
from alignkit.models.sharding import length_batches, map_batches, score_over_ranks, score_trained_over_ranks
from tests.scripts.tiny import tiny_model


class Rank:
    """One of several processes, as far as the work is shared out."""

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes = index, count


def test_batches_are_longest_first() -> None:
    assert length_batches([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_batch_is_done_once_and_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = length_batches([5, 1, 4, 2, 8, 3, 7, 6, 9, 0], 3)
    done: list[Any] = []

    def work(mine: list[list[int]]) -> list[int]:
        done.extend(mine)
        return [index * 10 for batch in mine for index in batch]

    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(sharding, "gather_object", lambda local: parts.extend(local) or list(parts))
    for index in range(count - 1):
        batches_of_rank = batches[index::count]
        parts.extend((i, i * 10) for i in [i for batch in batches_of_rank for i in batch])
        done.extend(batches_of_rank)
    assert map_batches(batches, work, Rank(count - 1, count)) == [i * 10 for i in range(10)]
    assert sorted(done) == sorted(batches)


def rows() -> Dataset:
    """Candidate rows of different lengths."""
    torch.manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, 200, (count,)).tolist()

    return Dataset.from_list(
        [
            {"prompt_ids": ids(p), "completion_ids": [ids(n) for n in c], "scores": [1.0] + [0.0] * (len(c) - 1)}
            for p, c in ((5, (3, 7)), (12, (1, 4, 2)), (1, (6, 6)), (8, (2, 9)), (3, (5, 1, 1)))
        ]
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_scores_are_those_of_each_response_alone(layout: str) -> None:
    model, data = tiny_model(), rows()
    expected = []
    for row in data:
        expected.append([])
        for completion in row["completion_ids"]:
            ids = row["prompt_ids"] + completion
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            start = len(row["prompt_ids"])
            expected[-1].append([float(logps[i - 1, ids[i]]) for i in range(start, len(ids))])
    add_completion_head(model)
    if layout == "packed":
        use_packed_attention(model)
    found = score_over_ranks(
        model, data, pad_token_id=0, layout=layout, batch_size=2, state=PartialState(), progress="rows"
    )
    assert [[len(c) for c in row] for row in found] == [[len(c) for c in row] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_completions_tie_in_every_layout(layout: str, batch_size: int) -> None:
    """Candidates 0 and 2 are the same text: a tie in likelihood, which counts half, however the row is computed."""
    torch.manual_seed(3)
    draw = torch.randint(4, 200, (16, 3, 9)).tolist()
    data = Dataset.from_list(
        [{"prompt_ids": p[: 1 + i % 9], "completion_ids": [a, b, a], "scores": [2.0, 0.0, 1.0]}
         for i, (p, a, b) in enumerate(draw)]
    )  # fmt: skip
    model = tiny_model()
    add_completion_head(model)
    if layout == "packed":
        use_packed_attention(model)
    found = score_over_ranks(
        model, data, pad_token_id=0, layout=layout, batch_size=batch_size, state=PartialState(), progress="rows"
    )
    assert all(first == third for first, _, third in found)
    # Of the pairs (0, 1), (2, 1) and (0, 2) the first two are right or wrong together and the third is a tie.
    right = sum(sum(first) > sum(second) for first, second, _ in found)
    assert 0 < right < len(found)
    accuracy = preference_sums(data, found)["accuracy/logps"].estimate()
    assert accuracy is not None and accuracy.mean == (2 * right + 0.5 * len(found)) / (3 * len(found))


def supervised_rows(model: Any) -> Dataset:
    """Five rows of one completion, the first of them the model's own; of each every third token is not counted."""
    found = rows().map(lambda row: {"completion_ids": row["completion_ids"][:1]})
    prompt = torch.tensor([found[0]["prompt_ids"]])
    own = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :].tolist()
    found = found.map(lambda row, index: {"completion_ids": [own]} if index == 0 else {}, with_indices=True)
    return found.map(lambda row: {"is_trained": [i % 3 != 1 for i in range(len(row["completion_ids"][0]))]})


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_trained_tokens_of_supervised_rows(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the logits of each row alone; two processes have the very figures of one."""
    model = tiny_model()
    data = supervised_rows(model)
    expected = []
    for row in data:
        ids, start = row["prompt_ids"] + row["completion_ids"][0], len(row["prompt_ids"])
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        counted = [start + i for i, trained in enumerate(row["is_trained"]) if trained]
        nll = -sum(float(logps[i - 1, ids[i]]) for i in counted)
        expected.append((nll, sum(int(logps[i - 1].argmax()) == ids[i] for i in counted), len(counted)))
    add_completion_head(model, top1=True)
    if layout == "packed":
        use_packed_attention(model)
    how = {"pad_token_id": 0, "layout": layout, "batch_size": 2, "progress": "rows"}
    found = score_trained_over_ranks(model, data, state=PartialState(), **how)
    for row, (nll, hits, tokens) in zip(found, expected, strict=True):
        assert row.nll == pytest.approx(nll, abs=1e-4) and (row.hits, row.tokens) == (hits, tokens)
    assert any(hits for _, hits, _ in expected)
    parts: list[Any] = []
    monkeypatch.setattr(sharding, "gather_object", lambda local: parts.extend(local) or list(parts))
    for index in range(2):
        rank = Rank(index, 2)
        rank.device, rank.is_main_process = torch.device("cpu"), index == 0
        if index == 0:
            with suppress(KeyError):  # What the other process has is not there yet.
                score_trained_over_ranks(model, data, state=rank, **how)
        else:
            assert score_trained_over_ranks(model, data, state=rank, **how) == found


def test_a_broken_model_is_named_not_averaged() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    add_completion_head(model)
    with pytest.raises(ModelError, match="NaN or infinite on 5 of 5 rows"):
        score_over_ranks(
            model, rows(), pad_token_id=0, layout="padded", batch_size=2, state=PartialState(), progress="rows"
        )
