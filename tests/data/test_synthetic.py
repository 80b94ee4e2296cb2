"""The quickstart's data is deterministic, disjoint, verifiable, and fit for the checks it will meet."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.data.report import data_report
from alignkit.data.synthetic import (
    STYLES,
    arithmetic_prompts,
    is_correct,
    make_corpus,
    make_preferences,
    tiny_model,
    train_tokenizer,
    write_quickstart_data,
)


def questions(rows: list[dict[str, list[dict[str, str]]]]) -> set[str]:
    return {row["prompt"][-1]["content"] for row in rows}


def test_a_seed_gives_the_same_data() -> None:
    assert make_corpus(50, seed=3) == make_corpus(50, seed=3) != make_corpus(50, seed=4)
    assert make_preferences(50, seed=3) == make_preferences(50, seed=3) != make_preferences(50, seed=4)
    assert make_preferences(20, seed=3) == make_preferences(50, seed=3)[:20]


def test_held_out_prompts_are_seen_nowhere_else() -> None:
    corpus = {messages[1]["content"] for seed in (0, 1) for messages in make_corpus(3000, seed)}
    train = questions(make_preferences(1000, seed=0)) | questions(make_preferences(1000, seed=1))
    held_out = questions(make_preferences(300, seed=0, held_out=True))
    assert len(held_out) == 300
    assert not held_out & (corpus | train)


def test_preferences_are_right_against_wrong_or_evasive() -> None:
    rows = make_preferences(400, seed=0)
    assert len(questions(rows)) == 400
    for row in rows:
        assert is_correct(row["prompt"], row["chosen"][0]["content"])
        assert not is_correct(row["prompt"], row["rejected"][0]["content"])
    assert sum(row["rejected"][0]["content"].startswith("Well") for row in rows) == 200


def test_arithmetic_prompts() -> None:
    rows = arithmetic_prompts(2000, seed=0)
    assert rows == arithmetic_prompts(3000, seed=0)[:2000] and rows != arithmetic_prompts(2000, seed=1)
    assert len({row["prompt"] for row in rows}) == 2000
    signs = Counter()
    for row in rows:
        first, sign, second = re.fullmatch(r"(\d{1,2})([+-])(\d{1,2})=", row["prompt"]).groups()
        signs[sign] += 1
        assert int(row["answer"]) == int(first) + (1 if sign == "+" else -1) * int(second) >= 0
    assert min(signs.values()) > 500
    held_out = arithmetic_prompts(500, seed=0, held_out=True)
    trained = {row["prompt"] for seed in (0, 1) for row in arithmetic_prompts(10000, seed)}
    assert not trained & {row["prompt"] for row in held_out}
    with pytest.raises(ValueError, match="20000 prompts are asked for, but there are 1"):
        arithmetic_prompts(20000, seed=0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("7 - 4 = 3. Mia has 3 eggs now.", True),
        (" 7 - 4 = 3. Mia has 3 eggs now.\n", True),
        ("7 - 4 = 2. Mia has 2 eggs now.", False),
        ("7 - 4 = 3. Mia has 2 eggs now.", False),
        ("7 + 4 = 11. Mia has 11 eggs now.", False),
        ("7 - 4 = 3.", False),
        ("", False),
    ],
)
def test_is_correct(answer: str, expected: bool) -> None:
    prompt = [{"role": "user", "content": "Mia has 7 eggs and loses 4 of them. How many eggs does Mia have now?"}]
    assert is_correct(prompt, answer) is expected


def test_corpus_shows_the_three_styles_in_their_shares() -> None:
    corpus = make_corpus(4000, seed=0)
    seen = Counter(
        "evasive" if text.startswith("Well") else "correct" if is_correct(messages[:2], text) else "careless"
        for messages in corpus
        for text in [messages[2]["content"]]
    )
    for style, share in STYLES.items():
        assert seen[style] / 4000 == pytest.approx(share, abs=0.03)


def test_rows_pass_every_check_and_share_a_long_prompt() -> None:
    tokenizer = train_tokenizer(make_corpus(1000, seed=0))
    rows, report = to_candidate_rows(
        Dataset.from_list(make_preferences(100, seed=0)), tokenizer, max_length=128, num_candidates=2
    )
    checks = data_report({"train": (rows, report)}, tokenizer).checks["train"]
    assert [(check.name, check.status) for check in checks if check.status != "ok"] == []
    assert report.num_rows == 100 and report.num_truncated_rows == 0
    assert report.lengths["prompt"]["min"] > report.lengths["completion"]["50 %"]
    sides = list(zip(*(map(len, row["completion_ids"]) for row in rows), strict=True))
    assert 0.6 < sum(sides[0]) / sum(sides[1]) < 1.7, "chosen and rejected are of similar length"


def test_tokenizer_splits_digits_and_marks_what_the_assistant_wrote() -> None:
    tokenizer = train_tokenizer(make_corpus(300, seed=0), vocab_size=320)
    assert len(tokenizer) == 320
    assert tokenizer.convert_ids_to_tokens(tokenizer("16 = 17")["input_ids"])[:2] == ["1", "6"]
    for text in ("日本語 é 😀", "16 - 7 = 9. Zoe has 9 cups now."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = make_corpus(1, seed=0)[0]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(trained) == messages[2]["content"] + "<|endoftext|>"
    assert trained[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    corpus = make_corpus(100, seed=0)
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for messages in corpus[:5]:
        rendered = [t.apply_chat_template(messages, return_dict=True)["input_ids"] for t in (tokenizer, again)]
        assert rendered[0] == rendered[1]


def test_tiny_model() -> None:
    tokenizer = train_tokenizer(make_corpus(300, seed=0))
    first, second, other = tiny_model(tokenizer, 0), tiny_model(tokenizer, 0), tiny_model(tokenizer, 1)
    assert 3e5 < sum(p.numel() for p in first.parameters()) < 1e6
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert first.config.eos_token_id == first.generation_config.eos_token_id == tokenizer.eos_token_id
    assert first(torch.tensor([[5, 6]])).logits.shape == (1, 2, len(tokenizer))


def test_quickstart_files(tmp_path: Path) -> None:
    files = write_quickstart_data(tmp_path / "data", seed=0)
    again = write_quickstart_data(tmp_path / "again", seed=0)
    assert sorted(files) == ["corpus", "preferences_heldout", "preferences_train", "prompts"]
    for stem, path in files.items():
        assert path.name == f"{stem}.jsonl"
        assert path.read_bytes() == again[stem].read_bytes()
    train = list(load_rows(str(files["preferences_train"])))
    held_out = list(load_rows(str(files["preferences_heldout"])))
    assert (len(train), len(held_out)) == (1000, 200)
    assert not questions(train) & questions(held_out)
    first = json.loads(files["corpus"].read_text().splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant"]
