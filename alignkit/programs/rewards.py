"""Try rewards on sample completions before a launch, or list the rewards that there are.

    alignkit rewards list
    alignkit rewards try --data samples.jsonl --rewards gsm8k_annotations gsm8k_answer
    alignkit rewards try --data samples.jsonl --rewards json_valid "{name: json_schema, schema: s.json, weight: 0.5}"
    alignkit rewards try --data samples.jsonl --config run.yaml --output report.json

A row has a prompt and completions, or a completion beside a prompt that other rows repeat, and the columns that the
rewards read; the rows that `alignkit sample` writes are such. Rewards are compared within a prompt, as training does:
a reward that is the same for all completions of a prompt teaches nothing there.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from alignkit.errors import ConfigError, DataError
from alignkit.parts.reward import completion_text, prompt_text
from alignkit.programs.arguments import StrictParser, column_pair, positive_int
from alignkit.programs.outputs import add_overwrite, output_problems
from alignkit.rewards import ChosenReward, check_columns, load_reward, load_rewards, reward_names
from alignkit.yaml_text import parse_yaml

if TYPE_CHECKING:
    from alignkit.reports.reward_report import Scored

SHOWN_PROBLEMS = 5
SHOWN_PROMPT = 60
FORMS = "a prompt with completions (a list), a prompt with a completion, or a prompt with chosen and rejected"


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        prompt: A text, or messages.
        completions: Texts, or messages.
        token_ids: Their tokens, as far as the rows have them.
        rows: The row that each is from.
    """

    prompt: Any
    completions: list[Any] = field(default_factory=list)
    token_ids: list[Sequence[int] | None] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Try, or list."""
    arguments = (parser := command_line(prog)).parse(words)
    if arguments.action == "list":
        print(listed())
        return
    chosen = check_inputs(arguments, parser.prog)

    # The libraries that read tables are imported here, once the command line is known to be right.
    from alignkit.reports.reward_report import report_rewards

    groups, columns = read_groups(arguments)
    check_columns(chosen, columns)
    if any(reward.counts_tokens for reward in chosen):
        count_tokens(groups, arguments.tokenizer)
    scored = [scores_of(reward, groups, columns) for reward in chosen]
    lengths = [len(completion_text(completion)) for group in groups for completion in group.completions]
    shown = [prompt_text(group.prompt)[:SHOWN_PROMPT] for group in groups]
    report = report_rewards(scored, numbered(groups), lengths, shown)
    print(report)
    if arguments.output is not None:
        from alignkit.storage.durability import write_whole

        write_whole(arguments.output, json.dumps(report.as_json(), indent=1) + "\n")
        print(f"report written to {arguments.output}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("action", choices=("try", "list"), help="try rewards, or list those there are")
    parser.add_argument(
        "--rewards",
        nargs="+",
        metavar="REWARD",
        help="names, file.py:function, or {name: ..., weight: ..., OPTION: ...}",
    )
    parser.add_argument("--config", metavar="FILE", help="take the rewards from the config of a run")
    parser.add_argument("--data", metavar="FILE", help="rows with completions: jsonl, json, csv, parquet, or Hub id")
    parser.add_argument("--column_map", nargs="+", default=[], type=column_pair, metavar="OURS=THEIRS")
    parser.add_argument("--max_rows", type=positive_int, help="use only so many rows")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="counts tokens where rows have no completion_ids"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON too")
    add_overwrite(parser)
    return parser


def check_inputs(arguments: argparse.Namespace, prog: str) -> list[ChosenReward]:
    """The rewards; every problem that can be seen without reading the rows, together."""
    problems = []
    if arguments.data is None:
        problems.append(f"--data: name the rows, each {FORMS}")
    if (arguments.rewards is None) == (arguments.config is None):
        problems.append("write --rewards NAME ..., or --config FILE of a run that has rewards, one of the two")
    if arguments.tokenizer is not None and not (arguments.tokenizer / "tokenizer.json").is_file():
        problems.append(f"--tokenizer: {arguments.tokenizer} is no folder with a tokenizer.json")
    problems += output_problems(arguments, "output")
    if problems:
        raise ConfigError(prog, problems)
    if arguments.config is not None:
        return load_rewards(rewards_of_config(arguments.config))
    return load_rewards([_entry(word) for word in arguments.rewards])


def rewards_of_config(recipe: str) -> list[Any]:
    """The entries of ``rewards`` in the config of a run.

    Args:
        recipe: A YAML file, or the name of a recipe.
    """
    from alignkit.config.recipes import find_recipe
    from alignkit.config.yaml_file import read_entries

    entries, _ = read_entries(find_recipe(recipe), recipe)
    value = entries["rewards"].value if "rewards" in entries else None
    if not isinstance(value, list):
        raise ConfigError(recipe, ["it has no list `rewards: [...]`; name the rewards by --rewards"])
    return value


def _entry(word: str) -> Any:
    if not word.startswith("{"):
        return word
    try:
        return parse_yaml(word)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError("--rewards", [f"{word!r:.80} is not YAML ({why})"]) from None


def read_groups(arguments: argparse.Namespace) -> tuple[list[Group], list[str]]:
    """The completions by prompt, and the columns of the rows beside them."""
    from alignkit.data.readers import Source, open_source

    theirs = dict(arguments.column_map)
    opened = open_source(Source(arguments.data), streaming=False)
    # Ours by theirs; a column that another one takes the name of is left out.
    names = {name: name for name in opened.columns if name not in theirs} | {
        their: our for our, their in theirs.items()
    }
    if missing := [name for name in theirs.values() if name not in opened.columns]:
        raise DataError(arguments.data, [f"--column_map names the column {missing[0]!r}, which it does not have"])
    groups: dict[str, Group] = {}
    problems = []
    for number, given in enumerate(opened.rows):
        if number == arguments.max_rows:
            break
        row = {names[key]: value for key, value in given.items() if key in names}
        try:
            _add(groups, row)
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more rows"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError(f"{arguments.data}: no completions to try", problems[:SHOWN_PROBLEMS] + more)
    own = ("prompt", "completion", "completions", "chosen", "rejected", "completion_ids")
    return list(groups.values()), [name for name in names.values() if name not in own]


def _add(groups: dict[str, Group], row: dict[str, Any]) -> None:
    """Put the completions of a row to those of its prompt; ValueError says what is wrong with the row."""
    if "prompt" not in row:
        raise ValueError(f"it has no prompt; expected {FORMS}, and --column_map to rename columns")
    many = row.get("completions") is not None
    if many:
        completions = row["completions"]
        ids = row.get("completion_ids") or [None] * len(completions)
    elif row.get("completion") is not None:
        completions, ids = [row["completion"]], [row.get("completion_ids")]
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        completions, ids = [row["chosen"], row["rejected"]], [None, None]
    else:
        raise ValueError(f"it has no completion; expected {FORMS}, and --column_map to rename columns")
    if not isinstance(completions, list) or not all(map(_is_text_or_messages, (row["prompt"], *completions))):
        raise ValueError("prompt and completions must be texts, or lists of messages with role and content")
    if len(ids) != len(completions):
        raise ValueError(f"it has {len(completions)} completions and completion_ids of {len(ids)}")
    group = groups.setdefault(json.dumps(row["prompt"]), Group(row["prompt"]))
    group.completions += completions
    group.token_ids += ids
    group.rows += [row] * len(completions)


def _is_text_or_messages(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
    return isinstance(value, str) or is_list


def count_tokens(groups: Sequence[Group], folder: Path | None) -> None:
    """Give every completion without tokens some: those of the tokenizer, or else one a word, which is said.

    Args:
        groups: The completions.
        folder: Where ``tokenizer.json`` is.
    """
    if all(ids is not None for group in groups for ids in group.token_ids):
        return
    encode: Callable[[str], Sequence[int]]
    if folder is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    else:
        print("rows have no completion_ids: words are counted in place of tokens; --tokenizer FOLDER counts tokens\n")
        encode = lambda text: range(len(text.split()))  # noqa: E731
    for group in groups:
        for place, completion in enumerate(group.completions):
            if group.token_ids[place] is None:
                group.token_ids[place] = list(encode(completion_text(completion)))


def scores_of(reward: ChosenReward, groups: Iterable[Group], columns: Sequence[str]) -> Scored:
    """What a reward gives the completions, a call a prompt, with the seconds of each call."""
    from alignkit.reports.reward_report import Scored

    values: list[float | None] = []
    seconds = []
    for group in groups:
        given: dict[str, Any] = {name: [row.get(name) for row in group.rows] for name in columns}
        # What TRL passes beside the columns; there is nothing to log to here.
        given |= {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        start = time.perf_counter()
        found: Any = reward.function(
            prompts=[group.prompt] * len(group.completions),
            completions=group.completions,
            completion_ids=[ids if ids is not None else [] for ids in group.token_ids],
            **given,
        )
        values += asyncio.run(found) if inspect.iscoroutine(found) else found
        seconds.append(time.perf_counter() - start)
    return Scored(reward.name, reward.weight, values, seconds)


def _ignore(*arguments: Any) -> None:
    pass


def numbered(groups: Iterable[Group]) -> list[list[int]]:
    """Numbers of the completions of each prompt, counted through."""
    numbers: list[list[int]] = []
    start = 0
    for group in groups:
        numbers.append(list(range(start, start + len(group.completions))))
        start += len(group.completions)
    return numbers


def listed() -> str:
    """Every reward with what it says of itself, and its options."""
    from alignkit.config.values import show, type_name

    blocks = []
    for name in reward_names():
        reward = load_reward(name)
        lines = [name, f"  {reward.summary}", f"  weight {reward.weight:g}; {reward.fidelity}"]
        hints = get_type_hints(reward)
        for option in dataclasses.fields(reward):
            info = option.metadata["option"]
            default = "required" if option.default is dataclasses.MISSING else f"default {show(option.default)}"
            kind = " or ".join(map(str, info.choices)) if info.choices else type_name(hints[option.name])
            lines.append(f"    {option.name} ({kind}; {default}): {info.help}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
