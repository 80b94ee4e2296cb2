"""Where the label of a step stands: what is read up to there is the solution up to the step, to the last byte."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from alignkit.data.step_rows import Steps, to_step_rows

SOLUTION = ["First add 2 and 3.", "两数之和是五。", "So é = 5 ∎", "Done \N{THUMBS UP SIGN}"]
LABELS = [True, False, True, False]


@pytest.mark.parametrize("separator", ["\n", "\n\n", "", " ки", "<step>"])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_step_is_judged_when_all_of_it_is_read(separator: str, conversational: bool, tokenizer: Any) -> None:
    """A character of several tokens too, as this tokenizer has of all that is not ASCII."""
    question = "What is 2 + 3? "
    prompt = [{"role": "user", "content": question}] if conversational else question
    row = {"prompt": prompt, "completions": SOLUTION, "labels": LABELS}
    rows, _ = to_step_rows(Dataset.from_list([row]), tokenizer, max_length=None, steps=Steps(separator))
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    places = [place for place, label in enumerate(labels) if label >= 0]
    assert [labels[place] for place in places] == LABELS
    for number, place in enumerate(places):
        read = "".join(step + separator for step in SOLUTION[: number + 1])
        if conversational and number == len(SOLUTION) - 1:
            read = read.rstrip()  # as the template may
        assert tokenizer.decode(ids[: place + 1]).rstrip().endswith(read.rstrip())
        assert not tokenizer.decode(ids[:place]).endswith(read)
