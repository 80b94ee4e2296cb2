"""Serve a run over an OpenAI-compatible API, through vLLM or the server of transformers.

    alignkit serve runs/first
    alignkit serve runs/first --port 8001 --dry_run
    alignkit serve runs/first --engine vllm -- --gpu-memory-utilization 0.8

vLLM serves a LoRA adapter on its base, which is served as well, under its own name. The server of transformers takes
whole models, so an adapter is first merged into a folder that is deleted at the end; so is one that vLLM cannot put on
a base (DoRA, whole modules trained beside it). The command that is started is printed, with a request to try; words
after -- are handed on to it. --dry_run prints and starts nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.files import ADAPTER_CONFIG, TOKENIZER_CONFIG, AdapterFiles, read_json
from alignkit.programs.arguments import StrictParser, positive_int
from alignkit.programs.chat import named

Engine = Literal["vllm", "transformers"]
NEEDED: dict[Engine, tuple[str, ...]] = {
    "vllm": ("vllm",),
    "transformers": ("fastapi", "uvicorn", "openai", "pydantic"),
}
"""Packages that the server of each imports, in the order they are preferred in."""
INSTALLS: dict[Engine, str] = {"vllm": "pip install vllm", "transformers": "pip install 'transformers[serving]'"}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for; an adapter of another one takes the room of the next."""


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        model: Folder or Hub id of a whole model: the base, where there is an adapter.
        revision: Branch, tag or commit of it, or None.
        adapter: Served on it, or None.
        name: What requests call it.
    """

    model: str
    revision: str | None
    adapter: AdapterFiles | None
    name: str


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve until stopped; returns the exit status of the server."""
    given = sys.argv[1:] if words is None else list(words)
    end = given.index("--") if "--" in given else len(given)
    arguments = (parser := command_line(prog)).parse(given[:end])
    served, engine = check_inputs(arguments, parser.prog)
    whole = served.adapter is None or not (why := merged_because(engine, served.adapter))
    if whole:
        return start(arguments, engine, served, given[end + 1 :])
    print(f"the adapter is merged into its base first: {why}")
    if arguments.dry_run:
        folder = Path("MERGED")
        print(shlex.join(["alignkit", *merge_words(arguments, served, folder)]))
        return start(arguments, engine, _merged(served, folder), given[end + 1 :])
    with tempfile.TemporaryDirectory(prefix="alignkit-merged-") as place:
        folder = Path(place) / "model"
        merge(arguments, served, folder)
        return start(arguments, engine, _merged(served, folder), given[end + 1 :])


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("target", metavar="RUN", help="run directory, adapter, model, or Hub id of a model")
    parser.add_argument("--model", help="base of the adapter, where its config does not name one that is here")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--engine", choices=("auto", *NEEDED), default="auto", help="auto is vLLM where installed")
    parser.add_argument("--name", help="what requests call the model; default the name of its folder (vLLM alone)")
    parser.add_argument("--host", default="localhost", help="address to listen at")
    parser.add_argument("--port", type=positive_int, default=8000, help="port to listen at")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--dry_run", action="store_true", help="print what would be started, and start nothing")
    return parser


def check_inputs(arguments: argparse.Namespace, prog: str) -> tuple[Served, Engine]:
    """What is served and through what; every problem that can be seen without loading anything, together."""
    problems, served, engine = [], None, None
    try:
        model, revision, adapter = named(arguments.target, arguments.model)
        target = Path(arguments.target).expanduser()
        folder_name = (target.resolve() if target.is_dir() else target).name
        served = Served(model, arguments.revision or revision, adapter, arguments.name or folder_name)
        if adapter is not None and is_sparse_kind(adapter.kind):
            raise ModelError(
                f"{arguments.target} removes parts of its base, which no server does: write what is left as a plain "
                f"model (alignkit prune --adapter {arguments.target} --output DIR), and serve that"
            )
    except AlignkitError as error:
        problems.append(str(error))
    try:
        engine = chosen_engine(arguments.engine, must_be_here=not arguments.dry_run)
    except AlignkitError as error:
        problems.append(str(error))
    if engine == "transformers" and served is not None and served.adapter is None and "@" in served.model:
        problems.append(f"{served.model}: the server of transformers reads what follows @ as a revision. Rename it")
    if engine == "transformers" and arguments.name is not None:
        problems.append("--name: the server of transformers knows a model by its path alone: leave the option out")
    if problems or served is None or engine is None:
        raise ConfigError(prog, problems)
    return served, engine


def chosen_engine(wanted: str, *, must_be_here: bool = True) -> Engine:
    """The engine to start.

    Args:
        wanted: Its name, or ``auto`` for the first that is installed.
        must_be_here: Whether it is started, and not only shown; else the first will do where none is installed.

    Raises:
        ModelError: None is, or not the one that was asked for.
    """
    asked: list[Engine] = [engine for engine in NEEDED if wanted in ("auto", engine)]
    missing = {engine: [name for name in NEEDED[engine] if find_spec(name) is None] for engine in asked}
    for engine in asked:
        if not missing[engine]:
            return engine
    if not must_be_here:
        return asked[0]
    told = "; or ".join(f"{INSTALLS[engine]} (not installed: {', '.join(missing[engine])})" for engine in asked)
    raise ModelError(f"there is no server here. Install one: {told}")


