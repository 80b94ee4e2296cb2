"""Start of a run, from the command to its first step: where the time goes, and rows a second.

    python scripts/benchmark_startup.py                               # 200,000 preference rows on all cores
    python scripts/benchmark_startup.py --program sft --chat --rows 50000 --processes 1
    python scripts/benchmark_startup.py --model MODEL --data rows.jsonl

Without --model and --data, rows of texts of 30 to 80 words are made up, and a small model with a tokenizer trained on
them. The caches are empty. Beside seconds on the clock stands processor time of all processes: where they differ by
more than the number of cores, the machine was doing something else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignkit.programs.arguments import StrictParser, positive_int
from alignkit.programs.entry import run_program

PHASES = {
    "read the files": ("alignkit.runs.rows", "load_splits"),
    "check and tokenise": ("alignkit.runs.rows", "convert_splits"),
    "report": ("alignkit.runs.rows", "report_data"),
    "hash what the run is made of": ("alignkit.runs.origin", "record_origin"),
    "load the model, choose the layout": ("alignkit.runs.run", "_trainer"),
    "up to the first step": ("alignkit.runs.steps", "train"),
}
"""Phase to the step of a run that is timed."""


class FirstStep(Exception):
    """Ends the run where its first step would begin."""


class Clock:
    """Seconds on the clock and of the processors, by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}

    def timed(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` with its time added to a phase."""

        def run(*arguments: Any, **named: Any) -> Any:
            begin = times()
            try:
                return work(*arguments, **named)
            finally:
                before = self.spent.get(phase, (0.0, 0.0))
                self.spent[phase] = tuple(b + now - then for b, now, then in zip(before, times(), begin, strict=True))

        return run


def times() -> tuple[float, float]:
    """The clock, and processor time of this process and of those it has started and seen end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def texts(draw: random.Random) -> Iterator[str]:
    """Endless problems and answers in words and numbers."""
    letters = "bcdfghklmnprstvz"
    stems = [a + v + b + w for a in letters for v in "aeiou" for b in letters for w in ("", "el", "er", "ing")]
    words = draw.sample(stems, 3000)
    weights = [1 / (rank + 3) for rank in range(len(words))]
    while True:
        sentences = []
        for _ in range(draw.randint(3, 7)):
            chosen = draw.choices(words, weights, k=8)
            a, b = draw.randint(2, 999), draw.randint(2, 99)
            sentences.append(f"{chosen[0].capitalize()} {' '.join(chosen[1:])}: {a} * {b} = {a * b}.")
        yield "\n".join(sentences)


def write_rows(path: Path, options: argparse.Namespace) -> None:
    """Rows of the asked form."""
    source = texts(random.Random(0))

    def told(role: str) -> Any:
        return [{"role": role, "content": next(source)}] if options.chat else next(source)

    answers = ("completion",) if options.program == "sft" else ("chosen", "rejected")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            row = {"prompt": told("user"), **{name: told("assistant") for name in answers}}
            file.write(json.dumps(row) + "\n")


def save_model(directory: str) -> None:
    """A model of half a million weights, and a byte-level BPE tokenizer of 2,048 tokens."""
    from alignkit.data.synthetic import tiny_model, train_tokenizer

    source = texts(random.Random(1))
    corpus = [[{"role": "user", "content": next(source)}] for _ in range(2000)]
    tokenizer = train_tokenizer(corpus, vocab_size=2048)
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, seed=0).save_pretrained(directory)


def start(options: argparse.Namespace, model: str, data: str, scratch: str) -> Clock:
    """Take a run up to its first step."""
    clock, run = Clock(), f"{scratch}/run"
    given = {"model": model, "data": data, "output_dir": run, "max_steps": 1, "use_cpu": "true", "report_to": "none"}
    given |= {"method": "sft" if options.program == "sft" else "dpo", "dataset_num_proc": options.processes}

    def load() -> Any:
        from alignkit.config import parse_program_arguments

        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        loaded = parse_program_arguments(options.program, words)
        return loaded, importlib.import_module("alignkit.runs.run")

    loaded, program = clock.timed("read the config, import the libraries", load)()
    for phase, (module, name) in PHASES.items():
        place = importlib.import_module(module)
        setattr(place, name, clock.timed(phase, getattr(place, name)))
    trainer = importlib.import_module("transformers").Trainer

    def stop(*_: Any, **__: Any) -> None:
        raise FirstStep

    trainer.training_step = stop
    try:
        getattr(program, f"train_{options.program}")(loaded)
    except FirstStep:
        return clock
    raise RuntimeError("the run took no step")


def show(clock: Clock, total: tuple[float, float], num_rows: int) -> None:
    """The table of phases."""
    print(f"\n{'phase':<40}{'seconds':>9}{'processor':>11}{'rows/s':>10}")
    other = tuple(whole - sum(spent[i] for spent in clock.spent.values()) for i, whole in enumerate(total))
    for phase, (wall, cpu) in {**clock.spent, "the rest": other, "all": total}.items():
        print(f"{phase:<40}{wall:>9.1f}{cpu:>11.1f}{num_rows / max(wall, 1e-9):>10,.0f}")


def main() -> None:
    """One start."""
    parser = StrictParser(*__doc__.split("\n\n", 1))
    parser.add_argument("--program", choices=("preference", "sft"), default="preference")
    parser.add_argument("--rows", type=positive_int, default=200_000, help="rows to make up")
    parser.add_argument("--processes", default="auto", help="dataset_num_proc of the run")
    parser.add_argument("--chat", action="store_true", help="make up messages rather than plain text")
    parser.add_argument("--model", help="a model in place of the one that is made")
    parser.add_argument("--data", help="rows in place of those that are made up")
    options = parser.parse()
    with tempfile.TemporaryDirectory() as scratch:
        # The libraries read it when they are imported.
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"
        model, data = options.model or f"{scratch}/model", options.data or f"{scratch}/rows.jsonl"
        if options.data is None:
            write_rows(Path(data), options)
        if options.model is None:
            making = multiprocessing.Process(target=save_model, args=(model,))  # apart: the run imports for itself
            making.start()
            making.join()
        with open(data, "rb") as file:
            num_rows = sum(1 for _ in file)
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        begin = times()
        clock = start(options, model, data, scratch)
        total = tuple(now - then for now, then in zip(times(), begin, strict=True))
        print(
            f"\n{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, load before {load}; "
            f"{options.program}, {num_rows:,} rows, {os.path.getsize(data) / 2**20:,.0f} MiB, "
            f"dataset_num_proc {options.processes}"
        )
        show(clock, total, num_rows)


if __name__ == "__main__":
    run_program(main)
