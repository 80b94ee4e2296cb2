"""R3's mixture against loops, and the invariants of its specification."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import ConfigError
from alignkit.parts.reward import load_reward
from alignkit.rewards.r3 import query_of, stripped
from tests.rewards.calls import reward, rewards

EMBEDDER = '''
import re

def embed(texts):
    """Letters a, b and c, counted; not of length 1."""
    calls.append(len(texts))
    return [[float(text.count(letter)) for letter in "abc"] for text in texts]

def against(texts):
    return [[1.0, 0.0] if i < len(texts) // 2 else [-2.0, 0.0] for i, _ in enumerate(texts)]

calls = []
'''


@pytest.fixture
def embedder(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(EMBEDDER)
    return f"{tmp_path / 'mine.py'}:embed"


def counted(first: str, second: str) -> float:
    """The relevance that the embedder of the tests has."""
    return sum(first.count(letter) * second.count(letter) for letter in "abc")


def expected(prompt: str, answer: str, reference: str | None, top: float) -> float:
    """The mixture in loops."""
    tokens = re.findall(r"\w+|[^\w\s]+", answer)
    trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    penalty = len(set(trigrams)) / len(trigrams) if trigrams else 1.0
    if reference is None:
        return counted(prompt, answer) * len(tokens) / 100 * penalty
    return counted(reference, answer) / top * 512 / 100 * penalty


@pytest.mark.parametrize("answer", ["", "a", "a b c a b c a b c.", "bb-aa, cc! dd", "the cab is a cab is a cab"])
@pytest.mark.parametrize("reference", [None, "abc"])
def test_the_mixture(answer: str, reference: str | None, embedder: str) -> None:
    qtype = "OPENENDED" if reference is None else "constrained"
    found = reward("r3", answer, prompt="a cab", qtype=qtype, reference=reference, embedder=embedder, relevance_top=3.5)
    assert found == pytest.approx(expected("a cab", answer, reference, 3.5), abs=1e-12)


def own(**given: Any) -> dict[str, Any]:
    return {"qtype": "OPENENDED", "reference": None, **given}


def test_the_words_are_those_of_nltk() -> None:
    """wordpunct: "can't" is three words, "..." one."""
    off = own(relevance=False, repetition_penalty=False)
    assert reward("r3", "can't stop... now", **off) == pytest.approx(6 / 100)


def test_nothing_said_is_worth_nothing_and_twice_the_same_less_a_word() -> None:
    assert reward("r3", "", **own()) == 0.0
    alone = own(relevance=False)
    once, twice = "one two three four five", "one two three four five one two three four five"
    assert reward("r3", once, **alone) == pytest.approx(0.05)
    assert reward("r3", twice, **alone) == pytest.approx(0.10 * 5 / 8)


def test_a_constrained_row_sees_neither_length_nor_query() -> None:
    row = {"qtype": "CONSTRAINED", "reference": "Paris"}
    assert reward("r3", "Paris", prompt="q", **row) == pytest.approx(512 / 100)
    assert reward("r3", "Paris", prompt="other", **row) == reward("r3", "Paris", prompt="q", **row)
    assert reward("r3", "Paris", qtype="CONSTRAINED", reference=None) is None
    assert reward("r3", "Paris", branching=False, prompt="Paris") == pytest.approx(1 / 100)


def test_all_switches_off_is_one() -> None:
    off = dict.fromkeys(("relevance", "length_incentive", "repetition_penalty", "branching"), False)
    assert rewards("r3", "", "anything at all", **off) == [1.0, 1.0]


def test_the_hashed_embedding_sees_shared_words() -> None:
    def rel(answer: str) -> float:
        return reward("r3", answer, prompt="capital of France", length_incentive=False, **own())

    assert rel("Capital of France!") > rel("the capital of the country") > rel("bananas") == 0.0
    # Three words and two pairs of them on one side; the same and one of each more on the other.
    assert rel("capital of France now") == pytest.approx(5 / math.sqrt(5 * 7))


def test_a_batch_is_embedded_at_once_and_rows_do_not_mix(embedder: str) -> None:
    function = load_reward("r3")(embedder=embedder, relevance_top=2.0, branching=False)
    prompts, completions = ["a", "b b", "abc"], ["a b", "c", "abc abc"]
    together = function(prompts=prompts, completions=completions)
    from alignkit.rewards._files import file_function

    calls = file_function(embedder).__globals__["calls"]
    assert calls == [6]
    backwards = function(prompts=prompts[::-1], completions=completions[::-1])
    assert (
        together
        == backwards[::-1]
        == [function(prompts=[p], completions=[c])[0] for p, c in zip(prompts, completions, strict=True)]
    )


def test_an_embedder_is_found_from_another_folder(
    embedder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_reward("r3")(embedder="mine.py:embed", relevance_top=2.0).embedder == embedder


def test_a_negative_relevance_can_be_clamped(embedder: str) -> None:
    against = embedder.replace(":embed", ":against")
    options = own(embedder=against, relevance_top=1.0, prompt="q")
    assert reward("r3", "one", **options) == pytest.approx(-2 / 100)
    assert reward("r3", "one", clamp=True, **options) == 0.0


def test_another_embedder_needs_its_own_range(embedder: str) -> None:
    with pytest.raises(ConfigError, match="for Contriever it is 3.5"):
        load_reward("r3")(embedder=embedder)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Yes.\n### Instruction:\nmore", "Yes."),
        ("Yes.\n\n\n\nmore", "Yes."),
        ("Yes.\n\n-- a", "Yes."),
        ("Yes.\n\n____\nmore", "Yes."),
        (" Yes, 3 ### 4\n\nand on ", "Yes, 3 ### 4\n\nand on"),
        ("### Response:\nYes", ""),
    ],
)
def test_where_an_answer_ends(text: str, kept: str) -> None:
    assert stripped(text) == kept


def test_the_query_is_what_was_asked() -> None:
    alpaca = "Below is an instruction.\n\n### Instruction:\nName  a\nfruit.\n\n### Response:\n"
    assert query_of(alpaca) == "Name a fruit."
    assert query_of("Name a\nfruit.") == "Name a fruit."
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "Name a\nfruit."}]
    assert query_of(chat) == "Name a fruit."