def merged_because(engine: Engine, adapter: AdapterFiles) -> str | None:
    """Why an adapter has to be merged before it is served; None where it need not.

    Args:
        engine: The server.
        adapter: The adapter.
    """
    if engine == "transformers":
        return "the server of transformers takes whole models"
    config = read_json(adapter.directory / ADAPTER_CONFIG)
    for key in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if config.get(key):
            return f"vLLM puts no adapter with {key} on a base"
    if adapter.kind != "LORA":
        return f"vLLM puts LoRA adapters on a base, and this is one of kind {adapter.kind}"
    if rank_of(adapter) > LORA_RANKS[-1]:
        return f"vLLM takes ranks up to {LORA_RANKS[-1]}, and this one has {rank_of(adapter)}"
    return None


def rank_of(adapter: AdapterFiles) -> int:
    """The largest rank of a LoRA adapter."""
    config = read_json(adapter.directory / ADAPTER_CONFIG)
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 1)


def server_command(arguments: argparse.Namespace, engine: Engine, served: Served) -> list[str]:
    """The words that start the server.

    Args:
        arguments: The command line.
        engine: The server.
        served: What it serves.
    """
    where = ["--host", arguments.host, "--port", str(arguments.port), "--dtype", arguments.dtype]
    trust = ["--trust-remote-code"] if arguments.trust_remote_code else []
    if engine == "transformers":
        return ["transformers", "serve", _request_name(engine, served), *where, *trust]
    words = ["vllm", "serve", served.model, *where, *trust]
    if served.revision is not None:
        words += ["--revision", served.revision]
    if served.adapter is None:
        return [*words, "--served-model-name", served.name]
    # The base keeps its own name, so that requests can ask for either.
    room = next(rank for rank in LORA_RANKS if rank >= rank_of(served.adapter))
    words += ["--enable-lora", "--max-lora-rank", str(room)]
    words += ["--lora-modules", f"{served.name}={served.adapter.directory}"]
    return [*words, "--tokenizer", str(served.adapter.directory)] if served.adapter.has_tokenizer else words


def example(arguments: argparse.Namespace, engine: Engine, served: Served) -> str:
    """A request to try, as a command of the shell.

    Args:
        arguments: The command line.
        engine: The server.
        served: What it serves.
    """
    own = {"max_tokens": 64, "temperature": 0}
    named_model: dict[str, Any] = {"model": _request_name(engine, served)}
    if has_template(served):
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": "Say hello."}]}
    else:
        path, asked = "completions", {"prompt": "Hello,"}
    address = f"http://{arguments.host}:{arguments.port}/v1/{path}"
    body = json.dumps({**named_model, **asked, **own})
    return shlex.join(["curl", "-s", address, "-H", "Content-Type: application/json", "-d", body])


def has_template(served: Served) -> bool:
    """Whether a tokenizer that lies here has a chat template; of a Hub model that is believed."""
    adapter = served.adapter
    folder = Path(served.model) if adapter is None or not adapter.has_tokenizer else adapter.directory
    if not folder.is_dir():
        return True
    if (folder / "chat_template.jinja").is_file() or (folder / "additional_chat_templates").is_dir():
        return True
    return (folder / TOKENIZER_CONFIG).is_file() and "chat_template" in read_json(folder / TOKENIZER_CONFIG)


def _request_name(engine: Engine, served: Served) -> str:
    if engine == "vllm":
        return served.name
    return served.model if served.revision is None else f"{served.model}@{served.revision}"


def merge_words(arguments: argparse.Namespace, served: Served, folder: Path) -> list[str]:
    """The words of ``alignkit`` that merge the adapter.

    Args:
        arguments: The command line.
        served: The base and its adapter.
        folder: Where to.
    """
    assert served.adapter is not None
    words = ["merge", "--adapter", str(served.adapter.directory), "--output", str(folder), "--model", served.model]
    words += [] if served.revision is None else ["--revision", served.revision]
    return words + (["--trust_remote_code"] if arguments.trust_remote_code else [])


def merge(arguments: argparse.Namespace, served: Served, folder: Path) -> None:
    """Merge in a process of its own, whose memory is free again when the server starts; arguments as above.

    Raises:
        ModelError: It did not come to an end; the process has said why.
    """
    words = merge_words(arguments, served, folder)
    if subprocess.run([sys.executable, "-m", "alignkit", *words], check=False).returncode:
        raise ModelError("the adapter was not merged, for the reason above, and nothing is served")


def _merged(served: Served, folder: Path) -> Served:
    return Served(str(folder), None, None, served.name)


def start(arguments: argparse.Namespace, engine: Engine, served: Served, handed_on: Sequence[str]) -> int:
    """Print what is started, start it, and wait for its end; signals are handed on.

    Args:
        arguments: The command line.
        engine: The server.
        served: What it serves.
        handed_on: More words for the server.
    """
    words = [*server_command(arguments, engine, served), *handed_on]
    print(f"{shlex.join(words)}\n\nonce it listens, try:\n{example(arguments, engine, served)}", flush=True)
    if arguments.dry_run:
        return 0
    program = shutil.which(words[0], path=str(Path(sys.executable).parent)) or shutil.which(words[0])
    if program is None:
        raise ModelError(f"the program {words[0]} is not found, though its package is installed: install it again")
    with subprocess.Popen([program, *words[1:]]) as server:
        hand_on: Callable[..., Any] = lambda number, frame: server.send_signal(number)  # noqa: E731
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return server.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
