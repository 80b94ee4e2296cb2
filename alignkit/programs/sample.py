"""Sample K responses of a model to every prompt and write them as candidate lists.

    alignkit sample --model Qwen/Qwen3-0.6B --data negatives.jsonl --output samples.jsonl
    alignkit sample --adapter runs/first --data negatives.jsonl --output samples.parquet \\
        --instruction "Answer honestly and harmlessly." --unique
    alignkit sample --model runs/sft --data prompts.jsonl --no_negative --scorer rewards.py:score \\
        --output scored.jsonl
    alignkit sample --model runs/sft --data prompts.jsonl --no_negative --reward_model runs/reward \\
        --output scored.jsonl

Rows have a prompt and a rejected answer, which becomes the last candidate with score 0 (the rows of method d2o). An
interrupted call continues where it stopped when it is repeated. Any number of processes writes the same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.models.files import AdapterFiles, find_model, is_reward_model, sha256
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

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from alignkit.models.loading import ModelSource
    from alignkit.sampling.candidates import Prompts, SampleSettings
    from alignkit.sampling.engines import Engine
    from alignkit.sampling.scorer import Scorer

SETTINGS = (
    "num_samples", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "chunk_size", "instruction",
    "unique", "drop_unfinished", "max_resamples", "max_prompt_length",
)  # fmt: skip


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One sampling, from the command line to the report."""
    arguments = (parser := command_line(prog)).parse(words)
    model_name, revision, adapter = check_inputs(arguments, parser.prog)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.models.loading import ModelSource
    from alignkit.programs.models import start_processes, tokenizer_for
    from alignkit.sampling import candidates as steps
    from alignkit.sampling.candidates import check_room
    from alignkit.sampling.report import SettingNames
    from alignkit.sampling.store import ChunkStore, on_first_process, write_rows

    state = start_processes(use_cpu=arguments.use_cpu)
    scorer = chosen_scorer(arguments)
    how = pick(arguments, "dtype", "quantization", "attn_implementation", "trust_remote_code")
    source = ModelSource(model_name, arguments.revision or revision, **how)
    tokenizer = tokenizer_for(source, adapter, arguments.chat_template)
    settings = steps.SampleSettings(**pick(arguments, *SETTINGS))
    prompts = read_prompts(arguments, tokenizer, state)
    names = SettingNames("--max_new_tokens", "--max_prompt_length", "--drop_unfinished")
    limit = check_room(prompts, settings, load_config(source), names)
    engine_name = choose_engine(arguments, state)
    identity = on_first_process(lambda: what_samples_depend_on(arguments, source, adapter, engine_name), state)
    store = ChunkStore(partial_folder(arguments.output), identity | asdict(settings) | prompts.settings())
    # Asked before the model is loaded, which takes longer.
    on_first_process(store.done, state)
    engine = load_engine(engine_name, source, adapter, tokenizer, prompts, settings, state)
    records = steps.sample_candidates(
        prompts, engine, settings, store=store, prompt_limit=limit, scorer=scorer, state=state, progress="samples"
    )
    if state.is_main_process:
        sampled = steps.candidate_lists(prompts, records, names)
        write_rows(arguments.output, sampled.rows)
        store.remove()
        print(sampled.report.render())
        print(f"written to {arguments.output}")


def chosen_scorer(arguments: argparse.Namespace) -> Scorer | None:
    """What scores the samples: a function of a file, a reward model, or nothing."""
    if arguments.reward_model is not None:
        from alignkit.models.reward_model import load_reward_model

        return load_reward_model(arguments.reward_model, batch_size=arguments.batch_size)
    from alignkit.sampling.scorer import load_scorer

    return None if arguments.scorer is None else load_scorer(*arguments.scorer)


