"""Strict command lines: nothing is abbreviated, dropped or guessed, and every mistake is reported at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import cli
from alignkit.errors import ConfigError
from alignkit.programs.arguments import StrictParser, non_negative_float, non_negative_int, positive_int, share

COMMAND_OF = {
    "evaluate": "evaluate",
    "merge_adapter": "merge",
    "export_pruned": "prune",
    "push_to_hub": "push",
    "compare_runs": "compare",
    "sample_candidates": "sample",
    "token_rewards": "score",
}
"""Script to the subcommand of ``alignkit`` that does the same."""


@pytest.fixture
def parser() -> StrictParser:
    parser = StrictParser("A program.")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows")
    parser.add_argument("--tolerance", type=non_negative_float)
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--top_p", type=share, default=1.0)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU")
    return parser


def test_values_and_defaults(parser: StrictParser) -> None:
    found = parser.parse(["--tolerance=1e-3", "--seed", "7"])
    assert vars(found) == {"batch_size": 8, "tolerance": 1e-3, "seed": 7, "top_p": 1.0, "use_cpu": False}
    text = parser.format_help()
    assert "rows; default 8" in text and "default 0" in text and "default False" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "4"], "unknown option --batch-size; did you mean --batch_size?"),
        (["--batch", "4"], "unknown option --batch; did you mean --batch_size?"),
        (["--tolerence=1"], "unknown option --tolerence; did you mean --tolerance?"),
        (["--zzz"], "unknown option --zzz (see --help)"),
        (["--batch_size", "0"], "expected a whole number from 1 to 2147483647, got '0'"),
        (["--batch_size", "2.5"], "expected a whole number from 1 to 2147483647, got '2.5'"),
        (["--batch_size"], "argument --batch_size: expected one argument"),
        (["--tolerance", "nan"], "expected a number from 0, got 'nan'"),
        (["--tolerance", "inf"], "expected a number from 0, got 'inf'"),
        (["--tolerance=-1"], "expected a number from 0, got '-1'"),
        (["--tolerance", "much"], "expected a number from 0, got 'much'"),
        (["--seed", "x"], "expected a whole number from 0 to 2147483647, got 'x'"),
        (["--seed", str(2**70)], "expected a whole number from 0 to 2147483647, got '1180591620717411303424'"),
        (["--seed", "9" * 5000], "expected a whole number from 0"),
        (["--top_p", "5"], "expected a share, above 0 and up to 1, got '5'"),
        (["--top_p", "0"], "expected a share, above 0 and up to 1, got '0'"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes(words: list[str], expected: str, parser: StrictParser) -> None:
    with pytest.raises(ConfigError) as raised:
        parser.parse(words)
    assert expected in str(raised.value)


def test_all_unknown_options_are_named(parser: StrictParser) -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        parser.parse(["--sed", "1", "--usecpu"])


@pytest.fixture
def start(launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run a file of the checkout where torch cannot be imported; returns the exit status and what it says.

    A module called torch that ends the process stands where the real one would be found first.
    """
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")

    def run(program: str, *words: str) -> tuple[int, str]:
        put = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {[program, *words]!r}; "
        done = launch("-c", put + f"runpy.run_path({program!r}, run_name='__main__')")
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("script", COMMAND_OF)
def test_script_and_command_answer_alike_without_loading_torch(
    script: str, start: Callable[..., tuple[int, str]]
) -> None:
    ways = {f"{script}.py": (f"scripts/{script}.py",), f"alignkit {COMMAND_OF[script]}": ("alignkit/__main__.py",)}
    ways[f"alignkit {COMMAND_OF[script]}"] += (COMMAND_OF[script],)
    helps = {}
    for name, way in ways.items():
        expected = f"error: {name}: 1 problem\n  1. unknown option --hlep; did you mean --help?\n"
        assert start(*way, "--hlep") == (2, expected)
        status, helps[name] = start(*way, "--help")
        assert status == 0 and helps[name].startswith(f"usage: {name} [-h]")
    described = [text.partition("\n\n")[2] for text in helps.values()]
    assert described[0] == described[1], "the same options and examples"


def test_every_command_has_its_script(repository: Path) -> None:
    # The scripts keep the old names of commands; these never had another, or take the words of a training.
    younger = {"chat", "serve", "data", "rewards", "rollouts", "bank", "memory", "translate"}
    assert set(COMMAND_OF.values()) == set(cli._PROGRAMS) - younger
    for script in COMMAND_OF:
        assert len((repository / "scripts" / f"{script}.py").read_text().splitlines()) < 20
