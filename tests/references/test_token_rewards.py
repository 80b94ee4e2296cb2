"""The pass for token rewards: values against single sequences, packing, cache and resumption, refusals, report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.contrast import load_contrast_prompts
from alignkit.data.synthetic import make_corpus, train_tokenizer
from alignkit.errors import CheckpointError, DataError
from alignkit.models._forward import add_completion_head, score_rows
from alignkit.references import _cache as reference
from alignkit.references import _token_rewards as token_rewards
from alignkit.references._token_rewards import choose_pass_layout, scored_rows, token_rewards_of, with_token_rewards
from alignkit.references.token_reward_report import token_reward_report, write_heatmap
from alignkit.shapes._candidates import BridgeSettings
from scripts.claims.gsm8k_pairs import make_pairs, read_questions
from tests.conftest import GSM8K
from tests.trainers import VOCABULARY

LAYOUTS = ("padded", "packed")


def contrast_rows(sizes: Sequence[int], *, include_response: bool, worse: int | None = None, seed: int = 0) -> Dataset:
    """Rows of random tokens with ``sizes`` candidates; the prompts of a row differ in their last tokens.

    ``worse`` ends the worse prompts in that many tokens of their own; 0 makes the two prompts equal.
    """
    draw = random.Random(seed)
    tokens = lambda low, high: [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(low, high))]  # noqa: E731
    rows = []
    for number, size in enumerate(sizes):
        prompt, completions = tokens(1, 20), [tokens(1, 9) for _ in range(size)]
        asked = [prompt + completion if include_response else prompt for completion in completions]
        good = tokens(1, 4)
        bad = good if worse == 0 else tokens(1, 4) + [1]
        rows.append(
            {
                "prompt_ids": prompt,
                "completion_ids": completions,
                "scores": [float(size - k) for k in range(size)],
                "better_prompt_ids": [ids + good for ids in asked],
                "worse_prompt_ids": [ids + bad for ids in asked],
                "completion_lengths": [len(completion) for completion in completions],
                "source_row": 10 * number,
            }
        )
    return Dataset.from_list(rows)


class Scorer:
    """Scores rows in one process and counts them."""

    def __init__(self, model: Any, layout: Any, fail_after: int | None = None) -> None:
        self.model, self.layout, self.fail_after, self.calls = model, layout, fail_after, 0

    def __call__(self, rows: Dataset, title: str) -> Any:
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        return score_rows(self.model, rows, pad_token_id=0, layout=self.layout.layout, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def model(model_path: str) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    add_completion_head(loaded)
    return loaded


@pytest.fixture
def run(model: Any, tmp_path: Path) -> Any:
    """Run the pass with the test's cache; returns the rows, the report and the number of scoring calls."""

    def run_pass(rows: Dataset, layout: str = "packed", weights: str = "w", **options: Any) -> Any:
        chosen = choose_pass_layout(layout, model, rows)
        score = Scorer(model, chosen, **options)
        cache = reference.ReferenceCache(tmp_path / "cache")
        found, report = with_token_rewards(
            rows, cache=cache, weights=weights, precision="float32", layout=chosen, score=score
        )
        return found, report, score.calls

    return run_pass


