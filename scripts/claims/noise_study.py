"""The study of flipped labels on real rows: its runs, kept one a line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from alignkit.models._forward import add_completion_head
from alignkit.models.loading import load_tokenizer
from noise_rows import LabelledRow, Question, draw_rows, flip, gsm8k_questions, short_enough, truthfulqa_questions
from noise_runs import METHODS, measure, run
from noise_task import Budget, Task, draw_samples, prepare_task, token_rewards

STAGES = ((0.0, 0.4), (0.2,))
"""Shares of flipped labels; all seeds of a stage are run before the next, so that an unfinished study has intervals."""
SHARES = tuple(share for stage in STAGES for share in stage)
START = "start"
"""Name of the record of the untrained model."""
REWARDS = "token rewards"
"""Name of the record of T-REG's token rewards."""

Record = dict[str, Any]
"""``data``, ``seed``, ``method``, ``share``, ``seconds`` and ``figures``."""


@dataclass(frozen=True)
class Source:
    """A data set of the study."""

    path: Path
    read: Callable[[Path], list[Question]]
    budget: Budget


def sources(solutions: Path, truthfulqa: Path, steps: int) -> dict[str, Source]:
    """The two data sets, with what a run on them costs.

    Args:
        solutions: ``example_model_solutions.jsonl``.
        truthfulqa: ``TruthfulQA.csv``.
        steps: Optimiser steps of a run.
    """
    return {
        "TruthfulQA": Source(truthfulqa, truthfulqa_questions, Budget(8, 64, 32, held_out=200, steps=steps)),
        "GSM8K": Source(solutions, gsm8k_questions, Budget(4, 192, 64, held_out=80, steps=steps)),
    }


def read_records(path: Path) -> list[Record]:
    """The finished runs; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def keys(data: str, seed: int) -> list[tuple[str, int, str, float]]:
    """All runs of a seed on a data set; robust DPO told that nothing is flipped is DPO, and left out."""
    runs = [(data, seed, method, share) for share in SHARES for method in METHODS]
    plain = [(data, seed, START, 0.0), (data, seed, REWARDS, 0.0)]
    return plain + [key for key in runs if (key[2], key[3]) != ("TRL robust, told", 0.0)]


def key_of(record: Record) -> tuple[str, int, str, float]:
    """What a record is of."""
    return record["data"], record["seed"], record["method"], record["share"]


def run_all(given: Mapping[str, Source], num_seeds: int, model: Path, directory: Path) -> list[Record]:
    """Every run that is not in ``runs.jsonl`` of the directory yet; the records of all of them.

    Args:
        given: The data sets.
        num_seeds: Seeds 0, 1, ...
        directory: Of the study.
    """
    path = directory / "runs.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    done = {key_of(record) for record in read_records(path)}
    for data, source in given.items():
        for stage, seed in product(STAGES, range(num_seeds)):
            missing = [key for key in keys(data, seed) if key[3] in stage and key not in done]
            if missing:
                _run_seed(missing, source, model, directory)
    return read_records(path)


def _run_seed(missing: Sequence[tuple[str, int, str, float]], source: Source, model: Path, directory: Path) -> None:
    data, seed = missing[0][:2]
    questions = short_enough(source.read(source.path), load_tokenizer(str(model)), source.budget.max_length)
    prompts = [question.prompt for question in questions]
    samples = draw_samples(prompts, model, source.budget.max_new_tokens, directory / data / "samples")
    task = prepare_task(
        draw_rows(questions, seed),
        model_path=model,
        budget=source.budget,
        seed=seed,
        samples=samples,
        directory=directory / data / f"seed{seed}",
    )
    rewarded, report = token_rewards(task)
    for key in missing:
        started = time.perf_counter()
        figures = _figures(task, key, rewarded, report.to_dict())
        names = ("data", "seed", "method", "share")
        record = {**dict(zip(names, key, strict=True)), "seconds": time.perf_counter() - started, "figures": figures}
        with (directory / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(*key, f"{record['seconds']:.0f} s", flush=True)


def _figures(task: Task, key: tuple[str, int, str, float], rewarded: Any, report: dict[str, Any]) -> dict[str, Any]:
    _, seed, method, share = key
    if method == REWARDS:
        return report
    if method == START:
        model = task.load()
        add_completion_head(model)
        sizes = {"train_rows": len(task.train), "held_out_rows": len(task.held_out)}
        return {**measure(task, model), **sizes, **asdict(task.budget)}
    rows: list[LabelledRow] = flip(task.train, share, seed)
    return run(task, method, rows, share, rewarded)
