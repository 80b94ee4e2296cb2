"""Give every completion token a reward by contrastive prompting, and write the rows with the rewards added.

    alignkit score --model Qwen/Qwen3-0.6B --data pairs.jsonl --output rewarded.jsonl
    alignkit score --adapter runs/sft --data pairs.jsonl --output rewarded.jsonl --heatmap look.html
    accelerate launch --config_file ddp.yaml -m alignkit score --model runs/sft \\
        --data pairs.jsonl --output rewarded.parquet --include_response false

The model is the reference of the run to come. Each token is scored after a prompt that asks for a better response and
after one that asks for a worse one. Pairs get the columns chosen_token_rewards and rejected_token_rewards, lists get
token_rewards. Started again after an interruption, the program goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.data.contrast import load_contrast_prompts
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.files import AdapterFiles, find_model
from alignkit.programs.arguments import StrictParser, add_loading, column_pair, positive_int
from alignkit.programs.outputs import add_overwrite, output_problems

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignkit.data.contrast import ContrastPrompts
    from alignkit.references.token_reward_report import TokenRewardReport

ENDINGS = (".jsonl", ".parquet")


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One pass, from the command line to the written rows."""
    arguments = (parser := command_line(prog)).parse(words)
    model_name, revision, adapter, contrast = check_inputs(arguments, parser.prog)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.data.lengths import RowLengths
    from alignkit.models._comparison import compare_with_itself
    from alignkit.models.loading import ModelSource
    from alignkit.models.vocabulary import check_token_ids
    from alignkit.programs.models import load_for_scoring, start_processes, tokenizer_for
    from alignkit.references._token_rewards import refuse_long_sequences
    from alignkit.references.token_reward_report import write_heatmap
    from alignkit.sampling.store import write_rows

    state = start_processes(use_cpu=arguments.use_cpu)
    how = ("dtype", "quantization", "attn_implementation", "trust_remote_code")
    source = ModelSource(model_name, arguments.revision or revision, **{name: getattr(arguments, name) for name in how})
    tokenizer = tokenizer_for(source, adapter, arguments.chat_template)
    given, rows = prepare_rows(arguments, tokenizer, contrast, state)
    model = load_for_scoring(source, adapter, state.device)
    refuse_long_sequences(rows, model, "data")
    check_token_ids(model, tokenizer, {"a row": rows}, name=repr(source.model))
    compare_with_itself(model, RowLengths.of(rows), "the model", together=arguments.batch_size > 1)
    rewarded, report = compute(arguments, model, None if adapter is None else "default", tokenizer, rows, state)
    if state.is_main_process:
        write_rows(arguments.output, list(with_rewards(given, rows, rewarded)))
        print(report)
        print(f"{len(rows)} rows written to {arguments.output}")
        if len(rows) < len(given):
            print(f"{len(given) - len(rows)} of {len(given)} rows cannot be trained on and were left out")
        if arguments.heatmap is not None:
            write_heatmap(arguments.heatmap, rewarded, tokenizer)
            print(f"heat map written to {arguments.heatmap}")


def prepare_rows(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, contrast: ContrastPrompts, state: PartialState
) -> tuple[Dataset, Dataset]:
    """The rows as given, and tokenised with their contrast prompts; the first process first, for the others' cache."""
    from alignkit.data.candidates import to_candidate_rows
    from alignkit.data.columns import LIST_REWARD_COLUMNS, PAIR_REWARD_COLUMNS
    from alignkit.data.load import load_rows
    from alignkit.data.messages import as_messages
    from alignkit.errors import DataError

    with state.main_process_first():
        given = load_rows(arguments.data, column_map=dict(arguments.column_map), max_rows=arguments.max_rows)
        given = as_messages(given, tokenizer, "data") if arguments.apply_chat_template else given
        there = [name for name in PAIR_REWARD_COLUMNS + LIST_REWARD_COLUMNS if name in given.column_names]
        if there:
            raise DataError("data: nothing to do", [f"the rows carry {', '.join(there)}: remove them to compute anew"])
        rows, _ = to_candidate_rows(
            given, tokenizer, max_length=arguments.max_length, num_candidates=None, name="data", contrast=contrast
        )
    return given, rows