def read_prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, state: PartialState) -> Prompts:
    """The rows to sample for, and what the model continues."""
    from alignkit.data.checks import check_template
    from alignkit.data.messages import rows_as_messages
    from alignkit.data.negatives import load_prompts
    from alignkit.sampling.candidates import prepare_prompts

    with state.main_process_first():
        options = pick(arguments, "split", "max_rows")
        rows = load_prompts(arguments.data, column_map=dict(arguments.column_map), **options)
    if arguments.apply_chat_template:
        rows = rows_as_messages(rows, tokenizer, "data")
    check = check_template(tokenizer, conversational=isinstance(rows[0].get("prompt"), list))
    if state.is_main_process and check.status != "ok":
        print(f"warning: {check.title}: {check.message}", file=sys.stderr)
    return prepare_prompts(rows, tokenizer, instruction=arguments.instruction, negatives=not arguments.no_negative)


def choose_engine(arguments: argparse.Namespace, state: PartialState) -> str:
    """``hf`` or ``vllm``; what was asked for, or vLLM where it is installed and can do it."""
    able = state.device.type == "cuda" and state.num_processes == 1 and arguments.quantization == "none"
    automatic = "vllm" if able and importlib.util.find_spec("vllm") is not None else "hf"
    return automatic if arguments.engine == "auto" else arguments.engine


def load_engine(
    engine: str,
    source: ModelSource,
    adapter: AdapterFiles | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    settings: SampleSettings,
    state: PartialState,
) -> Engine:
    """The engine with its model."""
    from alignkit.models.loading import check_base, load_adapter, load_model
    from alignkit.models.vocabulary import check_token_ids
    from alignkit.sampling.engines import HuggingFaceEngine, VllmEngine

    if adapter is not None:
        check_base(adapter, source)
    if engine == "vllm":
        return VllmEngine(source, adapter, tokenizer, settings.drawing)
    model = load_model(source, state.device)
    model = model if adapter is None else load_adapter(model, adapter)
    check_token_ids(model, tokenizer, {"a prompt": prompts.token_ids}, name=repr(source.model))
    return HuggingFaceEngine(model, tokenizer, settings.drawing, state)


def load_config(source: ModelSource) -> PretrainedConfig:
    """The configuration of the model, without its weights."""
    from transformers import AutoConfig

    options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(source.model, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"the configuration of {source.model!r} cannot be read: {error}") from error


def what_samples_depend_on(
    arguments: argparse.Namespace, source: ModelSource, adapter: AdapterFiles | None, engine: str
) -> dict[str, Any]:
    """Everything besides the prompts and the sampling settings."""
    from alignkit.models.loading import ModelSource
    from alignkit.sampling.store import source_identity

    scorer: Any = None if arguments.scorer is None else [sha256(arguments.scorer[0]), arguments.scorer[1]]
    if arguments.reward_model is not None:
        judge, commit, judge_adapter = find_model(arguments.reward_model, None)
        scorer = source_identity(ModelSource(judge, commit), judge_adapter)
    return source_identity(source, adapter) | {
        "engine": engine,
        "no_negative": arguments.no_negative,
        "scorer": scorer,
    }


