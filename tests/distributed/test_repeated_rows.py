"""Rows that do not divide by the processes are trained once: two processes take the steps that one takes.

Accelerate gives every process as many rows as the others and repeats some of the first ones for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import repeated_rows
from tests.distributed.layouts import LAYOUTS
from tests.distributed.repeated_rows import CASES, run_all
from tests.programs.launching import REPOSITORY

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def two(launchers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases on two processes, one after another."""
    folder = tmp_path_factory.mktemp("two")
    program = Path(repeated_rows.__file__)
    ended = launchers(LAYOUTS["ddp 2x2"]).run(str(folder), directory=REPOSITORY, program=program)
    assert ended.exit_code == 0, ended.errors[-6000:]
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same here."""
    return run_all(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    ours, theirs = two[name], one[name]
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["rows"] == theirs["rows"] and ours["rows"] % 4, "otherwise nothing is repeated"
    assert len(ours["steps"]) == len(theirs["steps"]) == CASES[name].steps
    for step, expected in zip(ours["steps"], theirs["steps"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], abs=2e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5, rel=1e-5)
        for key in {"entropy", "num_tokens", "logps/chosen", "gradient/sharpness_gap"} & set(expected):
            assert step[key] == pytest.approx(expected[key], abs=2e-5, rel=1e-5), key
    assert theirs["steps"][0]["grad_norm"] > 0.1
    torch.testing.assert_close(ours["weights"], theirs["weights"], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tokens])
def test_processes_agree_on_how_many_micro_batches_their_tokens_take(name: str, one: Any, two: Any) -> None:
    """What each would make of its own rows differs, or one of them has none."""
    for passes in (two[name]["passes"], one[name]["passes"]):
        assert len(passes) == CASES[name].steps and all(set(step) == {step[0]} for step in passes)
        assert max(step[0] for step in passes) > CASES[name].accumulation