def compute(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    state: PartialState,
) -> tuple[Dataset, TokenRewardReport]:
    """Score the rows on all processes, or take from the cache what an earlier pass has left there."""
    from alignkit.models._forward import compute_precision
    from alignkit.models.sharding import score_over_ranks
    from alignkit.references import _cache as reference
    from alignkit.references import _token_rewards as token_rewards

    choice = token_rewards.choose_pass_layout(arguments.layout, model, rows)
    if state.is_main_process:
        print(f"layout: {choice.layout} ({choice.reason})", flush=True)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def score(planned: Dataset, title: str) -> reference.Scores:
        return score_over_ranks(
            model,
            planned,
            pad_token_id=pad_token_id or 0,
            layout=choice.layout,
            batch_size=arguments.batch_size,
            state=state,
            progress=title,
        )

    return token_rewards.with_token_rewards(
        rows,
        cache=reference.ReferenceCache(arguments.cache or token_rewards.default_cache_dir()),
        weights=reference.model_fingerprint(model, adapter),
        precision=compute_precision(model),
        layout=choice,
        score=score,
    )


def with_rewards(given: Dataset, rows: Dataset, rewarded: Dataset) -> Iterator[dict[str, Any]]:
    """The given rows with their rewards, a list a completion in its original order; tokens that were cut get 0."""
    from alignkit.data.tokenization import by_descending_score

    kept, lengths = given.select(rows["source_row"]), rows["completion_lengths"]
    for row, whole, scored in zip(kept, lengths, rewarded["token_rewards"], strict=True):
        # Nine digits give the same float32 back.
        full = [
            [float(f"{reward:.9g}") for reward in rewards] + [0.0] * (length - len(rewards))
            for rewards, length in zip(scored, whole, strict=True)
        ]
        if "completions" not in row:
            yield {**row, "chosen_token_rewards": full[0], "rejected_token_rewards": full[1]}
            continue
        rewards: list[list[float]] = [[] for _ in full]
        for position, values in zip(by_descending_score(row["scores"]), full, strict=True):
            rewards[position] = values
        yield {**row, "token_rewards": rewards}


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--model", help="the reference: folder of a model or an adapter, or Hub id of a model")
    parser.add_argument("--adapter", help="folder of an adapter; without --model its config names the base")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--data", nargs="+", required=True, help="rows: jsonl, json, csv, parquet, or Hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="rows to write, .jsonl or .parquet")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="turn plain prompts and answers into messages, as in training",
    )
    parser.add_argument("--max_rows", type=positive_int, help="use only so many rows")
    parser.add_argument(
        "--max_length",
        type=positive_int,
        help="longest prompt + completion, tokens, as in the training to come; what is beyond it gets reward 0",
    )
    parser.add_argument("--contrast_prompts", type=Path, metavar="FILE", help="templates in place of alignkit's own")
    parser.add_argument(
        "--include_response",
        choices=("true", "false"),
        default="true",
        help="whether the response judged is part of its prompts; false is cheaper",
    )
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a forward pass")
    parser.add_argument("--layout", choices=("auto", "padded", "packed"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add_loading(parser)
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where log-probs are kept between passes")
    parser.add_argument("--heatmap", type=Path, metavar="FILE", help="write a few responses, tokens coloured, as HTML")
    add_overwrite(parser)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    return parser


def check_inputs(
    arguments: argparse.Namespace, prog: str
) -> tuple[str, str | None, AdapterFiles | None, ContrastPrompts]:
    """Model, revision, adapter and templates; every problem that can be seen without loading a model, together."""
    problems = []
    found: tuple[str, str | None, AdapterFiles | None] = ("", None, None)
    contrast = None
    try:
        found = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    try:
        include_response = arguments.include_response == "true"
        contrast = load_contrast_prompts(arguments.contrast_prompts, include_response=include_response)
    except ConfigError as error:
        problems += [f"--contrast_prompts: {error.headline}: {problem}" for problem in error.problems]
    if arguments.output.suffix not in ENDINGS:
        problems.append(f"--output: {arguments.output} must end in {' or '.join(ENDINGS)}")
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    problems += output_problems(arguments, "output", "heatmap", inputs=[found[0]])
    if problems or contrast is None:
        raise ConfigError(prog, problems)
    return *found, contrast
