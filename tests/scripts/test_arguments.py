"""Strict command lines: nothing is abbreviated, dropped or guessed, and every mistake is reported at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import ConfigError
from alignkit.programs.arguments import StrictParser, non_negative_float, non_negative_int, positive_int, share

SCRIPTS = ("evaluate", "merge_adapter", "push_to_hub", "compare_runs", "sample_candidates", "token_rewards")


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_a_typo_without_loading_torch(
    script: str, launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A module called torch that cannot be imported stands where the real one would be found first."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n")
    run = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['{script}.py', '--hlep']; "
    done = launch("-c", run + f"runpy.run_path('scripts/{script}.py', run_name='__main__')")
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {script}.py: 1 problem\n  1. unknown option --hlep; did you mean --help?\n"