def partial_folder(output: Path) -> Path:
    """Where unfinished samples are kept."""
    return output.with_name(f"{output.name}.partial")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--model", help="folder of a model or an adapter, or Hub id of a model")
    parser.add_argument("--adapter", help="folder of an adapter; without --model its config names the base")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--data", nargs="+", required=True, help="rows: jsonl, json, csv, parquet, or Hub id")
    parser.add_argument("--split", default="train", help="split of a Hub data set")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="turn plain prompts and answers into messages, as in training",
    )
    parser.add_argument("--max_rows", type=positive_int, help="use only so many rows")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="jsonl or parquet file to write")
    add_overwrite(parser)
    parser.add_argument("--num_samples", type=positive_int, default=8, help="samples a prompt")
    parser.add_argument("--max_new_tokens", type=positive_int, default=256, help="longest sample, tokens")
    parser.add_argument("--temperature", type=non_negative_float, default=1.0, help="1 is the model's distribution")
    parser.add_argument("--top_p", type=share, default=1.0, help="nucleus sampling")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draws")
    parser.add_argument("--instruction", metavar="TEXT", help="put before the prompt while sampling, never written")
    parser.add_argument("--unique", action="store_true", help="discard samples equal to an earlier one of the row")
    parser.add_argument("--drop_unfinished", action="store_true", help="discard samples cut at --max_new_tokens")
    parser.add_argument("--max_resamples", type=non_negative_int, default=3, help="new draws for a discarded sample")
    parser.add_argument("--max_prompt_length", type=positive_int, help="leave out rows with a longer prompt, tokens")
    parser.add_argument("--scorer", type=file_and_function, metavar="FILE.py:FUNCTION", help="gives the scores")
    parser.add_argument("--reward_model", metavar="FOLDER", help="gives the scores: a reward model, or its adapter")
    parser.add_argument("--no_negative", action="store_true", help="rows have only prompts; something must score")
    parser.add_argument("--engine", choices=("auto", "hf", "vllm"), default="auto", help="what generates")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="prompts at once, each with its samples")
    parser.add_argument("--chunk_size", type=positive_int, default=256, help="prompts between two writes to disk")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add_loading(parser)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    return parser


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[str, str | None, AdapterFiles | None]:
    """The model, its revision and the adapter; every problem that can be seen without loading anything, together."""
    problems = []
    found: tuple[str, str | None, AdapterFiles | None] = ("", None, None)
    try:
        found = find_model(arguments.model, arguments.adapter)
    except AlignkitError as error:
        problems.append(str(error))
    if arguments.temperature == 0 and arguments.num_samples > 1:
        advice = "write --num_samples 1, or a temperature above 0"
        problems.append(f"--temperature 0 gives the same answer {arguments.num_samples} times: {advice}")
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    problems += scorer_problems(arguments)
    if arguments.no_negative and arguments.num_samples == 1:
        problems.append("--no_negative: one sample is no list; write --num_samples 2 or more")
    if arguments.output.suffix not in (".jsonl", ".parquet"):
        problems.append(f"--output: {arguments.output} must end in .jsonl or .parquet")
    problems += output_problems(arguments, "output", inputs=[found[0]]) + engine_problems(arguments)
    if problems:
        raise ConfigError(prog, problems)
    return found


def scorer_problems(arguments: argparse.Namespace) -> list[str]:
    """Why samples cannot be scored as asked."""
    problems = []
    if arguments.scorer is not None and not arguments.scorer[0].is_file():
        problems.append(f"--scorer: there is no file {arguments.scorer[0]}")
    if arguments.reward_model is not None and arguments.scorer is not None:
        problems.append("--scorer and --reward_model both give scores: keep one of the two")
    if arguments.reward_model is not None and Path(arguments.reward_model).expanduser().is_dir():
        try:
            judge, _, adapter = find_model(arguments.reward_model, None)
        except AlignkitError as error:
            return [*problems, f"--reward_model: {error}"]
        if not is_reward_model(judge, adapter):
            advice = "name a folder that trainers/reward.py has written"
            problems.append(f"--reward_model: {arguments.reward_model} is a language model, without rewards: {advice}")
    if arguments.no_negative and arguments.scorer is None and arguments.reward_model is None:
        advice = "equal scores prefer nothing and cannot be trained on: give --scorer or --reward_model, or rows with "
        problems.append(f"--no_negative without --scorer would score every sample 1: {advice}rejected")
    return problems


def engine_problems(arguments: argparse.Namespace) -> list[str]:
    """Why vLLM cannot do what is asked of it."""
    if arguments.engine != "vllm":
        return []
    problems = []
    if importlib.util.find_spec("vllm") is None:
        advice = "install it in an environment of its own (it needs one exact version of torch), or write --engine hf"
        problems.append(f"--engine vllm: vLLM is not installed: {advice}")
    if arguments.quantization != "none" or arguments.use_cpu:
        problems.append("--engine vllm goes with neither --quantization nor --use_cpu: write --engine hf")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("--engine vllm runs in one process: start it without a launcher, or write --engine hf")
    return problems


def file_and_function(text: str) -> tuple[Path, str]:
    """An argparse type: ``file.py:function``."""
    file, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier() or not file.endswith(".py"):
        raise argparse.ArgumentTypeError(f"expected FILE.py:FUNCTION such as rewards.py:score, got {text!r}")
    return Path(file), function
