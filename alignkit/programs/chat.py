"""Talk to a model in the terminal; a tuned one side by side with the base it was tuned from.

    alignkit chat runs/first
    alignkit chat Qwen/Qwen3-0.6B --temperature 0 --system "Answer in one sentence."
    alignkit chat runs/full --compare Qwen/Qwen3-0.6B
    cat prompts.txt | alignkit chat runs/first --max_new_tokens 100

An adapter answers beside its base, which takes no second model; a full model beside what --compare names. Every line
is a turn (a line that ends with a backslash goes on in the next one), and a line that begins with / a command: /help
lists them. From a pipe every line is read as if it were typed. Ctrl-C ends an answer, Ctrl-D the conversation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import AlignkitError, ConfigError, ModelError, RunDirectoryError
from alignkit.models.files import AdapterFiles, find_model, is_reward_model, model_problem
from alignkit.programs.arguments import (
    StrictParser,
    add_loading,
    non_negative_float,
    non_negative_int,
    pick,
    positive_int,
    share,
)
from alignkit.storage.durability import write_whole

if TYPE_CHECKING:
    from alignkit.sampling.conversation import Conversation

COMMANDS = {
    "/reset": "forget all turns; the system message stays",
    "/system TEXT": "begin anew with this system message; without TEXT, with none",
    "/set NAME VALUE": "temperature, top_p, max_new_tokens or seed of the answers to come",
    "/alone, /both": "only the tuned model answers from now on, or the base as well",
    "/save FILE": "write the turns of all who answered as JSON",
    "/help": "this list",
    "/quit": "end",
}
SETTINGS: dict[str, Callable[[str], float]] = {
    "temperature": non_negative_float,
    "top_p": share,
    "max_new_tokens": positive_int,
    "seed": non_negative_int,
}

AS_TEXT = (
    "this run was trained on plain text, without the chat template that turns are written in here: it has not learnt "
    "to answer under it; train with apply_chat_template: true"
)


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One conversation, from the command line to its end."""
    arguments = (parser := command_line(prog)).parse(words)
    model_name, revision, adapter = check_inputs(arguments, parser.prog)

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.models.loading import ModelSource, check_base, load_adapter, load_model
    from alignkit.programs.models import fitting_dtype, start_processes, tokenizer_for
    from alignkit.sampling.conversation import base_and_tuned
    from alignkit.sampling.generation import Sampling, tell_unused_settings

    state = start_processes(use_cpu=arguments.use_cpu)
    how = pick(arguments, "dtype", "quantization", "attn_implementation", "trust_remote_code")
    how["dtype"] = how["dtype"] or fitting_dtype(state.device)
    source = ModelSource(model_name, arguments.revision or revision, **how)
    tokenizer = tokenizer_for(source, adapter, arguments.chat_template)
    if adapter is not None:
        check_base(adapter, source)
    model = load_model(source, state.device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    base = None if arguments.compare is None else load_model(ModelSource(arguments.compare, **how), state.device)
    tell_unused_settings(model.generation_config, state)
    speakers = base_and_tuned(model, tokenizer, Sampling(**pick(arguments, *SETTINGS)), base)
    if tokenizer.chat_template is not None and trained_as_text(Path(arguments.target)):
        print(AS_TEXT)
    Talk(speakers, arguments.system, alone=arguments.alone).run(lines())


def trained_as_text(folder: Path) -> bool:
    """Whether the rows of a run were plain text while its tokenizer had a chat template, which they went without.

    Args:
        folder: What may be a run directory.
    """
    from alignkit.data.checks import TEMPLATE_CHECK
    from alignkit.runs.directory import RunDirectory

    try:
        data = RunDirectory(folder, is_main=False).sections().get("data", {})
    except RunDirectoryError:  # an adapter or model by itself, or a run of another version: talked to all the same
        return False
    checks = data.get("checks", {}).get("train", [])
    return any((check["name"], check["status"]) == (TEMPLATE_CHECK, "warn") for check in checks)


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("target", metavar="RUN", help="run directory, adapter, model, or Hub id of a model")
    parser.add_argument("--model", help="base of the adapter, where its config does not name one that is here")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--compare", metavar="MODEL", help="base of a full model, to answer beside it")
    parser.add_argument("--alone", action="store_true", help="the tuned model alone answers")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max_new_tokens", type=positive_int, default=512, help="longest answer, tokens")
    parser.add_argument("--temperature", type=non_negative_float, default=0.7, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=share, default=0.95, help="nucleus sampling")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the answers")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; left out, bfloat16 where an accelerator has it, else float32",
    )
    add_loading(parser)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    return parser


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[str, str | None, AdapterFiles | None]:
    """The model, its revision and the adapter; every problem that can be seen without loading anything, together."""
    problems = []
    found: tuple[str, str | None, AdapterFiles | None] = ("", None, None)
    try:
        found = named(arguments.target, arguments.model)
    except AlignkitError as error:
        problems.append(str(error))
    if arguments.compare is not None and found[2] is not None:
        problems.append("--compare: the base of an adapter answers beside it as it is: leave the option out")
    elif arguments.compare is not None and (problem := model_problem(arguments.compare)):
        problems.append(f"--compare: {problem}")
    if arguments.alone and arguments.compare is not None:
        problems.append("--alone: --compare asks for a model that would not answer. Keep one of the two")
    if arguments.chat_template is not None and not arguments.chat_template.is_file():
        problems.append(f"--chat_template: there is no file {arguments.chat_template}")
    if problems:
        raise ConfigError(prog, problems)
    return found


