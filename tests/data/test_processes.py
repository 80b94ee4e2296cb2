"""Rows are the same however many processes prepare them, and so is all that is known of them."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignkit.data import processes
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.data.processes import ROWS_PER_PROCESS, process_count
from alignkit.data.report import data_report
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.supervised_tokens import _last_run
from alignkit.errors import DataError, Stopped
from alignkit.runs.arguments import training_arguments
from alignkit.runs.origin import rows_fingerprint
from alignkit.runs.preemption import StopRequest
from alignkit.shapes import _tokens
from alignkit.shapes.tokens import SupervisedConfig
from tests.data.rows import message, pair


def on_a_machine(monkeypatch: pytest.MonkeyPatch, cores: int, **launch: int) -> None:
    """Let this process have so many cores, and be this one of a launch."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("asked", "cores", "rows", "expected"),
    [
        ("auto", 8, 200_000, 8),
        ("auto", 64, 3 * ROWS_PER_PROCESS + 1, 3),
        ("auto", 8, 2 * ROWS_PER_PROCESS - 1, None),
        ("auto", 1, 200_000, None),
        (3, 1, 200, 3),
        (3, 8, 2, 2),
        (1, 8, 200_000, None),
    ],
)
def test_how_many_processes(
    monkeypatch: pytest.MonkeyPatch, asked: Any, cores: int, rows: int, expected: int | None
) -> None:
    on_a_machine(monkeypatch, cores)
    assert process_count(asked, rows) == expected


@pytest.mark.parametrize(("rank", "expected"), [(0, 8), (1, 2), (3, 2)])
def test_the_first_process_of_a_launch_has_all_cores_the_others_share_them(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: int
) -> None:
    on_a_machine(monkeypatch, 8, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=4)
    assert process_count("auto", 200_000) == expected


def preferences() -> list[dict[str, Any]]:
    """Pairs of all sorts: cut, dropped, repeated and contradicting ones among them."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc de\n", k=draw.randint(1, 30))) for _ in range(120)]
    rows = [pair(f"{i}: {texts[i]}?", f"a{texts[i + 1]}", f"b{texts[i + 2]}") for i in range(118)]
    rows[30] = pair("q: ", "same", "same")
    rows[60], rows[90] = rows[3], pair(rows[5]["prompt"], rows[5]["rejected"], rows[5]["chosen"])
    return rows


def chats() -> list[dict[str, Any]]:
    """Conversations of one or two exchanges, one of them without an answer."""
    turns = [[message("user", row["prompt"]), message("assistant", row["chosen"])] for row in preferences()]
    rows = [{"messages": turn + turns[i - 1] * (i % 2)} for i, turn in enumerate(turns)]
    return rows


def prepared(kind: str, source: str, tokenizer: PreTrainedTokenizerFast, count: Any) -> tuple[Dataset, Any]:
    """The rows of a file, converted, and their report."""
    shared = {"max_length": 40, "num_proc": count, "max_dropped_fraction": 0.5}
    if kind == "supervised":
        return to_supervised_rows(load_rows(source, family=supervised_rows()), tokenizer, **shared)
    return to_candidate_rows(load_rows(source), tokenizer, num_candidates=2, **shared)


@pytest.mark.parametrize("kind", ["preferences", "supervised"])
def test_rows_report_and_cache_are_those_of_one_process(
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[[str, Sequence[Any]], str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    rows = chats() if kind == "supervised" else preferences()
    # Two files of the same rows: what one of them left in the cache is not there for the other.
    one, report = prepared(kind, write_jsonl("one.jsonl", rows), tokenizer, 1)
    on_a_machine(monkeypatch, 2)
    monkeypatch.setattr(processes, "ROWS_PER_PROCESS", 50)
    source = write_jsonl("two.jsonl", rows)
    two, report_of_two = prepared(kind, source, tokenizer, "auto")
    assert len(one.cache_files) == 1 and len(two.cache_files) == 2, "auto took no second process"
    assert list(one) == list(two) and one.features == two.features
    assert report == report_of_two and report.num_rows_in == len(rows)
    assert data_report({"train": (one, report)}, tokenizer) == data_report({"train": (two, report)}, tokenizer)
    assert rows_fingerprint(one) == rows_fingerprint(two)
    # The key of the cache holds no number of processes: what two have made is found by one, and by three.
    for count in (1, 3):
        again, _ = prepared(kind, source, tokenizer, count)
        assert again.cache_files == two.cache_files
        assert again._fingerprint == two._fingerprint


def stop_the_parent(*_: Any) -> list[Any]:
    """What a scheduler does while a worker is busy."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
    return []


def die(*_: Any) -> list[Any]:
    """What the system does to a worker when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_a_signal_while_workers_prepare_rows_stops_the_run(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.data.candidates.row_problems", stop_the_parent)
    begun = time.monotonic()
    with StopRequest().heard() as request, pytest.raises(Stopped) as stopped:
        to_candidate_rows(Dataset.from_list(preferences()), tokenizer, max_length=40, num_candidates=2, num_proc=2)
    assert stopped.value.signal == request.signal == signal.SIGTERM
    assert time.monotonic() - begun < 30


def test_a_worker_that_is_lost_is_said(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.data.candidates.row_problems", die)
    with pytest.raises(DataError, match="a worker process was ended.*write a smaller dataset_num_proc"):
        to_candidate_rows(Dataset.from_list(preferences()), tokenizer, max_length=40, num_candidates=2, num_proc=2)


def test_packing_does_not_depend_on_the_processes() -> None:
    """TRL packs every process's share for itself, so that their number would change the rows."""
    config = SupervisedConfig(
        model="m", data="d", output_dir="o", method="sft", use_cpu=True, packing=True, dataset_num_proc=2
    )
    assert training_arguments(config, _tokens, {}).dataset_num_proc is None


def test_the_last_trained_run_of_a_row() -> None:
    draw = random.Random(0)
    for length in (0, 1, 2, 3, 5, 8) * 40:
        mask = [draw.randint(0, 1) for _ in range(length)]
        runs, place = [], 0
        for trained, group in groupby(mask):
            end = place + len(list(group))
            runs += [range(place, end)] * trained
            place = end
        assert _last_run(mask) == (runs[-1] if runs else range(0)), mask
