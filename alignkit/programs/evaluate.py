"""Evaluate a base model, an adapter or a merged model on held-out preference rows.

    alignkit evaluate --model Qwen/Qwen3-0.6B --data heldout.jsonl
    alignkit evaluate --adapter runs/first --data heldout.jsonl --compare_base --output eval.json
    accelerate launch --config_file ddp.yaml -m alignkit evaluate --model runs/first --data rows.jsonl

Prints preference accuracy, likelihood of chosen, rejected and probe responses, and sample answers, or what --metrics
names; --output writes them with everything they depend on. Rows are shared out among processes; any number of them
gives the same figures.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.files import AdapterFiles, find_model, model_problem
from alignkit.parts.evaluation import evaluation_names, load_evaluation
from alignkit.plain_text import all_without_secrets
from alignkit.programs.arguments import (
    StrictParser,
    column_pair,
    non_negative_float,
    non_negative_int,
    pick,
    positive_int,
    share,
)
from alignkit.programs.outputs import add_overwrite, output_problems

if TYPE_CHECKING:
    from accelerate import PartialState
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignkit.data.prefix import Layout
    from alignkit.evals._results import Results
    from alignkit.evals._trial import EvaluationData
    from alignkit.parts.evaluation import Evaluation

METRICS = ("preference", "likelihood", "generation")
"""Evaluations made unless others are named; figures and JSON follow this order."""
DTYPE_HELP = "of the weights; auto takes the checkpoint's; left out, bfloat16 where an accelerator has it, else float32"


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One evaluation, from the command line to the table."""
    arguments = (parser := command_line(prog)).parse(words)
    model_name, revision, adapter = check_inputs(arguments, parser.prog)
    evaluations = [load_evaluation(name) for name in arguments.metrics]

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.evals import _trial as steps
    from alignkit.evals._results import Results
    from alignkit.models.loading import ModelSource
    from alignkit.programs.models import fitting_dtype, load_for_scoring, start_processes, tokenizer_for
    from alignkit.sampling.generation import Sampling

    state = start_processes(use_cpu=arguments.use_cpu)
    how = pick(arguments, "dtype", "quantization", "attn_implementation", "trust_remote_code")
    how["dtype"] = how["dtype"] or fitting_dtype(state.device)
    source = ModelSource(model_name, arguments.revision or revision, **how)
    tokenizer = tokenizer_for(source, adapter, arguments.chat_template)
    data = prepare_data(arguments, evaluations, tokenizer, state)
    model = load_for_scoring(source, adapter, state.device)
    steps.check_positions(model, data, arguments.max_new_tokens)
    sampling = Sampling(**pick(arguments, "max_new_tokens", "temperature", "top_p", "seed", "batch_size"))

    def evaluate(tried: PreTrainedModel | PeftModel, name: str) -> tuple[Results, Layout]:
        steps.check_vocabulary(tried, tokenizer, data)
        batch_size = arguments.batch_size
        layout = steps.prepare_scoring(tried, data, arguments.layout, batch_size=batch_size, name=name)
        trial = steps.Trial(tried, tokenizer, data, sampling, layout, batch_size, state, name)
        return Results({evaluation.name: evaluation.compute(trial) for evaluation in evaluations}), layout

    results, layout = evaluate(model, "model")
    record = steps.provenance(source, adapter, model, tokenizer, data, state) | {"layout": layout}
    base = None
    if arguments.compare_base is not None and adapter is not None:
        with model.disable_adapter():
            base, record["base_layout"] = evaluate(model, "base")
    elif arguments.compare_base is not None:
        model = load_for_scoring(ModelSource(arguments.compare_base, **how), None, state.device)
        base, record["base_layout"] = evaluate(model, "base")
    if state.is_main_process:
        report(arguments, record, evaluations, [tokenizer.decode(ids) for ids in data.prompts], results, base)


def prepare_data(
    arguments: argparse.Namespace,
    evaluations: Sequence[Evaluation],
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
) -> EvaluationData:
    """The rows, and the prompts to answer where an evaluation reads some."""
    from alignkit.evals import _trial as steps

    sources = {"held-out": arguments.data} | ({"probe": arguments.probe_data} if arguments.probe_data else {})
    answered = arguments.num_samples if any("prompts" in evaluation.reads for evaluation in evaluations) else 0
    limits = pick(arguments, "max_rows", "max_length", "apply_chat_template") | {"num_samples": answered}
    return steps.prepare_data(sources, tokenizer, column_map=dict(arguments.column_map), state=state, **limits)