def named(target: str, base: str | None) -> tuple[str, str | None, AdapterFiles | None]:
    """What ``RUN`` and ``--model`` name together: the model, its revision, and the adapter.

    Args:
        target: A run directory, an adapter, a model or a Hub id.
        base: Base of an adapter; None for the one it names.

    Raises:
        ModelError: They name nothing that can be loaded.
        CheckpointError: The adapter's weights are empty or truncated.
    """
    found = find_model(target, None) if base is None else find_model(base, target)
    if is_reward_model(found[0], found[2]):
        raise ModelError(f"{target!r} is a reward model, which gives scores and no answers: see alignkit evaluate")
    return found


def lines() -> Iterator[str]:
    """What is typed, or comes from a pipe, and is shown then; a line that ends with a backslash goes on."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        import readline  # noqa: F401  # arrow keys and history
    text = ""
    while True:
        try:
            line = input("... " if text else "you> ") if is_typed else next(sys.stdin).rstrip("\r\n")
        except (EOFError, StopIteration):
            if is_typed:
                print()  # the line of the prompt has no other end
            break
        text += line
        if text.endswith("\\"):
            text = text[:-1] + "\n"
            continue
        if not is_typed:
            print(f"you> {text}")
        yield text
        text = ""
    if text:
        yield text


class Talk:
    """What is said to all who answer, and the commands.

    Args:
        speakers: Who answers, by name, in this order.
        system: System message that every conversation begins with.
        alone: Whether the last one answers alone.
    """

    def __init__(self, speakers: dict[str, Conversation], system: str | None, *, alone: bool = False) -> None:
        self.speakers, self.system, self.alone = speakers, None, alone
        if not self._any.has_template:
            print("the tokenizer has no chat template: every text is continued by itself, without the ones before it")
        if system is not None:
            self._begin(system)

    @property
    def _any(self) -> Conversation:
        return next(reversed(self.speakers.values()))

    def run(self, texts: Iterator[str]) -> None:
        """Take one text after the other, until there is none or one says /quit.

        Args:
            texts: Turns and commands.
        """
        for text in texts:
            if not text.strip():
                continue
            word, _, rest = text.strip().partition(" ")
            if word == "/quit":
                return
            try:
                self._command(word, rest.strip()) if word.startswith("/") else self._say(text)
            except AlignkitError as error:
                print(f"! {error}")

    def _say(self, text: str) -> None:
        asked = list(self.speakers.items())[-1:] if self.alone else list(self.speakers.items())
        for name, speaker in asked:
            print(f"{name}> ", end="", flush=True)
            try:
                speaker.answer(text, lambda piece: print(piece, end="", flush=True))
            except KeyboardInterrupt:
                print(" [interrupted; this turn is not kept]", end="")
            finally:
                print()

    def _command(self, word: str, rest: str) -> None:
        if word == "/reset" and not rest:
            self._begin(self.system)
        elif word == "/system":
            self._begin(rest or None)
        elif word == "/set":
            self._set(*rest.partition(" ")[::2])
        elif word in ("/alone", "/both") and len(self.speakers) > 1:
            self.alone = word == "/alone"
        elif word == "/save" and rest:
            self._save(Path(rest).expanduser())
        else:
            print("\n".join(f"  {name:<16}  {what}" for name, what in COMMANDS.items()))

    def _begin(self, system: str | None) -> None:
        for speaker in self.speakers.values():
            speaker.begin(system)
        self.system = system

    def _set(self, name: str, text: str) -> None:
        if name not in SETTINGS:
            raise ModelError(f"/set takes one of {', '.join(SETTINGS)} and a value, such as /set temperature 0.2")
        try:
            value = SETTINGS[name](text)
        except argparse.ArgumentTypeError as error:
            raise ModelError(f"/set {name}: {error}") from error
        for speaker in self.speakers.values():
            speaker.sampling = dataclasses.replace(speaker.sampling, **{name: value})

    def _save(self, path: Path) -> None:
        if path.exists():
            raise ModelError(f"{path} exists, and is not written over. Name a file that does not exist yet")
        content = {
            "sampling": dataclasses.asdict(self._any.sampling),
            "conversations": {name: speaker.messages for name, speaker in self.speakers.items()},
        }
        write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        print(f"written to {path}")
