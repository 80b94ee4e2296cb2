"""Evaluate a base model, an adapter or a merged model on held-out rows: preferences, supervised rows or prompts.

    alignkit evaluate --model Qwen/Qwen3-0.6B --data heldout.jsonl
    alignkit evaluate --adapter runs/first --data heldout.jsonl --compare_base --output eval.json
    alignkit evaluate --model runs/second --data heldout.jsonl --compare runs/first --output eval.html
    accelerate launch --config_file ddp.yaml -m alignkit evaluate --model runs/first --data rows.jsonl

Of preference rows it prints accuracy, likelihood of chosen, rejected and probe responses, and sample answers; of
supervised rows loss, perplexity and token accuracy; or what --metrics names. --output writes them with everything they
depend on. Rows are shared out among processes; any number of them gives the same figures.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.files import AdapterFiles, find_model, is_reward_model, model_problem
from alignkit.parts.evaluation import evaluation_names, load_evaluation
from alignkit.programs.arguments import (
    StrictParser,
    add_loading,
    column_pair,
    non_negative_float,
    non_negative_int,
    pick,
    positive_int,
    share,
)
from alignkit.programs.outputs import add_overwrite, output_problems
from alignkit.programs.run_values import OF_THE_RUN, take_from_run

DTYPE_HELP = "of the weights; auto takes the checkpoint's; left out, bfloat16 where an accelerator has it, else float32"


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One evaluation, from the command line to the table."""
    arguments = (parser := command_line(prog)).parse(words)
    (model_name, revision, adapter), others = check_inputs(arguments, parser.prog)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.models.loading import ModelSource
    from alignkit.programs import evaluation_steps as steps
    from alignkit.programs.models import fitting_dtype, start_processes, tokenizer_for

    state = start_processes(use_cpu=arguments.use_cpu)
    gives_rewards = is_reward_model(model_name, adapter)
    kind, evaluations = steps.choose_evaluations(arguments, parser.prog, gives_rewards=gives_rewards)
    how = pick(arguments, "dtype", "quantization", "attn_implementation", "trust_remote_code")
    how["dtype"] = how["dtype"] or fitting_dtype(state.device)
    model = steps.Named(steps.MODEL, ModelSource(model_name, arguments.revision or revision, **how), adapter)
    tokenizer = tokenizer_for(model.source, adapter, arguments.chat_template)
    data = steps.prepare(arguments, kind, evaluations, tokenizer, state)
    novelty = steps.novelty_of(arguments, data, state)
    compared = steps.compared_models(arguments, others, how)
    steps.check_compared(compared, tokenizer)

    comparison = steps.Comparison(arguments, evaluations, tokenizer, data, state, gives_rewards)
    base = [steps.Named(steps.BASE, ModelSource(arguments.compare_base, **how))] if arguments.compare_base else []
    # The reference of a full model's implicit reward comes before the model; otherwise what may fail comes first.
    for named in base if arguments.beta is not None else []:
        comparison.run(named)
    comparison.run(model, with_base=arguments.compare_base == "")
    for named in (base if arguments.beta is None else []) + compared:
        comparison.run(named)
    if state.is_main_process:
        steps.report(comparison, novelty)


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--model", help="folder of a model or an adapter, or Hub id of a model")
    parser.add_argument("--adapter", help="folder of an adapter; without --model its config names the base")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    _add_rows(parser)
    parser.add_argument(
        "--metrics",
        type=evaluation_list,
        metavar="NAME,NAME",
        help=f"evaluations to make, of {', '.join(evaluation_names())}; left out, what such rows allow at little cost",
    )
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="MODEL", help="models or adapters to compare with"
    )
    parser.add_argument(
        "--train_data", nargs="*", help="training rows, or alone those of the run: figures far from and near to them"
    )
    parser.add_argument(
        "--beta",
        nargs="?",
        const=OF_THE_RUN,
        type=beta_value,
        help="calibration of the implicit reward, relative to the base; alone with the beta of the run",
    )
    parser.set_defaults(train_column_map=None)
    _add_running(parser)
    parser.add_argument("--compare_base", nargs="?", const="", metavar="MODEL", help="evaluate the base as well")
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON, or as a page: x.html")
    parser.add_argument("--reliability", type=Path, metavar="FILE", help="write a reliability diagram as PNG")
    add_overwrite(parser)
    return parser