def report(
    arguments: argparse.Namespace,
    record: dict[str, Any],
    evaluations: Sequence[Evaluation],
    prompts: Sequence[str],
    results: Results,
    base: Results | None,
) -> None:
    """Print the table and what stands below it, and write the record."""
    from alignkit.evals._results import example_text, result_record, result_table
    from alignkit.storage.durability import write_whole

    print(result_table(results, base))
    print("± is 1.96 standard errors over rows; likelihoods and margins in nats", end="\n\n")
    print(example_text(evaluations, prompts, results, base))
    if arguments.output is not None:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        found = result_record(evaluations, prompts, results, base)
        content = {**record, "options": all_without_secrets(options), **found}
        write_whole(arguments.output, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        print(f"written to {arguments.output}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--model", help="folder of a model or an adapter, or Hub id of a model")
    parser.add_argument("--adapter", help="folder of an adapter; without --model its config names the base")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--data", nargs="+", required=True, help="held-out rows: jsonl, json, csv, parquet, or Hub id")
    parser.add_argument(
        "--metrics",
        type=evaluation_list,
        default=",".join(METRICS),
        metavar="NAME,NAME",
        help=f"evaluations to make, of {', '.join(evaluation_names())}",
    )
    parser.add_argument("--probe_data", nargs="+", help="rows whose responses, all of them, are scored as probes")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="turn plain prompts and answers into messages, as in training",
    )
    parser.add_argument("--max_rows", type=positive_int, help="use only so many rows of each")
    parser.add_argument("--max_length", type=positive_int, default=1024, help="longest prompt + completion, tokens")
    parser.add_argument("--num_samples", type=non_negative_int, default=4, help="prompts to answer; 0 for none")
    parser.add_argument("--max_new_tokens", type=positive_int, default=64, help="longest answer, tokens")
    parser.add_argument("--temperature", type=non_negative_float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=share, default=1.0, help="nucleus sampling")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the sampled answers")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a forward pass")
    parser.add_argument("--layout", choices=("auto", "padded", "packed"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help=DTYPE_HELP)
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none", help="of the base weights")
    parser.add_argument("--attn_implementation", choices=("eager", "sdpa", "flash_attention_2", "flex_attention"))
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="Jinja file in place of the tokenizer's")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--compare_base", nargs="?", const="", metavar="MODEL", help="evaluate the base as well")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add_overwrite(parser)
    return parser


def evaluation_list(text: str) -> tuple[str, ...]:
    """An argparse type: names of evaluations, with commas between them."""
    names, known = tuple(dict.fromkeys(text.split(","))), evaluation_names()
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"there is no evaluation {unknown[0]!r}; {advice}")
    return names


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[str, str | None, AdapterFiles | None]:
    """The model, its revision and the adapter; every problem that can be seen without loading anything, together."""
    problems = []
    found: tuple[str, str | None, AdapterFiles | None] = ("", None, None)
    try:
        found = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    is_adapter = found[2] is not None
    if arguments.compare_base == "" and not is_adapter and not problems:
        problems.append("--compare_base: the base of a full model is not known: write --compare_base MODEL")
    if arguments.compare_base:
        if is_adapter:
            problems.append("--compare_base: the base of an adapter is the model it sits on: leave the name out")
        elif problem := model_problem(arguments.compare_base):
            problems.append(f"--compare_base: {problem}")
    if found[0] and arguments.revision is not None and Path(found[0]).expanduser().is_dir():
        problems.append(f"--revision: {found[0]} is a folder, which has one version: leave the option out")
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    readers = [name for name in evaluation_names() if "probe" in load_evaluation(name).reads]
    if arguments.probe_data and not set(readers) & set(arguments.metrics):
        problems.append(f"--probe_data: read by none of --metrics; add {' or '.join(readers)}")
    problems += output_problems(arguments, "output", inputs=[found[0]])
    if problems:
        raise ConfigError(prog, problems)
    return found
