"""Filters, new draws, causes, scores, resumption and the report, with answers written down beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset

from alignkit.data.candidates import to_candidate_rows
from alignkit.errors import ConfigError, DataError
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource
from alignkit.sampling.candidates import (
    Prompts,
    Sampled,
    SampleSettings,
    candidate_lists,
    check_room,
    prepare_prompts,
    sample_candidates,
)
from alignkit.sampling.engines import HuggingFaceEngine, Request
from alignkit.sampling.generation import Sample
from alignkit.sampling.report import SettingNames
from alignkit.sampling.scorer import Scorer, load_scorer
from alignkit.sampling.self_samples import SETTING_NAMES, self_samples
from alignkit.sampling.store import ChunkStore, source_identity, write_rows
from tests.scripts.tiny import byte_tokenizer, save_adapter, save_model, tiny_model

SETTINGS = SampleSettings(num_samples=2, max_new_tokens=8, chunk_size=2, max_resamples=2)
NEGATIVE = "bad "
NAMES = SettingNames("--max_new_tokens", "--max_prompt_length", "--drop_unfinished")
Script = dict[tuple[int, int, int], str]


class Written:
    """An engine whose answers are written down by (row, candidate, attempt); ``~`` at the end: it did not stop."""

    def __init__(self, script: Script | None = None, fail_at: int = -1) -> None:
        self.script, self.fail_at, self.rounds = script or {}, fail_at, []

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        if len(self.rounds) == self.fail_at:
            raise RuntimeError("the power is cut")
        keys = [(request.row, request.candidate, request.attempt) for request in requests]
        self.rounds.append(keys)
        texts = [self.script.get(key, "row {} sample {} try {}".format(*key)) for key in keys]
        return [Sample(text.rstrip("~"), len(text), not text.endswith("~"), 0.5) for text in texts]


def prompts_of(count: int, *, negatives: bool = True) -> Prompts:
    """Prompts of which the last is the longest."""
    rows = [{"prompt": "?" * (3 + i), "rejected": NEGATIVE, "id": i} for i in range(count)]
    return prepare_prompts(rows, byte_tokenizer(), instruction=None, negatives=negatives)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Sampled]:
    """Sample with written answers; the store is new each time unless ``store`` is given."""

    def start(
        script: Script | None = None,
        *,
        count: int = 3,
        negatives: bool = True,
        scorer: Scorer | None = None,
        limit: int | None = None,
        store: ChunkStore | None = None,
        **changes: Any,
    ) -> Sampled:
        prompts = prompts_of(count, negatives=negatives)
        names = changes.pop("names", NAMES)
        place = store or ChunkStore(tmp_path / f"store{len(list(tmp_path.iterdir()))}", {})
        options: dict[str, Any] = {"store": place, "scorer": scorer, "prompt_limit": limit, "state": PartialState()}
        return candidate_lists(
            prompts, sample_candidates(prompts, Written(script), replace(SETTINGS, **changes), **options), names
        )

    return start


def test_what_equals_the_negative_is_drawn_again(run: Callable[..., Sampled]) -> None:
    """Row 0 gets its sample on the second draw, row 1 keeps one, row 2 none within two new draws."""
    bad = {(1, 1, attempt): f" {NEGATIVE}\n" for attempt in range(3)}
    worse = {(2, candidate, attempt): NEGATIVE for candidate in range(2) for attempt in range(3)}
    found = run({(0, 1, 0): NEGATIVE, **bad, **worse})
    assert [row["completions"] for row in found.rows] == [
        ["row 0 sample 0 try 0", "row 0 sample 1 try 1", NEGATIVE],
        ["row 1 sample 0 try 0", NEGATIVE],
    ]
    assert [row["scores"] for row in found.rows] == [[1, 1, 0], [1, 0]]
    assert [(row["prompt"], row["id"]) for row in found.rows] == [("???", 0), ("????", 1)]
    report = found.report
    assert (report.num_prompts, report.num_rows, report.samples_per_row) == (3, 2, {1: 1, 2: 1})
    assert report.dropped_rows == {"no sample is left": 1}
    assert report.num_draws == 3 + 10 and report.dropped_samples == {"identical to the negative": 10 / 13}
    assert report.mean_samples == 1.5 and report.to_dict()["num_rows"] == 2


def test_ragged_rows_are_accepted(run: Callable[..., Sampled], tmp_path: Path) -> None:
    found = run({(1, 1, attempt): NEGATIVE for attempt in range(3)})
    write_rows(tmp_path / "rows.jsonl", found.rows)
    write_rows(tmp_path / "rows.parquet", found.rows)
    for read, file in ((Dataset.from_json, "rows.jsonl"), (Dataset.from_parquet, "rows.parquet")):
        dataset = read(str(tmp_path / file), cache_dir=str(tmp_path / "cache"))
        assert list(dataset) == found.rows
        rows, report = to_candidate_rows(dataset, byte_tokenizer(), max_length=None, num_candidates=None)
        assert report.candidates_per_row == {2: 1, 3: 2} and [len(scores) for scores in rows["scores"]] == [3, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["rows.jsonl", "rows.parquet"]


def test_the_other_filters(run: Callable[..., Sampled]) -> None:
    same = {(0, 1, attempt): "row 0 sample 0 try 0 " for attempt in range(3)}
    script = {**same, (1, 0, 0): " \n", (2, 0, 0): "cut~", (2, 1, 0): "cut~"}
    plain = run(script)
    assert [row["completions"][:-1] for row in plain.rows] == [
        ["row 0 sample 0 try 0", "row 0 sample 0 try 0 "],
        ["row 1 sample 0 try 1", "row 1 sample 1 try 0"],
        ["cut", "cut"],
    ]
    report = plain.report
    assert report.share_duplicates == 2 / 6 and report.share_finished == 4 / 6 and report.mean_repetition == 0.5
    assert report.dropped_samples == {"empty": 1 / 7} and report.mean_tokens == (20 + 21 + 20 + 20 + 4 + 4) / 6
    assert "33.3% of the samples were cut for their length" in report.render() and "stopped by" in report.render()
    assert report.render().endswith("Raise --max_new_tokens, or drop them with --drop_unfinished")
    in_a_run = run(script, names=SETTING_NAMES).report.render("samples of train")
    assert in_a_run.startswith("samples of train") and in_a_run.endswith("Raise sampling_max_new_tokens")
    strict = run(script, unique=True, drop_unfinished=True)
    assert [row["completions"][:-1] for row in strict.rows] == [
        ["row 0 sample 0 try 0"],
        ["row 1 sample 0 try 1", "row 1 sample 1 try 0"],
        ["row 2 sample 0 try 1", "row 2 sample 1 try 1"],
    ]
    assert strict.report.dropped_samples == {"did not stop": 2 / 11, "duplicate": 3 / 11, "empty": 1 / 11}
    assert strict.report.notes == () and strict.report.share_finished == 1


def test_greedy_answers_are_not_asked_for_again(run: Callable[..., Sampled]) -> None:
    found = run({(0, 0, 0): NEGATIVE}, num_samples=1, temperature=0.0)
    assert found.report.dropped_rows == {"no sample is left": 1} and found.report.num_draws == 3


def test_prompts_that_leave_no_room_are_counted(run: Callable[..., Sampled]) -> None:
    found = run(limit=4)
    assert [row["id"] for row in found.rows] == [0, 1]
    assert found.report.dropped_rows == {"the prompt leaves no room for a sample": 1} and found.report.num_prompts == 3
    with pytest.raises(DataError, match="the prompt leaves no room for a sample: 3 of 3 rows"):
        run(limit=2)


def test_limits_of_the_model() -> None:
    config = tiny_model().config
    assert SampleSettings(max_new_tokens=500).prompt_limit(config) == 12
    assert SampleSettings(max_new_tokens=600).prompt_limit(config) == 0
    assert SampleSettings(max_new_tokens=500, max_prompt_length=7).prompt_limit(config) == 7


@pytest.mark.parametrize(
    ("settings", "allowed", "expected"),
    [
        ({"max_new_tokens": 508}, 1.0, 4),
        ({"max_new_tokens": 508}, 0.34, 4),
        ({"max_new_tokens": 508}, 0.33, "1 of 3.*508 of the model's 512 positions.*3 to 5.* to 507 or less"),
        ({"max_new_tokens": 510}, 1.0, "3 of 3.*takes 510 of the model's 512 .*set --max_new_tokens to 507 or less"),
        (
            {"max_prompt_length": 2},
            1.0,
            r"3 of 3[^\n]*: 1 problem\n.*--max_prompt_length is 2.*3 to 5 tokens: raise it",
        ),
    ],
)
def test_prompts_without_room_are_refused_with_figures(
    settings: dict[str, int], allowed: float, expected: int | str
) -> None:
    """Prompts of 3, 4 and 5 tokens and 512 positions."""
    words: tuple[Any, ...] = (prompts_of(3), SampleSettings(**settings), tiny_model().config, NAMES)
    if isinstance(expected, int):
        assert check_room(*words, max_dropped_fraction=allowed) == expected
        return
    with pytest.raises(DataError, match=rf"(?s)^rows: {expected}"):
        check_room(*words, max_dropped_fraction=allowed, name="rows")


def test_prompts_that_fill_the_model_cannot_all_be_kept() -> None:
    rows = [{"prompt": "?" * length, "rejected": NEGATIVE} for length in (500, 512)]
    prompts = prepare_prompts(rows, byte_tokenizer(), instruction=None)
    with pytest.raises(DataError, match="500 to 512 tokens: leave out the longest rows, and lower --max_new_tokens"):
        check_room(prompts, replace(SETTINGS, max_new_tokens=20), tiny_model().config, NAMES)


def test_a_stopped_run_continues_and_gives_the_same_rows(run: Callable[..., Sampled], tmp_path: Path) -> None:
    script = {(0, 1, 0): NEGATIVE, (4, 0, 0): ""}
    whole = run(script, count=5)
    store = ChunkStore(tmp_path / "stopped", {"seed": 0})
    options: dict[str, Any] = {"store": store, "state": PartialState()}
    with pytest.raises(RuntimeError, match="power"):
        sample_candidates(prompts_of(5), Written(script, fail_at=2), SETTINGS, **options)
    assert sorted(path.name for path in store.directory.iterdir()) == ["chunk-000000.jsonl", "settings.json"]
    # What a kill leaves of a file that was being written is not taken for a chunk.
    (store.directory / ".chunk-000001.jsonl.partial").write_text('{"row": 1, "te')
    engine = Written(script)
    records = sample_candidates(prompts_of(5), engine, SETTINGS, **options)
    assert candidate_lists(prompts_of(5), records, NAMES) == whole
    assert engine.rounds[0] == [(2, 0, 0), (2, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert not any(row > 2 for round_ in engine.rounds for row, _, _ in round_)
    again = Written(script)
    assert sample_candidates(prompts_of(5), again, SETTINGS, **options) == records and again.rounds == []
    assert store.read() == records
    store.remove()
    assert not store.directory.exists()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    ChunkStore(tmp_path / "store", {"seed": 0, "top_p": 1.0, "model": "a"}).done()
    with pytest.raises(ConfigError) as raised:
        ChunkStore(tmp_path / "store", {"seed": 1, "top_p": 1.0, "instruction": "Hi"}).done()
    message = str(raised.value)
    assert "was begun with other settings" in message and "top_p" not in message
    assert "seed: 0 then, 1 now" in message and "model: 'a' then, None now" in message
    assert "instruction: None then, 'Hi' now" in message and f"remove {tmp_path / 'store'}" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="it has no settings.json"):
        ChunkStore(tmp_path / "mine", {}).done()


def test_weights_and_configs_are_known_by_their_bytes(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(save_model(tmp_path / "base"), tmp_path / "adapter"))
    source = ModelSource(str(tmp_path / "base"))
    first = source_identity(source, adapter)
    assert source_identity(source, adapter) == first and source_identity(source, None)["adapter_weights"] is None
    save_model(tmp_path / "base", seed=1)
    changed = source_identity(source, adapter)
    assert [name for name in first if first[name] != changed[name]] == ["weights"]
    for folder, name, key in (("base", "config.json", "weights"), ("adapter", "adapter_config.json", "adapter_config")):
        before, file = source_identity(source, adapter), tmp_path / folder / name
        file.write_text(file.read_text().replace("{", '{"another": "function",', 1))
        assert [k for k, v in source_identity(source, adapter).items() if v != before[k]] == [key]


def test_scores(run: Callable[..., Sampled]) -> None:
    asked: list[Any] = []

    def scorer(prompt: str, completions: list[str]) -> list[float]:
        asked.append((prompt, completions))
        return [0.0 if prompt == "????" else float(len(text)) for text in completions]

    found = run(scorer=scorer)
    assert [row["scores"] for row in found.rows] == [[20, 20, len(NEGATIVE)]] * 2
    assert ("???", ["row 0 sample 0 try 0", "row 0 sample 1 try 0", NEGATIVE]) in asked
    assert found.report.dropped_rows == {"the scorer gave all completions the same score": 1}


def test_lists_without_a_negative(run: Callable[..., Sampled]) -> None:
    script = {(0, 0, attempt): "" for attempt in range(3)} | {(1, 0, 0): "same", (1, 1, 0): "same"}
    found = run(script, negatives=False, scorer=lambda prompt, completions: range(len(completions)))
    assert [(row["completions"], row["scores"]) for row in found.rows] == [
        (["row 2 sample 0 try 0", "row 2 sample 1 try 0"], [0, 1])
    ]
    assert found.report.dropped_rows == {"fewer than 2 samples": 1, "all samples are identical": 1}


@pytest.mark.parametrize("given", [[1.0, 2.0], [1.0, math.nan, 0.0], [1.0, math.inf, 0.0], 3.0, ["a", "b", "c"], None])
def test_scorers_that_are_wrong(given: Any, run: Callable[..., Sampled]) -> None:
    with pytest.raises(DataError, match="row 2: it must return a list of 3 finite numbers for 3 completions, not"):
        run(scorer=lambda prompt, completions: given)


def test_a_scorer_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("LIMIT = 3\ndef score(prompt, completions):\n    return [LIMIT] * len(completions)\n")
    assert load_scorer(file, "score")("p", ["a", "b"]) == [3, 3]
    for name in ("scores", "LIMIT"):
        with pytest.raises(ConfigError, match=f"has no function '{name}'; it has score"):
            load_scorer(file, name)


def test_a_model_samples_for_its_own_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SampleSettings(num_samples=3, max_new_tokens=6, batch_size=2, instruction="Speak of zebras.")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(3)
    ]
    model, tokenizer = tiny_model(), byte_tokenizer()
    words: tuple[Any, ...] = (prepare_prompts(rows, tokenizer, instruction="Speak of zebras."), model, tokenizer)
    sampled = self_samples(*words, settings, tmp_path / "cache", weights="w0")
    assert "zebras" not in json.dumps(sampled.rows) and [len(row["completions"]) for row in sampled.rows] == [4] * 3
    assert [row["prompt"] for row in sampled.rows] == [row["prompt"] for row in rows]
    uninstructed = prepare_prompts(rows, tokenizer, instruction=None)
    plain = self_samples(
        uninstructed, model, tokenizer, replace(settings, instruction=None), tmp_path / "cache", weights="w0"
    )
    assert plain.rows != sampled.rows
    calls: list[int] = []
    monkeypatch.setattr(HuggingFaceEngine, "__call__", lambda self, requests: calls.append(len(requests)) or [])
    dataset = Dataset.from_list(self_samples(*words, settings, tmp_path / "cache", weights="w0").rows)
    assert list(dataset) == sampled.rows and calls == []
    _, report = to_candidate_rows(dataset, tokenizer, max_length=None, num_candidates=None)
    assert report.candidates_per_row == {4: 3}
    with pytest.raises(ValueError, match="zip"):
        self_samples(*words, settings, tmp_path / "cache", weights="w1")
    assert calls == [9]
