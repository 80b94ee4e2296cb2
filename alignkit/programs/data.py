"""Say what rows hold before anything is trained on them, and write those that are worth it.

    alignkit data pairs.jsonl
    alignkit data talks.jsonl more/*.parquet --model Qwen/Qwen3-0.6B --max_length 2048
    alignkit data pairs.jsonl --model Qwen/Qwen3-0.6B --eval_data heldout.jsonl --output report.html
    alignkit data pairs.jsonl --write cleaned.jsonl --drop duplicates alike

The rows are those of any program; which one is seen by their columns. With --model the report is the one that a run
prints before its first step, with the same numbers. Without it everything that needs no tokenizer is said. Both go on
with rows that a run would refuse: those are counted, shown, and left out of what --write writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError
from alignkit.parts.method import load_method, method_names
from alignkit.parts.shape import shapes_by_program
from alignkit.programs.arguments import StrictParser, column_pair, non_negative_int, positive_int
from alignkit.programs.outputs import add_overwrite, output_problems
from alignkit.storage.durability import write_lines, write_whole

if TYPE_CHECKING:
    from datasets import Dataset

    from alignkit.config.base import ProgramConfig

PAGES = (".html", ".json")
ROWS = ".jsonl"
DROPS = ("duplicates", "alike", "overlap")
NO_LIMIT = 2**31 - 1


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the rows, look at them, and write what is asked for."""
    parser = command_line(prog)
    arguments = parser.parse(words)
    check_arguments(arguments, parser.prog)
    # Not before the words are judged.
    import datasets

    from alignkit.models.loading import generation_stop_ids
    from alignkit.programs.data_blocks import as_json, blocks_of
    from alignkit.programs.data_steps import examine, recognise, stand_in
    from alignkit.reports.blocks import as_page, as_text
    from alignkit.runs.preemption import StopRequest
    from alignkit.runs.rows import load_splits, load_tokenizer

    datasets.disable_progress_bars()
    columns = dict(arguments.column_map)
    shape, method = recognise(
        arguments.data, split=arguments.split, column_map=columns, program=arguments.program, method=arguments.method
    )
    config = config_of(shape.config, method, arguments)
    tokenizer = stand_in() if arguments.model is None else load_tokenizer(config)
    stops = [] if arguments.model is None else generation_stop_ids(config.model, config.model_revision)
    # A signal is to end the workers, too.
    with StopRequest().heard():
        found = examine(config, shape, load_splits(config, tokenizer), tokenizer, stops)
    has_model = arguments.model is not None
    cleaned = None
    if arguments.write is not None:
        rows = found.splits["train"].cleaned(arguments.drop)
        if not len(rows):
            raise DataError("--write: no row is left", found.problems or ["every row is dropped"])
        write_lines(arguments.write, lines_of(rows))
        cleaned = (str(arguments.write), len(rows))
    blocks = blocks_of(found, tokenizer, has_model=has_model, num_examples=arguments.examples, cleaned=cleaned)
    print(as_text(blocks))
    if arguments.output is not None and arguments.output.suffix == ".html":
        write_whole(arguments.output, as_page(f"Rows of {', '.join(arguments.data)}", [*blocks[-1:], *blocks[:-1]]))
    elif arguments.output is not None:
        content = as_json(found, has_model=has_model)
        write_whole(arguments.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("data", nargs="+", metavar="FILE", help="rows: files, folders, patterns or Hub ids")
    parser.add_argument("--model", help="folder or Hub id of the model whose tokenizer and chat template are used")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja file in place of the tokenizer's")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument(
        "--program", choices=sorted(shapes_by_program()), help="whose rows they are; None: seen by them"
    )
    parser.add_argument("--method", choices=method_names(), help="the method to come, where it asks more of the rows")
    parser.add_argument("--split", default="train", help="split of Hub ids and folders")
    parser.add_argument("--eval_data", nargs="+", metavar="FILE", help="held-out rows, compared with the others")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument("--apply_chat_template", action="store_true", help="turn plain prompts and answers to messages")
    parser.add_argument("--max_rows", type=positive_int, help="look at only so many rows")
    parser.add_argument("--max_length", type=positive_int, help="longest row, tokens; by default that of a run")
    parser.add_argument("--examples", type=non_negative_int, default=3, help="rows to show")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as .html or .json too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the rows that a run would keep, as .jsonl")
    parser.add_argument(
        "--drop",
        nargs="+",
        default=[],
        choices=DROPS,
        help="what --write leaves out besides: rows that repeat an earlier one, near-duplicates, rows held out as well",
    )
    add_overwrite(parser)
    return parser


def check_arguments(arguments: argparse.Namespace, prog: str) -> None:
    """Refuse what cannot work, all of it together, before any file is read.

    Raises:
        ConfigError: Some of the words make no sense.
    """
    from alignkit.data.similar import MISSING, can_compare

    problems = []
    if arguments.output is not None and arguments.output.suffix not in PAGES:
        problems.append(f"--output: {arguments.output} must end in {' or '.join(PAGES)}")
    if arguments.write is not None and arguments.write.suffix != ROWS:
        problems.append(f"--write: {arguments.write} must end in {ROWS}")
    of_method = load_method(arguments.method).program if arguments.method else arguments.program
    if arguments.program not in (None, of_method):
        problems.append(f"--method: {arguments.method} is one of {of_method} runs: leave --program out, or change it")
    if arguments.write is None and arguments.drop:
        problems.append(f"--drop says what a written file does without: add --write FILE{ROWS}")
    if "alike" in arguments.drop and not can_compare():
        problems.append(f"--drop alike: {MISSING}; --drop duplicates needs nothing")
    if "overlap" in arguments.drop and arguments.eval_data is None:
        problems.append("--drop overlap compares with held-out rows: add --eval_data FILE")
    if arguments.chat_template is not None and not Path(arguments.chat_template).is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    if arguments.model is None:
        given = [name for name in ("max_length", "chat_template", "revision") if getattr(arguments, name) is not None]
        problems += [f"--{name} says something of tokens: add --model" for name in given]
    problems += output_problems(arguments, "output", "write")
    if problems:
        raise ConfigError(prog, problems)


def config_of(config: Any, method: str, arguments: argparse.Namespace) -> ProgramConfig:
    """The config of a run on these rows; what the command line does not say has its default.

    Args:
        config: Class of the configuration.
    """
    names = {field.name for field in fields(config)}
    length_key = "max_prompt_length" if "max_prompt_length" in names else "max_length"
    # What is wanted of rows does not depend on what answers are to be worth.
    rewards = {"rewards": []} if "rewards" in names else {}
    made: ProgramConfig = config(
        **rewards,
        model=arguments.model or "",
        model_revision=arguments.revision,
        chat_template=arguments.chat_template,
        trust_remote_code=arguments.trust_remote_code,
        data=arguments.data,
        data_split=arguments.split,
        eval_data=arguments.eval_data,
        eval_split=arguments.split,
        column_map=dict(arguments.column_map),
        apply_chat_template=arguments.apply_chat_template,
        max_rows=arguments.max_rows,
        method=method,
        output_dir="",
    )
    limit = NO_LIMIT if arguments.model is None else arguments.max_length
    return made if limit is None else replace(made, **{length_key: limit})


def lines_of(rows: Dataset) -> Iterator[str]:
    """Rows as lines of JSON, without what they do not have."""
    from alignkit.data.sources import SOURCE_COLUMN

    for row in rows:
        held = {name: value for name, value in row.items() if value is not None and name != SOURCE_COLUMN}
        yield json.dumps(held, ensure_ascii=False) + "\n"