def naive(model: Any, rows: Dataset) -> list[list[list[float]]]:
    """r_hat with one plain forward pass a sequence."""

    def logps(prompt: list[int], completion: list[int]) -> torch.Tensor:
        with torch.no_grad():
            values = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        return torch.stack([values[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])

    results = []
    for row in rows:
        sides = zip(row["better_prompt_ids"], row["worse_prompt_ids"], row["completion_ids"], strict=True)
        pairs = [(logps(better, completion), logps(worse, completion)) for better, worse, completion in sides]
        results.append([[1 / (1 + 2.718281828459045 ** -float(d)) - 0.5 for d in (a - b)] for a, b in pairs])
    return results


def flat(values: Any) -> torch.Tensor:
    return torch.tensor([x for row in values for candidate in row for x in candidate])


# --- the formula ------------------------------------------------------------------------------------------------------


def test_golden_values_antisymmetry_and_range() -> None:
    worse = torch.tensor([-1.5, -2.0, -0.25])
    better = worse + torch.tensor([0.5, -1.0, 0.0])
    assert token_rewards_of(better, worse).tolist() == pytest.approx([0.1224593312, -0.2310585786, 0.0], abs=1e-7)
    assert torch.equal(token_rewards_of(better, worse), -token_rewards_of(worse, better))
    assert torch.equal(token_rewards_of(better - 4, worse - 4), token_rewards_of(better, worse))
    extreme = token_rewards_of(torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0]))
    assert extreme.abs().max() <= 0.5
    first, second = torch.linspace(-6.1, -0.3, 50).half(), torch.linspace(-0.7, -5.2, 50).half()
    assert torch.equal(token_rewards_of(first, second), token_rewards_of(first.float(), second.float())), "in float32"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("include_response", [True, False])
