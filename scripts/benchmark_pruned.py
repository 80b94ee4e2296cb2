"""A pruned model beside its dense original: prefill, decode, parameters and bytes, measured in one run.

    python scripts/benchmark_pruned.py                             # a random 6-layer Llama, 25 % of each axis
    python scripts/benchmark_pruned.py --dense Qwen/Qwen3-0.6B --pruned exported --rounds 15

Both live in one process and take turns, round after round, so that a machine that slows down slows both. Prefill is
one forward pass over the prompt that gives the logits of its last position; decode is one token after another through
the KV cache, behind that prompt. Printed are medians over rounds, and the median of the ratios of a round with the
least and the greatest.

On a CPU seconds are those that the process computed, over all of its threads, so that others on the machine disturb
less; ``--wall`` takes the clock on the wall, as a GPU always does. Without folders a Llama with random weights is
pruned along each axis by magnitude: speed does not depend on what the weights are. Its file is compared with the
formula of its config: 2 V d + L (2 d h (H + Hkv) + 3 d I + 2 d) + d numbers, and the header of the file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from alignkit.programs.entry import run_program
from alignkit.pruning.export import pruned_model
from alignkit.pruning.importance import plan_by_importance
from alignkit.reports.table import render_table

CASES: dict[str, dict[str, int]] = {
    "hidden": {"hidden": 384},
    "ffn": {"ffn": 1032},
    "kv_groups": {"kv_groups": 6},
    "layers": {"drop_layers": 2},
    "hidden and ffn": {"hidden": 384, "ffn": 1032},
}
"""What goes from the Llama below: a quarter of an axis; of six layers two."""


def dense_llama() -> PreTrainedModel:
    """Six layers, hidden size 512, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def numbers_by_formula(config: Any) -> int:
    """Parameters of an untied Llama without biases, from its config alone."""
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    layer = 2 * d * config.head_dim * (heads + groups) + 3 * d * config.intermediate_size + 2 * d
    return int(2 * config.vocab_size * d + config.num_hidden_layers * layer + d)


@dataclass
class Side:
    """One of the two models, loaded as any user would.

    Attributes:
        model: In evaluation mode.
        seconds: By what is measured, one entry a round.
    """

    model: Any
    seconds: dict[str, list[float]]

    @classmethod
    def of(cls, folder: str | Path, device: str, dtype: str) -> Side:
        """Load a folder."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        return cls(model, {"prefill": [], "decode": []})


def time_of(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that something takes."""
    start = clock()
    work()
    return clock() - start


@torch.no_grad()
def one_round(side: Side, prompt: torch.Tensor, new_tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one prefill, and of all tokens decoded after it."""
    state: dict[str, Any] = {}

    def prefill() -> None:
        state["out"] = side.model(prompt, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        for _ in range(new_tokens):
            out = state["out"]
            token = out.logits[:, -1:].argmax(-1)
            state["out"] = side.model(token, past_key_values=out.past_key_values, use_cache=True)

    return time_of(prefill, clock), time_of(decode, clock)


def measure(dense: Side, pruned: Side, arguments: argparse.Namespace, device: str) -> None:
    """Fill in the seconds of both, in turns; the first round warms up and does not count."""
    torch.manual_seed(1)
    prompt = torch.randint(5, 1000, (arguments.batch_size, arguments.prompt), device=device)
    clock = clock_of(device, wall=arguments.wall)
    for number in range(arguments.rounds + 1):
        # Who goes first changes, so that neither always finds the caches of the other.
        for side in (dense, pruned) if number % 2 else (pruned, dense):
            found = one_round(side, prompt, arguments.new_tokens, clock)
            if number:
                for what, seconds in zip(("prefill", "decode"), found, strict=True):
                    side.seconds[what].append(seconds)


def clock_of(device: str, *, wall: bool) -> Callable[[], float]:
    """What seconds are taken from."""
    if device == "cpu":
        return time.perf_counter if wall else time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def rows_of(name: str, dense: Side, pruned: Side, arguments: argparse.Namespace) -> list[list[str]]:
    """Lines of the table: prefill and decode in tokens a second, with the ratios of the rounds."""
    rows = []
    for what, tokens in (("prefill", arguments.prompt), ("decode", arguments.new_tokens)):
        pairs = list(zip(dense.seconds[what], pruned.seconds[what], strict=True))
        ratios = [old / new for old, new in pairs]
        speeds = [arguments.batch_size * tokens / statistics.median(side.seconds[what]) for side in (dense, pruned)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([f"{name}: {what}, tokens/s", *(f"{speed:,.0f}" for speed in speeds), spread])
    return rows


def size_rows(name: str, folders: tuple[Path, Path], dense: Side, pruned: Side) -> list[list[str]]:
    """Lines of the table: parameters, and bytes of the weights' files."""
    counts = [side.model.num_parameters() for side in (dense, pruned)]
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
    return [
        [f"{name}: {what}", f"{old:,}", f"{new:,}", f"{old / new:.2f}"]
        for what, (old, new) in (("parameters", counts), ("bytes of the file", sizes))
    ]


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in the files of a folder, without the headers that name them."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            total += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return total


def check_formula(folder: Path, model: Any) -> str:
    """The file against the formula; an exception where they differ."""
    numbers, stored = numbers_by_formula(model.config), tensor_bytes(folder)
    if stored != 4 * numbers:
        raise SystemExit(f"{folder}: {stored:,} bytes of tensors, by the formula {4 * numbers:,}")
    return f"{4 * numbers:,} bytes by the formula, as stored"


def main() -> None:
    """Measure and print."""
    arguments = command_line().parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"
    print(
        f"{platform.processor() or platform.machine()}, {device}, {arguments.threads} threads; torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {arguments.dtype}, batch "
        f"{arguments.batch_size}, prompt {arguments.prompt}, {arguments.new_tokens} new tokens, "
        f"{arguments.rounds} rounds, seconds {'on the wall' if arguments.wall or device != 'cpu' else 'computed'}"
    )
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as place:
        for name, folders in _folders(arguments, Path(place)):
            dense, pruned = (Side.of(folder, device, arguments.dtype) for folder in folders)
            measure(dense, pruned, arguments, device)
            rows += size_rows(name, folders, dense, pruned) + rows_of(name, dense, pruned, arguments)
            if arguments.dense is None:
                print(f"{name}: {check_formula(folders[1], pruned.model)}")
            print(f"{name}: done", file=sys.stderr)
    print(render_table(["", "dense", "pruned", "dense / pruned, or how much faster"], rows))


def _folders(arguments: argparse.Namespace, place: Path) -> Any:
    """The pairs of folders to compare, by name; those of the Llama are made one after the other."""
    if arguments.dense is not None:
        yield "given", (Path(arguments.dense), Path(arguments.pruned))
        return
    model = dense_llama()
    model.save_pretrained(place / "dense")
    check_formula(place / "dense", model)
    for name in arguments.cases:
        plan = plan_by_importance(model, (), criterion="magnitude", **CASES[name])
        folder = place / name.replace(" ", "_")
        pruned_model(model, plan).save_pretrained(folder)
        yield name, (place / "dense", folder)


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", help="folder of a model; with --pruned, in the place of the random Llama")
    parser.add_argument("--pruned", help="folder of the smaller model")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--wall", action="store_true", help="the clock on the wall, on a CPU too")
    parser.add_argument("--use_cpu", action="store_true")
    return parser


if __name__ == "__main__":
    run_program(main)
