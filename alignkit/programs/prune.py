"""Make a model smaller, as a plain model of an architecture that exists, and prove that nothing else changed.

    alignkit prune --model Qwen/Qwen3-0.6B --output pruned --ffn 0.25 --criterion activation --data rows.jsonl
    alignkit prune --adapter runs/pat --output exported
    alignkit prune --adapter runs/lora --output smaller --drop_layers 4 --criterion activation --data rows.jsonl
    alignkit prune --model tuned --output smaller --plan pruning_plan.json --evaluate heldout.jsonl

Hidden channels, feed-forward channels, KV groups (a key/value head with its query heads) and whole layers can go. What
goes is what scores lowest by --criterion, what --plan says, or what an adapter of PAT or ATP has learnt. Any other
adapter is merged first. The result is checked in a fresh process against the dense model in which the same parts are
set to zero, and nothing is written if they differ. Beside it stand pruning_plan.json, pruning_report.json, pruning.png
and a model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.files import MODEL_CONFIG, AdapterFiles, find_model
from alignkit.programs.arguments import StrictParser, non_negative_int, positive_int
from alignkit.programs.outputs import add_overwrite, folder_problems, written_folder
from alignkit.pruning.plan import SIZED, PruningPlan

if TYPE_CHECKING:
    from alignkit.pruning.amounts import Amount

CRITERIA = ("magnitude", "activation", "gradient")


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One pruned model."""
    arguments = (parser := command_line(prog)).parse(words)
    base, revision, adapter = check_inputs(arguments, parser.prog)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.programs import pruning_steps as steps
    from alignkit.programs.models import start_processes, tokenizer_for

    state = start_processes(use_cpu=arguments.use_cpu)
    task = steps.task_of(arguments, base, revision, adapter)
    for line in task.lines:
        print(line)
    tokenizer = tokenizer_for(task.source, adapter, None)
    rows = steps.load_data(arguments, tokenizer)
    with written_folder(arguments.output, last=MODEL_CONFIG) as folder:
        print(steps.prune(arguments, task, tokenizer, rows, folder, state))
    print(f"\nwritten to {arguments.output}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--model", help="the dense model; with --adapter its base, where the adapter names none here")
    parser.add_argument("--adapter", help="folder of an adapter: a finished run, or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    add_overwrite(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    how = "how many stay, or the share that goes: 0.25 takes a quarter, rounded to a size that is good to have"
    parser.add_argument("--hidden", type=amount, metavar="N", help=f"hidden channels: {how}")
    parser.add_argument("--ffn", type=amount, metavar="N", help="feed-forward channels of each layer, likewise")
    parser.add_argument("--kv_groups", type=amount, metavar="N", help="KV groups of each layer, likewise")
    parser.add_argument("--drop_layers", type=non_negative_int, default=0, metavar="N", help="layers that go")
    parser.add_argument("--criterion", choices=CRITERIA, help="what is kept: the highest of these scores")
    parser.add_argument("--data", nargs="+", help="supervised rows to score activations or gradients on")
    parser.add_argument("--num_rows", type=positive_int, default=128, help="rows of --data, the first ones")
    parser.add_argument("--max_length", type=positive_int, default=1024, help="longest row, tokens; it is cut there")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="rows a forward pass")
    parser.add_argument("--plan", type=Path, help="what is kept: a plan, or a folder with pruning_plan.json")
    parser.add_argument(
        "--keep_tied",
        action="store_true",
        help="refuse where embedding and head cannot stay one matrix; where they can, they do anyway",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights written, auto for that of the model; computed is in float64 and float32",
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4", "int8"),
        help="how training saw the base; by default what alignkit.json or run.json beside the adapter says, else none",
    )
    _add_evaluation(parser)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    return parser


def _add_evaluation(parser: StrictParser) -> None:
    parser.add_argument(
        "--evaluate", nargs="+", metavar="ROWS", help="rows to measure the likelihood on, before and after"
    )
    parser.add_argument("--evaluate_rows", type=positive_int, default=500, help="rows of --evaluate, the first ones")
    parser.add_argument(
        "--answer_column",
        metavar="COLUMN",
        help="of --evaluate: answer its prompts too, and count the final numbers that are those of this column (GSM8K)",
    )
    parser.add_argument("--max_new_tokens", type=positive_int, default=256, help="longest answer, tokens")


def amount(text: str) -> Amount:
    """An argparse type: a whole number from 1, or a share between 0 and 1."""
    if text.isdecimal() and text != "0":
        return positive_int(text)
    try:
        share = Fraction(text) if len(text) <= 20 and "/" not in text and "e" not in text.lower() else Fraction(-1)
    except ValueError:
        share = Fraction(-1)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(
            f"expected how many stay, such as 384, or the share that goes, such as 0.25; got {text[:40]!r}"
        )
    return share


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[str, str | None, AdapterFiles | None]:
    """The model, its revision and the adapter; every problem that can be seen without loading anything, together."""
    problems: list[str] = []
    found: tuple[str, str | None, AdapterFiles | None] = ("", None, None)
    try:
        found = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    problems += _choice_problems(arguments, "" if found[2] is None else found[2].kind)
    if found[0] and arguments.revision is not None and Path(found[0]).expanduser().is_dir():
        problems.append(f"--revision: {found[0]} is a folder, which has one version: leave the option out")
    if arguments.answer_column is not None and arguments.evaluate is None:
        problems.append("--answer_column: it is a column of --evaluate, which is not given")
    if arguments.plan is not None:
        try:
            if PruningPlan.load(arguments.plan.expanduser()) == PruningPlan():
                problems.append(f"--plan: {arguments.plan} keeps everything; write at least one axis, such as layers")
        except AlignkitError as error:
            problems.append(f"--plan: {error}")
    problems += folder_problems(arguments, "output", inputs=[found[0]])
    if problems:
        raise ConfigError(prog, problems)
    return found


def _choice_problems(arguments: argparse.Namespace, kind: str) -> list[str]:
    """What is wrong with how it is said what goes; ``kind`` is that of the adapter, or empty."""
    sizes = [f"--{axis}" for axis in SIZED if getattr(arguments, axis) is not None]
    sizes += ["--drop_layers"] if arguments.drop_layers else []
    problems = []
    if is_sparse_kind(kind) and sizes:
        problems.append(
            f"{sizes[0]}: the adapter ({kind}) has learnt what goes, and scores are those of a model without its "
            "masks. Leave it out; for other axes give a --plan, or prune the exported model once more"
        )
    elif sizes and arguments.plan is not None:
        problems.append(f"{sizes[0]}: --plan says what is kept. Leave one of the two out")
    elif not (sizes or arguments.plan or is_sparse_kind(kind)):
        merge = "; to merge the adapter alone, write alignkit merge" if kind else ""
        problems.append(
            f"nothing says what goes: write --hidden, --ffn, --kv_groups or --drop_layers, or --plan{merge}"
        )
    if sizes and arguments.criterion is None:
        problems.append(
            f"--criterion: write by which score the lowest go: {', '.join(CRITERIA)}; activation is a good one where "
            "there are rows like those of your task, magnitude needs none"
        )
    if arguments.criterion is not None and not sizes:
        problems.append(
            "--criterion: there are no sizes that it would choose for; leave it out, or write --hidden and so on"
        )
    if arguments.criterion in ("activation", "gradient") and arguments.data is None:
        problems.append(f"--data: {arguments.criterion} is measured on rows; give some, or --criterion magnitude")
    if arguments.data is not None and arguments.criterion in (None, "magnitude"):
        problems.append("--data: nothing is measured on it; write --criterion activation or gradient, or leave it out")
    return problems
