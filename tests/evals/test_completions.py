"""Figures of supervised rows: likelihood in any batches, answers that are right, differences of two models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from alignkit.errors import DataError
from alignkit.evals import _completions
from alignkit.evals._completions import exact_match, figures, likelihood, load_questions, load_tokens
from alignkit.sampling.generation import Sample, Sampling
from tests.scripts.tiny import byte_tokenizer, tiny_model, write_rows

ROWS = [
    {"prompt": "2 + 2?", "completion": " 4", "gold": "so 2 + 2 = 4 #### 4"},
    {"prompt": "A long question: 30 + 12?", "completion": " That is 42.", "gold": "#### 42"},
    {"prompt": "1?", "completion": " one", "gold": "#### 1,000"},
]


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    return [str(write_rows(tmp_path / "rows.jsonl", ROWS))]


def test_the_likelihood_does_not_depend_on_the_batches(rows: list[str]) -> None:
    model, tokenizer = tiny_model(family="llama"), byte_tokenizer()
    tokens = load_tokens(rows, tokenizer, max_rows=9, max_length=99, name="rows")
    expected = []
    with torch.no_grad():
        for row in tokens:
            ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
            logps = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            expected.append((-float(logps[trained].sum()), int(trained.sum())))
    assert [count for _, count in expected] == [3, 13, 5]  # The completion and its end.
    for batch_size in (1, 2, 3):
        found = likelihood(model, tokens, batch_size=batch_size)
        assert found.numerators == pytest.approx([total for total, _ in expected], rel=1e-5)
        assert found.denominators == tuple(count for _, count in expected)


def test_answers_whose_final_number_is_right(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    questions = load_questions(rows, tokenizer, column="gold", max_rows=9, name="rows")
    assert [tokenizer.decode(ids) for ids in questions.prompts] == [row["prompt"] for row in ROWS]
    answers = ["5, no: #### 4.0", "42 or 43", "1000"]
    monkeypatch.setattr(
        _completions, "generate_samples", lambda *_, **__: [Sample(text, 1, True, 0.0) for text in answers]
    )
    found = exact_match(tiny_model(), tokenizer, questions, Sampling(), PartialState(cpu=True), progress="answers")
    assert found.numerators == (1, 0, 1) and found.denominators == (1, 1, 1)


def test_rows_without_prompts_cannot_be_asked(tmp_path: Path) -> None:
    texts = [str(write_rows(tmp_path / "texts.jsonl", [{"text": "2 + 2 = 4", "gold": "4"}]))]
    with pytest.raises(DataError, match="no column 'prompt'"):
        load_questions(texts, byte_tokenizer(), column="gold", max_rows=9, name="rows")


def test_differences_are_to_the_last_model(rows: list[str]) -> None:
    tokens = load_tokens(rows, byte_tokenizer(), max_rows=9, max_length=99, name="rows")
    sums = {
        str(seed): {"nats_per_token": likelihood(tiny_model(seed=seed), tokens, batch_size=3)} for seed in (0, 1, 2)
    }
    found = figures(sums)
    means = [found[name]["nats_per_token"]["mean"] for name in "012"]
    assert "minus 0" not in found["1"] and found["2"]["nats_per_token"]["over"] == 21
    for name in "01":
        difference = found["2"][f"minus {name}"]["nats_per_token"]["mean"]
        assert difference == pytest.approx(means[2] - means[int(name)])