def test_values_are_those_of_single_sequences(model: Any, run: Any, layout: str, include_response: bool) -> None:
    rows = contrast_rows([2, 2, 3, 2, 4, 2, 1], include_response=include_response)
    found, report, _ = run(rows, layout)
    expected = naive(model, rows)
    assert [[len(c) for c in row] for row in found["token_rewards"]] == [[len(c) for c in row] for row in expected]
    torch.testing.assert_close(flat(found["token_rewards"]), flat(expected), atol=1e-5, rtol=0)
    shifted = [[[candidate[-1], *candidate[:-1]] for candidate in row] for row in expected]
    assert (flat(found["token_rewards"]) - flat(shifted)).abs().max() > 0.01, "one token off would be seen"
    assert set(found.column_names) == {"prompt_ids", "completion_ids", "scores", "token_rewards"}
    assert found["completion_ids"] == rows["completion_ids"]
    assert report.num_tokens == len(flat(expected)) and report.mean == pytest.approx(
        float(flat(expected).mean()), abs=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_prompts_give_zero(run: Any, layout: str) -> None:
    found, report, _ = run(contrast_rows([2] * 4, include_response=True, worse=0), layout)
    assert flat(found["token_rewards"]).abs().max() < 2e-6
    assert "nearly the same" in report.warning


def test_swapped_prompts_give_the_opposite(run: Any) -> None:
    rows = contrast_rows([2] * 4, include_response=False)
    names = {"better_prompt_ids": "worse_prompt_ids", "worse_prompt_ids": "better_prompt_ids"}
    first, second = (flat(run(data)[0]["token_rewards"]) for data in (rows, rows.rename_columns(names)))
    torch.testing.assert_close(first, -second, atol=1e-6, rtol=0)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_response", [True, False])
def test_every_sequence_is_scored_once_and_packing_never_costs_more(model: Any, include_response: bool) -> None:
    rows = contrast_rows([2, 3, 1, 4, 2], include_response=include_response, seed=1)
    padded = choose_pass_layout("padded", model, rows)
    packed = replace(padded, layout="packed")
    for row in rows:
        prompts = row["better_prompt_ids"] + row["worse_prompt_ids"]
        plan, apart = scored_rows(row, packed), scored_rows(row, padded)
        assert packed.cost(plan) <= packed.cost(apart)
        for found in (plan, apart):
            members = [(member, ids) for s in found for member, ids in zip(s.members, s.completion_ids, strict=True)]
            assert sorted(member for member, _ in members) == list(range(len(prompts)))
            for scored in found:
                for member, rest in zip(scored.members, scored.completion_ids, strict=True):
                    whole = prompts[member] + row["completion_ids"][member % len(row["completion_ids"])]
                    assert scored.prompt_ids + rest == whole


def test_what_is_shared(model: Any) -> None:
    """Prompts of 400, responses of 128: four branches share a row, without the response and with it.

    With it, two rows of two branches would share 528 tokens twice: 2 x (527 + 2 x 144), and one row shares 401, the
    first token of the responses being the same: 400 + 4 x 271.
    """

    def row(include_response: bool) -> dict[str, Any]:
        completions = [[7] + [k] * 127 for k in (3, 4)]
        asked = [[2] * 400 + (c if include_response else []) for c in completions]
        ends = {"better_prompt_ids": [5] * 16, "worse_prompt_ids": [6] * 16}
        return {"completion_ids": completions} | {name: [ids + end for ids in asked] for name, end in ends.items()}

    layout = replace(choose_pass_layout("padded", model, contrast_rows([2], include_response=True)), width=192)
    packed = replace(layout, layout="packed")
    (whole,) = scored_rows(row(False), packed)
    assert len(whole.prompt_ids) == 400 and list(whole.members) == [0, 1, 2, 3]
    (whole,) = scored_rows(row(True), packed)
    assert list(whole.members) == [0, 1, 2, 3]
    assert len(whole.prompt_ids) == 401 and whole.num_tokens == 400 + 4 * 271 < 2 * (527 + 2 * 144)


def test_layout_auto_says_why(model: Any) -> None:
    alike = contrast_rows([2] * 3, include_response=True)
    chosen = choose_pass_layout("auto", model, alike)
    assert chosen.layout == "packed" and "no padding" in chosen.reason
    model.config.attention_chunk_size = 4
    try:
        chosen = choose_pass_layout("auto", model, alike)
    finally:
        del model.config.attention_chunk_size
    assert chosen.layout == "padded" and "attention chunk size of 4" in chosen.reason


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rewards, "CHUNK_ROWS", 3)


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_pass_goes_on_with_the_first_missing_chunk(run: Any, tmp_path: Path) -> None:
    rows = contrast_rows([2] * 8, include_response=True)
    with pytest.raises(KeyboardInterrupt):
        run(rows, fail_after=1)
    (first,) = (tmp_path / "cache").iterdir()
    written = first.stat().st_mtime_ns
    found, _, calls = run(rows)
    assert calls == 2 + 1, "two chunks, and the check of the reused one"
    assert first.stat().st_mtime_ns == written and len(list((tmp_path / "cache").iterdir())) == 3
    again, _, calls = run(rows)
    assert calls == 1 and again["token_rewards"] == found["token_rewards"], "only the check is left"
    fresh, _, _ = run(rows, weights="other")
    torch.testing.assert_close(flat(fresh["token_rewards"]), flat(found["token_rewards"]), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("small_chunks")
def test_the_key_is_what_the_values_depend_on(run: Any, tmp_path: Path) -> None:
    files = lambda: len(list((tmp_path / "cache").iterdir()))  # noqa: E731
    rows = contrast_rows([2] * 6, include_response=True)
    run(rows)
    assert files() == 2
    run(rows, "padded")
    rescored = rows.map(lambda row: {"scores": [0.5, -0.5], "source_row": 3})
    run(rescored)
    assert files() == 2, "neither layout nor scores change a log-prob"
    other = rows.map(lambda row: {"worse_prompt_ids": [[*ids, 9] for ids in row["worse_prompt_ids"]]})
    assert run(other)[2] == 2 and files() == 4, "another template"
    run(rows, weights="other")
    assert files() == 6
    run(Dataset.from_list([*list(rows)[:3], *list(other)[3:]]))
    assert files() == 6, "chunks are reused one by one"


@pytest.mark.usefixtures("small_chunks")
def test_a_stale_or_damaged_chunk_is_found_out(run: Any, tmp_path: Path) -> None:
    rows = contrast_rows([2] * 6, include_response=False)
    run(rows)
    path = sorted((tmp_path / "cache").iterdir())[0]
    values = load_file(path)["token_logps"]
    save_file({"token_logps": values - 0.01}, path)
    with pytest.raises(CheckpointError, match=rf"differ from the model's by up to 0\.01.*Delete {path} and"):
        run(rows)
    save_file({"token_logps": values[:-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match="Delete"):
        run(rows)


def test_too_long_a_sequence_is_refused_before_anything_is_scored(model: Any) -> None:
    limit = model.config.max_position_embeddings
    rows = contrast_rows([2] * 5, include_response=True)
    room = limit - len(rows[3]["completion_ids"][1])
    rows = rows.map(
        lambda row, i: (
            {"worse_prompt_ids": [row["worse_prompt_ids"][0], [5] * (room + (i == 3))]} if i in (1, 3) else {}
        ),
        with_indices=True,
    )
    token_rewards.refuse_long_sequences(rows.select([0, 2, 4]), model, "train")
    with pytest.raises(DataError) as caught:
        token_rewards.refuse_long_sequences(rows.select([0, 3]), model, "train")
    text = str(caught.value)
    assert f"the model has {limit} positions, and in 1 of 2 rows" in text and f"row 30: {limit + 1} tokens" in text
    assert all(
        way in text for way in ("include_response: false", "max_length", "contrast_prompts", "remove these rows")
    )


def test_every_evaluation_set_is_given_its_rewards(make_trainer: Any, model: Any, tmp_path: Path) -> None:
    """A dictionary of sets, one of which brings rewards of its own."""
    easy, hard = (contrast_rows([2] * 4, include_response=True, seed=seed) for seed in (5, 6))
    own = hard.add_column("token_rewards", [[[0.25] * len(ids) for ids in row] for row in hard["completion_ids"]])
    own = own.remove_columns(["better_prompt_ids", "worse_prompt_ids"])
    trainer = make_trainer(
        "treg",
        settings=BridgeSettings(token_reward_cache=tmp_path / "cache"),
        train_dataset=contrast_rows([2] * 4, include_response=True),
        eval_dataset={"easy": easy, "hard": hard, "own": own},
    )
    for name, rows in (("easy", easy), ("hard", hard)):
        found = flat(trainer.eval_dataset[name]["token_rewards"])
        torch.testing.assert_close(found, flat(naive(model, rows)), atol=1e-5, rtol=0)
    assert set(flat(trainer.eval_dataset["own"]["token_rewards"]).tolist()) == {0.25}
    assert set(trainer.reference.token_reward_reports) == {"train", "eval_easy", "eval_hard", "eval_own"}
    assert {f"eval_{name}_loss/token_regularizer" for name in ("easy", "hard", "own")} <= trainer.evaluate().keys()


# --- report and heat map ----------------------------------------------------------------------------------------------


def reported(*rows: tuple[list[float], list[list[float]]]) -> Any:
    return token_reward_report([{"scores": scores, "token_rewards": rewards} for scores, rewards in rows])


def test_the_report_in_closed_form() -> None:
    first = ([1.0, 0.0], [[0.3, 0.1], [-0.1]])
    second = ([2.0, 1.0, 2.0], [[0.2], [0.1, 0.1, -0.2], [0.0]])
    report = reported(first, second)
    assert (report.num_rows, report.num_tokens, report.share_positive) == (2, 8, 5 / 8)
    assert report.mean == pytest.approx(0.5 / 8)
    assert report.std == pytest.approx((0.21 / 8 - (0.5 / 8) ** 2) ** 0.5)
    # Gaps of the rows: 0.2 + 0.1 and 0.1 - 0.
    assert report.gap == pytest.approx(0.2) and report.gap_standard_error == pytest.approx(0.1)
    assert report.to_dict()["warning"] == report.warning


def test_the_warning_tells_noise_from_signal() -> None:
    def rows(gap: float, spread: float) -> Any:
        return reported(*(([1.0, 0.0], [[gap + sign * spread], [0.0]]) for sign in (1, -1) * 8))

    assert rows(0.1, 0.1).warning is None and "warning" not in str(rows(0.1, 0.1))
    assert "within two standard errors" in rows(0.03, 0.1).warning, "0.03 against a standard error of 0.026"
    assert "rejected tokens get a higher reward" in rows(-0.1, 0.1).warning
    assert "nearly the same" in rows(1e-4, 0.0).warning
    assert "warning: " in str(rows(1e-4, 0.0))
    assert reported(([1.0, 0.0], [[0.4], [-0.4]])).gap_standard_error is None


def test_rewards_beyond_one_half_are_warned_of() -> None:
    """Their sign does not matter, nor that the rewards tell better from worse."""
    pairs = [([1.0, 0.0], [[0.5], [-0.5]]), ([1.0, 0.0], [[0.4], [-0.4]])]
    assert reported(*pairs).warning is None and reported(*pairs).largest == 0.5
    report = reported(*pairs, ([1.0, 0.0], [[0.4], [-3.0]]))
    assert report.largest == 3.0
    assert "  warning: the largest token reward is 3 in magnitude, and they are defined in (-1/2, 1/2)" in str(report)
    both = reported(([1.0, 0.0], [[0.6], [0.6]]), ([1.0, 0.0], [[0.6], [0.6]]))
    assert str(both).count("warning: ") == 2 and "; the largest" in both.to_dict()["warning"]


class Spans(HTMLParser):
    """Texts of the coloured pieces, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "span":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def test_the_heat_map_shows_every_token_escaped(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(make_corpus(50, seed=0), vocab_size=300)
    texts = ['<script>alert("x")</script> & 3 < 4', "naïve 😀\n{braces}"]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rewards = [[(-1) ** t * 0.1 for t in range(len(completion))] for completion in ids]
    row = {"prompt_ids": tokenizer("<b>why?</b>")["input_ids"], "completion_ids": ids, "scores": [1.0, 0.0]}
    write_heatmap(tmp_path / "heat.html", [row | {"token_rewards": rewards}] * 20, tokenizer, num_rows=2)
    page = (tmp_path / "heat.html").read_text(encoding="utf-8")
    parsed = Spans(page)
    shown = "".join(parsed.texts)
    assert page.count("<h2>") == 2 and "chosen, mean" in page and "rejected, mean" in page
    assert texts[0] + "<|endoftext|>" in shown and "naïve 😀↵\n{braces}<|endoftext|>" in shown
    assert page.count("&lt;|endoftext|&gt;</span>") == 4 and "<|endoftext|>" not in page and "&amp;" in page
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "b"} and "http" not in page
    styles = [(attributes["title"], attributes["style"]) for tag, attributes in parsed.tags if tag == "span"]
    assert ("+0.1000", "background:rgba(37,99,235,0.600)") in styles
    assert ("-0.1000", "background:rgba(220,38,38,0.600)") in styles


@pytest.mark.shared
def test_real_rows_packed_and_apart(shared: Path) -> None:
    """GSM8K pairs under the small trained model: the same rewards from both layouts; the gap is not asserted."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gsm-tiny")
    trained = AutoModelForCausalLM.from_pretrained(shared / "models" / "gsm-tiny", dtype=torch.float32).eval()
    add_completion_head(trained)
    pairs = Dataset.from_list(make_pairs(read_questions(GSM8K), seed=0)[:3])
    options = {"max_length": None, "num_candidates": 2, "contrast": load_contrast_prompts()}
    rows, _ = to_candidate_rows(pairs, tokenizer, **options)
    rewards = []
    for layout in LAYOUTS:
        chosen = choose_pass_layout(layout, trained, rows)
        cache = reference.ReferenceCache(Path(token_rewards.default_cache_dir()) / layout)
        found, report = with_token_rewards(
            rows, cache=cache, weights="w", precision="float32", layout=chosen, score=Scorer(trained, chosen)
        )
        rewards.append(flat(found["token_rewards"]))
    assert (rewards[0] - rewards[1]).abs().max() < 1e-4 and 0.005 < report.std < 0.2
