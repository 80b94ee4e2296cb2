"""Merge an adapter into its base model, and refuse a merge that changes what the model says.

    alignkit merge --adapter runs/first --output runs/first-merged
    alignkit merge --adapter runs/qlora --output runs/qlora-merged --quantization nf4 --data rows.jsonl

Base + adapter and the merged model, as written and loaded back, are compared on a few texts (--data, or built in).
Above the tolerance nothing is written and the exit status is 2. An adapter trained on a quantised base is merged into
the dequantised weights, those it was trained on, and compared with the quantised base + adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.files import MODEL_CONFIG, AdapterFiles, find_model
from alignkit.programs.arguments import StrictParser, non_negative_float, positive_int
from alignkit.programs.outputs import add_overwrite, folder_problems, written_folder
from alignkit.runs.directory import RUN_FILE, RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignkit.models.export import MergeReport

MAX_TOKENS = 128
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "To make tea, boil water, pour it over the leaves, wait four minutes and then remove them.",
    "If a train travels 60 miles in 45 minutes, its speed is 60 / 0.75 = 80 miles per hour.",
    "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n",
    "Sehr geehrte Damen und Herren, hiermit bestätige ich den Eingang Ihrer Nachricht vom 3. Mai.",
    'Answer with JSON: {"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}',
    "I am sorry, but I cannot help with that. Is there something else you would like to know?",
    "Once upon a time, in a village at the edge of a dark forest, there lived a miller and his three daughters.",
)


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One merge."""
    arguments = (parser := command_line(prog)).parse(words)
    base, revision, adapter = check_inputs(arguments, parser.prog)
    quantization = arguments.quantization or quantization_in_training(adapter)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from accelerate import PartialState

    from alignkit.models.export import merge_adapter
    from alignkit.models.loading import ModelSource, load_tokenizer

    source = ModelSource(
        base,
        arguments.revision or revision,
        dtype=arguments.dtype,
        quantization=quantization,
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = (
        load_tokenizer(str(adapter.directory))
        if adapter.has_tokenizer
        else load_tokenizer(base, revision=source.revision, trust_remote_code=arguments.trust_remote_code)
    )
    with written_folder(arguments.output, last=MODEL_CONFIG) as folder:
        report = merge_adapter(
            adapter,
            source,
            folder,
            tokenizer=tokenizer,
            prompts=token_ids(arguments, tokenizer),
            tolerance=arguments.tolerance,
            device=PartialState().device,
        )
    print(describe(report))
    print(f"\nwritten to {arguments.output}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--adapter", required=True, help="folder of the adapter: a finished run, or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    add_overwrite(parser)
    parser.add_argument("--model", help="the base, where the adapter's config does not name one that is here")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub base")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the merged weights, auto for that of the base; merging itself is done in float32",
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4", "int8"),
        help="how training saw the base; by default what alignkit.json or run.json beside the adapter says, else none",
    )
    parser.add_argument("--tolerance", type=non_negative_float, help="largest difference of a logit; default by type")
    parser.add_argument("--data", nargs="+", help="rows whose texts are compared, in place of the built-in ones")
    parser.add_argument("--num_prompts", type=positive_int, default=len(TEXTS), help="texts compared")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[str, str | None, AdapterFiles]:
    """The base, its revision and the adapter; every problem that can be seen without loading anything, together."""
    problems, base, revision, adapter = [], "", None, None
    try:
        base, revision, adapter = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    problems += folder_problems(arguments, "output", inputs=[base])
    if problems:
        raise ConfigError(prog, problems)
    assert adapter is not None
    return base, revision, adapter


def quantization_in_training(adapter: AdapterFiles) -> str:
    """How the run that wrote an adapter quantised its base, by ``alignkit.json`` or ``run.json``; else ``none``."""
    from alignkit.models.fingerprints import QUANTIZATION, read_origin

    if (recorded := (read_origin(adapter.directory) or {}).get(QUANTIZATION)) is not None:
        return str(recorded)
    for folder in (adapter.directory, adapter.directory.parent):
        if (folder / RUN_FILE).is_file():
            config = RunDirectory(folder, is_main=False).sections().get("config", {})
            return config.get("quantization", {}).get("value", "none")
    return "none"


def token_ids(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the texts to compare."""
    if arguments.data is None:
        return [ids[:MAX_TOKENS] for ids in tokenizer(list(TEXTS[: arguments.num_prompts]))["input_ids"]]
    from alignkit.data.candidates import to_candidate_rows
    from alignkit.data.load import load_rows

    loaded = load_rows(arguments.data, max_rows=arguments.num_prompts)
    rows, _ = to_candidate_rows(loaded, tokenizer, max_length=None, num_candidates=None, name="compared")
    return [(row["prompt_ids"] + row["completion_ids"][0])[:MAX_TOKENS] for row in rows]


def describe(report: MergeReport) -> str:
    """The comparison as a table."""
    from alignkit.reports.table import render_table

    differences = {"the adapter's effect on the base": report.effect, "error of the merge": report.error}
    rows = [[name, f"{found.max_abs:.3g}", f"{found.kl:.3g}"] for name, found in differences.items()]
    quantised = "" if report.quantization == "none" else f", base quantised to {report.quantization}"
    return "\n".join(
        [
            render_table(["on the same tokens", "max |d logit|", "KL, nats"], rows),
            f"{report.error.positions} tokens, weights {report.dtype}{quantised}, tolerance {report.tolerance:g}: ok",
        ]
    )