def _add_rows(parser: StrictParser) -> None:
    """What models are evaluated on, and how it is read."""
    parser.add_argument("--data", nargs="+", required=True, help="held-out rows: jsonl, json, csv, parquet, or Hub id")
    parser.add_argument(
        "--rows",
        choices=("auto", "preference", "supervised", "prompts"),
        default="auto",
        help="of which kind they are; auto goes by their columns",
    )
    parser.add_argument("--answer_column", metavar="NAME", help="reference of each row; left out, its completion")
    for key in ("completion_only_loss", "assistant_only_loss"):
        parser.add_argument(f"--{key}", choices=("true", "false"), help="of supervised rows, as in a config")
    parser.add_argument("--probe_data", nargs="+", help="rows whose responses, all of them, are scored as probes")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="turn plain prompts and answers into messages, as in training",
    )
    parser.add_argument("--max_rows", type=positive_int, help="use only so many rows of each")
    parser.add_argument("--max_length", type=positive_int, default=1024, help="longest prompt + completion, tokens")


def _add_running(parser: StrictParser) -> None:
    """How models are loaded, prompts answered and rows run."""
    parser.add_argument(
        "--num_samples",
        type=non_negative_int,
        help="prompts to answer; 4, or all of prompts alone. Of answers that are judged, which all are, those to show",
    )
    parser.add_argument("--max_new_tokens", type=positive_int, default=64, help="longest answer, tokens")
    parser.add_argument("--temperature", type=non_negative_float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=share, default=1.0, help="nucleus sampling")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the sampled answers")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a forward pass")
    parser.add_argument("--layout", choices=("auto", "padded", "packed"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help=DTYPE_HELP)
    add_loading(parser)


def beta_value(text: str) -> str | float:
    """An argparse type: a number from 0, or that of the run."""
    return text if text == OF_THE_RUN else non_negative_float(text)


def evaluation_list(text: str) -> tuple[str, ...]:
    """An argparse type: names of evaluations, with commas between them."""
    names, known = tuple(dict.fromkeys(text.split(","))), evaluation_names()
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"there is no evaluation {unknown[0]!r}; {advice}")
    return names


Found = tuple[str, str | None, AdapterFiles | None]
"""A model, its revision, and the adapter on it."""


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[Found, list[Found]]:
    """The model and those of ``--compare``; every problem that can be seen without loading anything, together."""
    problems = []
    found: Found = ("", None, None)
    try:
        found = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    others: dict[str, Found] = {}
    for path in arguments.compare:
        try:
            others[path] = find_model(path, None)
        except AlignkitError as error:
            problems.append(f"--compare: {error}")
    twice = {path for path in arguments.compare if arguments.compare.count(path) > 1}
    problems += [f"--compare: {path} is given twice" for path in sorted(twice)]
    problems += take_from_run(arguments) + _base_problems(arguments, found)
    gives_rewards = is_reward_model(found[0], found[2])
    problems += [
        f"--compare: {path} is {'a' if given else 'no'} reward model, and the model is {'none' if given else 'one'}: "
        "compare models of one kind"
        for path, (name, _, adapter) in others.items()
        if (given := is_reward_model(name, adapter)) != gives_rewards
    ]
    if found[0] and arguments.revision is not None and Path(found[0]).expanduser().is_dir():
        problems.append(f"--revision: {found[0]} is a folder, which has one version: leave the option out")
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    problems += _calibration_problems(arguments, gives_rewards=gives_rewards)
    problems += output_problems(
        arguments, "output", "reliability", inputs=[found[0], *(other[0] for other in others.values())]
    )
    if problems:
        raise ConfigError(prog, problems)
    return found, list(others.values())


def _base_problems(arguments: argparse.Namespace, found: Found) -> list[str]:
    problems = []
    is_adapter = found[2] is not None
    if arguments.compare_base == "" and not is_adapter and found[0]:
        problems.append("--compare_base: the base of a full model is not known: write --compare_base MODEL")
    if arguments.compare_base:
        if is_adapter:
            problems.append("--compare_base: the base of an adapter is the model it sits on: leave the name out")
        elif problem := model_problem(arguments.compare_base):
            problems.append(f"--compare_base: {problem}")
    if arguments.compare_base is not None and is_reward_model(found[0], found[2]):
        problems.append("--compare_base: the base of a reward model gives no rewards; name another one in --compare")
    if arguments.beta is not None and found[0] and not is_adapter and not arguments.compare_base:
        problems.append("--beta: an implicit reward is relative to a reference: write --compare_base MODEL")
    return problems


def _calibration_problems(arguments: argparse.Namespace, *, gives_rewards: bool) -> list[str]:
    sure = [name for name in evaluation_names() if load_evaluation(name).gives_confidence]
    by_itself = gives_rewards and arguments.metrics is None
    if arguments.reliability is not None and not by_itself and not set(sure) & set(arguments.metrics or ()):
        return [f"--metrics: --reliability draws how sure a model is; add one of {', '.join(sure)}"]
    return []
